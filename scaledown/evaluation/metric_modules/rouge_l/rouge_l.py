"""Longest common subsequence of words with the gold answer that fits best: ROUGE-L."""

import evaluate

from scaledown.common.metrics import rouge_l
from scaledown.evaluation.metrics import answer_metric_info, summarize


class RougeL(evaluate.Metric):
    """Longest common subsequence of words with the gold answer that fits best: ROUGE-L."""

    def _info(self) -> evaluate.MetricInfo:
        return answer_metric_info(__doc__)

    def _compute(self, predictions, references, per_question=False):
        return summarize("rouge_l", map(rouge_l, predictions, references), per_question)
