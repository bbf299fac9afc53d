"""What the metric modules of `metric_modules/` share: what they take, and the form in which they return values."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate


def answer_metric_info(description: str) -> evaluate.MetricInfo:
    """Say what a metric of answers takes.

    Args:
        description: What it measures.

    Returns:
        Its description for the library.
    """
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions: answers; references: for each the list of its gold answers, at least one",
        features=datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        ),
    )


def summarize(name: str, values: Iterable[float], per_question: bool) -> dict[str, Any]:
    """Bring the values of questions into the form a metric returns.

    Args:
        name: The metric's name.
        values: One value per question.
        per_question: Whether the values are wanted, or their mean.

    Returns:
        The name with the values or the mean.
    """
    values = [float(value) for value in values]
    return {name: values if per_question else sum(values) / len(values)}
