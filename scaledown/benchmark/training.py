"""Time and memory of training steps: joint training, and both stages of two-stage training.

Each kind of step is what `train.py` does with a batch: forward, backward and AdamW, LoRA on the generator; the stage
`compress` has no gradients and writes what the stage `generate` reads.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import set_seed

from compression_scaledown import chunk_inputs
from modeling_scaledown import ScaleDownModel

from ..common.devices import find_device, hold_learned_in_32_bits, pick_dtype, wait_for
from ..common.tables import table
from ..common.tracing import MemoryTracker
from .arguments import BenchmarkArguments
from .configurations import build_config, label
from .speed import Inputs, draw_inputs, spread

STAGES = ("joint", "compress", "generate")


def measure_training(arguments: BenchmarkArguments) -> list[dict[str, Any]]:
    """Time steps of every stage, in turn, for each compressor.

    Args:
        arguments: The models and the batch; answers have `new_tokens` tokens.

    Returns:
        A JSON object for each compressor and stage.

    Raises:
        ImportError: peft is missing.
        ValueError: There is no such model, or it cannot read as much.
    """
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = find_device(arguments.device)
    dtype = torch.float32 if arguments.dtype == "auto" and device.type != "cuda" else pick_dtype(arguments.dtype)
    rows = []
    for name in arguments.compressor_names:
        workload = arguments.workload
        chunk_length = min(workload.chunk_length, workload.document_length)
        set_seed(arguments.seed)
        config = build_config(arguments.generator, name, chunk_length, workload.query_length, workload.compression_rate)
        model = ScaleDownModel(config).to(device, dtype)
        model.add_lora()
        hold_learned_in_32_bits(model)
        model.train()
        sizes = (config.vocab_size, config.compressor_config.vocab_size)
        inputs = draw_inputs(
            workload, arguments.batch_size, sizes[0], arguments.mixed_lengths, sizes[1], arguments.seed
        )
        steps, optimizers, tokens = _steps(model, inputs, workload.new_tokens, device, dtype)
        peaks = {stage: _peak(model, optimizers, step, device) for stage, step in steps.items()}  # warms up too
        times: dict[str, list[float]] = {stage: [] for stage in STAGES}
        for _ in range(arguments.repeats):
            for stage, step in steps.items():
                wait_for(device)
                started = time.perf_counter()
                step()
                wait_for(device)
                times[stage].append(time.perf_counter() - started)
        for stage in STAGES:
            step = spread(times[stage])
            speed = tokens[stage] / step["median"]
            row = {"compressor": name, "stage": stage, "batch_size": arguments.batch_size, "step": step}
            rows.append({**row, "tokens": tokens[stage], "tokens_per_second": speed, "peak_bytes": peaks[stage]})
        del model, steps, optimizers
    return rows


def render_training(rows: list[dict[str, Any]]) -> str:
    """Write rows as a table in Markdown.

    Args:
        rows: What `measure_training` returned.

    Returns:
        The table.
    """
    lines = [("compressor", "stage", "step, s", "tokens/s", "peak beside weights and optimizer, MB")]
    for row in rows:
        step = f"{row['step']['median']:.3f} ({row['step']['low']:.3f}–{row['step']['high']:.3f})"
        speed, peak = f"{row['tokens_per_second']:.0f}", f"{row['peak_bytes'] / 1e6:.0f}"
        lines.append((label(row["compressor"]), row["stage"], step, speed, peak))
    return table(lines, text_columns=2)


def _steps(
    model: ScaleDownModel, inputs: Inputs, answer_length: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Any]], list[torch.optim.Optimizer], dict[str, int]]:
    """A step of each stage in mixed precision, the optimizers, and the tokens and slots the stages' models read."""
    optimizers: list[torch.optim.Optimizer] = []
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    chunks = {name: value.to(device) for name, value in chunk_inputs(inputs.chunks).items()}
    ids, slot_mask = inputs.truncated.to(device), inputs.slot_mask.to(device)
    answer = ids[:, -1:].expand(-1, answer_length)
    ids = torch.cat([ids, answer], dim=1)
    slot_mask = torch.nn.functional.pad(slot_mask, (0, answer_length))
    labels = ids.clone()
    labels[:, :-answer_length] = -100
    prompt = {"input_ids": ids, "slot_mask": slot_mask, "labels": labels, "logits_to_keep": answer_length + 1}

    def stepper(parameters: list[torch.nn.Parameter], **documents: torch.Tensor) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        optimizers.append(optimizer)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

        def step() -> None:
            with mixed:
                loss = model(**prompt, **documents).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        return step

    @torch.no_grad()
    def compress() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        with mixed:
            return model.compressor.hidden_states(*chunks.values())

    learned = [p for p in model.parameters() if p.requires_grad]
    behind = [p for name, p in model.named_parameters() if p.requires_grad and "compressor.backbone" not in name]
    states, mask, scored = compress()
    steps = {
        "joint": stepper(learned, **chunks),
        "compress": compress,
        "generate": stepper(behind, memory_states=states, memory_mask=mask, rerank_states=scored),
    }
    read = int(inputs.chunks["compressor_attention_mask"].sum() + inputs.chunks["chunk_slots"].sum()) + len(states)
    return steps, optimizers, {"joint": read + ids.numel(), "compress": read, "generate": ids.numel()}


def _peak(
    model: ScaleDownModel, optimizers: list[torch.optim.Optimizer], step: Callable[[], Any], device: torch.device
) -> int:
    """Bytes beside what is there between steps: gradients and activations."""
    step()  # makes the optimizer's state
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    held = [tensor for optimizer in optimizers for state in optimizer.state.values() for tensor in state.values()]
    tracker = MemoryTracker([*model.parameters(), *model.buffers(), *filter(torch.is_tensor, held)])
    with tracker:
        step()
    return tracker.peak
