"""Plots of an evaluation, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .report import TITLES, measured
from .systems import MODEL

# Systems without a rate of their own: lines in the comparison of runs.
LINES = {"full_text": "--", "no_documents": ":"}
DPI = 150


def plot_answers(folder: Path, metrics: dict[str, Any]) -> list[str]:
    """Plot the metrics of answers of all systems, as a whole and by field.

    Args:
        folder: Where the plots go.
        metrics: What metrics.json holds.

    Returns:
        Names of the files.
    """
    names = measured(metrics["systems"])
    _bars(folder / "answers.png", metrics["systems"], names, f"{metrics['model']['name']} on {metrics['data']['name']}")
    files = ["answers.png"]
    for field, groups in metrics["groups"].items():
        labels = {f"{value} ({group['num_questions']})": group["systems"] for value, group in groups.items()}
        systems = {
            system: {label: values[system]["exact_match"] for label, values in labels.items()}
            for system in metrics["systems"]
        }
        files.append(f"exact_match_by_{_as_file_name(field)}.png")
        _bars(folder / files[-1], systems, list(labels), f"exact match by {field}")
    return files


def plot_comparison(path: Path, runs: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Plot exact match against the compression rate, with full text and no documents as lines.

    Args:
        path: The file.
        runs: Names and metrics of runs.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, metrics in runs:
        rate, found = metrics["model"]["measured_compression"]["value"], metrics["systems"][MODEL]["exact_match"]
        if rate is not None:
            axes.errorbar(rate, found["value"], yerr=_error(found), fmt="o", capsize=4, label=_as_text(name))
    drawn: set[tuple[str, float]] = set()
    for name, metrics in runs:
        for system, style in LINES.items():
            value = metrics["systems"].get(system, {}).get("exact_match", {}).get("value")
            # Runs on the same questions share their lines.
            if value is not None and (system, value) not in drawn:
                several = len({v for s, v in drawn if s == system}) > 0
                label = f"{system.replace('_', ' ')} ({name})" if several else system.replace("_", " ")
                axes.axhline(value, linestyle=style, color="0.4", label=_as_text(label))
                drawn.add((system, value))
    axes.set_xlabel("document tokens per slot, measured")
    axes.set_ylabel("exact match")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=DPI)


def _bars(path: Path, systems: dict[str, Any], names: Sequence[str], title: str) -> None:
    figure = Figure(figsize=(max(6.0, 1.2 + 0.28 * len(names) * len(systems)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(systems)
    for place, (system, values) in enumerate(systems.items()):
        shown = [(i, values[name]) for i, name in enumerate(names) if values.get(name, {}).get("value") is not None]
        positions = [i + (place - (len(systems) - 1) / 2) * width for i, _ in shown]
        heights = [value["value"] for _, value in shown]
        errors = [_error(value) for _, value in shown]
        errors = [[row[0][0] for row in errors], [row[1][0] for row in errors]]
        axes.bar(positions, heights, width, yerr=errors, label=system.replace("_", " "), capsize=2)
    axes.set_xticks(range(len(names)), [_as_text(TITLES.get(name, name)) for name in names])
    axes.set_ylim(bottom=0)
    axes.set_title(_as_text(title), fontsize=10)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=DPI)


def _error(estimate: dict[str, Any]) -> list[list[float]]:
    """Lengths of an error bar below and above; none where there is no interval."""
    value = estimate["value"]
    low, high = (value if end is None else end for end in (estimate["low"], estimate["high"]))
    return [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def _as_text(text: str) -> str:
    """Words of the data, in which a $ is no beginning of a formula."""
    return text.replace("$", r"\$")


def _as_file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in text)
