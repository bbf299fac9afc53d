"""An estimate as `train.py --dry_run true` prints it."""

import torch

from ..arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments
from ..cache import format_size
from .estimate import RESERVE, StageEstimate, estimate_stages

# Compared with where there is no GPU.
COMMON_SIZES = (16, 24, 40, 80)


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


def render(found: StageEstimate) -> str:
    """Render an estimate for the terminal.

    Args:
        found: The estimate.

    Returns:
        Tables and sentences.
    """
    compressor = "no compressor" if found.kind is None else f"compressor {found.kind}"
    lines = [f"Stage {found.stage}, {compressor}, {str(found.dtype).removeprefix('torch.')}"]
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
    sides = (("compressor", reading.compressor_tokens), ("generator", reading.generator_tokens))
    tokens = ", ".join(f"{side} {examples * count:,.0f} tokens" for side, count in sides if count)
    steps = f"{found.steps:,}" if found.steps is not None else "unknown without the data"
    return [
        f"A step reads {examples:,} examples: {tokens} (padding aside).",
        f"Steps in the run: {steps}.",
    ]
