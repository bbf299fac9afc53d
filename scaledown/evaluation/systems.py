"""What an evaluation compares: the model, and ways to answer without it. All write greedily, from the same prompt.

| name                 | the generator reads                                                      |
| -------------------- | ------------------------------------------------------------------------ |
| `compressed`         | the slots: the model itself                                              |
| `full_text`          | the documents' text, without our LoRA                                    |
| `selected_text`      | the text of the documents that the model's scores select, without our LoRA |
| `no_documents`       | the question alone, without our LoRA                                     |
| `truncated`          | of each document as many tokens of text as it has slots, without our LoRA |
| `random_memory`      | slots of random embeddings as long as the model's own                    |
| `shuffled_documents` | slots made of another question's documents, this question in view        |
"""

import copy
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel

from compression_scaledown import chunk_inputs
from compressor_scaledown import own_tokens
from configuration_scaledown import ScaleDownConfig
from errors_scaledown import ScaleDownError
from modeling_scaledown import ScaleDownModel
from outputs_scaledown import CompressedDocuments
from processing_scaledown import ScaleDownProcessor
from prompt_scaledown import pad
from reranking_scaledown import (
    check_limits,
    scores_by_example,
    select_chunks,
    select_documents,
    slots_by_document,
)
from text_scaledown import encode_as_text, encode_continuations, padding_id

from ..common.adapters import adapters_off
from ..common.choices import SELECTED_TEXT
from ..common.devices import wait_for
from ..common.prompts import encode_texts, text_prompts
from ..data.choice import stable_hash
from .data import Example

MODEL = "compressed"


@dataclass
class Answer:
    """What a system answered, and what that took.

    Args:
        text: The answer.
        tokens_in: Tokens and slots the generator read.
        tokens_out: Tokens it wrote, the end token included.
        compressor_tokens: Tokens the compressor read; 0 without one.
        document_tokens: Those of them that are documents the generator gets, the question left out.
        slots: Memory embeddings among `tokens_in`.
        seconds: This question's share of its batch's time, from texts to text.
        batch: Which batch it was answered in.
        scores: The model's score of each document, where it ranks.
    """

    text: str
    tokens_in: int
    tokens_out: int
    compressor_tokens: int = 0
    document_tokens: int = 0
    slots: int = 0
    seconds: float = 0.0
    batch: int = 0
    scores: list[float] | None = None


class System(Protocol):
    """Answers questions.

    Args:
        name: Its name in results.
    """

    name: str

    def prompt_lengths(self, examples: Sequence[Example]) -> list[int]:
        """Count what the generator would read.

        Args:
            examples: Questions.

        Returns:
            Tokens and slots of each prompt.
        """

    def answer(self, examples: Sequence[Example]) -> list[Answer]:
        """Answer a batch of questions.

        Args:
            examples: Questions.

        Returns:
            One answer each, without its time and batch.
        """


class CompressedSystem:
    """The model, or what becomes of it when its slots hold something else.

    Args:
        model: The model.
        compression_rate: Document tokens per slot; None leaves it to the model.
        max_new_tokens: Length of an answer at most.
        seed: Decides random slots.
        memory: `own`, or `random`: random directions, each as long as the embedding it replaces.
        donors: Documents to compress in place of a question's own, by the question's index.
        name: Its name in results.
        selection: What decides which documents the generator reads, as for `ScaleDownModel.answer`; what the model's
            configuration says by default.
    """

    def __init__(
        self,
        model: ScaleDownModel,
        compression_rate: int | None,
        max_new_tokens: int,
        seed: int = 0,
        memory: str = "own",
        donors: dict[int, list[str]] | None = None,
        name: str = MODEL,
        selection: dict[str, float] | None = None,
    ):
        self.name = name
        self.processor = unlimited(model.processor)
        self._model = model
        self._rate = compression_rate
        self._writing = greedy(model.generation_config, max_new_tokens)
        self._seed = seed
        self._memory = memory
        self._donors = donors
        self.selection = selection_of(model.config, selection or {})

    def prompt_lengths(self, examples: Sequence[Example]) -> list[int]:
        """See `System.prompt_lengths`; with a selection, what it could come to."""
        slots = self._encode(examples)[-1]
        lengths = self._prompts(examples, slots)["attention_mask"].sum(dim=1).tolist()
        most = [sum(sorted(numbers, reverse=True)[: self.selection.get("max_documents")]) for numbers in slots]
        most = [min(number, self.selection.get("max_slots", number)) for number in most]
        return [all_of - sum(row) + kept for all_of, row, kept in zip(lengths, slots, most, strict=True)]

    @torch.inference_mode()
    def answer(self, examples: Sequence[Example]) -> list[Answer]:
        """See `System.answer`."""
        chunks, slots, found, scores = self._compress(examples)
        compressed, stays = {}, None
        if found is not None:
            memory, mask = found.memory_embeddings, found.memory_mask
            if self._memory == "random":
                memory = self._randomized(memory, mask, chunks, examples)
            if self.selection:
                slots, stays = select_chunks(scores, slots, chunks, **self.selection)
                mask = mask & stays.to(mask.device).unsqueeze(1)
            compressed = {"memory_embeddings": memory, "memory_mask": mask}
        counts = _chunk_counts(chunks, len(examples), self._model.config, stays)
        batch = self._prompts(examples, slots)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        sequences = self._model.generate(**batch.to(self._model.device), **compressed, generation_config=self._writing)
        prompt_length = batch["input_ids"].shape[1]
        texts = self.processor.decode_answers(sequences, prompt_length)
        written = _written(sequences[:, prompt_length:], self._writing)
        if self._donors is not None:  # the scores are of documents that are not the question's
            scores = [None] * len(examples)
        return [
            Answer(text, tokens, new, *count, sum(numbers), scores=row)
            for text, tokens, new, count, numbers, row in zip(
                texts, lengths, written, counts, slots, scores, strict=True
            )
        ]

    @torch.inference_mode()
    def select(self, examples: Sequence[Example]) -> tuple[list[Example], list[int]]:
        """Leave each question the documents that the scores select.

        Args:
            examples: Questions.

        Returns:
            The questions with those documents, and the tokens the compressor read for each.
        """
        chunks, slots, _, scores = self._compress(examples)
        kept: list[list[bool]] = [[] for _ in examples]  # of no documents
        if chunks:
            kept = [select_documents(*row, **self.selection) for row in zip(scores, slots, strict=True)]
        counts = _chunk_counts(chunks, len(examples), self._model.config, None)
        chosen = [
            replace(example, documents=[text for text, stays in zip(example.documents, flags, strict=True) if stays])
            for example, flags in zip(examples, kept, strict=True)
        ]
        return chosen, [read for read, _ in counts]

    def _compress(
        self, examples: Sequence[Example]
    ) -> tuple[dict[str, torch.Tensor], list[list[int]], CompressedDocuments | None, list[Any]]:
        """Chunks, each question's slots by document, what became of the chunks, and each question's scores."""
        chunks, documents, slots = self._encode(examples)
        scores: list[Any] = [None] * len(examples)
        if not chunks:
            return chunks, slots, None, scores
        inputs = chunk_inputs(chunks)
        found = self._model.get_memory_embeddings(**inputs, batch_size=self._model.chunks_per_pass)
        if found.reranking_scores is not None:
            scores = scores_by_example(found.reranking_scores.cpu(), chunks, documents)
        return chunks, slots, found, scores

    def _encode(self, examples: Sequence[Example]) -> tuple[dict[str, torch.Tensor], list[list[str]], list[list[int]]]:
        """Chunks for the compressor, each question's documents, and their slots."""
        documents = [example.documents for example in examples]
        if self._donors is not None:
            documents = [self._donors[example.index] for example in examples]
        chunks = self.processor.encode_documents([example.query for example in examples], documents, self._rate)
        return chunks, documents, slots_by_document(chunks, documents)

    def _prompts(self, examples: Sequence[Example], slots: list[list[int]]) -> Any:
        return self.processor.build_prompts([example.query for example in examples], slots)

    def _randomized(
        self, memory: torch.Tensor, mask: torch.Tensor, chunks: dict[str, torch.Tensor], examples: Sequence[Example]
    ) -> torch.Tensor:
        """Random directions `(num_chunks, slots, hidden)`, a question's own whatever else is in the batch."""
        owner = chunks["document_to_example"][chunks["chunk_to_document"]].to(mask.device)  # (num_chunks,)
        noise = torch.zeros_like(memory, dtype=torch.float32)
        for i, example in enumerate(examples):
            own = (owner == i).unsqueeze(1) & mask  # (num_chunks, slots)
            seed = stable_hash(self._seed, "random_memory", example.id) % 2**63
            drawn = torch.randn(int(own.sum()), memory.shape[-1], generator=torch.Generator().manual_seed(seed))
            noise[own] = drawn.to(memory.device)
        lengths = memory.float().norm(dim=-1, keepdim=True)
        return (noise / noise.norm(dim=-1, keepdim=True).clamp(min=1e-12) * lengths).to(memory.dtype)


class TextSystem:
    """The generator without compression.

    Args:
        name: One of `TEXT_BASELINES`.
        generator: The language model.
        processor: Builds the prompt's frame, and counts the slots a truncated document may cost.
        generation_config: How to write.
        compression_rate: Document tokens per slot; None leaves it to the processor.
        max_new_tokens: Length of an answer at most.
        adapters_off: Whether the generator has LoRA layers to be passed over.
    """

    def __init__(
        self,
        name: str,
        generator: PreTrainedModel,
        processor: ScaleDownProcessor,
        generation_config: GenerationConfig,
        compression_rate: int | None,
        max_new_tokens: int,
        adapters_off: bool = False,
    ):
        self.name = name
        self.processor = unlimited(processor)
        self._generator = generator
        self._writing = greedy(generation_config, max_new_tokens)
        self._rate = compression_rate
        self._adapters_off = adapters_off

    def prompt_lengths(self, examples: Sequence[Example]) -> list[int]:
        """See `System.prompt_lengths`."""
        return [len(prompt) for prompt in self.prompts(examples)]

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Build the prompts a compressed question would have, with text where those have slots.

        Args:
            examples: Questions.

        Returns:
            Token ids, no special token among those of the texts.
        """
        bodies = [None] * len(examples) if self.name == "no_documents" else self._bodies(examples)
        return text_prompts(self.processor, [example.query for example in examples], bodies)

    @torch.inference_mode()
    def answer(self, examples: Sequence[Example]) -> list[Answer]:
        """See `System.answer`."""
        prompts = self.prompts(examples)
        input_ids, attention_mask = pad(prompts, padding_id(self.processor.tokenizer), side="left")
        device = self._generator.device
        with adapters_off(self._generator) if self._adapters_off else nullcontext():
            sequences = self._generator.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=self._writing,
            )
        texts = self.processor.decode_answers(sequences, input_ids.shape[1])
        written = _written(sequences[:, input_ids.shape[1] :], self._writing)
        return [Answer(text, len(prompt), new) for text, prompt, new in zip(texts, prompts, written, strict=True)]

    def _bodies(self, examples: Sequence[Example]) -> list[list[int] | None]:
        """Token ids of each question's documents; None where it has none."""
        tokenizer, separator = self.processor.tokenizer, self.processor.document_separator
        if self.name != "truncated":
            return encode_texts(self.processor, [example.documents for example in examples])
        between = encode_continuations(tokenizer, [separator])[0]
        bodies: list[list[int] | None] = []
        for example in examples:
            if not example.documents:
                bodies.append(None)
                continue
            chunks = self.processor.encode_documents([example.query], [example.documents], self._rate)
            (slots,) = slots_by_document(chunks, [example.documents])
            body: list[int] = []
            for place, ids in enumerate(encode_as_text(tokenizer, example.documents)):
                body += [*(between if place else []), *ids[: slots[place]]]
            bodies.append(body)
        return bodies


class SelectedTextSystem(TextSystem):
    """The generator without compression, on the documents that the model's scores select.

    Args:
        ranker: The model, with what decides which documents are read.
        args, kwargs: As in `TextSystem`.
    """

    def __init__(self, ranker: CompressedSystem, *args, **kwargs):
        super().__init__(SELECTED_TEXT, *args, **kwargs)
        self._ranker = ranker

    def prompt_lengths(self, examples: Sequence[Example]) -> list[int]:
        """See `System.prompt_lengths`; what the selection could come to."""
        longest, most = [], self._ranker.selection.get("max_documents")
        for example in examples:
            lengths = [len(ids) for ids in encode_as_text(self.processor.tokenizer, example.documents)]
            order = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:most]
            longest.append(replace(example, documents=[example.documents[i] for i in order]))
        return super().prompt_lengths(longest)

    def answer(self, examples: Sequence[Example]) -> list[Answer]:
        """See `System.answer`."""
        selected, tokens = self._ranker.select(examples)
        answers = super().answer(selected)
        return [replace(answer, compressor_tokens=count) for answer, count in zip(answers, tokens, strict=True)]


def selection_of(config: ScaleDownConfig, selection: dict[str, float]) -> dict[str, float]:
    """Tell what decides which documents the generator reads.

    Args:
        config: The model's, which may say how many.
        selection: What was asked for.

    Returns:
        Both, what was asked for first; empty for all documents.

    Raises:
        ScaleDownError: The model's number is none.
    """
    check_limits(max_documents=config.max_documents)
    own = {} if config.max_documents is None else {"max_documents": config.max_documents}
    return {**own, **selection}


def choose_donors(examples: Sequence[Example], seed: int) -> dict[int, list[str]]:
    """Give every question the documents of another one, none of which are its own.

    Args:
        examples: All questions.
        seed: Decides who gives to whom.

    Returns:
        Documents by the index of the question that gets them; none for a question that has none.

    Raises:
        ValueError: The documents of a question are those of every other one.
    """
    order = list(range(len(examples)))
    random.Random(stable_hash(seed, "shuffled_documents", "")).shuffle(order)
    donors = {}
    for place, index in enumerate(order):
        own = set(examples[index].documents)
        others = (examples[order[(place + step) % len(order)]].documents for step in range(1, len(order)))
        documents = [] if not own else next((texts for texts in others if texts and own.isdisjoint(texts)), None)
        if documents is None:
            raise ScaleDownError(
                f"the baseline shuffled_documents finds no question without a document of question "
                f"{examples[index].id!r} among {len(examples)}; ask more questions, or leave this baseline out."
            )
        donors[examples[index].index] = documents
    return donors


def greedy(generation_config: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
    """Copy settings for writing without chance and search.

    Args:
        generation_config: A model's.
        max_new_tokens: Length of an answer at most.

    Returns:
        Settings for `generate`.
    """
    settings = copy.deepcopy(generation_config)
    settings.update(
        max_new_tokens=max_new_tokens,
        max_length=None,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        # They look at the prompt, which has every document's words or none of them: no comparison would be fair.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )
    return settings


def unlimited(processor: ScaleDownProcessor) -> ScaleDownProcessor:
    """Copy a processor without its limit on the prompt, which the evaluation checks for all systems at once.

    Args:
        processor: The model's.

    Returns:
        A processor that shares the tokenizers.
    """
    twin = copy.copy(processor)
    twin.max_prompt_length = None
    return twin


def timed(system: System, examples: Sequence[Example], device: torch.device) -> list[Answer]:
    """Answer a batch and share its time out among its questions.

    Args:
        system: Answers.
        examples: The batch.
        device: Whose work is waited for.

    Returns:
        Answers with their seconds.
    """
    wait_for(device)
    started = time.perf_counter()
    answers = system.answer(examples)
    wait_for(device)
    seconds = (time.perf_counter() - started) / len(examples)
    for answer in answers:
        answer.seconds = seconds
    return answers


def _chunk_counts(
    chunks: dict[str, torch.Tensor], num_examples: int, config: Any, stays: torch.Tensor | None
) -> list[tuple[int, int]]:
    """Of each question, tokens the compressor read, and document tokens of the chunks `(num_chunks,)` that stayed."""
    if not chunks:
        return [(0, 0)] * num_examples
    read = chunks["compressor_attention_mask"].sum(dim=1)
    read = read + own_tokens(chunks["chunk_slots"], config)
    own = chunks["compressor_document_mask"].sum(dim=1)
    own = own if stays is None else own * stays
    columns = torch.stack([read, own], dim=1)  # (num_chunks, 2)
    owner = chunks["document_to_example"][chunks["chunk_to_document"]]
    sums = torch.zeros(num_examples, 2, dtype=torch.long).index_add_(0, owner, columns.long())
    return [tuple(row) for row in sums.tolist()]


def _written(new: torch.Tensor, generation_config: GenerationConfig) -> list[int]:
    """Tokens up to the end token `(batch,)`, that one included."""
    ends = generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    is_end = torch.isin(new, torch.tensor([end for end in ends if end is not None], device=new.device))
    length = torch.where(is_end.any(dim=1), is_end.long().argmax(dim=1) + 1, new.shape[1])
    return length.tolist()
