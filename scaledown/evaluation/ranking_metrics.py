"""Metrics of rankings, computed by ir-measures."""

from collections.abc import Sequence

import ir_measures
from ir_measures import RR, R, Success, nDCG

from errors_scaledown import ScaleDownError

RECALL_AT = (1, 3, 5)


def rank_questions(
    scores: Sequence[Sequence[float]], positives: Sequence[Sequence[int]], recall_at: Sequence[int] = RECALL_AT
) -> dict[str, list[float]]:
    """Measure how high the right documents of each question are ranked.

    Args:
        scores: For each question one score per document, higher is better.
        positives: For each question the indices of its right documents, at least one.
        recall_at: Ranks at which recall is measured.

    Returns:
        `ndcg@10`, `mrr`, `success@1` (a right document is first) and `recall@k`, each with one value per question.

    Raises:
        ValueError: A question has no right document, or one that is not there.
    """
    runs, truth = {}, {}
    for index, (row, right) in enumerate(zip(scores, positives, strict=True)):
        if not right or not all(0 <= place < len(row) for place in right):
            raise ScaleDownError(
                f"question {index} has the right documents {list(right)} among {len(row)}; expected at least one, each "
                "an index into the scores. Leave out questions without one."
            )
        # Ranks instead of scores, with equal scores in the documents' order: ties are then no matter of names.
        order = sorted(range(len(row)), key=lambda place: -row[place])
        runs[str(index)] = {str(place): float(len(row) - rank) for rank, place in enumerate(order)}
        truth[str(index)] = {str(place): 1 for place in right}
    measures = {nDCG @ 10: "ndcg@10", RR: "mrr", Success @ 1: "success@1", **{R @ k: f"recall@{k}" for k in recall_at}}
    values = {name: [0.0] * len(runs) for name in measures.values()}
    for result in ir_measures.iter_calc(list(measures), truth, runs):
        values[measures[result.measure]][int(result.query_id)] = result.value
    return values
