"""What a stage that trains begins with: its data, the collator that makes batches of it, and its model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from modeling_scaledown import ScaleDownModel
from weights_scaledown import weights_fingerprint

from ..data.records import load_records
from .arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments
from .build import build_model
from .cache import CachedDataset, open_plan
from .collators import GenerationCollator, JointCollator, PointerCollator, PretrainingCollator
from .compression import cache_fingerprint
from .pretraining import load_pretraining_data
from .reader import ReaderCollator
from .record_checks import (
    check_answers_stand_in_documents,
    check_documents,
    doubtful_passages,
    doubtful_records,
    has_scores,
    keep_fitting,
    learns_from_positives,
    with_documents,
)
from .sampling import record_length


def prepare_stage(
    model_args: ModelArguments, data_args: DataArguments, args: ScaleDownTrainingArguments
) -> tuple[Any, Any, Callable, ScaleDownModel]:
    """Make what a stage trains with; the data is read first, so that its errors come before the waiting.

    Args:
        model_args: The model to train.
        data_args: The data to learn from.
        args: Its `stage` is joint, pretrain, pointer, generate or reader.

    Returns:
        Rows to train on, rows to evaluate on (or None), the collator, and the model.

    Raises:
        FileNotFoundError: There is no such data, or no cache of it for the stage `generate`.
        ValueError: Arguments that contradict each other, or data that breaks the format.
    """
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
    data = read_data(data_args)
    model = build_model(model_args, args, with_backbone=args.stage in ("joint", "pointer"))
    if args.stage == "pointer":
        data = with_documents(data, data_args)
    builders = {"reader": ReaderCollator, "pointer": PointerCollator}
    whole = builders.get(args.stage, JointCollator)(model.processor, data_args.max_answer_length)
    doubtful = doubtful_records(model.processor, data_args.max_answer_length, args.stage == "reader")
    data = keep_fitting(data, whole, doubtful, data_args)
    if args.stage != "reader":
        whole.scores_from_positives = learns_from_positives(data, model.config)
        if model.config.slot_pooling == "pointer" and model.config.pointer_loss_weight > 0:
            scored = whole.scores_from_positives or has_scores(data["train"])
            learns_scores = model.config.enable_reranking and model.config.reranking_loss_weight > 0 and scored
            needed = args.stage == "pointer" and not learns_scores
            check_answers_stand_in_documents(data["train"], data_args, needed)
    if args.stage in ("joint", "pointer", "reader"):
        if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            lengths = [record_length(record, args.stage) for record in data["train"]]
            data["train"] = data["train"].add_column("length", lengths)
        return data["train"], data.get("eval"), whole, model
    for name, records in data.items():
        folder = cache_folder(data_args, args) / name
        plan = open_plan(folder, fingerprint(model, records, model_args, data_args))
        if plan is None:
            raise FileNotFoundError(
                f"{folder} holds no cache; make one with --stage compress, or use --two_stage true."
            )
        data[name] = CachedDataset(folder, plan, records)
    settings = (data_args.max_answer_length, True, whole.scores_from_positives)
    collator = GenerationCollator(model.processor, *settings)
    return data["train"], data.get("eval"), collator, model


def read_data(data_args: DataArguments) -> dict[str, datasets.Dataset]:
    """Read the records to train on, and those to evaluate on where they are named.

    Args:
        data_args: Names the files.

    Returns:
        Records by `train` and `eval`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It breaks the format.
    """
    data = {"train": _limit(load_records(data_args.train_file), data_args.max_train_examples)}
    if data_args.eval_file is not None:
        data["eval"] = _limit(load_records(data_args.eval_file), data_args.max_eval_examples)
    check_documents(data, data_args)
    return data


def _limit(rows, limit: int | None):
    return rows if limit is None else rows.take(limit)


def cache_folder(data_args: DataArguments, args: ScaleDownTrainingArguments) -> Path:
    """The folder of the cache of two-stage training."""
    return Path(data_args.cache_dir or Path(args.output_dir) / "cache")


def fingerprint(
    model: ScaleDownModel, records: datasets.Dataset, model_args: ModelArguments, data_args: DataArguments
) -> dict[str, Any]:
    """What a cache was made of: `cache_fingerprint` with the weights of the run's frozen backbone."""
    name, where = _backbone_source(model_args)
    weights = weights_fingerprint(name, **where)
    return cache_fingerprint(records, model.processor, model.config, weights, data_args.cache_dtype)


def _backbone_source(model_args: ModelArguments) -> tuple[str, dict[str, str | None]]:
    """Repository the compressor's backbone comes from, with its revision and file."""
    if model_args.model_name_or_path is not None:
        return model_args.model_name_or_path, {"revision": model_args.revision}
    return model_args.backbone_source("generator" if model_args.compressor_name_or_path is None else "compressor")
