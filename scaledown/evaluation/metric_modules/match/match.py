"""Share of predictions that hold a gold answer: the "accuracy" of OSCAR (arXiv 2504.07109)."""

import evaluate

from scaledown.common.metrics import match
from scaledown.evaluation.metrics import answer_metric_info, summarize


class Match(evaluate.Metric):
    """Share of predictions that hold a gold answer: the "accuracy" of OSCAR (arXiv 2504.07109)."""

    def _info(self) -> evaluate.MetricInfo:
        return answer_metric_info(__doc__)

    def _compute(self, predictions, references, per_question=False):
        return summarize("match", map(match, predictions, references), per_question)
