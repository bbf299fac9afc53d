"""Collators: rows of a data set in, batches of a ScaleDown model out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from processing_scaledown import IGNORE_INDEX, ScaleDownProcessor


@dataclass
class JointCollator:
    """Builds batches for joint training: questions, documents, answers to learn and teacher scores.

    Rows are records as `scaledown.records.load_records` yields them (`query`, `documents`, `answer`,
    `reranking_scores`); the keys that come out are those of `ScaleDownProcessor.__call__` and `logits_to_keep`.

    Args:
        processor: The processor of the model that is trained, so that training sees the prompt of inference.
        max_answer_length: Answer tokens learned at most, end token included.
    """

    processor: ScaleDownProcessor
    max_answer_length: int = 128

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build one batch.

        Args:
            records: Rows of the data set. Of several gold answers the first is learned.

        Returns:
            The batch; documents of all rows lie behind one another, so rows may differ in their number.

        Raises:
            ValueError: A record does not fit the generator's context.
        """
        scores = [record.get("reranking_scores") for record in records]
        try:
            batch = self.processor(
                [record["query"] for record in records],
                [record["documents"] for record in records],
                answers=[record["answer"][0] for record in records],
                reranking_scores=scores if any(row is not None for row in scores) else None,
                max_answer_length=self.max_answer_length,
            )
        except ValueError as error:
            ids = ", ".join(str(record.get("id")) for record in records)
            raise ValueError(f"{error} (The batch holds the records with the ids {ids}, in this order.)") from error
        return {**batch, "logits_to_keep": num_answer_positions(batch["labels"])}


def num_answer_positions(labels: torch.Tensor) -> int:
    """Count the last positions whose logits the loss needs; the vocabulary is too wide to compute the others.

    Args:
        labels: Labels of shape `(batch, prompt_len)`, padded left, so that answers end in the last column.

    Returns:
        The length of the longest answer and one more, for the position that predicts its first token.
    """
    learned = (labels != IGNORE_INDEX).any(dim=0)  # (prompt_len,)
    return int(labels.shape[1] - learned.long().argmax()) + 1
