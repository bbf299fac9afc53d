"""Benchmark of operations, time and memory; `benchmark.py` is its command line."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common.command_line import run_command
from ..common.devices import find_device
from ..common.environment import describe_environment
from . import speed
from .arguments import SWEPT, BenchmarkArguments, parse_arguments
from .flops import count_rows, count_table, render
from .plots import plot_flops, plot_lines, plot_speed
from .rivals import RivalModels
from .scaling import count_scaling, fit_exponents, render_exponents
from .training import measure_training, render_training

PACKAGES = ("torch", "transformers")


def benchmark(arguments: BenchmarkArguments) -> str:
    """Measure, and write what was found where that is asked for.

    Args:
        arguments: What to measure.

    Returns:
        The table, in Markdown.

    Raises:
        ValueError: There is no such model, or it cannot read as much.
    """
    rows, table = RUN_BY_MODE[arguments.mode](arguments)
    if arguments.output_dir is not None:
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True)
        device = find_device(arguments.device)
        settings = {name: value for name, value in asdict(arguments).items() if name != "output_dir"}
        results = {"settings": settings, "environment": describe_environment(PACKAGES, device), "results": rows}
        text = json.dumps(results, indent=2, ensure_ascii=False)
        (folder / f"{arguments.mode}.json").write_text(text + "\n", encoding="utf-8")
        (folder / f"{arguments.mode}.md").write_text(table + "\n", encoding="utf-8")
        if arguments.mode == "flops":
            plot_flops(folder, rows)
        elif arguments.mode == "speed":
            plot_speed(folder, rows, SWEPT)
        elif arguments.mode == "scaling":
            for name in ("num_documents", "document_length"):
                swept = [row for row in rows if row["swept"] == name]
                plot_lines(folder / f"scaling_{name}.png", swept, name, "tflop", "TFLOP per question")
    return table


def _flops(arguments: BenchmarkArguments) -> tuple[list[dict[str, Any]], str]:
    if arguments.generator is None:
        rows = count_table(arguments.workload)
    else:
        rows = count_rows(arguments.generator, arguments.compressor_names, arguments.workload)
    return [row.as_json() for row in rows], render(rows)


def _speed(arguments: BenchmarkArguments) -> tuple[list[dict[str, Any]], str]:
    rows = speed.measure(arguments, (RivalModels,) if arguments.rivals else ())
    return rows, speed.render(rows)


def _scaling(arguments: BenchmarkArguments) -> tuple[list[dict[str, Any]], str]:
    rows = count_scaling(arguments)
    return rows, render_exponents(fit_exponents(rows))


def _train(arguments: BenchmarkArguments) -> tuple[list[dict[str, Any]], str]:
    rows = measure_training(arguments)
    return rows, render_training(rows)


def _serving(arguments: BenchmarkArguments) -> tuple[list[dict[str, Any]], str]:
    from . import serving  # needs openai, which no other mode does

    rows = serving.measure(arguments)
    return rows, serving.render(rows)


# Each measures, and returns rows of JSON values and a table.
RUN_BY_MODE = {"flops": _flops, "speed": _speed, "scaling": _scaling, "train": _train, "serving": _serving}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `benchmark.py`.

    Args:
        argv: Its arguments; the command line by default.

    Returns:
        The exit status: 0, or 2 after an error the user can mend.
    """
    return run_command(lambda: benchmark(parse_arguments(argv)))
