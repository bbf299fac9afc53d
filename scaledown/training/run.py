"""Training of a ScaleDown model from backbones or from a checkpoint; `train.py` is its command line."""

import functools
import logging
import time
from collections.abc import Sequence
from functools import partial

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, Trainer, set_seed

from configuration_scaledown import ScaleDownConfig
from errors_scaledown import ScaleDownError
from modeling_scaledown import ScaleDownModel

from ..common.command_line import run_command, settings_checked_by_libraries
from .arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments, parse_arguments
from .build import build_model, lora_settings
from .collators import JointCollator
from .compression import compress_records
from .dry_run.report import dry_run
from .dry_run.skeleton import build_skeleton
from .finish import finish, write_results
from .reader import ReaderTrainer, add_reader_lora
from .record_checks import doubtful_records, keep_fitting
from .resume import begin, check_start
from .stages import cache_folder, fingerprint, prepare_stage, read_data
from .trainer import ScaleDownTrainer

logger = logging.getLogger(__name__)


def run(model_args: ModelArguments, data_args: DataArguments, args: ScaleDownTrainingArguments) -> dict[str, float]:
    """Run the stage that was asked for, or both stages of two-stage training.

    Args:
        model_args: The model to train.
        data_args: The data to learn from.
        args: How to train.

    Returns:
        What the last stage measured.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: As in `train` and `compress`.
    """
    if args.dry_run:
        raise ScaleDownError(
            "dry_run is done by scaledown.training.dry_run.report.dry_run, which train.py calls; run() trains."
        )
    if args.two_stage:
        _check_second_stage(model_args, data_args, args)
    metrics = {}
    for stage in ("compress", "generate") if args.two_stage else (args.stage,):
        args.stage = stage
        metrics = (
            compress(model_args, data_args, args) if stage == "compress" else train(model_args, data_args, args)[1]
        )
    return metrics


def _check_second_stage(model_args, data_args, args) -> None:
    """Find what would stop the stage generate before hours were spent on its cache."""
    args.stage = "generate"
    check_start(model_args, data_args, args)
    build_skeleton(model_args, args, args.generator_dtype, with_backbone=False)


class Patience(EarlyStoppingCallback):
    """Early stopping that goes on where it was, with the patience of the command that goes on."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Take the patience asked for; a checkpoint brings the one it was saved with."""
        self.early_stopping_patience = args.early_stopping_patience
        super().on_train_begin(args, state, control, **kwargs)


def train(
    model_args: ModelArguments, data_args: DataArguments, args: ScaleDownTrainingArguments
) -> tuple[ScaleDownModel, dict[str, float]]:
    """Train a model and save it, with processor and card, in `args.output_dir`.

    A run that was interrupted goes on from its last checkpoint when it is started again.

    Args:
        model_args: The model to train.
        data_args: The data to learn from.
        args: How to train; its `stage` is joint, pretrain, pointer, generate or reader.

    Returns:
        The trained model, as it was saved, and the metrics of the run.

    Raises:
        FileExistsError: `output_dir` holds a finished model.
        FileNotFoundError: There is no such data or checkpoint.
        ValueError: Arguments that contradict each other, or data that breaks the format.
    """
    if args.stage == "reader" and model_args.generator_name_or_path is None:
        raise ScaleDownError(
            f"The stage reader trains a language model, not the ScaleDown model {model_args.model_name_or_path}; set "
            "generator_name_or_path, and lora_name_or_path to go on from an adapter."
        )
    checkpoint = begin(model_args, data_args, args)
    set_seed(args.seed)
    load_backbone = partial(_load_backbone, model_args, args) if args.stage == "generate" else None
    train_data, eval_data, collator, model = prepare_stage(model_args, data_args, args)
    if args.stage == "reader":
        return _train_reader(model_args, args, train_data, eval_data, collator, model, checkpoint)
    if checkpoint is not None:  # which may be of another day than this
        date = ScaleDownConfig.from_pretrained(checkpoint).prompt_date
        model.config.prompt_date = model.processor.prompt_date = date or model.processor.prompt_date
    with settings_checked_by_libraries("The training cannot be set up"):
        trainer = ScaleDownTrainer(
            model=model,
            args=args,
            train_dataset=train_data,
            eval_dataset=eval_data,
            data_collator=collator,
            processing_class=model.processor,
            load_backbone=load_backbone,
        )
    log_parameters(model)
    metrics = _take_steps(trainer, checkpoint)
    if trainer.is_sharded:
        trainer.save_model(_internal_call=True)  # by all processes, each of which holds a part; without a push
    if args.should_save:
        if trainer.is_sharded:
            trainer.model = model = ScaleDownModel.from_pretrained(args.output_dir)
        elif load_backbone is not None:
            model.compressor.backbone = load_backbone()
        num_examples = len(train_data) if hasattr(train_data, "__len__") else None
        finish(model, model_args, data_args, args, metrics, num_examples)
        if args.push_to_hub:
            trainer.push_to_hub()
    return model, metrics


def compress(
    model_args: ModelArguments, data_args: DataArguments, args: ScaleDownTrainingArguments
) -> dict[str, float]:
    """Write the cache that the stage `generate` learns from, or what is missing of it.

    Args:
        model_args: The model whose compressor runs; its generator is not loaded.
        data_args: The data, and where its cache goes.
        args: How to compress.

    Returns:
        The cache's size.

    Raises:
        FileNotFoundError: There is no such data.
        CacheError: The cache was made for something else, or the disk is too small.
        ValueError: Arguments that contradict each other.
    """
    started = time.perf_counter()
    skeleton = build_model(model_args, args, with_generator=False, with_backbone=False)
    metrics = {"cache_bytes": 0.0, "cache_chunks": 0.0}

    @functools.cache
    def load_compressor() -> ScaleDownModel:
        return build_model(model_args, args, with_generator=False).to(args.device).eval()

    collate = JointCollator(skeleton.processor, data_args.max_answer_length)
    doubtful = doubtful_records(skeleton.processor, data_args.max_answer_length)
    for name, records in keep_fitting(read_data(data_args), collate, doubtful, data_args).items():
        plan = compress_records(
            load_compressor,
            skeleton.processor,
            skeleton.config,
            records,
            cache_folder(data_args, args) / name,
            fingerprint(skeleton, records, model_args, data_args),
            max_shard_size=data_args.max_shard_size,
            batch_size=data_args.compression_batch_size,
            num_workers=args.dataloader_num_workers,
            process_index=args.process_index,
            num_processes=args.world_size,
            wait_for_everyone=PartialState().wait_for_everyone,
        )
        metrics["cache_bytes"] += plan.num_bytes()
        metrics["cache_chunks"] += sum(shard.num_chunks for shard in plan.shards)
    return {**metrics, "compress_runtime": time.perf_counter() - started}


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
        arguments = parse_arguments(argv)
        if arguments[-1].dry_run:
            return dry_run(*arguments)
        metrics = run(*arguments)
        return "\n".join(f"{name:<28} {metrics[name]:.6g}" for name in sorted(metrics))

    return run_command(
        command, "The same command goes on from the last checkpoint; save_steps decides how many there are."
    )


def _train_reader(model_args, args, train_data, eval_data, collator, model, checkpoint):
    """Train the generator's LoRA on whole documents, and leave it as a PEFT adapter beside its tokenizer."""
    with settings_checked_by_libraries("The training cannot be set up"):
        reader = add_reader_lora(model, lora_settings(model_args), model_args.lora_name_or_path)
        trainer = ReaderTrainer(
            model=reader,
            args=args,
            train_dataset=train_data,
            eval_dataset=eval_data,
            data_collator=collator,
            processing_class=model.processor.tokenizer,
        )
    metrics = _take_steps(trainer, checkpoint)
    trainer.save_model()
    if args.should_save:
        write_results(metrics, args.output_dir)
    return reader, metrics


def _take_steps(trainer: Trainer, checkpoint: str | None) -> dict[str, float]:
    """Train from the start or from a checkpoint, and evaluate at the end where there is data for it."""
    if trainer.args.early_stopping_patience is not None:
        trainer.add_callback(Patience(trainer.args.early_stopping_patience))
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.eval_dataset is not None:
        metrics.update(trainer.evaluate())
    return metrics


def _load_backbone(model_args: ModelArguments, args: ScaleDownTrainingArguments) -> torch.nn.Module:
    """The frozen backbone of two-stage training, which only a whole model needs."""
    return build_model(model_args, args, with_generator=False).compressor.backbone
