"""How high the right documents are ranked: nDCG@10, MRR, success@1 and recall@k, as ir-measures computes them."""

import datasets
import evaluate

from scaledown.evaluation.metrics import summarize
from scaledown.evaluation.ranking_metrics import RECALL_AT, rank_questions


class Ranking(evaluate.Metric):
    """How high the right documents are ranked: nDCG@10, MRR, success@1 and recall@k, as ir-measures computes them."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: one score per document; references: the indices of the right documents",
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.List(datasets.Value("int32")),
                }
            ),
        )

    def _compute(self, predictions, references, per_question=False, recall_at=RECALL_AT):
        results = {}
        for name, values in rank_questions(predictions, references, recall_at).items():
            results.update(summarize(name, values, per_question))
        return results
