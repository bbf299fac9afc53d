"""What a run would train and need, told before any weights are downloaded: `train.py RECIPE --dry_run true`.

Only configurations and tokenizers are read. The model is built on `meta` as training would have it, and one step of
training is traced there (`scaledown.common.tracing`).
"""

import math
import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from backbones_scaledown import check_compressor, check_generator
from compressor_scaledown import CHUNK_INPUTS
from configuration_scaledown import ScaleDownConfig
from errors_scaledown import ScaleDownError
from gguf_scaledown import read_config
from modeling_scaledown import ScaleDownModel
from processing_scaledown import PROCESSOR_FIELDS, ScaleDownProcessor

from ...common.devices import load_model
from ...common.tracing import QUANTIZED_BYTES, inference_peak, storage_bytes, training_peak
from ..arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments
from ..cache import format_size
from ..run import (
    CHANGEABLE,
    CONFIG_ARGUMENTS,
    add_lora,
    check_exist,
    check_settings,
    choose_slot_pooling,
    keep_token_embeddings,
)
from .reading import Reading, read_sample

PARTS = ("compressor backbone", "memory embeddings", "projector", "reranking head", "generator", "LoRA")
# Compared with where there is no GPU.
COMMON_SIZES = (16, 24, 40, 80)
# Of a GPU's memory, what the driver, the libraries' work spaces and the allocator's gaps take: an allowance, not
# measured here.
RESERVE = 10**9


@dataclass(frozen=True)
class Memory:
    """Bytes on a device at the moment of a step that needs most.

    Args:
        weights: Of all parts, in the types they are held in.
        gradients: Of what is trained, in 32 bits; twice where processes exchange them.
        optimizer: The optimizer's state. These three are a device's share where the model is spread over several.
        activations: What else is alive at the peak: activations, copies for mixed precision, logits, inputs.
    """

    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class StageEstimate:
    """What a stage would train and need.

    Args:
        stage: The stage.
        kind: Kind of compressor.
        parameters: Parameters trained and frozen, by part.
        memory: Memory by whether gradient checkpointing is on; one entry under `False` where nothing is trained.
        checkpointing: Whether the run has it on.
        reading: What the micro-batches hold.
        dtype: Type of computation; the frozen generator is held in it.
        examples_per_step: Questions or passages of a step, on all devices.
        steps: Steps of the run; `None` where that is unknown.
        notes: What else the user should know.
    """

    stage: str
    kind: str
    parameters: dict[str, tuple[int, int]]
    memory: dict[bool, Memory]
    checkpointing: bool
    reading: Reading
    dtype: torch.dtype
    examples_per_step: int
    steps: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def needed(self) -> Memory:
        """The memory of the run as it is set."""
        return self.memory[self.checkpointing]

    @property
    def device_bytes(self) -> int:
        """What a device must have: the memory of the run, and the allowance for driver and libraries."""
        return self.needed.total + RESERVE


def dry_run(model_args: ModelArguments, data_args: DataArguments, args: ScaleDownTrainingArguments) -> str:
    """Tell what a run would train, need and read, stage by stage.

    Args:
        model_args: The model that would be trained.
        data_args: The data, which need not be there.
        args: How it would be trained.

    Returns:
        The report.

    Raises:
        OSError: There is no such model.
        ValueError: Arguments that contradict each other, or data that breaks the format.
    """
    return "\n\n".join(map(render, estimate_stages(model_args, data_args, args)))


def estimate_stages(
    model_args: ModelArguments, data_args: DataArguments, args: ScaleDownTrainingArguments
) -> list[StageEstimate]:
    """Estimate what each stage of a run trains and needs.

    Args:
        model_args: The model that would be trained.
        data_args: The data, which need not be there.
        args: How it would be trained; its `stage` is changed where there are two.

    Returns:
        An estimate for each stage.

    Raises:
        OSError: There is no such model.
        ValueError: Arguments that contradict each other, or data that breaks the format.
    """
    estimates = []
    for stage in ("compress", "generate") if args.two_stage else (args.stage,):
        args.stage = stage
        estimates.append(estimate(model_args, data_args, args))
    return estimates


def estimate(model_args: ModelArguments, data_args: DataArguments, args: ScaleDownTrainingArguments) -> StageEstimate:
    """Estimate what the stage `args.stage` trains and needs.

    Args:
        model_args: The model that would be trained.
        data_args: The data, which need not be there.
        args: How it would be trained.

    Returns:
        The estimate.

    Raises:
        OSError: There is no such model.
        ValueError: Arguments that contradict each other, or data that breaks the format.
    """
    if args.stage == "reader":
        raise ScaleDownError("dry_run does not estimate the stage reader; estimate stage=joint, which needs more.")
    dtype, notes = _dtype(args)
    compressing = args.stage == "compress"
    model = build_on_meta(model_args, args, dtype, not compressing, args.stage != "generate")
    reading = read_sample(model.processor, model.config, data_args, args)
    if compressing:
        memory, checkpointing = {False: _inference_memory(model, reading)}, False
        examples, steps = reading.batch_size, None
    else:
        checkpointing = args.gradient_checkpointing
        memory = {on: _training_memory(model, reading, args, dtype, on) for on in (True, False)}
        examples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = _num_steps(reading.num_examples, args)
    if args.optim.value not in OPTIMIZER_BYTES and "8bit" not in args.optim.value:
        notes.append(f"the state of optim={args.optim.value} is not known and taken to be AdamW's")
    if args.world_size > 1:
        share = "a share of the model, but for the layer at work" if _num_shards(args) > 1 else "the whole model"
        notes.append(f"each of {args.world_size} devices is taken to hold {share}")
    return StageEstimate(
        args.stage,
        model.config.compressor_type,
        _count_parameters(model, trained=not compressing),
        memory,
        checkpointing,
        reading,
        dtype,
        examples,
        steps,
        notes,
    )


def build_on_meta(
    model_args: ModelArguments,
    args: ScaleDownTrainingArguments,
    dtype: torch.dtype,
    with_generator: bool = True,
    with_backbone: bool = True,
) -> ScaleDownModel:
    """Build the model a stage trains on `meta`: as `scaledown.training.run.build_model`, but without weights.

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
    settings = {name: getattr(model_args, name) for name in CONFIG_ARGUMENTS}
    settings = {name: value for name, value in settings.items() if value is not None}
    if model_args.model_name_or_path is not None:
        config, processor = _trained(model_args, settings)
    else:
        settings["slot_pooling"] = choose_slot_pooling(model_args, args)
        config, processor = _from_backbones(model_args, settings)
    for part in (config.generator_config, config.compressor_config):
        # Other kernels keep what sdpa keeps.
        part._attn_implementation = "eager" if model_args.attn_implementation == "eager" else "sdpa"
    with torch.device("meta"):
        model = ScaleDownModel(config, with_generator=with_generator, with_backbone=with_backbone)
        keep_token_embeddings(model, model_args)
        if with_generator:
            add_lora(model, model_args)
    for parameter in model.parameters():
        trained = parameter.requires_grad and args.stage != "compress"  # as ScaleDownTrainer holds what it trains
        parameter.data = parameter.data.to(torch.float32 if trained else dtype)
    if with_generator and (model_args.load_in_4bit or model_args.load_in_8bit):
        _mark_quantized(model.generator, model_args.load_in_4bit)
    model.processor = processor
    return model.train()


# The bytes of state per parameter of optimizers that keep no more than a multiple of it.
OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_torch_xla": 8,
    "adamw_torch_npu_fused": 8,
    "adamw_apex_fused": 8,
    "paged_adamw_32bit": 8,
    "stable_adamw": 8,
    "adafactor": 0,  # a row and a column per matrix
    "adagrad": 4,
    "sgd": 0,
    "rmsprop": 4,
    "lion_32bit": 4,
    "paged_lion_32bit": 4,
}


def _dtype(args: ScaleDownTrainingArguments) -> tuple[torch.dtype, list[str]]:
    """Type of the computation, and what to say about it."""
    if torch.cuda.is_available() or args.use_cpu or args.precision_is_set:
        return args.generator_dtype, []
    return torch.bfloat16, ["there is no GPU here; the figures are those of mixed precision on one"]


READ = "configuration and tokenizer are all that a dry run reads"


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
        generator_config=configs[0].get_text_config(decoder=True),
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


def _count_parameters(model: ScaleDownModel, trained: bool) -> dict[str, tuple[int, int]]:
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        part, learns = _part_of(name), trained and parameter.requires_grad
        before = counts[part]
        counts[part] = (before[0] + parameter.numel() * learns, before[1] + parameter.numel() * (not learns))
    return {part: count for part, count in counts.items() if any(count)}


def _part_of(name: str) -> str:
    if name.startswith("generator."):
        return "LoRA" if "lora_" in name else "generator"
    if name.startswith("compressor.backbone."):
        return "compressor backbone"
    for part in ("projector", "reranking head"):
        if name.startswith(f"compressor.{part.replace(' ', '_')}."):
            return part
    return "memory embeddings"


def _inference_memory(model: ScaleDownModel, reading: Reading) -> Memory:
    if not reading.largest:
        return Memory(storage_bytes(model))
    compress = partial(model.compressor.hidden_states, *(reading.largest[name] for name in CHUNK_INPUTS))
    model.eval()
    inputs = sum(tensor.nbytes for tensor in reading.largest.values())
    return Memory(storage_bytes(model), activations=inference_peak(compress, model) + inputs)


def _training_memory(
    model: ScaleDownModel, reading: Reading, args: ScaleDownTrainingArguments, dtype: torch.dtype, checkpointing: bool
) -> Memory:
    learned = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in learned)
    gradients = 4 * count
    precision = dtype if dtype != torch.float32 else None
    accumulation = args.gradient_accumulation_steps
    traced = training_peak(model, reading.largest, precision, checkpointing, accumulation)
    # The Trainer fetches the micro-batches of a whole step before it begins.
    inputs = accumulation * sum(v.nbytes for v in reading.largest.values() if isinstance(v, torch.Tensor))
    update = gradients + (4 * count if args.optim.value == "adamw_torch" else 0)  # which is not fused
    activations = max(traced + inputs, update) - gradients
    shards = _num_shards(args)
    exchanged = gradients if args.world_size > shards else 0  # buckets of DistributedDataParallel
    return Memory(
        storage_bytes(model) // shards,
        gradients // shards + exchanged,
        _optimizer_bytes(learned, args.optim.value) // shards,
        activations,
    )


def _num_shards(args: ScaleDownTrainingArguments) -> int:
    """Devices the model is spread over: all with FSDP and DeepSpeed, else each has its own."""
    by_launcher = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    return args.world_size if args.fsdp or args.deepspeed or by_launcher else 1


def _optimizer_bytes(parameters: list[nn.Parameter], optim: str) -> int:
    if optim == "adafactor":
        return sum(4 * sum(p.shape[-2:]) if p.dim() > 1 else 4 * p.numel() for p in parameters)
    per_parameter = 2 if "8bit" in optim else OPTIMIZER_BYTES.get(optim, 8)
    return per_parameter * sum(p.numel() for p in parameters)


def _num_steps(num_examples: int | None, args: ScaleDownTrainingArguments) -> int | None:
    """Steps as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    if num_examples is None:
        return None
    batches = math.ceil(num_examples / (args.per_device_train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))


def render(found: StageEstimate) -> str:
    """Render an estimate for the terminal.

    Args:
        found: The estimate.

    Returns:
        Tables and sentences.
    """
    lines = [f"Stage {found.stage}, compressor {found.kind}, {str(found.dtype).removeprefix('torch.')}"]
    lines += [f"Read: {found.reading.source}", ""]
    lines.append(f"{'parameters':<26}{'trained':>18}{'frozen':>18}")
    rows = [*found.parameters.items(), ("all", tuple(map(sum, zip(*found.parameters.values(), strict=True))))]
    lines += [f"{part:<26}{trained:>18,}{frozen:>18,}" for part, (trained, frozen) in rows]
    lines += ["", *_render_memory(found), "", *_render_reading(found)]
    lines += [f"Note: {note}." for note in found.notes]
    return "\n".join(lines)


def _render_memory(found: StageEstimate) -> list[str]:
    columns = sorted(found.memory, key=lambda on: on != found.checkpointing)
    titles = {True: "with checkpointing", False: "without" if len(columns) > 1 else ""}
    lines = [f"{'memory per device':<26}" + "".join(f"{titles[on]:>20}" for on in columns)]
    for name in ("weights", "gradients", "optimizer", "activations", "total"):
        sizes = [getattr(found.memory[on], name) for on in columns]
        label = {"optimizer": "optimizer state", "total": "all, at the peak"}.get(name, name)
        lines.append(f"{label:<26}" + "".join(f"{format_size(size) if size else '–':>20}" for size in sizes))
    if len(columns) > 1:
        lines.append(f"(first column: as set, gradient_checkpointing={str(found.checkpointing).lower()})")
    return [*lines, *_render_fit(found)]


def _render_fit(found: StageEstimate) -> list[str]:
    needed = found.device_bytes
    allowance = f"{format_size(found.needed.total)} and {format_size(RESERVE)} for driver and libraries"
    if torch.cuda.is_available():
        size = torch.cuda.mem_get_info()[1]
        verdict = "fits" if needed <= size else "does NOT fit"
        return [f"It {verdict} this {torch.cuda.get_device_name()} ({format_size(size)}): {allowance}."]
    verdicts = ", ".join(f"{size} GB: {'yes' if needed <= size * 10**9 else 'NO'}" for size in COMMON_SIZES)
    return [f"Fits a device of {verdicts} ({allowance})."]


def _render_reading(found: StageEstimate) -> list[str]:
    reading, examples = found.reading, found.examples_per_step
    if found.stage == "compress":
        lines = [f"A batch compresses {examples:,} chunks; an example has {reading.compressor_tokens:,.0f} tokens."]
        count = reading.num_examples
        known = f"{count:,} examples: {format_size(round(count * reading.cache_bytes))}" if count else ""
        known = known or f"{format_size(round(1000 * reading.cache_bytes))} per 1,000 examples"
        return [*lines, f"The cache takes {known}."]
    compressor = f"compressor {examples * reading.compressor_tokens:,.0f} tokens, "
    compressor = compressor if reading.compressor_tokens else ""
    steps = f"{found.steps:,}" if found.steps is not None else "unknown without the data"
    generator = f"generator {examples * reading.generator_tokens:,.0f} tokens"
    return [
        f"A step reads {examples:,} examples: {compressor}{generator} (padding aside).",
        f"Steps in the run: {steps}.",
    ]
