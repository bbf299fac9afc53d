"""Evaluation of a model; `evaluate.py` is its command line.

data ──► length check ──► answers of all systems, timed ──► metrics, intervals ──► judge ──► report, plots, card
"""

import datetime
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from .answering import answer_all
from .bootstrap import Bootstrap
from .command_line import run_command
from .evaluation_arguments import EvaluationArguments, parse_arguments
from .evaluation_data import Example, load_data
from .evaluation_models import Contestants, build_systems, check_lengths, load_contestants
from .evaluation_report import write_report
from .evaluation_results import (
    break_down,
    check_fields,
    compare_systems,
    measured_compression,
    prediction_rows,
    rank_documents,
    score_answers,
    summarize_systems,
)
from .run_environment import describe_environment
from .systems import MODEL, System

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.json"
PREDICTIONS_NAME = "predictions.jsonl"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "ir-measures", "numpy")
# Options that name places of this machine, which are nobody's business.
PRIVATE = ("model", "generator", "data", "output_dir", "compare", "judge_cache", "judge_url", "judge_api_key_env")


def evaluate(arguments: EvaluationArguments) -> Path | None:
    """Measure a model, and write a folder with predictions, metrics, a report and plots.

    Args:
        arguments: Model, data, baselines and where to write.

    Returns:
        The folder; None in all processes but the first.

    Raises:
        FileExistsError: The output folder exists.
        FileNotFoundError: There is no such data.
        ValueError: The model or the data cannot be read, a prompt is too long, or memory does not suffice.
    """
    started = time.perf_counter()
    state, device = _place(arguments)
    data = load_data(
        arguments.data,
        arguments.format,
        arguments.config,
        arguments.split,
        arguments.data_revision,
        arguments.num_documents,
        arguments.limit,
        arguments.seed,
    )
    check_fields(data.examples, arguments.group_fields)
    found = load_contestants(arguments, device)
    examples, systems, too_long = _fitting(found, arguments, data.examples)
    answers, batch_sizes = answer_all(systems, examples, arguments.batch_size, device, state)
    if not state.is_main_process:
        return None

    bootstrap = Bootstrap(arguments.resamples, arguments.seed)
    columns = score_answers(examples, answers)
    folder = _new_folder(arguments)
    _write_predictions(folder, examples, answers, columns)  # before anything that may fail
    reranking, note = rank_documents(examples, answers[MODEL], bootstrap)
    notes = [*found.notes, *([note] if note else [])]
    if too_long:
        notes.append(
            "Questions whose prompt exceeds the generator's context were left out everywhere: "
            + ", ".join(f"{count} for {name}" for name, count in too_long.items())
            + "."
        )
    metrics: dict[str, Any] = {
        "model": {**found.description, "measured_compression": asdict(measured_compression(answers[MODEL], bootstrap))},
        "data": {**data.description, "num_asked": len(examples), "too_long": too_long},
        "systems": summarize_systems(columns, bootstrap),
        "against_full_text": compare_systems(columns, bootstrap),
        "reranking": reranking,
        "groups": break_down(columns, examples, arguments.group_fields, bootstrap),
        "notes": notes,
        "settings": _settings(arguments),
        "batch_sizes": batch_sizes,
        **describe_environment(PACKAGES, device, state.num_processes),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "wall_seconds": time.perf_counter() - started,
    }
    _write_json(folder / METRICS_NAME, metrics)
    write_report(folder, metrics)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run `evaluate.py`.

    Args:
        argv: Its arguments; the command line by default.

    Returns:
        The exit status: 0, or 2 after an error the user can mend.
    """

    def command() -> str:
        arguments = parse_arguments(argv)
        folder = evaluate(arguments)
        if folder is None:
            return ""
        report = (folder / "report.md").read_text(encoding="utf-8")
        return f"{report}\nwrote {folder}"

    return run_command(command)


def _place(arguments: EvaluationArguments) -> tuple[PartialState, torch.device]:
    """The processes, and the device of this one."""
    state = PartialState(cpu=arguments.device == "cpu")
    if arguments.device in ("auto", "cpu"):
        return state, torch.device("cpu") if arguments.device == "cpu" else state.device
    if state.num_processes > 1:
        raise ValueError(
            f"device is {arguments.device}, but each of {state.num_processes} processes has its own; auto."
        )
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
        raise ValueError(f"device is {arguments.device}, which is not here ({message}); correct --device.") from error
    return state, device


def _fitting(
    found: Contestants, arguments: EvaluationArguments, examples: list[Example]
) -> tuple[list[Example], list[System], dict[str, int]]:
    """The questions that fit the generator with every system, the systems, and how many each one left out."""
    systems = build_systems(found, arguments, examples)
    limit = getattr(found.model.config.generator_config, "max_position_embeddings", None)
    too_long = check_lengths(systems, examples, limit, arguments.max_new_tokens)
    if not too_long:
        return examples, systems, {}
    counts = {name: len(places) for name, places in too_long.items()}
    if arguments.too_long == "error":
        name, places = next(iter(too_long.items()))
        index, length = max(places, key=lambda place: place[1])
        others = f", and {len(places) - 1} more questions are too long" if len(places) > 1 else ""
        raise ValueError(
            f"question {examples[index].id!r} has a prompt of {length} tokens for {name}; with max_new_tokens="
            f"{arguments.max_new_tokens} that exceeds the generator's {limit} positions{others}. Lower --num_documents "
            f"or --max_new_tokens, leave {name} out of --baselines, or leave such questions out everywhere with "
            "--too_long skip."
        )
    left_out = {index for places in too_long.values() for index, _ in places}
    kept = [example for example in examples if example.index not in left_out]
    if not kept:
        raise ValueError(f"all {len(examples)} questions are too long ({counts}); lower --num_documents.")
    for index, example in enumerate(kept):
        example.index = index
    return kept, build_systems(found, arguments, kept), counts


def _new_folder(arguments: EvaluationArguments) -> Path:
    if arguments.output_dir is not None:
        folder = Path(arguments.output_dir)
    else:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        names = [Path(name).resolve().name.split(".")[0] for name in (arguments.model, arguments.data)]
        folder = Path("runs/evaluation") / "-".join([*names, now])
    folder.mkdir(parents=True)
    return folder


def _write_predictions(folder: Path, examples, answers, columns) -> None:
    rows = prediction_rows(examples, answers, columns)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / PREDICTIONS_NAME).write_text(text, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _settings(arguments: EvaluationArguments) -> dict[str, Any]:
    return {name: value for name, value in asdict(arguments).items() if name not in PRIVATE}
