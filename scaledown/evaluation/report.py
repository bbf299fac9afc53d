"""The report of an evaluation, or of several, in Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.tables import table
from .results import QUALITY, REFERENCE

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
COMPARISON_NAME = "comparison.md"


def write_report(folder: Path, metrics: dict[str, Any], plots: Sequence[str]) -> None:
    """Write the report of one run.

    Args:
        folder: The run's.
        metrics: What metrics.json holds.
        plots: Names of the plots in the folder.
    """
    (folder / REPORT_NAME).write_text(render_report(metrics, plots), encoding="utf-8")


def write_comparison(folder: Path, runs: Sequence[tuple[str, dict[str, Any]]], plot: str) -> None:
    """Write the report of several runs.

    Args:
        folder: Where it goes.
        runs: Names and metrics of the runs.
        plot: Name of the plot beside it.
    """
    (folder / COMPARISON_NAME).write_text(render_comparison(runs, plot), encoding="utf-8")


def render_comparison(runs: Sequence[tuple[str, dict[str, Any]]], plot: str) -> str:
    """Render several runs: their models, each with what it was compared with.

    Args:
        runs: Names and metrics.
        plot: Name of the plot beside the report.

    Returns:
        Markdown.
    """
    names = [name for name in QUALITY if any(name in measured(metrics["systems"]) for _, metrics in runs)]
    costs = ("tokens_in", "seconds")
    header = ["run", "", "tokens per slot", *(TITLES[name] for name in names), "tokens in", "seconds per question"]
    rows = [[*header, "speed-up"]]
    for run, metrics in runs:
        rate = metrics["model"]["measured_compression"]["value"]
        for system, values in metrics["systems"].items():
            speed_up = metrics["against_full_text"].get(system, {}).get("speed_up")
            rows.append(
                [
                    run,
                    system,
                    f"{rate:.3g}" if values["slots"]["value"] and rate is not None else "–",
                    *(with_interval(values.get(name)) for name in names),
                    *(with_interval(values[name], form) for name, form in zip(costs, (".1f", ".4f"), strict=True)),
                    "1" if system == REFERENCE else with_interval(speed_up, ".2f"),
                ]
            )
    sections = ["# Comparison of runs", _differences(runs), table(rows), f"![exact match and compression]({plot})"]
    reranked = [(run, metrics["reranking"]) for run, metrics in runs if metrics["reranking"]]
    if reranked:
        names = list(reranked[0][1]["model"])
        rows = [["run", *(TITLES.get(name, name) for name in names)]]
        rows += [[run, *(with_interval(found["model"].get(name)) for name in names)] for run, found in reranked]
        sections += ["## Reranking", table(rows)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _differences(runs: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """What keeps the runs from being comparable."""
    differences = []
    for what, read in (
        ("questions", lambda metrics: metrics["data"]["sha256"]),
        ("number of questions asked", lambda metrics: metrics["data"]["num_asked"]),
        ("hardware, so that times do not compare", lambda metrics: str(metrics["hardware"])),
        ("batch size, so that times do not compare", lambda metrics: str(metrics.get("batch_sizes"))),
        ("the judge", lambda metrics: metrics.get("judge", {}).get("model")),
        ("the selection of documents", lambda metrics: str(metrics["model"].get("selection") or {})),
        ("length of answers", lambda metrics: metrics["settings"]["max_new_tokens"]),
    ):
        if len({read(metrics) for _, metrics in runs}) > 1:
            differences.append(f"- The runs differ in {what}.")
    return "\n".join(differences)


def render_report(metrics: dict[str, Any], plots: Sequence[str] = ()) -> str:
    """Render one run.

    Args:
        metrics: What metrics.json holds.
        plots: Names of plots beside the report.

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
    if "judge" in metrics:
        sections += [f"## The judge, {metrics['judge']['model']}", _judge(metrics["judge"])]
    if metrics["reranking"]:
        sections += ["## Reranking", _reranking(metrics["reranking"])]
    for field, groups in metrics["groups"].items():
        sections += [f"## By {field}", _groups(field, groups)]
    sections += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plots]
    sections += ["## How it was measured", _run(metrics)]
    return "\n\n".join(section for section in sections if section) + "\n"


def with_interval(value: dict[str, Any] | None, form: str = ".3f") -> str:
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
    names = measured(systems)
    rows = [["", *(TITLES[name] for name in names)]]
    rows += [[system, *(with_interval(values.get(name)) for name in names)] for system, values in systems.items()]
    return table(rows)


def _costs(metrics: dict[str, Any]) -> str:
    rows = [["", "tokens in", "of them slots", "compressor reads", "tokens out", "seconds per question", "speed-up"]]
    for system, values in metrics["systems"].items():
        speed_up = metrics["against_full_text"].get(system, {}).get("speed_up")
        rows.append(
            [
                system,
                *(f"{values[name]['value']:.1f}" for name in ("tokens_in", "slots", "compressor_tokens", "tokens_out")),
                with_interval(values["seconds"], ".4f"),
                "1" if system == REFERENCE else with_interval(speed_up, ".2f"),
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
                *(with_interval(values[name]["difference"], "+.3f") for name in names),
                with_interval(values["exact_match"]["ratio"]),
                with_interval(values["tokens_in"]["ratio"]),
            ]
        )
    return table(rows)


def _judge(judge: dict[str, Any]) -> str:
    rows = [["", "judged", "not judged", "agreement with exact match", "Cohen's kappa", "judged 1 without exact match"]]
    for system, found in judge["agreement_with_exact_match"].items():
        values = ["–" if found[name] is None else f"{found[name]:.3f}" for name in ("agreement", "kappa")]
        lenient = found["counts"]["judge 1, exact match 0"]
        rows.append([system, str(found["num_judged"]), str(found["num_unjudged"]), *values, str(lenient)])
    parts = [table(rows)]
    if judge["pairs"]:
        rows = [["compressed against", "win rate, ties half", "wins", "ties", "losses", "undecided"]]
        for other, found in judge["pairs"].items():
            counts = (str(found[name]) for name in ("wins", "ties", "losses", "undecided"))
            rows.append([other, with_interval(found["win_rate"]), *counts])
        parts += ["Pairs of answers, each judged in both orders:", table(rows)]
    return "\n\n".join(parts)


def _reranking(reranking: dict[str, Any]) -> str:
    names = list(reranking["model"])
    rows = [["", *(TITLES.get(name, name) for name in names)]]
    for source, values in reranking.items():
        if source != "num_questions":
            rows.append([source.replace("_", " "), *(with_interval(values[name]) for name in names)])
    return f"{reranking['num_questions']} questions with known right documents.\n\n" + table(rows)


def _groups(field: str, groups: dict[str, Any]) -> str:
    systems = list(next(iter(groups.values()))["systems"])
    rows = [[field, "questions", "", *(TITLES[name] for name in ("exact_match", "f1", "match"))]]
    for value, group in groups.items():
        for system in systems:
            values = group["systems"][system]
            cells = (with_interval(values[name]) for name in ("exact_match", "f1", "match"))
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
        "run from texts to text, tokenizing and compressing included. The first batch was answered once before it was "
        "timed. Intervals of times resample batches."
    )
    return how + "\n\n" + table(rows)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and not isinstance(value, dict | list)}


def measured(systems: dict[str, Any]) -> list[str]:
    """Tell which metrics of answers a run has.

    Args:
        systems: Estimates of each system.

    Returns:
        Their names, in the order of reports.
    """
    return [name for name in QUALITY if any(name in values for values in systems.values())]
