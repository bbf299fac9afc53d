"""Share of predictions that are one of the gold answers, normalized as SQuAD does."""

import evaluate

from scaledown.common.metrics import exact_match
from scaledown.evaluation.metrics import answer_metric_info, summarize


class ExactMatch(evaluate.Metric):
    """Share of predictions that are one of the gold answers, normalized as SQuAD does."""

    def _info(self) -> evaluate.MetricInfo:
        return answer_metric_info(__doc__)

    def _compute(self, predictions, references, per_question=False):
        return summarize("exact_match", map(exact_match, predictions, references), per_question)
