"""Opens the local metric modules of `metric_modules/` by the library `evaluate`, without a network."""

import functools
from pathlib import Path

import evaluate

MODULES = Path(__file__).with_name("metric_modules")
ANSWER_MODULES = ("exact_match", "f1", "match", "rouge_l")


@functools.cache
def load_metric(name: str) -> evaluate.EvaluationModule:
    """Open a local metric.

    Args:
        name: A folder of `metric_modules`.

    Returns:
        The metric. Its `compute` takes `per_question=True` for one value per question in place of the mean.
    """
    return evaluate.load(str(MODULES / name), keep_in_memory=True)
