"""Time and memory of answers: whole documents, truncated ones, and each compressor, in turn.

Weights and token ids are random, shapes are real. One run of a contestant gives the time of compression, the time to
the first token and the time of the whole answer; contestants alternate, so that what else the machine does meets all of
them alike, and gains are medians over rounds of the ratio within a round.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, set_seed

from errors_scaledown import ScaleDownError
from modeling_scaledown import ScaleDownModel

from ..common.devices import find_device, pick_dtype, wait_for
from ..common.tables import table
from ..common.tracing import MemoryTracker
from .arguments import BenchmarkArguments
from .configurations import build_config, label
from .workload import Workload

FULL_TEXT, TRUNCATED = "full text", "truncated text"
FIGURES = ("compression", "first_token", "total")
# What a straightforward compressor takes: all padded, all positions in all layers.
REFERENCE = "compression_padded"


@dataclass
class Timing:
    """One answer to a batch.

    Args:
        compression: Seconds of compression.
        first_token: Seconds to the first token, compression included.
        total: Seconds to the last.
    """

    compression: float
    first_token: float
    total: float


class FirstToken(LogitsProcessor):
    """Notes when the scores of the first token are there.

    Args:
        device: Whose work is waited for.
    """

    def __init__(self, device: torch.device):
        self.time: float | None = None
        self._device = device

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.time is None:
            wait_for(self._device)
            self.time = time.perf_counter()
        return scores


@dataclass
class Inputs:
    """Random ids of a batch of questions.

    Args:
        text: `(batch, length)`, whole documents in the prompt.
        truncated: `(batch, length)`, as many tokens of each document as it has slots.
        slot_mask: `(batch, length)`, where `truncated` has document tokens.
        chunks: The compressor's inputs, a chunk for every document of the batch.
    """

    text: torch.Tensor
    truncated: torch.Tensor
    slot_mask: torch.Tensor
    chunks: dict[str, torch.Tensor]


def draw_ids(source: torch.Generator, vocab_size: int, *shape: int) -> torch.Tensor:
    """Draw token ids from the upper half of a vocabulary, where no special tokens are."""
    return torch.randint(vocab_size // 2, vocab_size, shape, generator=source)


def draw_inputs(
    workload: Workload, batch_size: int, vocab_size: int, mixed: bool, compressor_vocab_size: int, seed: int
) -> Inputs:
    """Draw token ids.

    Args:
        workload: How many.
        batch_size: Questions.
        vocab_size: The generator's.
        mixed: Draw the documents' lengths too, alike for all questions so that prompts need no padding.
        compressor_vocab_size: The compressor's.
        seed: Decides all of it.

    Returns:
        The batch.
    """
    source = torch.Generator().manual_seed(seed)
    full, count = workload.document_length, workload.num_documents
    lengths = torch.full((count,), full)
    if mixed:
        lengths = torch.randint(max(full // 8, 1), full + 1, (count,), generator=source)
    chunks = [workload.chunks(length) for length in lengths.tolist()]
    slots = [[-(-chunk // workload.compression_rate) for chunk in listed] for listed in chunks]
    is_slot = [False] * (workload.prompt_length // 2)
    for place, numbers in enumerate(slots):
        is_slot += [False] * workload.separator_length * (place > 0) + [True] * sum(numbers)
    is_slot += [False] * (workload.frame_length + sum(map(sum, slots)) - len(is_slot))

    read = torch.tensor([chunk + workload.query_length for listed in chunks for chunk in listed] * batch_size)
    places = torch.arange(int(read.max()))
    mask = (places < read.unsqueeze(1)).long()
    ids = draw_ids(source, compressor_vocab_size, *mask.shape)
    if workload.query_length:  # a question's documents are read with the same question
        question = draw_ids(source, compressor_vocab_size, batch_size, 1, workload.query_length)
        ids[:, : workload.query_length] = question.expand(-1, len(ids) // batch_size, -1).flatten(0, 1)
    return Inputs(
        text=draw_ids(source, vocab_size, batch_size, workload.frame_length + int(lengths.sum())),
        truncated=draw_ids(source, vocab_size, batch_size, len(is_slot)),
        slot_mask=torch.tensor(is_slot).expand(batch_size, -1),
        chunks={
            "compressor_input_ids": ids,
            "compressor_attention_mask": mask,
            "chunk_slots": torch.tensor([number for numbers in slots for number in numbers] * batch_size),
            "compressor_document_mask": mask.bool() & (places >= workload.query_length),
        },
    )


class TimedModels:
    """Models that share a generator.

    Args:
        arguments: Which, and how they compute.
    """

    def __init__(self, arguments: BenchmarkArguments):
        self.device = find_device(arguments.device)
        self.arguments = arguments
        dtype = pick_dtype(arguments.dtype) if arguments.dtype != "auto" or self.device.type == "cuda" else None
        self.models: dict[str, ScaleDownModel] = {}
        self.generator: PreTrainedModel | None = None
        self.parts: list[PreTrainedModel] = []  # whose weights are not counted as memory of an answer
        longest = max(min(workload.document_length, workload.chunk_length) for workload, _ in arguments.settings)
        finest = min(workload.compression_rate for workload, _ in arguments.settings)
        set_seed(arguments.seed)
        for name in arguments.compressor_names:
            config = build_config(arguments.generator, name, longest, arguments.query_length, finest)
            with self.device, default_dtype(dtype or torch.float32):  # a CPU takes minutes to draw 7 billion weights
                model = ScaleDownModel(config, generator=self.generator).eval()
            self.generator = model.generator
            if arguments.compile:
                model.optimize_for_inference(compile=True)
            # Random weights end answers at random.
            model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
            self.models[name] = model
            self.parts.append(model)
        self.generator.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)

    def runs(self, workload: Workload, batch_size: int) -> dict[str, Callable[[], Timing]]:
        """What each contestant does with a batch, by its name.

        Args:
            workload: What is read and written.
            batch_size: Questions.

        Returns:
            Functions that answer once.
        """
        args, found = self.arguments, {}
        size = self.generator.config.vocab_size
        for name, model in self.models.items():
            inputs = draw_inputs(
                workload, batch_size, size, args.mixed_lengths, model.config.compressor_config.vocab_size, args.seed
            )
            if not found:
                for text_name, ids in ((FULL_TEXT, inputs.text), (TRUNCATED, inputs.truncated)):
                    found[text_name] = self.text_run(ids.to(self.device), workload.new_tokens)
            found[name] = self._compressed_run(model, inputs, workload.new_tokens)
        return found

    def tokens_read(self, name: str, workload: Workload) -> int:
        """Tokens of the generator's prompt, slots among them."""
        inputs = draw_inputs(workload, 1, 2, self.arguments.mixed_lengths, 2, self.arguments.seed)
        return (inputs.text if name == FULL_TEXT else inputs.truncated).shape[1]

    def padded_compression(self, name: str, workload: Workload, batch_size: int) -> Callable[[], float]:
        """Compression as a straightforward implementation does it: the padding read, the last layer whole.

        Args:
            name: A compressor's name.
            workload: What is read.
            batch_size: Questions.

        Returns:
            A function that compresses once and returns the seconds.
        """
        model = self.models[name]
        args, size = self.arguments, model.chunks_per_pass
        vocab_size = model.config.compressor_config.vocab_size
        chunks = draw_inputs(workload, batch_size, 2, args.mixed_lengths, vocab_size, args.seed).chunks
        longest = workload.query_length + min(workload.document_length, workload.chunk_length)
        ids = torch.nn.functional.pad(
            chunks["compressor_input_ids"], (0, longest - chunks["compressor_input_ids"].shape[1])
        ).to(self.device)
        slots = chunks["chunk_slots"].to(self.device)

        def run() -> float:
            compressor = model.compressor
            prunes, compressor.prunes_last_layer = compressor.prunes_last_layer, False
            try:
                wait_for(self.device)
                started = time.perf_counter()
                with torch.inference_mode():
                    for part, count in zip(ids.split(size), slots.split(size), strict=True):
                        compressor(part, torch.ones_like(part), count)
                wait_for(self.device)
                return time.perf_counter() - started
            finally:
                compressor.prunes_last_layer = prunes

        return run

    def text_run(
        self,
        ids: torch.Tensor,
        new_tokens: int,
        before: Callable[[], Any] = lambda: None,
        settings: dict[str, Any] | None = None,
    ) -> Callable[[], Timing]:
        """Reading text.

        Args:
            ids: `(batch, length)`, the prompt.
            new_tokens: Tokens of the answer.
            before: What is computed before, timed as compression.
            settings: Further arguments of `generate()`.

        Returns:
            A function that answers once.
        """
        compiles = all(model.compiles_decoding for model in self.models.values())  # on a CPU neither side does
        static = {"cache_implementation": "static"} if compiles else {}  # generate() compiles with those
        settings = {**(settings or {}), **static, "attention_mask": torch.ones_like(ids)}

        def write(_: Any, timed: dict[str, Any]) -> None:
            self.generator.generate(input_ids=ids, **timed, **settings)

        return lambda: self._timed(before, write, new_tokens)

    def _compressed_run(self, model: ScaleDownModel, inputs: Inputs, new_tokens: int) -> Callable[[], Timing]:
        prompt = {
            "input_ids": inputs.truncated.to(self.device),
            "attention_mask": torch.ones_like(inputs.truncated, device=self.device),
            "slot_mask": inputs.slot_mask.to(self.device),
        }

        def compress() -> Any:
            return model.get_memory_embeddings(**inputs.chunks, batch_size=model.chunks_per_pass)

        def write(compressed: Any, settings: dict[str, Any]) -> None:
            memory = {"memory_embeddings": compressed.memory_embeddings, "memory_mask": compressed.memory_mask}
            model.generate(**prompt, **memory, **settings)

        return lambda: self._timed(compress, write, new_tokens)

    @torch.inference_mode()
    def _timed(
        self, compress: Callable[[], Any], write: Callable[[Any, dict[str, Any]], Any], new_tokens: int
    ) -> Timing:
        first = FirstToken(self.device)
        settings = {"max_new_tokens": new_tokens, "logits_processor": LogitsProcessorList([first])}
        wait_for(self.device)
        started = time.perf_counter()
        compressed = compress()
        wait_for(self.device)
        ready = time.perf_counter()
        write(compressed, settings)
        wait_for(self.device)
        return Timing(ready - started, first.time - started, time.perf_counter() - started)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New weights are of this type.

    Args:
        dtype: The type.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def measure(arguments: BenchmarkArguments, others: Sequence[Callable[[TimedModels], Any]] = ()) -> list[dict[str, Any]]:
    """Time all contestants at all settings.

    Args:
        arguments: What to measure.
        others: Make further contestants, timed in the same rounds; their `runs` and `tokens_read` are as here.

    Returns:
        A JSON object for each setting and contestant.

    Raises:
        ValueError: There is no such model, or it cannot read as much.
    """
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    contestants = TimedModels(arguments)
    limit = getattr(contestants.generator.config, "max_position_embeddings", None)
    longest = max(workload.text_length + workload.new_tokens for workload, _ in arguments.settings)
    if limit is not None and longest > limit:
        raise ScaleDownError(
            f"{arguments.generator} has {limit} positions, and the longest setting needs {longest} to read its "
            "documents as text and answer; lower num_documents, document_length or new_tokens."
        )
    groups = [contestants, *(other(contestants) for other in others)]
    rows = []
    for workload, batch_size in tqdm(arguments.settings, desc="Settings", disable=None):
        rows += measure_setting(groups, workload, batch_size)
    return rows


def measure_setting(groups: Sequence[Any], workload: Workload, batch_size: int) -> list[dict[str, Any]]:
    """Time all contestants at one setting.

    Args:
        groups: The models, and further contestants.
        workload: What is read and written.
        batch_size: Questions.

    Returns:
        A JSON object for each contestant.
    """
    contestants, runs, tokens = groups[0], {}, {}
    for group in groups:
        found = group.runs(workload, batch_size)
        tokens |= {name: group.tokens_read(name, workload) for name in found}
        runs |= found
    padded = {name: contestants.padded_compression(name, workload, batch_size) for name in contestants.models}
    peaks = {name: _peak_memory(contestants, name, run) for name, run in runs.items()}  # warms up too
    times: dict[str, list[Timing]] = {name: [] for name in runs}
    references: dict[str, list[float]] = {name: [] for name in padded}
    for _ in range(contestants.arguments.repeats):
        for name, run in runs.items():
            times[name].append(run())
            if name in padded:
                references[name].append(padded[name]())
    setting = {
        "batch_size": batch_size,
        **{name: getattr(workload, name) for name in ("num_documents", "document_length", "new_tokens")},
        "compression_rate": workload.compression_rate,
    }
    rows = []
    for name, found in times.items():
        row = {**setting, "contestant": name, "tokens_read": tokens[name], "peak_bytes": peaks[name]}
        for figure in FIGURES:
            row[figure] = spread([getattr(run, figure) for run in found])
            row[f"{figure}_gain"] = spread(
                [
                    getattr(text, figure) / getattr(run, figure)
                    for text, run in zip(times[FULL_TEXT], found, strict=True)
                    if getattr(text, figure) and getattr(run, figure)
                ]
                if figure != "compression"
                else []
            )
        row["generation"] = spread([run.total - run.compression for run in found])
        row["questions_per_second"] = batch_size / row["total"]["median"]
        if name in references:
            row[REFERENCE] = spread(references[name])
            pairs = zip(references[name], found, strict=True)
            row["compression_gain"] = spread([padded / run.compression for padded, run in pairs])
        rows.append(row)
    return rows


def _peak_memory(contestants: TimedModels, name: str, run: Callable[[], Timing]) -> int:
    """Bytes beside the weights at the worst moment: what the allocator reports, or the tensors alive on a CPU."""
    device = contestants.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    tracker = MemoryTracker(tensor for model in contestants.parts for tensor in (*model.parameters(), *model.buffers()))
    with tracker:
        run()
    return tracker.peak


def spread(values: list[float]) -> dict[str, float | None]:
    """Median, lowest and highest."""
    if not values:
        return {"median": None, "low": None, "high": None}
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def render(rows: list[dict[str, Any]]) -> str:
    """Write rows as a table in Markdown, settings that never change left out.

    Args:
        rows: What `measure` returned.

    Returns:
        The table.
    """
    names = ("batch_size", "num_documents", "document_length", "new_tokens", "compression_rate")
    shown = [name for name in names if len({row[name] for row in rows}) > 1]
    titles = [name.replace("_", " ") for name in shown]
    titles += [
        "reads",
        "tokens",
        "compression, s",
        "first token, s",
        "gain",
        "answer, s",
        "gain",
        "questions/s",
        "peak, MB",
    ]
    lines = [titles]
    for row in rows:
        name = row["contestant"]
        cells = [str(row[name]) for name in shown] + [label(name), str(row["tokens_read"])]
        compression = spread([]) if name in (FULL_TEXT, TRUNCATED) else row["compression"]
        for figure, digits, unit in (
            (compression, 3, ""),
            (row["first_token"], 3, ""),
            (row["first_token_gain"], 2, "×"),
            (row["total"], 3, ""),
            (row["total_gain"], 2, "×"),
        ):
            cells.append(_cell(figure, digits, unit))
        cells += [f"{row['questions_per_second']:.3f}", f"{row['peak_bytes'] / 1e6:.0f}"]
        lines.append(cells)
    return table(lines)


def _cell(figure: dict[str, float | None], digits: int, unit: str) -> str:
    if figure["median"] is None:
        return "–"
    return f"{figure['median']:.{digits}f}{unit} ({figure['low']:.{digits}f}–{figure['high']:.{digits}f})"
