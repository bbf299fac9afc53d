"""Plots of a benchmark, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .configurations import label
from .flops import TERA

DPI = 150


def plot_flops(folder: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Plot operations as bars, generation and compression on top of each other.

    Args:
        folder: Where the plot goes.
        rows: Rows of the table of operations.

    Returns:
        Names of the files.
    """
    figure = Figure(figsize=(8, 0.8 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['generator']}, {label(row['compressor'] or 'full text')}" for row in rows]
    left = [0.0] * len(rows)
    for part in ("generation", "compression"):
        widths = [sum(row[part].values()) / TERA for row in rows]
        axes.barh(labels, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        axes.text(left[place], place, f" {row['ratio']:.1f}×", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("TFLOP per question")
    axes.legend(fontsize=8)
    figure.savefig(folder / "flops.png", dpi=DPI)
    return ["flops.png"]


def plot_speed(folder: Path, rows: Sequence[dict[str, Any]], swept: Sequence[str]) -> list[str]:
    """Plot time to the first token and of the answer: as bars at the first setting, as lines over each sweep.

    Args:
        folder: Where the plots go.
        rows: Rows of a measurement, those of the first setting first.
        swept: Names of settings that may vary.

    Returns:
        Names of the files.
    """
    first = {name: rows[0][name] for name in swept}
    base = [row for row in rows if all(row[name] == value for name, value in first.items())]
    figure = Figure(figsize=(7, 0.9 + 0.5 * len(base)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(base))
    for shift, (name, title) in ((-0.2, ("first_token", "first token")), (0.2, ("total", "whole answer"))):
        axes.barh(places + shift, [row[name]["median"] for row in base], 0.38, xerr=_errors(base, name), label=title)
    axes.set_yticks(places, [label(row["contestant"]) for row in base])
    axes.invert_yaxis()
    axes.set_xlabel("seconds; bars from lowest to highest")
    axes.legend(fontsize=8)
    figure.savefig(folder / "speed.png", dpi=DPI)
    files = ["speed.png"]
    for name in swept:
        others = {other: value for other, value in first.items() if other != name}
        line = [row for row in rows if all(row[other] == value for other, value in others.items())]
        if len({row[name] for row in line}) > 1:
            files.append(f"speed_{name}.png")
            plot_lines(folder / files[-1], line, name, "first_token", "seconds to the first token")
    return files


def plot_lines(path: Path, rows: Sequence[dict[str, Any]], name: str, figure_name: str, title: str) -> None:
    """Plot a figure against a setting, a line for each contestant, on logarithmic axes.

    Args:
        path: The file.
        rows: Rows of a measurement; the figure is a number or has a median.
        name: The setting.
        figure_name: The figure.
        title: What the figure is.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for contestant in dict.fromkeys(row["contestant"] for row in rows):
        own = sorted((row for row in rows if row["contestant"] == contestant), key=lambda row: row[name])
        values = [row[figure_name] for row in own]
        medians = [value["median"] if isinstance(value, dict) else value for value in values]
        axes.plot([row[name] for row in own], medians, marker="o", label=label(contestant))
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({row[name] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(name.replace("_", " "))
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)


def _errors(rows: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    """Lengths of error bars below and above."""
    return [
        [row[name]["median"] - row[name]["low"] for row in rows],
        [row[name]["high"] - row[name]["median"] for row in rows],
    ]
