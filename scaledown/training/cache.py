"""The cache between the two stages of two-stage training: what a frozen compressor makes of every chunk.

A folder of `index.json`, the plan, and of shards in safetensors. A shard covers the examples `[start, end)` of the data
and holds

| tensor            | shape                 | what                                                              |
| ----------------- | --------------------- | ----------------------------------------------------------------- |
| `memory_states`   | (num_slots, hidden)   | the backbone's state at each slot, before the projector           |
| `rerank_states`   | (num_chunks, hidden)  | the state that is scored; absent without reranking                |
| `chunk_slots`     | (num_chunks,)         | slots of each chunk                                               |
| `chunk_documents` | (num_chunks,)         | the document of its example that each chunk is a part of          |
| `example_chunks`  | (num_examples + 1,)   | where each example's chunks begin and end                         |

A shard appears under its name when it is whole. The plan is made before the first of them, so that any process can
write any shard, and a run that was stopped goes on with those that are missing.
"""

import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from errors_scaledown import ScaleDownError

from ..common.files import write_json
from ..common.text import shorten

FORMAT = 1
RECORD_FIELDS = ("id", "query", "answer", "gold_answers", "reranking_scores", "positives")
INDEX_NAME = "index.json"
STATE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class CacheError(ScaleDownError):
    """A cache that does not fit or is not whole; the message says in what, and what to do."""


@dataclass(frozen=True)
class Shard:
    """A part of the plan.

    Args:
        file: Its name in the folder.
        start: First example.
        end: One past the last example.
        num_chunks: Chunks of these examples.
        num_slots: Slots of these chunks.
    """

    file: str
    start: int
    end: int
    num_chunks: int
    num_slots: int


@dataclass(frozen=True)
class CachePlan:
    """What a cache holds, and for what it was made.

    Args:
        fingerprint: Data, settings and weights; a cache serves a run only where all of it agrees.
        memory_size: Width of a slot's state.
        hidden_size: Width of a state to score.
        dtype: Type of a state, one of `STATE_DTYPES`.
        has_rerank_states: Whether there are states to score.
        shards: The parts, in the order of the examples.
    """

    fingerprint: dict[str, Any]
    memory_size: int
    hidden_size: int
    dtype: str
    has_rerank_states: bool
    shards: tuple[Shard, ...]

    @property
    def num_examples(self) -> int:
        """Examples in all."""
        return self.shards[-1].end

    def num_bytes(self, shard: Shard | None = None) -> int:
        """Count the bytes of a shard, or of all of them, but for their headers."""
        if shard is None:
            return sum(self.num_bytes(part) for part in self.shards)
        numbers = shard.num_slots * self.memory_size + shard.num_chunks * self.hidden_size * self.has_rerank_states
        counts = 2 * shard.num_chunks + (shard.end - shard.start + 1)
        return numbers * STATE_DTYPES[self.dtype].itemsize + 4 * counts


def parse_size(size: str | int) -> int:
    """Read a size such as `500MB` or `2GB`.

    Args:
        size: A number of bytes, or a number with one of the units KB, MB, GB and TB.

    Returns:
        Bytes.

    Raises:
        ValueError: It is no such size.
    """
    text = str(size).strip().upper()
    unit = next((unit for unit in UNITS if text.endswith(unit)), None)
    number = text.removesuffix(unit or "").strip()
    try:
        value = int(float(number) * UNITS.get(unit, 1))
    except ValueError:
        value = 0
    if value < 1:
        raise ScaleDownError(f"max_shard_size is {size!r}; expected a size such as 500MB or 2GB.")
    return value


def make_plan(
    counts: Sequence[tuple[int, int]],
    fingerprint: dict[str, Any],
    memory_size: int,
    hidden_size: int,
    dtype: str,
    has_rerank_states: bool,
    max_shard_size: str | int,
) -> CachePlan:
    """Divide the examples into shards.

    Args:
        counts: Chunks and slots of each example.
        fingerprint, memory_size, hidden_size, dtype, has_rerank_states: As in `CachePlan`.
        max_shard_size: Bytes of a shard at most, unless a single example has more.

    Returns:
        The plan.

    Raises:
        ValueError: `dtype` or `max_shard_size` is unknown.
    """
    if dtype not in STATE_DTYPES:
        raise ScaleDownError(f"cache_dtype is {dtype!r}; expected one of {', '.join(STATE_DTYPES)}.")
    limit = parse_size(max_shard_size)
    itemsize = STATE_DTYPES[dtype].itemsize
    ranges, size, first, chunks, slots = [], 0, 0, 0, 0
    for i, (num_chunks, num_slots) in enumerate(counts):
        numbers = num_slots * memory_size + num_chunks * hidden_size * has_rerank_states
        needed = numbers * itemsize + 4 * (2 * num_chunks + 1)
        if i > first and size + needed > limit:
            ranges.append((first, i, chunks, slots))
            size, first, chunks, slots = 0, i, 0, 0
        size, chunks, slots = size + needed, chunks + num_chunks, slots + num_slots
    ranges.append((first, len(counts), chunks, slots))
    shards = tuple(Shard(f"shard-{k:05d}.safetensors", *part) for k, part in enumerate(ranges))
    return CachePlan(fingerprint, memory_size, hidden_size, dtype, has_rerank_states, shards)


def open_plan(folder: str | Path, fingerprint: dict[str, Any]) -> CachePlan | None:
    """Read the plan of a cache and check that it was made for this very run.

    Args:
        folder: The cache.
        fingerprint: What the run needs.

    Returns:
        The plan; `None` where there is no cache.

    Raises:
        CacheError: The cache was made for something else, or its index is damaged.
    """
    index = Path(folder) / INDEX_NAME
    if not index.is_file():
        return None
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CacheError(f"{folder} has the format {content['format']}, this version reads {FORMAT}; delete it.")
        shards = tuple(Shard(**shard) for shard in content["shards"])
        names = ("fingerprint", "hidden_size", "dtype", "has_rerank_states")
        memory_size = content.get("memory_size", content["hidden_size"])  # once they were the same
        plan = CachePlan(**{name: content[name] for name in names}, memory_size=memory_size, shards=shards)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CacheError(f"{index} is damaged ({error!r}); delete {folder} and compress again.") from error
    both = {name: (plan.fingerprint.get(name), fingerprint.get(name)) for name in {*plan.fingerprint, *fingerprint}}
    changed = [
        f"{name} was {shorten(json.dumps(before))} and is {shorten(json.dumps(now))}"
        for name, (before, now) in sorted(both.items())
        if before != now
    ]
    if changed:
        raise CacheError(
            f"{folder} was made for something else: {'; '.join(changed)}. Go back to that, name another cache_dir, or "
            "delete the cache and compress again."
        )
    return plan


def write_plan(folder: str | Path, plan: CachePlan) -> None:
    """Write the index of a new cache.

    Args:
        folder: The cache; made when missing.
        plan: Its plan.

    Raises:
        CacheError: There is not enough room on the disk.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = plan.num_bytes(), shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"The cache needs {format_size(needed)}, but {folder} has {format_size(free)} free. Name a cache_dir on "
            "another disk, raise compression_rate, or use fewer records."
        )
    content = {"format": FORMAT, **asdict(plan)}
    write_json(folder / INDEX_NAME, content, indent=1)


def missing_shards(folder: str | Path, plan: CachePlan) -> list[Shard]:
    """List the shards that are not there, or not as the plan has them.

    Args:
        folder: The cache.
        plan: Its plan.

    Returns:
        Shards in their order.
    """
    return [shard for shard in plan.shards if not _is_whole(Path(folder) / shard.file, shard, plan)]


def write_shard(folder: str | Path, plan: CachePlan, shard: Shard, tensors: dict[str, torch.Tensor]) -> None:
    """Write a shard; it appears under its name when it is whole.

    Args:
        folder: The cache.
        plan: Its plan.
        shard: The shard.
        tensors: As the module describes; types are converted.

    Raises:
        CacheError: The disk is full, or the tensors are not what was planned.
    """
    path = Path(folder) / shard.file
    temporary = path.with_name(f".{path.name}.tmp")
    converted = {
        name: tensor.to("cpu", STATE_DTYPES[plan.dtype] if name.endswith("_states") else torch.int32).contiguous()
        for name, tensor in tensors.items()
    }
    try:
        save_file(converted, temporary)
        if not _is_whole(temporary, shard, plan):
            raise CacheError(f"{path} came out otherwise than planned; the data changed meanwhile. Compress again.")
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"{path} could not be written: {error}. {format_size(shutil.disk_usage(folder).free)} are free there; make "
            "room and run the same command again: the shards that are whole are kept."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


class CachedDataset(torch.utils.data.Dataset):
    """Records with the states of their chunks, read from the shards as they are asked for.

    Rows are dicts of the records' `id`, `query`, `answer`, `gold_answers`, `reranking_scores` and `positives`,
    `memory_states` (num_slots, hidden), `rerank_states` (num_chunks, hidden) or `None`, `chunk_slots` and
    `chunk_documents` (num_chunks,), and `document_slots`, the slots of each document.

    Args:
        folder: The cache.
        plan: Its plan, as `open_plan` returned it.
        records: The records it was made from.

    Raises:
        CacheError: Shards are missing.
    """

    def __init__(self, folder: str | Path, plan: CachePlan, records: Sequence[dict[str, Any]]):
        missing = missing_shards(folder, plan)
        if missing:
            raise CacheError(
                f"{folder} lacks {len(missing)} of {len(plan.shards)} shards (the first is {missing[0].file}); finish "
                "it with the command that began it."
            )
        if plan.num_examples != len(records):
            raise CacheError(f"{folder} holds {plan.num_examples} examples for {len(records)} records; compress again.")
        self.folder, self.plan = Path(folder), plan
        self.records = records
        self._starts = torch.tensor([shard.start for shard in plan.shards])
        self._open = functools.cache(self._open_shard)

    def __len__(self) -> int:
        return self.plan.num_examples

    @property
    def lengths(self) -> list[int]:
        """Slots of each example, by which a sampler can put those of like length together."""
        lengths = []
        for number in range(len(self.plan.shards)):
            _, offsets, slot_offsets = self._open(number)
            lengths += slot_offsets[offsets].diff().tolist()
        return lengths

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = self.records[index]
        number = int(torch.searchsorted(self._starts, index, right=True)) - 1
        tensors, offsets, slot_offsets = self._open(number)
        place = index - self.plan.shards[number].start
        chunks = slice(int(offsets[place]), int(offsets[place + 1]))
        slots = slice(int(slot_offsets[chunks.start]), int(slot_offsets[chunks.stop]))
        chunk_slots = tensors.get_slice("chunk_slots")[chunks].long()
        chunk_documents = tensors.get_slice("chunk_documents")[chunks].long()
        count = int(chunk_documents[-1]) + 1 if len(chunk_documents) else 0
        return {
            **{name: record.get(name) for name in RECORD_FIELDS},
            "memory_states": tensors.get_slice("memory_states")[slots],
            "rerank_states": tensors.get_slice("rerank_states")[chunks] if self.plan.has_rerank_states else None,
            "chunk_slots": chunk_slots,
            "chunk_documents": chunk_documents,
            "document_slots": torch.zeros(count).long().index_add(0, chunk_documents, chunk_slots).tolist(),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Drop the open files: each process maps the shards itself."""
        return {**self.__dict__, "_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = functools.cache(self._open_shard)

    def _open_shard(self, number: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
        tensors = safe_open(self.folder / self.plan.shards[number].file, framework="pt")
        chunk_slots = tensors.get_tensor("chunk_slots").long()
        slot_offsets = torch.cat([chunk_slots.new_zeros(1), chunk_slots.cumsum(0)])  # (num_chunks + 1,)
        return tensors, tensors.get_tensor("example_chunks").long(), slot_offsets


def format_size(num_bytes: int) -> str:
    """Render a number of bytes, such as 12.3 GB."""
    unit = next((unit for unit in reversed(UNITS) if num_bytes >= UNITS[unit]), "KB")
    return f"{num_bytes / UNITS[unit]:.1f} {unit}"


def _is_whole(path: Path, shard: Shard, plan: CachePlan) -> bool:
    shapes = {
        "memory_states": [shard.num_slots, plan.memory_size],
        "chunk_slots": [shard.num_chunks],
        "chunk_documents": [shard.num_chunks],
        "example_chunks": [shard.end - shard.start + 1],
    }
    if plan.has_rerank_states:
        shapes["rerank_states"] = [shard.num_chunks, plan.hidden_size]
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()} == shapes  # noqa: SIM118
    except (OSError, SafetensorError):
        return False
