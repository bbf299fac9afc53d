"""Words shared with the gold answer that fits best, each as often as it occurs, normalized as SQuAD does."""

import evaluate

from scaledown.common.metrics import f1
from scaledown.evaluation.metrics import answer_metric_info, summarize


class F1(evaluate.Metric):
    """Words shared with the gold answer that fits best, each as often as it occurs, normalized as SQuAD does."""

    def _info(self) -> evaluate.MetricInfo:
        return answer_metric_info(__doc__)

    def _compute(self, predictions, references, per_question=False):
        return summarize("f1", map(f1, predictions, references), per_question)
