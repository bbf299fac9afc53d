"""What the service asks of an engine, and what every engine does in this process: compress, rank, check."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from errors_scaledown import ScaleDownError
from filling_scaledown import FilledPrompts, PromptSettings, fill_prompts
from modeling_scaledown import ScaleDownModel
from reranking_scaledown import document_scores
from text_scaledown import tokenize

from .batching import Batcher
from .errors import ServiceError
from .jobs import AnswerJob

PIECE = 65_536  # characters of a text whose tokens are counted at a time


@dataclass(frozen=True)
class Compressed:
    """A question's documents, compressed.

    Args:
        embeddings: `(slots, hidden)` of each document.
        scores: Reranking score of each document; None where the model has none.
        num_tokens: Tokens that the compressor read.
    """

    embeddings: list[torch.Tensor]
    scores: list[float] | None
    num_tokens: int


class Engine(Protocol):
    """Answers, ranks and compresses."""

    name: str
    compressor: "CompressorEngine"

    def submit(self, job: AnswerJob) -> None:
        """Let a request wait for its answer, whose pieces come out of the job."""

    async def unavailable(self) -> str | None:
        """Why no answers can be had now; None where they can."""

    async def close(self) -> None:
        """Finish what waits, and let go of everything."""


class CompressorEngine:
    """Compression and ranking in this process, in batches; answers of every engine start from it.

    Args:
        model: The model, prepared for inference.
        batcher: The thread that all of the model's work is done in.
        max_document_tokens: Tokens of a request at most, messages included, in the compressor's vocabulary.
    """

    def __init__(self, model: ScaleDownModel, batcher: Batcher, max_document_tokens: int):
        self.model, self.batcher, self._max_document_tokens = model, batcher, max_document_tokens

    @property
    def ranks(self) -> bool:
        """Whether the model has reranking scores."""
        return self.model.config.enable_reranking

    async def check(self, asked: dict[str, str], documents: Sequence[str], compression_rate: int | None) -> None:
        """Refuse, before it waits, a request that no batch could take.

        Args:
            asked: The texts of the request's question and of what was said before it, by their fields.
            documents: The request's.
            compression_rate: As asked for.

        Raises:
            ServiceError: The texts are too long, or the rate is none of this model's.
        """
        if compression_rate is not None and compression_rate > self.model.config.chunk_length:
            raise ServiceError(
                400,
                f"compression_rate is {compression_rate}, expected at most {self.model.config.chunk_length}, the "
                f"tokens of a chunk",
                "compression_rate",
            )
        texts = {**asked, **{f"documents[{place}]": document for place, document in enumerate(documents)}}
        # A token is at least one byte, so that what is short in bytes needs no counting.
        if sum(len(text.encode(errors="replace")) for text in texts.values()) > self._max_document_tokens:
            await asyncio.to_thread(self._count_tokens, texts)

    def _count_tokens(self, texts: dict[str, str]) -> None:
        tokenizer, total = self.model.processor.compressor_tokenizer, 0
        for name, text in texts.items():
            # In pieces: all of a body would take many seconds, and it is too long before its end.
            for start in range(0, len(text), PIECE):
                piece = text[start : start + PIECE]
                total += len(tokenize(tokenizer, piece, add_special_tokens=False, verbose=False)["input_ids"])
                if total > self._max_document_tokens:
                    raise ServiceError(
                        400,
                        f"{name} takes the request past {self._max_document_tokens} tokens, the most that this service "
                        f"reads; send fewer or shorter texts",
                        name,
                    )

    async def compress(self, query: str, documents: list[str], compression_rate: int | None = None) -> Compressed:
        """Compress a question's documents.

        Args:
            query: The question.
            documents: Its documents, at least one.
            compression_rate: Tokens per slot; the model's own where None.

        Returns:
            What came of each.

        Raises:
            ScaleDownError: A text is empty or cannot be encoded.
        """
        key = ("compress", compression_rate)
        return await self.batcher.call(key, lambda asked: self._compress(asked, compression_rate), (query, documents))

    def _compress(self, asked: list[tuple[str, list[str]]], compression_rate: int | None) -> list[Compressed]:
        queries, documents = [query for query, _ in asked], [documents for _, documents in asked]
        model = self.model
        found = model.compress(queries, documents, compression_rate, batch_size=model.chunks_per_pass)
        count = sum(len(row) for row in documents)
        scores = None
        if self.ranks:
            scores = document_scores(found.reranking_scores, found.chunk_to_document, count).tolist()
        embeddings = found.by_document()  # (slots, hidden) each
        tokenizer, results, start = model.processor.compressor_tokenizer, [], 0
        for query, texts in asked:
            part = slice(start, start := start + len(texts))
            tokens = sum(len(ids) for ids in tokenize(tokenizer, [query, *texts], verbose=False)["input_ids"])
            results.append(Compressed(embeddings[part], None if scores is None else scores[part], tokens))
        return results

    def fill(self, jobs: Sequence[AnswerJob]) -> FilledPrompts:
        """Compress the documents of jobs with equal settings, and build their prompts.

        Args:
            jobs: The requests.

        Returns:
            The prompts, a row for each job.

        Raises:
            ScaleDownError: One of the jobs cannot be read.
        """
        processor = self.model.processor
        questions, documents = processor.check_texts([job.question for job in jobs], [job.documents for job in jobs])
        conversations = processor.conversations([job.question for job in jobs])
        return fill_prompts(self.model, questions, documents, conversations, jobs[0].settings)

    def settings(
        self, compression_rate: int | None, max_documents: int | None, min_reranking_score: float | None
    ) -> PromptSettings:
        """How a request's documents are read.

        Raises:
            ServiceError: Documents are to be selected by scores that the model does not have.
        """
        if not self.ranks and (max_documents is not None or min_reranking_score is not None):
            name = "max_documents" if max_documents is not None else "min_reranking_score"
            raise ServiceError(400, f"{name} needs reranking scores, and this model has none; leave it out", name)
        return PromptSettings(
            compression_rate, None, (min_reranking_score, max_documents, None), None, with_scores=self.ranks
        )


def answer_limit(
    model: ScaleDownModel, prompt_tokens: int, max_tokens: int | None, default: int, served: int | None = None
) -> int:
    """Tokens that an answer may have.

    Args:
        model: The model.
        prompt_tokens: Positions of the prompt.
        max_tokens: As asked for.
        default: Where nothing was asked for; cut to what fits.
        served: Positions that another server gives the generator; None for all that it has.

    Returns:
        The limit.

    Raises:
        ScaleDownError: The prompt, or it with the answer that was asked for, exceeds the generator's context.
    """
    positions = getattr(model.config.generator_config, "max_position_embeddings", None)
    if served is not None:
        positions = served if positions is None else min(positions, served)
    room = default if positions is None else positions - prompt_tokens
    if room < 1 or (max_tokens is not None and positions is not None and max_tokens > room):
        raise ScaleDownError(
            f"the prompt has {prompt_tokens} tokens, and the generator reads {positions} with the answer's "
            f"{max_tokens or 1}; send fewer documents, a higher compression_rate or a smaller max_tokens"
        )
    return min(default, room) if max_tokens is None else max_tokens
