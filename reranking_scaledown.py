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
"""Relevance: scores of documents, how they are learned, and which documents are read because of them."""

import math
from numbers import Integral, Real

import torch

try:
    from .errors_scaledown import ScaleDownError
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError


def document_scores(
    reranking_scores: torch.Tensor, chunk_to_document: torch.LongTensor, num_documents: int
) -> torch.Tensor:
    """
    Scores documents by their best chunk.

    Args:
        reranking_scores (`torch.FloatTensor` of shape `(num_chunks,)`): Scores of chunks.
        chunk_to_document (`torch.LongTensor` of shape `(num_chunks,)`): Document of each chunk.
        num_documents (`int`): Documents in all.

    Returns:
        `torch.FloatTensor` of shape `(num_documents,)`, in 32 bits.
    """
    lowest = reranking_scores.new_full((num_documents,), -torch.inf, dtype=torch.float32)
    return lowest.scatter_reduce(0, chunk_to_document.to(lowest.device), reranking_scores.float(), reduce="amax")


def scores_by_example(
    reranking_scores: torch.Tensor, chunks: dict[str, torch.Tensor], documents: list[list[str]]
) -> list[list[float]]:
    """
    Scores the documents of every question by their best chunk.

    Args:
        reranking_scores (`torch.FloatTensor` of shape `(num_chunks,)`): Scores of chunks.
        chunks (`dict[str, torch.Tensor]`): What the processor's `encode_documents` returned.
        documents (`list[list[str]]`): The documents it was given.

    Returns:
        `list[list[float]]`: One number per document.
    """
    num_documents = chunks["document_to_example"].shape[0]
    scores = iter(document_scores(reranking_scores, chunks["chunk_to_document"], num_documents).tolist())
    return [[next(scores) for _ in row] for row in documents]


def reranking_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    document_to_example: torch.LongTensor,
    num_scored_examples: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Distils a teacher's scores: `Σ_i (r_i − r'_i)²` per question (OSCAR, arXiv 2504.07109), averaged over questions.

    Args:
        scores (`torch.FloatTensor` of shape `(num_documents,)`): The model's scores.
        labels (`torch.FloatTensor` of shape `(num_documents,)`): The teacher's; NaN where there is none.
        document_to_example (`torch.LongTensor` of shape `(num_documents,)`): Question of each document.
        num_scored_examples (`int`, *optional*):
            Questions to average over; those of this batch that have scores when left out. A trainer that accumulates
            gradients passes the number in all micro-batches.

    Returns:
        `torch.FloatTensor` of shape `()`; 0 when no document has a teacher score.
    """
    known = ~labels.isnan()
    difference = torch.where(known, scores.float() - labels.float().nan_to_num(), 0.0)
    if num_scored_examples is None:
        num_scored_examples = document_to_example[known].unique().numel()
    return difference.square().sum() / max(num_scored_examples, 1)


def check_limits(min_reranking_score: float | None = None, **counts: int | None):
    """
    Checks what documents are selected by.

    Args:
        min_reranking_score (`float`, *optional*): As in `ScaleDownModel.answer`.
        counts (`int`, *optional*): Numbers of documents or slots, by their names.

    Raises:
        ScaleDownError: a score that is no number, or a count that is not a whole number of at least 1.
    """
    score = min_reranking_score
    if score is not None and (isinstance(score, bool) or not isinstance(score, Real) or math.isnan(score)):
        raise ScaleDownError(f"min_reranking_score={score!r} must be a number; leave it out to keep all documents.")
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, Integral) or count < 1):
            raise ScaleDownError(f"{name}={count!r} must be a whole number of at least 1.")


def slots_by_document(chunks: dict[str, torch.Tensor], documents: list[list[str]]) -> list[list[int]]:
    """
    Counts the slots of every question's documents, over all their chunks.

    Args:
        chunks (`dict[str, torch.Tensor]`): What the processor's `encode_documents` returned; empty without documents.
        documents (`list[list[str]]`): The documents it was given.

    Returns:
        `list[list[int]]`: One number per document.
    """
    if not chunks:
        return [[] for _ in documents]
    slots = torch.zeros_like(chunks["document_to_example"])
    slots.index_add_(0, chunks["chunk_to_document"], chunks["chunk_slots"])
    return [row.tolist() for row in slots.split([len(listed) for listed in documents])]


def select_documents(
    scores: list[float],
    slots: list[int],
    min_reranking_score: float | None = None,
    max_documents: int | None = None,
    max_slots: int | None = None,
) -> list[bool]:
    """
    Decides which of a question's documents the generator reads.

    Args:
        scores (`list[float]`): Reranking score of each document.
        slots (`list[int]`): Slots of each document.
        min_reranking_score, max_documents, max_slots: As in `ScaleDownModel.answer`.

    Returns:
        `list[bool]`: True for those that stay.
    """
    kept, room = set(), float("inf") if max_slots is None else max_slots
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        enough = min_reranking_score is None or scores[i] >= min_reranking_score
        if enough and slots[i] <= room and len(kept) != max_documents:
            kept.add(i)
            room -= slots[i]
    return [i in kept for i in range(len(scores))]


def select_chunks(
    scores: list[list[float]], slots: list[list[int]], chunks: dict[str, torch.Tensor], *limits, **named_limits
) -> tuple[list[list[int]], torch.BoolTensor | None]:
    """
    Selects documents for every question of a batch.

    Args:
        scores (`list[list[float]]`): Reranking scores of each question's documents.
        slots (`list[list[int]]`): Their slots.
        chunks (`dict[str, torch.Tensor]`): What the processor's `encode_documents` returned; empty without documents.
        limits, named_limits: As in `select_documents`.

    Returns:
        `tuple`: slots of the documents that stay, and which chunks `(num_chunks,)` are theirs; `None` without chunks.
    """
    kept = [select_documents(*rows, *limits, **named_limits) for rows in zip(scores, slots, strict=True)]
    left = [[n for n, stays in zip(*rows, strict=True) if stays] for rows in zip(slots, kept, strict=True)]
    if not chunks:
        return left, None
    return left, torch.tensor([flag for row in kept for flag in row])[chunks["chunk_to_document"]]
