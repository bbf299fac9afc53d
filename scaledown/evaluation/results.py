"""From answers to figures: metrics with intervals, comparisons with full text, breakdowns."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from errors_scaledown import ScaleDownError

from .bootstrap import Bootstrap, Estimate
from .data import Example
from .metric_loader import ANSWER_MODULES, load_metric
from .systems import Answer

REFERENCE = "full_text"
QUALITY = (*ANSWER_MODULES, "judge")
COUNTS = ("tokens_in", "tokens_out", "slots", "compressor_tokens")
# Values of each system: metric to one value per question.
Measurements = dict[str, dict[str, list[float]]]


def score_answers(examples: Sequence[Example], answers: dict[str, list[Answer]]) -> Measurements:
    """Compare answers with the gold answers, and collect what they took.

    Args:
        examples: The questions.
        answers: Each system's answers to them.

    Returns:
        For each system the metrics of `ANSWER_MODULES`, the counts, `seconds` and `batch`.
    """
    gold = [example.gold for example in examples]
    columns: Measurements = {}
    for system, given in answers.items():
        texts = [answer.text for answer in given]
        columns[system] = {}
        for name in ANSWER_MODULES:
            columns[system] |= load_metric(name).compute(predictions=texts, references=gold, per_question=True)
        for name in (*COUNTS, "seconds", "batch"):
            columns[system][name] = [getattr(answer, name) for answer in given]
    return columns


def summarize_systems(columns: Measurements, bootstrap: Bootstrap) -> dict[str, dict[str, Any]]:
    """Average the metrics of every system.

    Args:
        columns: What `score_answers` returned.
        bootstrap: Makes the intervals.

    Returns:
        For each system each metric's value and interval.
    """
    summary = {}
    for system, values in columns.items():
        summary[system] = {
            name: asdict(bootstrap.mean(values[name], share=name in QUALITY))
            for name in _present(values, QUALITY + COUNTS)
        }
        # Questions of a batch were timed together.
        summary[system]["seconds"] = asdict(bootstrap.clustered_mean(values["seconds"], values["batch"]))
    return summary


def compare_systems(columns: Measurements, bootstrap: Bootstrap) -> dict[str, dict[str, Any]]:
    """Compare every system with full text, question by question.

    Args:
        columns: What `score_answers` returned.
        bootstrap: Makes the intervals.

    Returns:
        For each other system the `difference` and `ratio` of each metric, the `ratio` of tokens, and `speed_up`; empty
        where there is no full text to compare with.
    """
    if REFERENCE not in columns:
        return {}
    reference = columns[REFERENCE]
    comparisons = {}
    for system, values in columns.items():
        if system == REFERENCE:
            continue
        comparison: dict[str, Any] = {}
        for name in _present(values, QUALITY):
            comparison[name] = {
                "difference": asdict(bootstrap.difference(values[name], reference[name], share=True)),
                "ratio": asdict(bootstrap.ratio(values[name], reference[name])),
            }
        comparison["tokens_in"] = {"ratio": asdict(bootstrap.ratio(values["tokens_in"], reference["tokens_in"]))}
        # Batches are the same for all systems.
        comparison["speed_up"] = asdict(bootstrap.ratio(reference["seconds"], values["seconds"], values["batch"]))
        comparisons[system] = comparison
    return comparisons


def break_down(
    columns: Measurements, examples: Sequence[Example], fields: Sequence[str], bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """Average the metrics of answers over the questions that share the value of a field.

    Args:
        columns: What `score_answers` returned.
        examples: The questions.
        fields: Names of fields of the records.
        bootstrap: Makes the intervals.

    Returns:
        For each field and value `num_questions` and `systems`, as in `summarize_systems`.
    """
    groups: dict[str, dict[str, Any]] = {}
    for field in fields:
        members: dict[str, list[int]] = {}
        for place, example in enumerate(examples):
            members.setdefault(str(example.fields.get(field, "(none)")), []).append(place)
        groups[field] = {}
        for value in sorted(members):
            places = members[value]
            groups[field][value] = {
                "num_questions": len(places),
                "systems": {
                    system: {
                        name: asdict(bootstrap.mean([values[name][place] for place in places], share=True))
                        for name in _present(values, QUALITY)
                    }
                    for system, values in columns.items()
                },
            }
    return groups


def check_fields(examples: Sequence[Example], fields: Sequence[str]) -> None:
    """Raise a ValueError that names the fields there are, unless some record has each field."""
    present = {name for example in examples for name in example.fields}
    for name in fields:
        if name not in present:
            raise ScaleDownError(
                f"group_by names {name!r}, which no record has; the records' own fields are "
                f"{', '.join(sorted(present)) or '(none)'}. Correct --group_by, or add the field to the records."
            )


def rank_documents(
    examples: Sequence[Example], scores: Sequence[list[float] | None], bootstrap: Bootstrap
) -> tuple[dict[str, Any], str | None]:
    """Measure how high the model ranks the right documents, beside their order in the data and a teacher's.

    Args:
        examples: The questions.
        scores: The model's for the documents of each, None where it has none.
        bootstrap: Makes the intervals.

    Returns:
        `num_questions`, and for `model`, `given_order` and, where every record has scores, `teacher` each metric's
        estimate; and a note where nothing was measured, or not everything.
    """
    pairs = [(e, row) for e, row in zip(examples, scores, strict=True) if e.positives and e.documents]
    if not pairs:
        return {}, "Reranking was not measured: no record has `positives`, the indices of its right documents."
    if any(row is None for _, row in pairs):
        return {}, "Reranking was not measured: the model was built without it."
    rankings = {
        "model": [row for _, row in pairs],
        "given_order": [[-float(place) for place in range(len(example.documents))] for example, _ in pairs],
    }
    if all(example.teacher_scores is not None for example, _ in pairs):
        rankings["teacher"] = [example.teacher_scores for example, _ in pairs]
    positives = [example.positives for example, _ in pairs]
    results: dict[str, Any] = {"num_questions": len(pairs)}
    for name, rows in rankings.items():
        values = load_metric("ranking").compute(predictions=rows, references=positives, per_question=True)
        results[name] = {metric: asdict(bootstrap.mean(column, share=True)) for metric, column in values.items()}
    note = None
    if len(pairs) < len(examples):
        note = f"Reranking was measured on {len(pairs)} of {len(examples)} questions; the others have no `positives`."
    return results, note


def measured_compression(answers: Sequence[Answer], bootstrap: Bootstrap) -> Estimate:
    """Estimate how many document tokens a slot stands for.

    Args:
        answers: The model's.
        bootstrap: Makes the interval.

    Returns:
        Document tokens, as the compressor counts them, over slots.
    """
    return bootstrap.ratio([answer.document_tokens for answer in answers], [answer.slots for answer in answers])


def _present(values: dict[str, list[float]], names: Sequence[str]) -> list[str]:
    return [name for name in names if name in values]
