"""The model that a run would train, without weights: only configurations and tokenizers are read."""

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer

from backbones_scaledown import check_compressor, check_generator
from configuration_scaledown import ScaleDownConfig
from errors_scaledown import ScaleDownError
from families_scaledown import language_model_config
from gguf_scaledown import read_config
from modeling_scaledown import ScaleDownModel
from processing_scaledown import PROCESSOR_FIELDS, ScaleDownProcessor

from ...common.adapters import adapter_settings
from ...common.loading import load_model
from ...common.tracing import QUANTIZED_BYTES, build_on_meta
from ..arguments import ModelArguments, ScaleDownTrainingArguments
from ..build import (
    CHANGEABLE,
    STAGES_WITHOUT_LORA,
    add_lora,
    check_exist,
    check_settings,
    check_stage,
    choose_slot_pooling,
    config_settings,
    keep_token_embeddings,
    lora_settings,
)
from ..reader import add_reader_lora

READ = "configuration and tokenizer are all that a dry run reads"


def build_skeleton(
    model_args: ModelArguments,
    args: ScaleDownTrainingArguments,
    dtype: torch.dtype,
    with_generator: bool = True,
    with_backbone: bool = True,
) -> ScaleDownModel:
    """Build the model a stage trains on `meta`: as `scaledown.training.build.build_model`, but without weights.

    Args:
        model_args: Backbones or checkpoint, and settings.
        args: The stage decides what slots are.
        dtype: Type of what is frozen.
        with_generator: Whether the stage has the generator, with LoRA.
        with_backbone: Whether it has the compressor's backbone.

    Returns:
        The model, with its processor, in training mode.

    Raises:
        OSError: There is no such model.
        ValueError: Settings that contradict each other.
    """
    check_exist(model_args)
    settings = config_settings(model_args, args.stage)
    if model_args.model_name_or_path is not None:
        config, processor = _trained(model_args, settings)
    else:
        settings["slot_pooling"] = choose_slot_pooling(model_args, args)
        config, processor = _from_backbones(model_args, settings)
    # Other kernels keep what sdpa keeps.
    attention = "eager" if model_args.attn_implementation == "eager" else "sdpa"
    check_stage(config, args.stage)
    model = build_on_meta(config, attention, with_generator=with_generator, with_backbone=with_backbone)
    with torch.device("meta"):
        keep_token_embeddings(model, model_args)
        if with_generator and args.stage not in STAGES_WITHOUT_LORA:
            add_lora(model, model_args)
    for parameter in model.parameters():
        trained = parameter.requires_grad and args.stage != "compress"  # as ScaleDownTrainer holds what it trains
        parameter.data = parameter.data.to(torch.float32 if trained else dtype)
    if with_generator and (model_args.load_in_4bit or model_args.load_in_8bit):
        _mark_quantized(model.generator, model_args.load_in_4bit)
    model.processor = processor
    return model.train()


def build_reader(model: ScaleDownModel, model_args: ModelArguments) -> PeftModel:
    """Put a reader's LoRA around the generator of a skeleton.

    Args:
        model: What `build_skeleton` returned for the stage reader.
        model_args: The settings of LoRA, or the adapter to go on with.

    Returns:
        What the stage reader trains, on `meta`, in training mode.

    Raises:
        ScaleDownError: The adapter to go on with is none.
    """
    adapter = model_args.lora_name_or_path
    settings = lora_settings(model_args) if adapter is None else adapter_settings(adapter)
    with torch.device("meta"):
        reader = add_reader_lora(model, settings)
    for parameter in reader.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return reader.train()


def _trained(model_args: ModelArguments, settings: dict[str, Any]) -> tuple[Any, ScaleDownProcessor]:
    name, revision = model_args.model_name_or_path, model_args.revision
    changes = {key: settings[key] for key in CHANGEABLE if key in settings}
    option = f"--model_name_or_path, whose {READ},"
    config = load_model(lambda: ScaleDownConfig.from_pretrained(name, revision=revision, **changes), name, option)
    check_settings(settings, config, name)
    processor = load_model(lambda: ScaleDownProcessor.from_pretrained(name, revision=revision), name, option)
    for key in PROCESSOR_FIELDS:
        if key in changes:
            setattr(processor, key, changes[key])
    return config, processor


def _from_backbones(model_args: ModelArguments, settings: dict[str, Any]) -> tuple[Any, ScaleDownProcessor]:
    names = [model_args.backbone_source("generator")]
    if model_args.compressor_name_or_path is not None:
        names.append(model_args.backbone_source("compressor"))
    kind = settings.get("compressor_type", "n_layers")
    if (len(names) == 1) != (kind == "n_layers"):
        raise ScaleDownError(
            f"compressor_name_or_path={model_args.compressor_name_or_path} does not go with compressor_type={kind}: "
            "n_layers copies the generator's own layers and takes no compressor, the other types need one."
        )
    options = [f"--{part}_name_or_path, whose {READ}," for part in ("generator", "compressor")]
    configs = [
        load_model(partial(read_config, name, where), name, option)
        for (name, where), option in zip(names, options, strict=False)
    ]
    for (name, _), config, check in zip(names, configs, (check_generator, check_compressor), strict=False):
        check(name, config)
    tokenizers = [
        load_model(partial(AutoTokenizer.from_pretrained, name, **where), name, option)
        for (name, where), option in zip(names, options, strict=False)
    ]
    config = ScaleDownConfig(
        **settings,
        generator_config=language_model_config(configs[0]),
        compressor_config=configs[1] if len(configs) > 1 else None,
    )
    return config, ScaleDownProcessor.from_config(config, *tokenizers)


def _mark_quantized(generator: nn.Module, in_4bit: bool) -> None:
    """bitsandbytes packs the weights of linear layers: NF4 with a scale per 64 values, or int8 with one per row."""
    for name, module in generator.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name and module is not generator.get_output_embeddings():
            count = module.weight.numel()
            size = count // 2 + count // 64 * 4 if in_4bit else count + module.weight.shape[0] * 4
            setattr(module.weight, QUANTIZED_BYTES, size)
