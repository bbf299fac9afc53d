"""Training of a ScaleDown model from backbones or from a checkpoint; `train.py` is its command line."""

import functools
import importlib.metadata
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch.optim import SGD
from transformers import EarlyStoppingCallback, get_scheduler, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from configuration_scaledown import ScaleDownConfig
from errors_scaledown import ScaleDownError
from modeling_scaledown import ScaleDownModel
from weights_scaledown import weights_fingerprint

from ..common.command_line import run_command, settings_checked_by_libraries, split_names
from ..common.devices import is_quantized, load_model
from ..data.records import atomic_writer, load_records
from .arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments, parse_arguments
from .cache import CachedDataset, open_plan
from .collators import GenerationCollator, JointCollator, PretrainingCollator
from .compression import cache_fingerprint, compress_records
from .pretraining import load_pretraining_data
from .reader import ReaderCollator, ReaderTrainer, add_reader_lora, start_lora_from
from .record_checks import check_documents, doubtful_passages, doubtful_records, keep_fitting, learns_from_positives
from .trainer import ScaleDownTrainer

logger = logging.getLogger(__name__)

CONFIG_ARGUMENTS = (
    "compressor_type",
    "num_compressor_layers",
    "num_memory_tokens",
    "compression_rate",
    "slot_pooling",
    "chunk_length",
    "max_query_length",
    "enable_reranking",
    "reranking_loss_weight",
    "projector_hidden_size",
    "system_prompt",
    "weights_format",
)
# What may change when a trained model is trained further; the others are built into its weights.
CHANGEABLE = ("compression_rate", "max_query_length", "reranking_loss_weight", "system_prompt", "weights_format")
LORA_ARGUMENTS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}
RESULTS_NAME = "all_results.json"  # as the scripts of transformers name it
RUN_NAME = "run.json"  # the settings of a run that is under way, or over
RECORDED_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


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
            "dry_run is told by scaledown.training.dry_run.dry_run.dry_run, which train.py calls; run() trains."
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
    from .dry_run.dry_run import build_on_meta  # which builds on this module

    args.stage = "generate"
    _look_around(model_args, data_args, args)
    build_on_meta(model_args, args, args.generator_dtype, with_backbone=False)


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
        args: How to train; its `stage` is joint, pretrain, generate or reader.

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
    checkpoint = _checkpoint_to_resume(model_args, data_args, args)
    set_seed(args.seed)
    with_backbone = args.stage not in ("generate", "reader")
    load_backbone = partial(_load_backbone, model_args, args) if args.stage == "generate" else None
    train_data, eval_data, collator, model = _prepare(model_args, data_args, args, with_backbone)
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
    if args.early_stopping_patience is not None:
        trainer.add_callback(Patience(args.early_stopping_patience))
    log_parameters(model)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if eval_data is not None:
        metrics.update(trainer.evaluate())
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
    for name, records in keep_fitting(_records(data_args), collate, doubtful, data_args).items():
        plan = compress_records(
            load_compressor,
            skeleton.processor,
            skeleton.config,
            records,
            _cache_folder(data_args, args) / name,
            _fingerprint(skeleton, records, model_args, data_args),
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


def build_model(
    model_args: ModelArguments,
    args: ScaleDownTrainingArguments,
    with_generator: bool = True,
    with_backbone: bool = True,
) -> ScaleDownModel:
    """Build or load the model, or a part of it, in the type the run computes in.

    Args:
        model_args: Backbones or checkpoint, and settings.
        args: Decide device and type.
        with_generator: Whether the generator is needed, with LoRA.
        with_backbone: Whether the compressor's backbone is.

    Returns:
        The model, its generator frozen but for LoRA.

    Raises:
        ValueError: Settings that contradict each other.
    """
    quantization = {"load_in_4bit": model_args.load_in_4bit, "load_in_8bit": model_args.load_in_8bit}
    quantized = with_generator and any(quantization.values())
    loading = {"dtype": args.generator_dtype, "with_generator": with_generator, "with_backbone": with_backbone}
    if model_args.attn_implementation:
        loading["attn_implementation"] = model_args.attn_implementation
    if quantized:
        loading.update(quantization)
        # A quantised generator cannot be moved afterwards, so it is loaded where it will run.
        loading["device_map"] = {"": args.device.index or 0} if args.device.type == "cuda" else None
    settings = {name: getattr(model_args, name) for name in CONFIG_ARGUMENTS}
    settings = {name: value for name, value in settings.items() if value is not None}
    if args.stage == "reader":  # which has no compressor; any generator has a first layer
        settings = {name: value for name, value in settings.items() if name == "system_prompt"}
        settings["num_compressor_layers"] = 1
    check_exist(model_args)
    unset_hf_deepspeed_config()  # so that weights are spread when all are there: LoRA and memory embeddings read them
    if model_args.model_name_or_path is not None:
        changes = {name: settings[name] for name in CHANGEABLE if name in settings and name != "weights_format"}
        name, revision = model_args.model_name_or_path, model_args.revision
        load = partial(ScaleDownModel.from_pretrained, name, revision=revision, **changes, **loading)
        model = load_model(load, name, "--model_name_or_path")
        model.config.weights_format = settings.get("weights_format", model.config.weights_format)
        model.config.check()
        check_settings(settings, model.config, model_args.model_name_or_path)
        if model.config.weights_format == "delta" and not model.config.generator_fingerprint:
            raise ScaleDownError(
                f"weights_format=delta needs a generator that is still the one of its repository, and that of "
                f"{model_args.model_name_or_path} is not: its LoRA was merged into it. Train with weights_format=full, "
                "or go on from a model that was trained with merge_lora=false."
            )
    else:
        settings["slot_pooling"] = choose_slot_pooling(model_args, args)
        model = _from_backbones(model_args, {**settings, **loading})
    keep_token_embeddings(model, model_args)
    if with_generator and args.stage != "reader":  # whose LoRA is an adapter of its own
        add_lora(model, model_args)
    if args.deepspeed_plugin is not None:
        args.deepspeed_plugin.set_deepspeed_weakref()
    return model


def _from_backbones(model_args: ModelArguments, settings: dict[str, Any]) -> ScaleDownModel:
    try:
        return ScaleDownModel.from_backbones(
            model_args.generator_name_or_path,
            model_args.compressor_name_or_path,
            revision=model_args.generator_revision,
            compressor_revision=model_args.compressor_revision,
            gguf_file=model_args.generator_gguf_file,
            compressor_gguf_file=model_args.compressor_gguf_file,
            **settings,
        )
    except ScaleDownError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        names = [("generator", model_args.generator_name_or_path), ("compressor", model_args.compressor_name_or_path)]
        named = " and ".join(f"{part}_name_or_path={name}" for part, name in names if name is not None)
        raise ScaleDownError(
            f"{named} cannot be loaded ({type(error).__name__}: {error}). Expected folders or names on the Hub; check "
            "the names, their kind and the connection."
        ) from error


def keep_token_embeddings(model: ScaleDownModel, model_args: ModelArguments) -> None:
    """Keep the token embeddings of the compressor's backbone from learning, where that is asked for.

    Args:
        model: The model; it is changed.
        model_args: Say whether they learn.
    """
    if model.compressor.backbone is not None and not model_args.train_token_embeddings:
        model.compressor.backbone.get_input_embeddings().requires_grad_(False)


def check_exist(model_args: ModelArguments) -> None:
    """Check that models meant as folders are there, before anybody's of that name is looked up on the Hub.

    Args:
        model_args: Names them.

    Raises:
        FileNotFoundError: One of them can only be a folder, and there is none.
    """
    for option in ("model_name_or_path", "generator_name_or_path", "compressor_name_or_path", "lora_name_or_path"):
        name = getattr(model_args, option) or ""
        # A name on the Hub is `name` or `owner/name`, and of a GGUF file `owner/name/file.gguf`.
        is_file = name.endswith(".gguf")
        meant = name.startswith(("runs/", ".", "/", "~")) or name.count("/") > 1 + is_file
        if meant and not (Path(name).is_file() if is_file else Path(name).is_dir()):
            made = "run the recipe that makes it first, or " if name.startswith("runs/") else ""
            raise FileNotFoundError(
                f"{option}={name} is not a {'file' if is_file else 'folder'} (looked from {Path.cwd()}); {made}name "
                "another. A dry run needs it too: it reads configuration and tokenizer."
            )


def check_settings(settings: dict[str, Any], config: Any, name_or_path: str) -> None:
    """Check that a trained model has the settings asked for.

    Args:
        settings: Fields of the configuration.
        config: The model's configuration.
        name_or_path: The model's, for the message.

    Raises:
        ValueError: It has others.
    """
    for name, value in settings.items():
        if value != getattr(config, name):
            raise ScaleDownError(
                f"{name}={value} cannot be changed in a trained model: {name_or_path} has {getattr(config, name)}. "
                "Leave it out, or start from backbones."
            )


def add_lora(model: ScaleDownModel, model_args: ModelArguments) -> None:
    """Add the LoRA layers asked for, or check that those a trained model has are they.

    Args:
        model: The model; it is changed.
        model_args: The settings of LoRA.

    Raises:
        ValueError: The model has LoRA layers with other settings.
    """
    settings = lora_settings(model_args)
    if settings.get("r") == 0:
        return
    if model_args.lora_name_or_path is not None:
        start_lora_from(model, model_args.lora_name_or_path)
    if model.config.lora_config is None:
        with settings_checked_by_libraries("The LoRA layers cannot be made"):
            model.add_lora(**settings)
        return
    for key, value in settings.items():
        if value != model.config.lora_config.get(key):
            raise ScaleDownError(
                f"The model's LoRA has {key}={model.config.lora_config.get(key)}, not {value}. Leave the option out, "
                "or merge its LoRA first (model.merge_lora(), then save) to begin a new one."
            )


def lora_settings(model_args: ModelArguments) -> dict[str, Any]:
    """The settings of LoRA that were asked for, by the names of `peft.LoraConfig`.

    Args:
        model_args: Holds them.

    Returns:
        Those that are set.
    """
    settings = {key: getattr(model_args, name) for name, key in LORA_ARGUMENTS.items()}
    settings = {key: value for key, value in settings.items() if value is not None}
    if "target_modules" in settings:
        settings["target_modules"] = _target_modules(settings["target_modules"])
    return settings


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
    if model_args.merge_lora and model.config.weights_format == "full" and not is_quantized(model):
        model.merge_lora()
    if not is_quantized(model):
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
    write_results(metrics, args.output_dir)


def write_results(metrics: dict[str, float], output_dir: str) -> None:
    """Write what a run measured; it comes last, since it says that the run is over.

    Args:
        metrics: What was measured.
        output_dir: The run's folder.
    """
    results = json.dumps(metrics, indent=2, sort_keys=True)
    (Path(output_dir) / RESULTS_NAME).write_text(results + "\n", encoding="utf-8")
    logger.info("Saved the model to %s", output_dir)


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
            from .dry_run.dry_run import dry_run  # which builds on this module

            return dry_run(*arguments)
        metrics = run(*arguments)
        return "\n".join(f"{name:<28} {metrics[name]:.6g}" for name in sorted(metrics))

    return run_command(
        command, "The same command goes on from the last checkpoint; save_steps decides how many there are."
    )


def _prepare(model_args, data_args, args, with_backbone):
    """Data, collator and model of a stage; the data is read first, so that its errors come before the waiting."""
    if args.stage == "pretrain":
        model = build_model(model_args, args)
        settings = (model.processor.compressor_tokenizer, model.config.chunk_length, data_args.text_column)
        files = {"train": (data_args.train_file, data_args.train_split)}
        if data_args.eval_file is not None:
            # A file has no splits, and a split of the training data may be named by its name alone.
            files["eval"] = (data_args.eval_file, data_args.eval_split)
        data = {
            name: load_pretraining_data(file, *settings, data_args.dataset_config, split, data_args.streaming)
            for name, (file, split) in files.items()
        }
        data = {name: _limit(rows, getattr(data_args, f"max_{name}_examples")) for name, rows in data.items()}
        collator = PretrainingCollator(model.processor)
        data = keep_fitting(data, collator, doubtful_passages(model.processor), data_args)
        return data["train"], data.get("eval"), collator, model
    data = _records(data_args)
    model = build_model(model_args, args, with_backbone=with_backbone)
    build = ReaderCollator if args.stage == "reader" else JointCollator
    whole = build(model.processor, data_args.max_answer_length)
    doubtful = doubtful_records(model.processor, data_args.max_answer_length, args.stage == "reader")
    data = keep_fitting(data, whole, doubtful, data_args)
    if args.stage != "reader":
        whole.scores_from_positives = learns_from_positives(data, model.config)
    if args.stage in ("joint", "reader"):
        if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            data["train"] = data["train"].map(_length, desc="Measuring lengths")
        return data["train"], data.get("eval"), whole, model
    for name, records in data.items():
        folder = _cache_folder(data_args, args) / name
        plan = open_plan(folder, _fingerprint(model, records, model_args, data_args))
        if plan is None:
            raise FileNotFoundError(
                f"{folder} holds no cache; make one with --stage compress, or use --two_stage true."
            )
        data[name] = CachedDataset(folder, plan, records)
    settings = (data_args.max_answer_length, True, whole.scores_from_positives)
    collator = GenerationCollator(model.processor, *settings)
    return data["train"], data.get("eval"), collator, model


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
    if args.early_stopping_patience is not None:
        trainer.add_callback(Patience(args.early_stopping_patience))
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if eval_data is not None:
        metrics.update(trainer.evaluate())
    trainer.save_model()
    if args.should_save:
        write_results(metrics, args.output_dir)
    return reader, metrics


def _records(data_args: DataArguments) -> dict[str, datasets.Dataset]:
    data = {"train": _limit(load_records(data_args.train_file), data_args.max_train_examples)}
    if data_args.eval_file is not None:
        data["eval"] = _limit(load_records(data_args.eval_file), data_args.max_eval_examples)
    check_documents(data, data_args)
    return data


def _length(record: dict[str, Any]) -> dict[str, int]:
    """Characters tell which records are of like length, and need no tokenizer."""
    return {"length": len(record["query"]) + sum(map(len, record["documents"]))}


def _limit(rows, limit: int | None):
    return rows if limit is None else rows.take(limit)


def _cache_folder(data_args: DataArguments, args: ScaleDownTrainingArguments) -> Path:
    return Path(data_args.cache_dir or Path(args.output_dir) / "cache")


def _fingerprint(model: ScaleDownModel, records: datasets.Dataset, model_args, data_args) -> dict[str, Any]:
    name, where = _backbone_source(model_args)
    weights = weights_fingerprint(name, **where)
    return cache_fingerprint(records, model.processor, model.config, weights, data_args.cache_dtype)


def _backbone_source(model_args: ModelArguments) -> tuple[str, dict[str, str | None]]:
    """Repository the compressor's backbone comes from, with its revision and file."""
    if model_args.model_name_or_path is not None:
        return model_args.model_name_or_path, {"revision": model_args.revision}
    return model_args.backbone_source("generator" if model_args.compressor_name_or_path is None else "compressor")


def choose_slot_pooling(model_args: ModelArguments, args: ScaleDownTrainingArguments) -> str:
    """Say what the slots of a model from backbones are: what was asked for, or what the stage can train.

    Args:
        model_args: May name a `slot_pooling`.
        args: Its `stage` decides.

    Returns:
        A value of the configuration's `slot_pooling`.

    Raises:
        ValueError: The stage cannot train what was asked for.
    """
    frozen = args.stage in ("compress", "generate")
    if frozen and model_args.slot_pooling == "memory_tokens":
        raise ScaleDownError(
            "slot_pooling=memory_tokens in two-stage training from backbones would cache what random memory embeddings "
            "give, and never train them. Leave it out (span_mean), or start from a trained model (model_name_or_path)."
        )
    return model_args.slot_pooling or ("span_mean" if frozen else "memory_tokens")


def _load_backbone(model_args: ModelArguments, args: ScaleDownTrainingArguments) -> torch.nn.Module:
    """The frozen backbone of two-stage training, which only a whole model needs."""
    return build_model(model_args, args, with_generator=False).compressor.backbone


def _look_around(model_args, data_args, args: ScaleDownTrainingArguments) -> str | None:
    """Check that a stage that trains can begin; returns the checkpoint it goes on from."""
    if args.eval_strategy != "no" and data_args.eval_file is None:
        raise ScaleDownError(f"eval_strategy={args.eval_strategy.value} needs data to evaluate on; set eval_file.")
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


def _checkpoint_to_resume(model_args, data_args, args: ScaleDownTrainingArguments) -> str | None:
    checkpoint = _look_around(model_args, data_args, args)
    PartialState().wait_for_everyone()  # until all have looked
    if checkpoint is not None:
        logger.info("Going on from %s; choose another output_dir to start anew.", checkpoint)
    if args.should_save and args.resume_from_checkpoint is None:
        settings = _run_settings(model_args, data_args, args)
        with atomic_writer(Path(args.output_dir) / RUN_NAME, overwrite=True) as stream:
            stream.write(json.dumps(settings, indent=1).encode("utf-8") + b"\n")
    return checkpoint


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


def _target_modules(names: str) -> str | list[str]:
    """peft takes `all-linear` as it is, names as a list; any other string it would read as a regular expression."""
    return names if names == "all-linear" else split_names(names)


def _recorded_settings(*arguments: Any) -> dict[str, Any]:
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
