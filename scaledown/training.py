"""Training of a ScaleDown model from backbones or from a checkpoint; `train.py` is its command line."""

import importlib.metadata
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_scaledown import ScaleDownModel

from .arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments, parse_arguments
from .collators import JointCollator
from .command_line import run_command
from .records import load_records
from .trainer import ScaleDownTrainer

logger = logging.getLogger(__name__)

CONFIG_ARGUMENTS = (
    "compressor_type",
    "num_compressor_layers",
    "num_memory_tokens",
    "compression_rate",
    "chunk_length",
    "max_query_length",
    "enable_reranking",
    "reranking_loss_weight",
    "projector_hidden_size",
    "system_prompt",
    "weights_format",
)
RESULTS_NAME = "all_results.json"  # as the scripts of transformers name it
RECORDED_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


def train(
    model_args: ModelArguments, data_args: DataArguments, args: ScaleDownTrainingArguments
) -> tuple[ScaleDownModel, dict[str, float]]:
    """Train a model and save it, with processor and card, in `args.output_dir`.

    A run that was interrupted goes on from its last checkpoint when it is started again.

    Args:
        model_args: The model to train.
        data_args: The data to learn from.
        args: How to train.

    Returns:
        The trained model, as it was saved, and the metrics of the run.

    Raises:
        FileExistsError: `output_dir` holds a finished model.
        FileNotFoundError: There is no such data or checkpoint.
        ValueError: Arguments that contradict each other, or data that breaks the format.
    """
    checkpoint = _checkpoint_to_resume(args)
    train_data = _load(data_args.train_file, data_args.max_train_examples)
    eval_data = _load(data_args.eval_file, data_args.max_eval_examples) if data_args.eval_file else None
    if args.eval_strategy != "no" and eval_data is None:
        raise ValueError(f"eval_strategy={args.eval_strategy.value} needs data to evaluate on; set eval_file.")
    set_seed(args.seed)
    model = build_model(model_args, args)
    trainer = ScaleDownTrainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=JointCollator(model.processor, data_args.max_answer_length),
        processing_class=model.processor,
    )
    log_parameters(model)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if eval_data is not None:
        metrics.update(trainer.evaluate())
    if args.should_save:
        finish(model, model_args, data_args, args, metrics, len(train_data))
        if args.push_to_hub:
            trainer.push_to_hub()
    return model, metrics


def build_model(model_args: ModelArguments, args: ScaleDownTrainingArguments) -> ScaleDownModel:
    """Build or load the model, its generator in the type the run computes in.

    Args:
        model_args: Backbones or checkpoint, and settings.
        args: Decide device and type.

    Returns:
        The model, its generator frozen but for LoRA.

    Raises:
        ValueError: Settings that contradict each other.
    """
    quantization = {"load_in_4bit": model_args.load_in_4bit, "load_in_8bit": model_args.load_in_8bit}
    attention = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    # A quantised generator cannot be moved afterwards, so it is loaded where it will run.
    device_map = {"": args.device.index or 0} if any(quantization.values()) and args.device.type == "cuda" else None
    if model_args.model_name_or_path is not None:
        model = ScaleDownModel.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.revision,
            dtype=args.generator_dtype,
            device_map=device_map,
            **quantization,
            **attention,
        )
    else:
        model = ScaleDownModel.from_backbones(
            model_args.generator_name_or_path,
            model_args.compressor_name_or_path,
            revision=model_args.generator_revision,
            compressor_revision=model_args.compressor_revision,
            dtype=args.generator_dtype,
            device_map=device_map,
            **quantization,
            **attention,
            **{name: getattr(model_args, name) for name in CONFIG_ARGUMENTS},
        )
    if model.config.lora_config is None and model_args.lora_r > 0:
        model.add_lora(
            r=model_args.lora_r,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules=_target_modules(model_args.lora_target_modules),
        )
    return model


def finish(
    model: ScaleDownModel,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: ScaleDownTrainingArguments,
    metrics: dict[str, float],
    num_examples: int,
) -> None:
    """Save the trained model for inference: LoRA merged on request, one type for all weights, card filled in.

    Args:
        model: The trained model; it is changed as it is saved.
        model_args: What was trained.
        data_args: What it learned from.
        args: How, and where to save.
        metrics: What came of it.
        num_examples: Questions it learned from.
    """
    if model_args.merge_lora and model.config.weights_format == "full" and not _is_quantized(model):
        model.merge_lora()
    if not _is_quantized(model):
        for parameter in model.parameters():  # buffers, such as rotary frequencies, stay in 32 bits
            parameter.data = parameter.data.to(args.generator_dtype)
    model.card_fields = {
        "training": {
            "data": Path(data_args.train_file).name,
            "num_examples": num_examples,
            "settings": _recorded_settings(model_args, data_args, args),
            "metrics": metrics,
            "versions": {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
            "hardware": torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU",
        }
    }
    model.eval().save_pretrained(args.output_dir)
    # Last, since it says that the run is over.
    results = json.dumps(metrics, indent=2, sort_keys=True)
    (Path(args.output_dir) / RESULTS_NAME).write_text(results + "\n", encoding="utf-8")
    logger.info("Saved the model to %s", args.output_dir)


def log_parameters(model: ScaleDownModel) -> None:
    """Log how many parameters of each part are trained and how many are frozen."""
    for name, part in (("compressor", model.compressor), ("generator", model.generator)):
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        total = sum(p.numel() for p in part.parameters())
        logger.info("%s: %s parameters trained, %s frozen", name, f"{trained:,}", f"{total - trained:,}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `train.py`.

    Args:
        argv: Its arguments; the command line by default.

    Returns:
        The exit status: 0, or 2 after an error the user can mend.
    """

    def command() -> str:
        _, metrics = train(*parse_arguments(argv))
        return "\n".join(f"{name:<28} {metrics[name]:.6g}" for name in sorted(metrics))

    return run_command(command)


def _load(path: str, limit: int | None) -> datasets.Dataset:
    records = load_records(path)
    return records if limit is None else records.select(range(min(limit, len(records))))


def _checkpoint_to_resume(args: ScaleDownTrainingArguments) -> str | None:
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint is not None:
        if not Path(args.resume_from_checkpoint).is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint={args.resume_from_checkpoint} is not a folder.")
        return args.resume_from_checkpoint
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if (folder / RESULTS_NAME).is_file() or (checkpoint is None and (folder / "config.json").is_file()):
        raise FileExistsError(
            f"{folder} holds a finished model; choose another output_dir, or name it as model_name_or_path to train "
            "it further."
        )
    if checkpoint is not None:
        logger.info("Going on from %s; choose another output_dir to start anew.", checkpoint)
    return checkpoint


def _target_modules(names: str) -> str | list[str]:
    """peft takes `all-linear` as it is, names as a list; any other string it would read as a regular expression."""
    return names if names == "all-linear" else [name.strip() for name in names.split(",")]


def _is_quantized(model: ScaleDownModel) -> bool:
    return getattr(model.generator, "hf_quantizer", None) is not None


def _recorded_settings(*arguments: Any) -> dict[str, Any]:
    """Settings that differ from the defaults, for the card; paths and whom to report to are nobody's business."""
    private = {"output_dir", "train_file", "eval_file", "logging_dir", "report_to", "hub_token", "run_name"}
    settings = {}
    for group in arguments:
        for name, value in asdict(group).items():
            default = group.__dataclass_fields__[name].default
            if name not in private and value != default and isinstance(value, str | int | float | bool):
                settings[name] = value
    return settings
