"""Collators: rows of a data set in, batches of a ScaleDown model out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from errors_scaledown import ScaleDownError
from processing_scaledown import ScaleDownProcessor
from prompt_scaledown import IGNORE_INDEX
from reranking_scaledown import slots_by_document

from ..data.records import answers_of

# Reranking scores of documents that are known to hold the answer, and of the others, where no teacher gave any.
SCORE_OF_POSITIVE, SCORE_OF_OTHER = 2.0, -2.0
# Answers that stand in a text only by chance.
NO_EVIDENCE = {"yes", "no"}
# What the generator is asked in pretraining, in the place of a question.
INSTRUCTIONS = {"autoencoding": "Repeat the background word for word.", "continuation": "Continue the background."}


@dataclass
class JointCollator:
    """Builds batches for joint training: questions, documents, answers to learn and teacher scores.

    Rows are records as `scaledown.data.records.load_records` yields them (`query`, `documents`, `answer`,
    `reranking_scores`); the keys that come out are those of `ScaleDownProcessor.__call__` and `logits_to_keep`.

    Args:
        processor: The processor of the model that is trained, so that training sees the prompt of inference.
        max_answer_length: Answer tokens learned at most, end token included.
        with_answers: Whether there is something to learn; without, the batch is what `generate` takes.
        scores_from_positives: Whether records without teacher scores get some by their `positives`.
    """

    processor: ScaleDownProcessor
    max_answer_length: int = 128
    with_answers: bool = True
    scores_from_positives: bool = False

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build one batch.

        Args:
            records: Rows of the data set. Of several gold answers the first is learned.

        Returns:
            The batch; the documents of all rows follow one another, so their number may differ between rows.

        Raises:
            ValueError: A record does not fit the generator's context, or the compressor's tokenizer leaves nothing of
                a document.
        """
        scores = [_scores_to_learn(record, len(record["documents"]), self.scores_from_positives) for record in records]
        learned = {}
        if self.with_answers:
            learned["answers"] = [answers_of(record)[0] for record in records]
            learned["reranking_scores"] = scores if any(row is not None for row in scores) else None
            if self.processor.pointer_window is not None:
                learned["evidence"] = [evidence_of(record) for record in records]
        try:
            batch = self.processor(
                [record["query"] for record in records],
                [record["documents"] for record in records],
                **learned,
                max_answer_length=self.max_answer_length,
            )
        except ScaleDownError as error:
            raise ScaleDownError(f"{error} ({_ids(records)})") from error
        if not self.with_answers:
            return dict(batch)
        return {**batch, "logits_to_keep": num_answer_positions(batch["labels"])}


@dataclass
class PointerCollator(JointCollator):
    """Builds batches for the compressor alone: where each chunk holds an answer, and which documents are relevant."""

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build one batch.

        Args:
            records: As `JointCollator` takes them.

        Returns:
            The batch of `JointCollator` without what the generator reads.

        Raises:
            ValueError: As `JointCollator`.
        """
        batch = super().__call__(records)
        of_prompt = ("input_ids", "attention_mask", "slot_mask", "labels", "logits_to_keep")
        return {name: value for name, value in batch.items() if name not in of_prompt}


@dataclass
class PretrainingCollator:
    """Builds batches for pretraining: passages to be written again or continued, from their slots alone.

    Rows are those of `load_pretraining_data` (`task`, `text`, `target`). The compressor sees the passage without a
    question; the generator gets the task instead.

    Args:
        processor: The processor of the model that is trained.
    """

    processor: ScaleDownProcessor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build one batch.

        Args:
            rows: Rows of the data set.

        Returns:
            The batch, with the keys of `JointCollator` but for the teacher's scores.
        """
        documents = [[row["text"]] for row in rows]
        chunks = self.processor.encode_documents([""] * len(rows), documents)
        prompts = self.processor.build_prompts(
            [INSTRUCTIONS[row["task"]] for row in rows],
            slots_by_document(chunks, documents),
            [row["target"] for row in rows],
            # The generator's tokens may be shorter than those of the compressor, which measure the passage.
            max_answer_length=2 * self.processor.chunk_length,
        )
        return {**prompts, **chunks, "logits_to_keep": num_answer_positions(prompts["labels"])}


@dataclass
class CompressionCollator:
    """Builds what stage 1 of two-stage training reads: the chunks of questions and documents, and no prompt.

    Args:
        processor: The processor of the model that compresses.
    """

    processor: ScaleDownProcessor

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Build one batch.

        Args:
            records: Records as `JointCollator` takes them.

        Returns:
            The chunk keys of `ScaleDownProcessor.__call__`; empty when no record has documents.

        Raises:
            ValueError: The compressor's tokenizer leaves nothing of a document.
        """
        try:
            return self.processor.encode_documents(
                [record["query"] for record in records], [record["documents"] for record in records]
            )
        except ScaleDownError as error:
            raise ScaleDownError(f"{error} ({_ids(records)})") from error


@dataclass
class GenerationCollator:
    """Builds batches for stage 2 of two-stage training: cached states in the place of documents.

    Rows are those of `cache.CachedDataset`; the keys that come out are those of `JointCollator`, with
    `memory_states`, `memory_mask` and `rerank_states` in the place of the compressor's inputs.

    Args:
        processor: The processor of the model that is trained.
        max_answer_length: Answer tokens learned at most, end token included.
        with_answers: Whether there is something to learn; without, the batch is what `generate` takes.
        scores_from_positives: As in `JointCollator`.
    """

    processor: ScaleDownProcessor
    max_answer_length: int = 128
    with_answers: bool = True
    scores_from_positives: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build one batch.

        Args:
            rows: Rows of the cache.

        Returns:
            The batch.

        Raises:
            ValueError: A record does not fit the generator's context.
        """
        try:
            prompts = self.processor.build_prompts(
                [row["query"] for row in rows],
                [row["document_slots"] for row in rows],
                [answers_of(row)[0] for row in rows] if self.with_answers else None,
                self.max_answer_length,
            )
        except ScaleDownError as error:
            raise ScaleDownError(f"{error} ({_ids(rows)})") from error
        batch = dict(prompts)
        if self.with_answers:
            batch["logits_to_keep"] = num_answer_positions(prompts["labels"])
        if not any(row["document_slots"] for row in rows):
            return batch
        counts = [len(row["document_slots"]) for row in rows]
        offsets = [sum(counts[:i]) for i in range(len(rows))]
        chunk_slots = torch.cat([row["chunk_slots"] for row in rows])  # (num_chunks,)
        states = torch.cat([row["memory_states"] for row in rows])  # (num_slots, hidden)
        memory_mask = torch.arange(int(chunk_slots.max())) < chunk_slots.unsqueeze(1)  # (num_chunks, slots)
        batch["memory_mask"] = memory_mask
        batch["memory_states"] = states.new_zeros(*memory_mask.shape, states.shape[-1])
        batch["memory_states"][memory_mask] = states
        if rows[0]["rerank_states"] is not None:
            batch["rerank_states"] = torch.cat([row["rerank_states"] for row in rows])  # (num_chunks, hidden)
        chunk_documents = [row["chunk_documents"] + offset for row, offset in zip(rows, offsets, strict=True)]
        batch["chunk_to_document"] = torch.cat(chunk_documents)
        batch["document_to_example"] = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
        scores = [
            _scores_to_learn(row, count, self.scores_from_positives) for row, count in zip(rows, counts, strict=True)
        ]
        if self.with_answers and any(row is not None for row in scores):
            unknown = [[float("nan")] * count for count in counts]
            listed = [known if known is not None else nan for known, nan in zip(scores, unknown, strict=True)]
            batch["reranking_labels"] = torch.tensor([score for row in listed for score in row])
        return batch


def num_answer_positions(labels: torch.Tensor) -> int:
    """Count the last positions whose logits the loss needs; the vocabulary is too wide to compute the others.

    Args:
        labels: Labels of shape `(batch, prompt_len)`, padded left, so that answers end in the last column.

    Returns:
        The length of the longest answer and one more, for the position that predicts its first token.
    """
    learned = (labels != IGNORE_INDEX).any(dim=0)  # (prompt_len,)
    return int(labels.shape[1] - learned.long().argmax()) + 1


def evidence_of(record: dict[str, Any]) -> list[list[str]]:
    """Say what to point at in each document of a record: the answers, in positives alone where those are known.

    Args:
        record: A row of the data set.

    Returns:
        Texts to find in each document.
    """
    positives = record.get("positives")
    holds = range(len(record["documents"])) if positives is None else positives
    answers = [answer for answer in answers_of(record) if answer.strip().lower() not in NO_EVIDENCE]
    return [answers if i in holds else [] for i in range(len(record["documents"]))]


def _scores_to_learn(record: dict[str, Any], num_documents: int, from_positives: bool) -> list[float] | None:
    scores, positives = record.get("reranking_scores"), record.get("positives")
    if scores is not None or positives is None or not from_positives:
        return scores
    return [SCORE_OF_POSITIVE if index in positives else SCORE_OF_OTHER for index in range(num_documents)]


def _ids(records: Sequence[dict[str, Any]]) -> str:
    ids = ", ".join(str(record.get("id")) for record in records)
    if len(records) == 1:
        return f"This is the record with the id {ids}."
    return f"The batch holds the records with the ids {ids}, in this order."
