"""What a finished run leaves: the model with its card, and what was measured."""

import importlib.metadata
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from modeling_scaledown import ScaleDownModel
from quantization_scaledown import is_quantized

from ..common.files import write_json
from .arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments

logger = logging.getLogger(__name__)

RESULTS_NAME = "all_results.json"  # as the scripts of transformers name it
RECORDED_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


def finish(
    model: ScaleDownModel,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: ScaleDownTrainingArguments,
    metrics: dict[str, float],
    num_examples: int | None,
) -> None:
    """Save the trained model for inference: LoRA merged on request, one type for all weights, card filled in.

    Args:
        model: The trained model; it is changed as it is saved.
        model_args: What was trained.
        data_args: What it learned from.
        args: How, and where to save.
        metrics: What came of it.
        num_examples: Rows it learned from, if known.
    """
    if model_args.merge_lora and model.config.weights_format == "full" and not is_quantized(model.generator):
        model.merge_lora()
    if not is_quantized(model.generator):
        for parameter in model.parameters():  # buffers, such as rotary frequencies, stay in 32 bits
            parameter.data = parameter.data.to(args.generator_dtype)
    model.card_fields = {
        "training": {
            "data": Path(data_args.train_file).name,
            "num_examples": num_examples,
            "settings": recorded_settings(model_args, data_args, args),
            "metrics": metrics,
            "versions": {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
            "hardware": torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU",
        }
    }
    model.eval().save_pretrained(args.output_dir)
    write_results(metrics, args.output_dir)


def write_results(metrics: dict[str, float], output_dir: str) -> None:
    """Write what a run measured; it comes last, since it says that the run is over.

    Args:
        metrics: What was measured.
        output_dir: The run's folder.
    """
    write_json(Path(output_dir) / RESULTS_NAME, metrics, indent=2, sort_keys=True)
    logger.info("Saved the model to %s", output_dir)


def recorded_settings(*arguments: Any) -> dict[str, Any]:
    """Settings that differ from the defaults, for the card; paths and whom to report to are nobody's business."""
    private = {
        "output_dir",
        "train_file",
        "eval_file",
        "cache_dir",
        "logging_dir",
        "report_to",
        "hub_token",
        "run_name",
        "resume_from_checkpoint",
        "disable_tqdm",
        "dataloader_num_workers",
        "dataloader_pin_memory",
    }
    settings = {}
    for group in arguments:
        for name, value in asdict(group).items():
            default = group.__dataclass_fields__[name].default
            unset = default is None and value is False  # filled in by the Trainer
            if name not in private and value != default and not unset and isinstance(value, str | int | float | bool):
                is_folder = name.endswith("_name_or_path") and Path(str(value)).exists()
                settings[name] = Path(str(value)).name if is_folder else value
    return settings
