"""Trains a backbone on the lessons of a curriculum, one after another."""

import itertools
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .curriculum import Lesson, Row, Rows

logger = logging.getLogger(__name__)

ReadBatch = Callable[[PreTrainedModel, Row], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class BackboneArguments:
    """Size of a backbone and length of its training."""

    output: str = field(metadata={"help": "Folder for the model, its tokenizer and training.json."})
    hidden_size: int = field(default=128, metadata={"help": "Width, a multiple of 32."})
    num_layers: int = field(default=5, metadata={"help": "Layers."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of AdamW."})
    lesson_steps: int = field(default=3000, metadata={"help": "Maximum steps per lesson."})
    num_lessons: int | None = field(
        default=None, metadata={"help": "Stop after N lessons; the same command without it continues from there."}
    )
    bf16: bool = field(default=False, metadata={"help": "Multiply in bfloat16, if the processor supports it."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the layers; requires a C++ compiler."})
    seed: int = field(default=0, metadata={"help": "Random seed."})


def teach(model: PreTrainedModel, lessons: list[Lesson], args: BackboneArguments, read: ReadBatch) -> list[dict]:
    """Train a backbone on the lessons; it is saved after each.

    Args:
        model: The backbone.
        lessons: The lessons.
        args: How long, and where to.
        read: Reads a batch as this kind of backbone does.

    Returns:
        For each lesson its name, steps, seconds and share of answer tokens that were right at its end.
    """
    folder = Path(args.output)
    progress = folder / "training.json"
    report = []
    if progress.is_file():  # a stopped run continues after its last lesson
        report = json.loads(progress.read_text(encoding="utf-8"))
        model = type(model).from_pretrained(folder)
    if args.torch_compile:
        model.model.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    taken = itertools.count(1)
    for lesson in lessons[len(report) :]:
        steps = min(lesson.steps or args.lesson_steps, args.lesson_steps)
        started, right = time.perf_counter(), 0.0
        rows = Rows(lesson, args.seed, model.config.pad_token_id)
        for step, row in enumerate(DataLoader(rows, batch_size=None, **_workers()), 1):
            falling = (steps - step + 1) / (0.7 * steps) if lesson.steps else 1.0
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * lesson.rate * min(1.0, next(taken) / 100, falling)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                logits, learned = read(model, row)
            right = 0.95 * right + 0.05 * _step(model, optimizer, logits.float(), learned)
            if step % 50 == 0:
                logger.info("%s: step %d, %.0f s, %.3f right", lesson.name, step, time.perf_counter() - started, right)
            if step == steps or (right > lesson.target and not lesson.steps):
                break
        seconds = round(time.perf_counter() - started)
        report.append({"lesson": lesson.name, "steps": step, "seconds": seconds, "right": round(right, 4)})
        logger.info("%s", report[-1])
        model.save_pretrained(folder)
        progress.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _workers() -> dict[str, Any]:
    """A process that draws batches, where one can be a copy of this: lessons cannot be sent to one that is not."""
    if "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin":  # where copies may crash
        return {"num_workers": 1, "multiprocessing_context": "fork"}
    return {"num_workers": 0}


def _step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, logits: torch.Tensor, learned: torch.Tensor
) -> float:
    """Learn from a batch; returns the share of answer tokens that were right."""
    loss = cross_entropy(logits, learned)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return (logits.argmax(dim=-1) == learned).float().mean().item()
