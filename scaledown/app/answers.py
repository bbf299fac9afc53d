"""One question, answered twice and streamed: from the text of its passages, and from their slots."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from errors_scaledown import ScaleDownError
from filling_scaledown import FilledPrompts, PromptSettings, fill_prompts
from generation_scaledown import DEFAULT_MAX_NEW_TOKENS
from text_scaledown import check_encodable

from ..common.adapters import adapters_off
from ..common.devices import wait_for
from ..common.prompts import encode_texts, text_prompts
from ..common.streaming import stream_tokens, text_so_far
from ..evaluation.contestants import Contestants
from ..evaluation.systems import greedy

MAX_PASSAGES = 100
MAX_QUESTION_CHARACTERS = 2_000
MAX_CHARACTERS = 100_000


@dataclass(frozen=True)
class Request:
    """What somebody asks.

    Args:
        question: The question.
        passages: The passages, in their order on the page.
        compression_rate: Passage tokens per slot.
        max_documents: How many of the best passages are read from slots; None for all.
    """

    question: str
    passages: list[str]
    compression_rate: int | None = None
    max_documents: int | None = None


@dataclass
class Reading:
    """An answer as far as it is written, and what it took. Seconds count from the texts on.

    Args:
        answer: The text.
        tokens: Positions of the generator's prompt.
        slots: Those of them that are slots.
        compression: Seconds until the passages were compressed and the prompt was built.
        first_token: Seconds until the first token.
        whole: Seconds until the last one.
        error: Why there is no answer.
    """

    answer: str = ""
    tokens: int | None = None
    slots: int | None = None
    compression: float | None = None
    first_token: float | None = None
    whole: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Passage:
    """What became of a passage.

    Args:
        number: Its place on the page, from 1.
        text: Its text.
        score: Its reranking score; None where the model has none.
        slots: Slots it was compressed into.
        read: Whether the generator reads these.
    """

    number: int
    text: str
    score: float | None
    slots: int
    read: bool


@dataclass
class Answers:
    """Both answers as far as they are written.

    Args:
        from_text: The answer from whole passages.
        from_slots: The answer from slots.
        passages: The passages, in their order on the page; empty until they are compressed.
    """

    from_text: Reading = field(default_factory=Reading)
    from_slots: Reading = field(default_factory=Reading)
    passages: list[Passage] = field(default_factory=list)


def read_request(question: str, passages: str, compression_rate: int | None, max_documents: int | None) -> Request:
    """Read the fields of the page.

    Args:
        question: The question.
        passages: Passages with a blank line between two.
        compression_rate: Passage tokens per slot.
        max_documents: How many passages are read at most.

    Returns:
        The request.

    Raises:
        ScaleDownError: Something is missing, or there is too much; the message is for the page.
    """
    question = question.strip()
    if not question:
        raise ScaleDownError("Please ask a question.")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise ScaleDownError(
            f"The question has {len(question):,} characters; at most {MAX_QUESTION_CHARACTERS:,} are read. Please "
            "shorten it."
        )
    parts = [part.strip() for part in re.split(r"\n\s*\n", passages.replace("\r\n", "\n"))]
    parts = [part for part in parts if part]
    if not parts:
        raise ScaleDownError("Please paste at least one passage, or pick an example.")
    if len(parts) > MAX_PASSAGES or len(passages) > MAX_CHARACTERS:
        raise ScaleDownError(
            f"That is too long: {len(passages):,} characters in all, in {len(parts):,} passage"
            f"{'s' if len(parts) > 1 else ''}. This page reads at most {MAX_PASSAGES} passages and {MAX_CHARACTERS:,} "
            "characters."
        )
    for name, text in (("The question", question), *((f"Passage {i}", part) for i, part in enumerate(parts, 1))):
        check_encodable(text, name)
    return Request(question, parts, compression_rate, max_documents)


class Answerer:
    """Answers one request at a time.

    Args:
        contestants: The model, its LoRA merged, and the generator that reads text, as for `evaluate.py`.
    """

    def __init__(self, contestants: Contestants):
        self.model, self._generator = contestants.model, contestants.generator
        self._adapters_off = contestants.adapters_off
        self._max_new_tokens = self.model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        self._writing = greedy(self.model.generation_config, self._max_new_tokens)

    @property
    def ranks(self) -> bool:
        """Whether passages have scores."""
        return self.model.config.enable_reranking

    def answer(self, request: Request) -> Iterator[Answers]:
        """Answer from slots, then from text: one after the other, so that neither is timed while the other runs.

        Args:
            request: The question and its passages.

        Yields:
            The same object after every token.
        """
        answers = Answers()
        for read, reading in ((self._from_slots, answers.from_slots), (self._from_text, answers.from_text)):
            try:
                for _ in read(request, answers):
                    yield answers
            except ScaleDownError as error:
                reading.error = str(error)
            yield answers

    def _from_text(self, request: Request, answers: Answers) -> Iterator[None]:
        reading, started = answers.from_text, time.perf_counter()
        processor = self.model.processor
        (prompt,) = text_prompts(processor, [request.question], encode_texts(processor, [request.passages]))
        reading.tokens = len(prompt)
        self._check_length(reading.tokens, "Paste fewer or shorter passages.")
        input_ids = torch.tensor([prompt], device=self._generator.device)

        def generate(**streaming: Any) -> None:
            inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
            with adapters_off(self._generator) if self._adapters_off else nullcontext():
                self._generator.generate(**inputs, generation_config=self._writing, **streaming)

        yield from self._write(reading, started, generate)

    def _from_slots(self, request: Request, answers: Answers) -> Iterator[None]:
        reading, started = answers.from_slots, time.perf_counter()
        filled = self._fill(request)
        wait_for(self.model.device)
        reading.compression = time.perf_counter() - started
        reading.tokens = filled.batch["input_ids"].shape[1]
        answers.passages = _passages(request, filled)
        reading.slots = sum(passage.slots for passage in answers.passages if passage.read)
        self._check_length(reading.tokens, "Read fewer passages, or compress them more.")

        def generate(**streaming: Any) -> None:
            self.model.generate(**filled.batch, **filled.compressed, generation_config=self._writing, **streaming)

        # Nothing is yielded before this: the clock would run while the page is drawn.
        yield from self._write(reading, started, generate)

    @torch.inference_mode()
    def _fill(self, request: Request) -> FilledPrompts:
        processor = self.model.processor
        questions, documents = processor.check_texts(request.question, request.passages)
        most = request.max_documents or len(request.passages)  # whatever the configuration says
        limits = (None, most if self.ranks else None, None)
        # The length is checked here, in words for the page.
        settings = PromptSettings(request.compression_rate, None, limits, None, with_scores=self.ranks)
        return fill_prompts(self.model, questions, documents, processor.conversations(questions), settings)

    def _check_length(self, tokens: int, remedy: str) -> None:
        positions = getattr(self.model.config.generator_config, "max_position_embeddings", None)
        if positions is not None and tokens + self._max_new_tokens > positions:
            raise ScaleDownError(
                f"Too long: the prompt has {tokens:,} tokens, and the language model has {positions:,} positions, "
                f"{self._max_new_tokens} of them for the answer. {remedy}"
            )

    def _write(self, reading: Reading, started: float, generate: Callable[..., None]) -> Iterator[None]:
        ids: list[int] = []
        for moment, token in stream_tokens(torch.inference_mode()(generate)):
            if token is None:
                reading.whole = moment - started
            else:
                reading.first_token = reading.first_token or moment - started
                ids.append(token)
                reading.answer = text_so_far(self.model.processor, ids)
            yield


def _passages(request: Request, filled: FilledPrompts) -> list[Passage]:
    rows = zip(request.passages, filled.reports(0), strict=True)
    return [
        Passage(number, text, report.score, report.slots, report.read) for number, (text, report) in enumerate(rows, 1)
    ]
