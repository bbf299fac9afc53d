"""Where a run stands when its command is given: not begun, unfinished, or over."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch.optim import SGD
from transformers import get_scheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from errors_scaledown import ScaleDownError

from ..common.command_line import settings_checked_by_libraries
from ..common.files import write_json
from ..common.metrics import ANSWER_METRICS
from .arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments
from .finish import RESULTS_NAME
from .trainer import PARTS_OF_LOSS

logger = logging.getLogger(__name__)

RUN_NAME = "run.json"  # the settings of a run that is under way, or over


def begin(model_args: ModelArguments, data_args: DataArguments, args: ScaleDownTrainingArguments) -> str | None:
    """Begin a run that trains, or go on with it, and note its settings in its folder.

    Args:
        model_args: The model to train.
        data_args: The data to learn from.
        args: How to train, and where to save.

    Returns:
        The checkpoint to go on from, if any.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: As in `check_start`.
    """
    checkpoint = check_start(model_args, data_args, args)
    PartialState().wait_for_everyone()  # until all have looked
    if checkpoint is not None:
        logger.info("Going on from %s; choose another output_dir to start anew.", checkpoint)
    if args.should_save and args.resume_from_checkpoint is None:
        settings = _run_settings(model_args, data_args, args)
        write_json(Path(args.output_dir) / RUN_NAME, settings, indent=1)
    return checkpoint


def check_start(model_args: ModelArguments, data_args: DataArguments, args: ScaleDownTrainingArguments) -> str | None:
    """Check that a stage that trains can begin; nothing is written.

    Args:
        model_args: The model to train.
        data_args: The data to learn from.
        args: How to train, and where to save.

    Returns:
        The checkpoint to go on from, if any.

    Raises:
        FileExistsError: `output_dir` holds a finished model.
        FileNotFoundError: There is no such checkpoint.
        ValueError: Settings that contradict each other, or those of the unfinished run in `output_dir`.
    """
    if args.eval_strategy != "no" and data_args.eval_file is None:
        raise ScaleDownError(f"eval_strategy={args.eval_strategy.value} needs data to evaluate on; set eval_file.")
    _check_metric(args)
    with settings_checked_by_libraries(f"lr_scheduler_type={args.lr_scheduler_type.value}"):
        kwargs = args.lr_scheduler_kwargs
        get_scheduler(args.lr_scheduler_type, SGD([torch.zeros(1)]), 1, 2, scheduler_specific_kwargs=kwargs)
    if args.stage == "pretrain" and data_args.streaming and args.max_steps <= 0:
        raise ScaleDownError("streaming=true does not know how long the text is; set max_steps.")
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint is not None:
        if not Path(args.resume_from_checkpoint).is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint={args.resume_from_checkpoint} is not a folder.")
        if not (Path(args.resume_from_checkpoint) / TRAINER_STATE_NAME).is_file():
            raise FileNotFoundError(
                f"resume_from_checkpoint={args.resume_from_checkpoint} holds no {TRAINER_STATE_NAME}; name a folder "
                f"such as {PREFIX_CHECKPOINT_DIR}-500 of an earlier run, or leave it out: a run goes on by itself."
            )
        return args.resume_from_checkpoint
    started, settings = folder / RUN_NAME, _run_settings(model_args, data_args, args)
    begun = started.is_file()
    if (folder / RESULTS_NAME).is_file() or (not begun and (folder / "config.json").is_file()):
        raise FileExistsError(
            f"{folder} holds a finished model; choose another output_dir, or name it as model_name_or_path to train "
            "it further."
        )
    checkpoint = _last_whole_checkpoint(folder)
    if begun and checkpoint is not None:
        before = json.loads(started.read_text(encoding="utf-8"))
        names = {**before, **settings}
        changed = [
            f"{n} was {before.get(n)} and is {settings.get(n)}" for n in names if before.get(n) != settings.get(n)
        ]
        if changed:
            raise ScaleDownError(
                f"{folder} holds an unfinished run of other settings: {'; '.join(changed)}. Go back to those, choose "
                "another output_dir, or delete the folder to start anew."
            )
    return checkpoint


def _check_metric(args: ScaleDownTrainingArguments) -> None:
    """Find a misspelt metric before the first evaluation does, which may be hours away."""
    if args.metric_for_best_model is None:
        return
    measured = ["loss"]
    parts = {"reader": [], "pretrain": PARTS_OF_LOSS[:1], "pointer": PARTS_OF_LOSS[1:]}
    measured += parts.get(args.stage, PARTS_OF_LOSS)
    if args.predict_with_generate:
        measured += ANSWER_METRICS
    if args.metric_for_best_model.removeprefix("eval_") not in measured:
        raise ScaleDownError(
            f"metric_for_best_model={args.metric_for_best_model} is not measured by this run; expected one of "
            f"{', '.join(measured)}."
        )


def _run_settings(model_args, data_args, args) -> dict[str, Any]:
    """What must be the same for a run to go on; how it is spread over devices and how long it runs may change."""
    names = ("stage", "seed", "learning_rate", "compressor_learning_rate", "lr_scheduler_type", "weight_decay")
    settings = {**asdict(model_args), **{name: getattr(args, name) for name in names}}
    data_names = ("train_file", "max_train_examples", "max_answer_length")
    if args.stage == "pretrain":
        data_names += ("text_column", "dataset_config", "train_split", "streaming")
    for name in data_names:
        settings[name] = getattr(data_args, name)
    if data_args.too_long != "error":
        settings["too_long"] = data_args.too_long
    if Path(data_args.train_file).is_file():
        settings["bytes of train_file"] = Path(data_args.train_file).stat().st_size
    return json.loads(json.dumps(settings, default=str))


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    checkpoints = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(checkpoints, key=lambda path: -int(path.name.split("-")[-1])):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # the Trainer writes it last
            for file in path.glob("*.safetensors"):
                with safe_open(file, framework="pt"):
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("%s is not whole (%s); it is left aside.", path, error)
        else:
            return str(path)
    return None
