"""Evaluation of a model; `evaluate.py` is its command line.

data ──► length check ──► answers of all systems, timed ──► metrics, intervals ──► judge ──► report, plots, card
"""

import datetime
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from errors_scaledown import ScaleDownError

from ..common.command_line import run_command
from ..common.devices import check_processes, find_device, must_use_cpu
from ..common.environment import describe_environment
from ..data.teachers.answers import TeacherError
from .answering import answer_all
from .arguments import EvaluationArguments, default_name, parse_arguments
from .bootstrap import Bootstrap
from .card import check_card, update_card
from .contestants import Contestants, build_systems, check_lengths, load_contestants
from .data import Example, describe_asked, list_counts, load_data
from .judge import Judge, agreement, compare_answers, grade_answers
from .plots import plot_comparison
from .report import COMPARISON_NAME, REPORT_NAME, write_comparison
from .results import (
    break_down,
    check_fields,
    compare_systems,
    measured_compression,
    rank_documents,
    score_answers,
    summarize_systems,
)
from .resuming import deciding_settings, keep_answers
from .run_folder import EvaluationRun, read_metrics
from .systems import MODEL, System

logger = logging.getLogger(__name__)

COMPARISON_PLOT = "comparison.png"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "ir-measures", "numpy")
# Options that name places of this machine, which are nobody's business.
PRIVATE = (
    "model",
    "generator",
    "reader",
    "data",
    "output_dir",
    "compare",
    "rejudge",
    "update_card",
    "judge_cache",
    "judge_url",
    "judge_api_key_env",
)


def evaluate(arguments: EvaluationArguments) -> Path | None:
    """Measure a model or have earlier answers judged, and write a folder; compare runs where that is asked for.

    Args:
        arguments: Model, data, baselines and where to write.

    Returns:
        The folder; None in all processes but the first.

    Raises:
        FileExistsError: The output folder exists.
        FileNotFoundError: There is no such data.
        ValueError: The model, the data or an earlier run cannot be read, a prompt is too long, memory does not suffice,
            or the judge does not answer.
    """
    earlier = [(folder, read_metrics(folder)) for folder in arguments.compare or []]  # before the work, not after it
    if arguments.update_card:
        check_card(arguments.model)
    judge = _open_judge(arguments)
    run = None
    if arguments.rejudge is not None:
        run = EvaluationRun.read(arguments.rejudge)
    elif arguments.model is not None:
        run = ask(arguments)
        if run is None:
            return None
    folder = _new_folder(arguments)
    if run is not None:
        run.write(folder)  # before the judge, who may be out
        if run.kept_in is not None:
            shutil.rmtree(run.kept_in, ignore_errors=True)
        if judge is not None:
            _judge(run, judge, arguments, folder)
            run.write(folder)
        if arguments.update_card:
            update_card(arguments.model, run.metrics)
        earlier.append((str(folder), run.metrics))
    if arguments.compare is not None:
        named = list(zip(_names([path for path, _ in earlier]), (metrics for _, metrics in earlier), strict=True))
        write_comparison(folder, named, COMPARISON_PLOT)
        plot_comparison(folder / COMPARISON_PLOT, named)
    return folder


def ask(arguments: EvaluationArguments) -> EvaluationRun | None:
    """Ask a model and its baselines, and measure the answers.

    Args:
        arguments: Model, data and baselines.

    Returns:
        The run; None in all processes but the first.

    Raises:
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
        arguments.closed_book,
    )
    check_fields(data.examples, arguments.group_fields)
    found = load_contestants(arguments, device)
    examples, systems, too_long = _fitting(found, arguments, data.examples)
    environment = describe_environment(PACKAGES, device, state.num_processes)
    asked = {**data.description, **(describe_asked(examples) if too_long else {})}
    settings = deciding_settings(arguments, found, asked["sha256"], environment)
    with keep_answers(arguments, settings, state) as (kept_in, kept):
        answers, batch_sizes = answer_all(systems, examples, arguments.batch_size, device, state, kept)
    # The other processes are done, and the first must not wait for them, nor they for it: a judge may take its time.
    state.wait_for_everyone()
    state.destroy_process_group()
    if not state.is_main_process:
        return None

    bootstrap = Bootstrap(arguments.resamples, arguments.seed)
    scores = [answer.scores for answer in answers[MODEL]]
    reranking, note = rank_documents(examples, scores, bootstrap)
    notes = [*found.notes, *([note] if note else [])]
    if dropped := data.description["dropped"]:
        notes.append(f"Questions of the data that were left out: {list_counts(dropped)}.")
    if kept.num_earlier:
        notes.append("The run was stopped and resumed; wall_seconds is of its last part.")
    if too_long:
        counts = list_counts(too_long)
        notes.append(f"Questions whose prompt exceeds the generator's context were left out everywhere: {counts}.")
    run = EvaluationRun(
        examples=examples,
        texts={name: [answer.text for answer in given] for name, given in answers.items()},
        scores=scores,
        columns=score_answers(examples, answers),
        metrics={
            "model": {
                **found.description,
                "measured_compression": asdict(measured_compression(answers[MODEL], bootstrap)),
            },
            "data": {**asked, "num_asked": len(examples), "too_long": too_long},
            "reranking": reranking,
            "notes": notes,
            "settings": {name: value for name, value in asdict(arguments).items() if name not in PRIVATE},
            "batch_sizes": batch_sizes,
            **environment,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "wall_seconds": time.perf_counter() - started,
        },
        num_documents=[len(example.documents) for example in examples],
        kept_in=kept_in,
    )
    _summarize(run, bootstrap, arguments.group_fields)
    return run


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
        reports = [folder / name for name in (REPORT_NAME, COMPARISON_NAME)]
        texts = [path.read_text(encoding="utf-8") for path in reports if path.is_file()]
        return "\n".join([*texts, f"wrote {folder}"])

    return run_command(command)


def _place(arguments: EvaluationArguments) -> tuple[PartialState, torch.device]:
    """The processes, and the device of this one."""
    state = PartialState(cpu=arguments.device == "cpu" or must_use_cpu())
    check_processes(state.num_processes)
    if arguments.device in ("auto", "cpu"):
        return state, torch.device("cpu") if arguments.device == "cpu" else state.device
    if state.num_processes > 1:
        raise ScaleDownError(
            f"device is {arguments.device}, but each of {state.num_processes} processes has its own; auto."
        )
    return state, find_device(arguments.device)


def _fitting(
    found: Contestants, arguments: EvaluationArguments, examples: list[Example]
) -> tuple[list[Example], list[System], dict[str, int]]:
    """The questions that fit the generator with every system, the systems, and how many each one left out."""
    systems = build_systems(found, arguments, examples)
    limit = getattr(found.model.config.generator_config, "max_position_embeddings", None)
    counts: Counter[str] = Counter()
    # Again after each time, since shuffled_documents draws from the questions that are left.
    while too_long := check_lengths(systems, examples, limit, arguments.max_new_tokens):
        if arguments.too_long == "error":
            raise ScaleDownError(_too_long(too_long, arguments, examples, limit))
        counts.update({name: len(places) for name, places in too_long.items()})
        left_out = {index for places in too_long.values() for index, _ in places}
        kept = [example for example in examples if example.index not in left_out]
        if not kept:
            raise ScaleDownError(f"all {len(examples)} questions are too long ({dict(counts)}); lower --num_documents.")
        for index, example in enumerate(kept):
            example.index = index
        examples, systems = kept, build_systems(found, arguments, kept)
    return examples, systems, dict(counts)


def _too_long(
    too_long: dict[str, list[tuple[int, int]]], arguments: EvaluationArguments, examples: list[Example], limit: int
) -> str:
    """Says which question is longest, and what to do."""
    name, places = next(iter(too_long.items()))
    index, length = max(places, key=lambda place: place[1])
    others = f", and {len(places) - 1} more questions are too long" if len(places) > 1 else ""
    return (
        f"question {examples[index].id!r} has a prompt of {length} tokens for {name}; with max_new_tokens="
        f"{arguments.max_new_tokens} that exceeds the generator's {limit} positions{others}. Lower --num_documents "
        f"or --max_new_tokens, leave {name} out of --baselines, or leave such questions out everywhere with "
        "--too_long skip."
    )


def _new_folder(arguments: EvaluationArguments) -> Path:
    if arguments.output_dir is not None:
        folder = Path(arguments.output_dir)
    else:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = Path(f"{default_name(arguments)}-{now}")
    folder.mkdir(parents=True)
    return folder


def _summarize(run: EvaluationRun, bootstrap: Bootstrap, fields: Sequence[str]) -> None:
    """Work out all that depends on the values per question."""
    run.metrics["systems"] = summarize_systems(run.columns, bootstrap)
    run.metrics["against_full_text"] = compare_systems(run.columns, bootstrap)
    run.metrics["groups"] = break_down(run.columns, run.examples, fields, bootstrap)


def _open_judge(arguments: EvaluationArguments) -> Judge | None:
    if arguments.judge is None:
        return None
    return Judge(
        arguments.judge_url,
        arguments.judge,
        arguments.judge_api_key_env,
        arguments.judge_concurrency,
        max_tokens=arguments.judge_max_tokens,
        seed=arguments.seed,
        extra_body=arguments.judge_request,
    )


def _judge(run: EvaluationRun, judge: Judge, arguments: EvaluationArguments, folder: Path) -> None:
    """Add grades of all answers, their agreement with exact match, and comparisons in pairs."""
    cache = Path(arguments.judge_cache)
    before = run.metrics["settings"]
    bootstrap = Bootstrap(before["resamples"], before["seed"])
    found: dict[str, Any] = {"model": arguments.judge, "agreement_with_exact_match": {}, "pairs": {}}
    try:
        for system, texts in run.texts.items():
            run.columns[system]["judge"] = grade_answers(judge, cache, run.examples, texts)
            grades = run.columns[system]["judge"], run.columns[system]["exact_match"]
            found["agreement_with_exact_match"][system] = agreement(*grades)
        for other in arguments.judged_against:
            if other not in run.texts:
                raise ScaleDownError(f"judge_against names {other!r}, which {arguments.rejudge} has no answers of.")
            values = compare_answers(judge, cache, run.examples, run.texts[MODEL], run.texts[other])
            decided = [value for value in values if not math.isnan(value)]
            found["pairs"][other] = {
                "win_rate": asdict(bootstrap.mean(values, share=True)),
                "wins": sum(value > 0.5 for value in decided),
                "ties": decided.count(0.5),
                "losses": sum(value < 0.5 for value in decided),
                "undecided": len(values) - len(decided),
            }
    except TeacherError as error:
        raise ScaleDownError(
            f"{error} All but the judgements is in {folder}; --rejudge {folder} with the same judge goes on."
        ) from error
    run.metrics["judge"] = found
    fields = arguments.group_fields or list(run.metrics["groups"])
    check_fields(run.examples, fields)
    _summarize(run, bootstrap, fields)


def _names(folders: Sequence[str]) -> list[str]:
    """The folders' own names, with those above where two are alike."""
    paths = [Path(folder).resolve() for folder in folders]
    short = [path.name for path in paths]
    return [f"{path.parent.name}/{path.name}" if short.count(path.name) > 1 else path.name for path in paths]
