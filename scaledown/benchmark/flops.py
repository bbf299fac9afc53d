"""FLOPs of answering a question, counted on `meta`: the model's own code runs on tensors that have no data.

The protocol is that of OSCAR (arXiv 2504.07109, appendix D): a prompt of 128 tokens, 10 documents of 128 tokens, 32 new
tokens, one question. A multiplication and an addition are two FLOPs. Products with weights and products of attention
are counted apart, the latter as kernels report them: every query with every key, whether the mask lets it or not.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_scaledown import ScaleDownModel
from shortcuts_scaledown import CACHE_NAME

from ..common.tables import table
from ..common.tracing import META, MemoryTracker, build_on_meta
from .configurations import build_config, label
from .workload import Workload

aten = torch.ops.aten
WEIGHTS = {aten.mm, aten.addmm}
TERA = 1e12
# OSCAR, table 1: TFLOP of generation and of compression.
PAPER = {
    "mistral-7b": {None: (20.33, 0.0), "5": (3.49, 3.04), "8": (3.49, 4.87), "llama-3.2-1b": (3.49, 2.66)},
    "llama-3.2-1b": {None: (2.85, 0.0), "5": (0.50, 0.88)},
    "qwen2-7b": {None: (18.94, 0.0), "8": (3.17, 5.07), "llama-3.2-1b": (3.17, 2.65)},
    "mistral-24b": {None: (64.29, 0.0), "llama-3.2-1b": (10.72, 2.65)},
}
# What is counted beside the paper's table.
ADDED = {"mistral-7b": ("10", "modernbert-base"), "qwen2.5-0.5b": ("5", "minilm-l6")}


@dataclass(frozen=True)
class Flops:
    """Operations, two for a multiplication and its addition.

    Args:
        weights: In products with weights.
        attention: In products of queries, keys and values.
    """

    weights: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.weights + other.weights, self.attention + other.attention)


@dataclass(frozen=True)
class FlopsRow:
    """A line of the table.

    Args:
        generator: The generator's name.
        compressor: A number of layers or a name; None where documents are read as text.
        generation: FLOPs of reading the prompt and writing the answer.
        compression: FLOPs of the compressor.
        whole_compression: The same with all positions in the last layer, as in the paper.
        ratio: How many times fewer than from text.
        paper: TFLOP of generation and compression in the paper's table.
    """

    generator: str
    compressor: str | None
    generation: Flops
    compression: Flops
    whole_compression: Flops
    ratio: float
    paper: tuple[float, float] | None = None

    @property
    def total(self) -> int:
        """FLOPs of the whole answer."""
        return self.generation.total + self.compression.total

    def deviations(self) -> tuple[float | None, float | None]:
        """By how much the paper's way of counting gives other figures here: weights alone, the last layer whole."""
        if self.paper is None:
            return None, None
        counted = (self.generation.weights, self.whole_compression.weights)
        return tuple(
            count / TERA / figure - 1 if figure else None for count, figure in zip(counted, self.paper, strict=True)
        )

    def as_json(self) -> dict[str, Any]:
        """All of it, and what follows from it."""
        values = asdict(self)
        generation, compression = self.deviations()
        return {**values, "total": self.total, "deviation": {"generation": generation, "compression": compression}}


def count(run: Callable[[], Any], reader: nn.Module | None = None) -> Flops:
    """Count the operations of a computation.

    Args:
        run: Computes something with a model on `meta`.
        reader: The model, where it reads values of integers and masks, which are computed for it then.

    Returns:
        The operations.
    """
    counter = FlopCounterMode(display=False)
    values = nullcontext() if reader is None else MemoryTracker(reader.parameters())
    with torch.no_grad(), counter, values:
        run()
    found = counter.get_flop_counts()["Global"]
    weights = sum(number for operation, number in found.items() if operation in WEIGHTS)
    return Flops(weights, sum(found.values()) - weights)


def count_generation(generator: nn.Module, prompt_length: int, new_tokens: int) -> Flops:
    """Count what a generator computes for an answer: the prompt at once, then token by token with a cache.

    Args:
        generator: A causal language model on `meta`.
        prompt_length: Tokens and slots of the prompt.
        new_tokens: Tokens of the answer, the first of which comes with the prompt.

    Returns:
        The operations.
    """
    cache = None

    def read(length: int) -> None:
        nonlocal cache
        embeds = torch.empty(1, length, generator.config.hidden_size, dtype=generator.dtype, device=META)
        outputs = generator(inputs_embeds=embeds, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        cache = outputs[CACHE_NAME]

    total = count(lambda: read(prompt_length))
    steps = new_tokens - 1
    if steps == 0:
        return total
    first = count(lambda: read(1))
    growth = 0
    if steps > 1:  # each step attends to one token more, so that two steps say what all cost
        growth = count(lambda: read(1)).attention - first.attention
    return total + Flops(steps * first.weights, steps * first.attention + growth * steps * (steps - 1) // 2)


def count_compression(model: ScaleDownModel, workload: Workload, whole: bool = False) -> Flops:
    """Count what the compressor computes for a question.

    Args:
        model: A model on `meta`.
        workload: What it reads.
        whole: Compute all positions in the last layer too.

    Returns:
        The operations.
    """
    chunks = workload.chunks(workload.document_length)
    ids = torch.zeros(workload.num_documents * len(chunks), workload.query_length + chunks[0], dtype=torch.long)
    slots = torch.full((len(ids),), -(-chunks[0] // workload.compression_rate))
    compressor = model.compressor
    prunes = compressor.prunes_last_layer
    compressor.prunes_last_layer = prunes and not whole
    try:
        return count(lambda: compressor(ids, torch.ones_like(ids), slots), compressor)
    finally:
        compressor.prunes_last_layer = prunes


def count_rows(generator: str, compressors: list[str], workload: Workload) -> list[FlopsRow]:
    """Count a generator without and with compressors.

    Args:
        generator: Its name.
        compressors: Numbers of layers, or names.
        workload: What is read and written.

    Returns:
        A row for text, and one for each compressor.

    Raises:
        ValueError: There is no such model.
    """
    rows: list[FlopsRow] = []
    paper = PAPER.get(generator, {}) if workload == Workload() else {}
    generation = None
    for name in compressors:
        chunk_length = min(workload.chunk_length, workload.document_length)
        config = build_config(generator, name, chunk_length, workload.query_length, workload.compression_rate)
        model = build_on_meta(config).to(torch.bfloat16).eval()
        if generation is None:
            text = count_generation(model.generator, workload.text_length, workload.new_tokens)
            rows.append(FlopsRow(generator, None, text, Flops(), Flops(), 1.0, paper.get(None)))
            generation = count_generation(model.generator, workload.frame_length + workload.slots, workload.new_tokens)
        compression = count_compression(model, workload)
        ratio = rows[0].total / (generation.total + compression.total)
        whole = count_compression(model, workload, whole=True)
        rows.append(FlopsRow(generator, name, generation, compression, whole, ratio, paper.get(name)))
    return rows


def count_table(workload: Workload) -> list[FlopsRow]:
    """Count table 1 of the paper, and what is of interest beside it.

    Args:
        workload: What is read and written.

    Returns:
        The rows.
    """
    rows: list[FlopsRow] = []
    for generator in dict.fromkeys([*PAPER, *ADDED]):
        listed = [name for name in PAPER.get(generator, {}) if name is not None]
        rows += count_rows(generator, [*listed, *ADDED.get(generator, ())], workload)
    return rows


def render(rows: list[FlopsRow]) -> str:
    """Write rows as a table in Markdown.

    Args:
        rows: The rows.

    Returns:
        The table.
    """
    counted = ("generation", "compression", "all, TFLOP", "times fewer")
    lines = [("generator", "compressor", *counted, "paper, generation", "paper, compression", "paper, times fewer")]
    for row in rows:
        name = "none" if row.compressor is None else label(row.compressor)
        own = [row.generation.total / TERA, row.compression.total / TERA, row.total / TERA, row.ratio]
        cells = [f"{value:.2f}" for value in own]
        paper = ["", "", ""]
        if row.paper is not None:
            text = next(other for other in rows if other.generator == row.generator and other.compressor is None)
            paper = [
                f"{figure:.2f}" + (f" ({deviation:+.1%})" if deviation is not None else "")
                for figure, deviation in zip(row.paper, row.deviations(), strict=True)
            ]
            paper.append(f"{sum(text.paper) / sum(row.paper):.2f}")
        lines.append((row.generator, name, *cells, *paper))
    return table(lines, text_columns=2)
