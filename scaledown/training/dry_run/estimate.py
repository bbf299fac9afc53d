"""What a run would train and need, reported before any weights are downloaded: `train.py RECIPE --dry_run true`.

Only configurations and tokenizers are read. The model is built on `meta` as training would have it, and one step of
training is traced there (`scaledown.common.tracing`).
"""

import math
import os
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from modeling_scaledown import ScaleDownModel

from ...common.tracing import inference_peak, storage_bytes, training_peak
from ..arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments
from .reading import Reading, read_sample
from .skeleton import build_reader, build_skeleton

PARTS = ("compressor backbone", "memory embeddings", "projector", "reranking head", "generator", "LoRA")
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
        kind: Kind of compressor; `None` where there is none.
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
    kind: str | None
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
        estimates.append(estimate_stage(model_args, data_args, args))
    return estimates


def estimate_stage(
    model_args: ModelArguments, data_args: DataArguments, args: ScaleDownTrainingArguments
) -> StageEstimate:
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
    dtype, notes = _dtype(args)
    compressing = args.stage == "compress"
    model = build_skeleton(model_args, args, dtype, not compressing, args.stage != "generate")
    reading = read_sample(model.processor, model.config, data_args, args)
    kind = model.config.compressor_type
    if args.stage == "reader":
        model, kind = build_reader(model, model_args), None
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
        kind,
        _count_parameters(model, trained=not compressing),
        memory,
        checkpointing,
        reading,
        dtype,
        examples,
        steps,
        notes,
    )


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


def _count_parameters(model: nn.Module, trained: bool) -> dict[str, tuple[int, int]]:
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        part, learns = _part_of(name), trained and parameter.requires_grad
        before = counts[part]
        counts[part] = (before[0] + parameter.numel() * learns, before[1] + parameter.numel() * (not learns))
    return {part: count for part, count in counts.items() if any(count)}


def _part_of(name: str) -> str:
    if name.startswith(("generator.", "base_model.")):  # the latter in a reader
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
    compress = partial(model.compressor.hidden_states, *reading.largest.values())
    model.eval()
    inputs = sum(tensor.nbytes for tensor in reading.largest.values())
    return Memory(storage_bytes(model), activations=inference_peak(compress, model) + inputs)


def _training_memory(
    model: nn.Module, reading: Reading, args: ScaleDownTrainingArguments, dtype: torch.dtype, checkpointing: bool
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
