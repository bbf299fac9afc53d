# Copyright 2026 The ScaleDown authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Filled prompts: documents compressed, selected, and put into the slots of the generator's prompts."""

import itertools
from dataclasses import dataclass

import torch
from transformers import BatchFeature, PreTrainedModel
from transformers.utils import logging

try:
    from .compression_scaledown import compress_chunks
    from .errors_scaledown import ScaleDownError
    from .outputs_scaledown import CompressedDocuments
    from .reranking_scaledown import check_limits, scores_by_example, select_chunks, slots_by_document
    from .text_scaledown import Conversation
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from compression_scaledown import compress_chunks
    from errors_scaledown import ScaleDownError
    from outputs_scaledown import CompressedDocuments
    from reranking_scaledown import check_limits, scores_by_example, select_chunks, slots_by_document
    from text_scaledown import Conversation

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PromptSettings:
    """
    How documents are read, the same for all questions of a batch.

    Args:
        compression_rate, num_memory_tokens (`int`, *optional*): As in `answer`.
        limits (`tuple`):
            `min_reranking_score`, `max_documents` and `max_slots`, as in `answer`; the second is the configuration's
            where it is `None`.
        max_new_tokens (`int`, *optional*): Positions that must be left for the answer; `None` checks nothing.
        with_scores (`bool`, defaults to `False`): Whether scores are wanted where nothing is selected by them.
    """

    compression_rate: int | None = None
    num_memory_tokens: int | None = None
    limits: tuple[float | int | None, ...] = (None, None, None)
    max_new_tokens: int | None = 0
    with_scores: bool = False


@dataclass(frozen=True)
class DocumentReport:
    """
    What became of a document.

    Args:
        score (`float`, *optional*): Reranking score; `None` where none was wanted.
        slots (`int`): Memory embeddings it was compressed into.
        read (`bool`): Whether it is in the prompt.
    """

    score: float | None
    slots: int
    read: bool


@dataclass
class FilledPrompts:
    """
    Prompts of some questions, and what fills them.

    Args:
        batch (`BatchFeature`): `input_ids`, `attention_mask` and `slot_mask`, each `(batch, prompt_len)`.
        compressed (`dict[str, torch.Tensor]`): `memory_embeddings` and `memory_mask`; empty without documents.
        scores (`list[list[float]]`): Reranking score of each question's documents; empty where none were wanted.
        read (`list[list[int]]`): Places of the documents that are in the prompt.
        slots (`list[list[int]]`): Slots of each document, read or not.
    """

    batch: BatchFeature
    compressed: dict[str, torch.Tensor]
    scores: list[list[float]]
    read: list[list[int]]
    slots: list[list[int]]

    def reports(self, question: int) -> list[DocumentReport]:
        """What became of each document of a question, by the question's place in the batch."""
        read, slots = set(self.read[question]), self.slots[question]
        scores = self.scores[question] or [None] * len(slots)
        return [DocumentReport(score, n, i in read) for i, (score, n) in enumerate(zip(scores, slots, strict=True))]


def fill_prompts(
    model: PreTrainedModel,
    questions: list[str],
    documents: list[list[str]],
    conversations: list[Conversation],
    settings: PromptSettings,
    first_question: int = 0,
) -> FilledPrompts:
    """
    Compresses documents, selects among them and builds the prompts.

    Args:
        model (`ScaleDownModel`): The model.
        questions, documents: What `ScaleDownProcessor.check_texts` returned.
        conversations: What `ScaleDownProcessor.conversations` returned.
        settings (`PromptSettings`): How the documents are read.
        first_question (`int`, defaults to 0): Number of the first question, for errors.

    Returns:
        `FilledPrompts`: On the model's device.

    Raises:
        ScaleDownError: a prompt that leaves no room for the answer, or scores of a model without reranking.
    """
    least, most, room = settings.limits
    limits = (least, model.config.max_documents if most is None else most, room)
    check_limits(least, max_documents=limits[1], max_slots=room)  # the configuration's may have been assigned since
    selects = any(limit is not None for limit in limits)
    if settings.with_scores or selects:
        require_reranking(model)
    chunks = model.processor.encode_documents(
        questions, documents, settings.compression_rate, settings.num_memory_tokens
    )
    of_document = slots = slots_by_document(chunks, documents)
    context = (conversations, settings.max_new_tokens, first_question)
    if not selects:  # a prompt that is too long is reported before the work
        batch = _build_prompts(model, questions, slots, *context)
    read = [list(range(len(row))) for row in documents]
    compressed, scores = {}, [[] for _ in documents]
    if chunks:
        memory = compress_chunks(model, chunks, model.chunks_per_pass)
        compressed = {"memory_embeddings": memory.memory_embeddings, "memory_mask": memory.memory_mask}
        if settings.with_scores or selects:
            scores = scores_by_example(memory.reranking_scores, chunks, documents)
    if selects:
        slots, stays = select_chunks(scores, slots, chunks, *limits)
        if chunks:
            compressed["memory_mask"] = memory.memory_mask & stays.to(memory.memory_mask.device).unsqueeze(1)
            kept, places = set(chunks["chunk_to_document"][stays].tolist()), itertools.count()
            read = [[i for i in range(len(row)) if next(places) in kept] for row in documents]
        for i, (row, left) in enumerate(zip(documents, read, strict=True)):
            if row and not left:
                logger.warning_once(
                    f"questions[{first_question + i}] is answered without documents: none of its {len(row)} is "
                    "left by min_reranking_score, max_documents and max_slots. return_reranking_scores=True "
                    "returns which documents were read."
                )
        batch = _build_prompts(model, questions, slots, *context)
    return FilledPrompts(batch, compressed, scores, read, of_document)


def embed_prompts(model: PreTrainedModel, filled: FilledPrompts) -> torch.FloatTensor:
    """Embeddings of prompts `(batch, prompt_len, hidden)`, slots filled."""
    documents = CompressedDocuments(**filled.compressed)
    return model._embed_prompt(filled.batch["input_ids"], filled.batch["slot_mask"], documents)


def _build_prompts(model: PreTrainedModel, questions, slots, conversations, max_new_tokens, first_question: int):
    batch = model.processor.build_prompts(questions, slots, conversations=conversations)
    check_context(model, batch, max_new_tokens, first_question)
    return batch.to(model.device)


def require_reranking(model: PreTrainedModel):
    """Refuses a model without a reranking head, and warns if the head is untrained."""
    if not model.config.enable_reranking:
        raise ScaleDownError("This model was built with enable_reranking=False and has no reranking scores.")
    if model.config.reranking_trained is False:
        logger.warning_once(
            "The reranking head of this model is untrained: its scores order documents at random. Train it on "
            "records with `reranking_scores` or `positives`."
        )


def check_context(model: PreTrainedModel, batch, max_new_tokens: int | None, first_question: int):
    """Refuses prompts that leave no room for the answer in the generator's context."""
    limit = getattr(model.config.generator_config, "max_position_embeddings", None)
    if limit is None or max_new_tokens is None:
        return
    lengths = batch["attention_mask"].sum(dim=1)
    longest = int(lengths.argmax())
    if int(lengths[longest]) + max_new_tokens > limit:
        raise ScaleDownError(
            f"questions[{first_question + longest}] has a prompt of {int(lengths[longest])} tokens; with "
            f"max_new_tokens={max_new_tokens} that exceeds the generator's {limit} positions. Pass fewer "
            "documents, a higher compression_rate or a smaller max_new_tokens."
        )
