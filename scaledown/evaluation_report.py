"""The report of an evaluation in Markdown."""

from pathlib import Path
from typing import Any

from .evaluation_results import QUALITY, REFERENCE

TITLES = {
    "exact_match": "exact match",
    "f1": "F1",
    "match": "match",
    "rouge_l": "ROUGE-L",
    "judge": "judge",
    "ndcg@10": "nDCG@10",
    "mrr": "MRR",
}
REPORT_NAME = "report.md"


def write_report(folder: Path, metrics: dict[str, Any]) -> None:
    """Write the report of one run.

    Args:
        folder: The run's.
        metrics: What metrics.json holds.
    """
    (folder / REPORT_NAME).write_text(render_report(metrics), encoding="utf-8")


def render_report(metrics: dict[str, Any]) -> str:
    """Render one run.

    Args:
        metrics: What metrics.json holds.

    Returns:
        Markdown.
    """
    model, data = metrics["model"], metrics["data"]
    compression = model["measured_compression"]["value"]
    sections = [
        f"# {model['name']} on {data['name']}",
        f"{data['num_asked']} questions, {data['documents_per_question']:.3g} documents each"
        + (f"; {compression:.3g} document tokens per slot" if compression is not None else "")
        + ". In brackets: 95 % intervals by bootstrap over questions.",
        "\n".join(f"- {note}" for note in metrics["notes"]),
        "## Answers",
        _answers(metrics["systems"]),
        "## Tokens and time",
        _costs(metrics),
    ]
    if metrics["against_full_text"]:
        sections += ["## Against full text, question by question", _comparison(metrics["against_full_text"])]
    if metrics["reranking"]:
        sections += ["## Reranking", _reranking(metrics["reranking"])]
    for field, groups in metrics["groups"].items():
        sections += [f"## By {field}", _groups(field, groups)]
    sections += ["## How it was measured", _run(metrics)]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(rows: list[list[str]]) -> str:
    """Lay out a table.

    Args:
        rows: Cells, the header first.

    Returns:
        Markdown.
    """
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def estimate(value: dict[str, Any] | None, form: str = ".3f") -> str:
    """Render a value with its interval.

    Args:
        value: An `Estimate` as a dictionary.
        form: Format of the numbers.

    Returns:
        Such as `0.512 [0.480, 0.544]`.
    """
    if value is None or value["value"] is None:
        return "–"
    text = format(value["value"], form)
    if value["low"] is None or value["low"] == value["high"]:
        return text
    return f"{text} [{value['low']:{form}}, {value['high']:{form}}]"


def _answers(systems: dict[str, Any]) -> str:
    names = _measured(systems)
    rows = [["", *(TITLES[name] for name in names)]]
    rows += [[system, *(estimate(values.get(name)) for name in names)] for system, values in systems.items()]
    return table(rows)


def _costs(metrics: dict[str, Any]) -> str:
    rows = [["", "tokens in", "of them slots", "compressor reads", "tokens out", "seconds per question", "speed-up"]]
    for system, values in metrics["systems"].items():
        speed_up = metrics["against_full_text"].get(system, {}).get("speed_up")
        rows.append(
            [
                system,
                *(f"{values[name]['value']:.1f}" for name in ("tokens_in", "slots", "compressor_tokens", "tokens_out")),
                estimate(values["seconds"], ".4f"),
                "1" if system == REFERENCE else estimate(speed_up, ".2f"),
            ]
        )
    return table(rows)


def _comparison(comparisons: dict[str, Any]) -> str:
    names = [name for name in QUALITY if name in next(iter(comparisons.values()))]
    rows = [["", *(f"{TITLES[name]}, difference" for name in names), "exact match, ratio", "tokens in, ratio"]]
    for system, values in comparisons.items():
        rows.append(
            [
                system,
                *(estimate(values[name]["difference"], "+.3f") for name in names),
                estimate(values["exact_match"]["ratio"]),
                estimate(values["tokens_in"]["ratio"]),
            ]
        )
    return table(rows)


def _reranking(reranking: dict[str, Any]) -> str:
    names = list(reranking["model"])
    rows = [["", *(TITLES.get(name, name) for name in names)]]
    for source, values in reranking.items():
        if source != "num_questions":
            rows.append([source.replace("_", " "), *(estimate(values[name]) for name in names)])
    return f"{reranking['num_questions']} questions with known right documents.\n\n" + table(rows)


def _groups(field: str, groups: dict[str, Any]) -> str:
    systems = list(next(iter(groups.values()))["systems"])
    rows = [[field, "questions", "", *(TITLES[name] for name in ("exact_match", "f1", "match"))]]
    for value, group in groups.items():
        for system in systems:
            values = group["systems"][system]
            cells = (estimate(values[name]) for name in ("exact_match", "f1", "match"))
            rows.append([value, str(group["num_questions"]), system, *cells])
    return table(rows)


def _run(metrics: dict[str, Any]) -> str:
    hardware, git = metrics["hardware"], metrics["git"]
    commit = git.get("commit", "not recorded")[:12] + (", with changed files" if git.get("changed_files") else "")
    rows = [
        ["", ""],
        ["model", ", ".join(f"{name} {value}" for name, value in _flat(metrics["model"]).items())],
        ["data", ", ".join(f"{name} {value}" for name, value in _flat(metrics["data"]).items())],
        ["settings", ", ".join(f"{name} {value}" for name, value in _flat(metrics["settings"]).items())],
        ["batch size", ", ".join(map(str, metrics["batch_sizes"]))],
        ["hardware", ", ".join(f"{name} {value}" for name, value in hardware.items())],
        ["versions", ", ".join(f"{name} {value}" for name, value in metrics["versions"].items())],
        ["commit", commit],
        ["date", f"{metrics['date']}, {metrics['wall_seconds']:.0f} s in all"],
    ]
    how = (
        "Every batch was answered by all systems in turn, in alternating order, greedily, at one batch size; seconds "
        "run from texts to text, tokenising and compressing included. The first batch was answered once before it was "
        "timed. Intervals of times resample batches."
    )
    return how + "\n\n" + table(rows)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and not isinstance(value, dict | list)}


def _measured(systems: dict[str, Any]) -> list[str]:
    return [name for name in QUALITY if any(name in values for values in systems.values())]
