# Copyright 2026 The ScaleDown authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Many chunks at once: in passes of similar length, and those that were compressed before from a cache."""

import contextlib
import itertools
from collections import OrderedDict
from numbers import Integral

import torch
from torch import nn
from transformers import PreTrainedModel

try:
    from .compressor_scaledown import CHUNK_INPUTS, ScaleDownCompressor
    from .errors_scaledown import ScaleDownError
    from .outputs_scaledown import CompressedDocuments
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from compressor_scaledown import CHUNK_INPUTS, ScaleDownCompressor
    from errors_scaledown import ScaleDownError
    from outputs_scaledown import CompressedDocuments

# Chunks are compressed with others of similar length. A pass ends where the next chunk is this much shorter than its
# longest, once the pass is large enough to keep the device busy: tokens on a CPU, and on an accelerator.
SIMILAR_LENGTH = 0.85
LARGE_PASS = {"cpu": 512}
LARGE_PASS_ELSEWHERE = 4096
# Larger passes take more memory, and beyond these no less time.
CHUNKS_PER_PASS = {"cpu": 16}
CHUNKS_PER_PASS_ELSEWHERE = 64


class CompressionCache:
    r"""
    Bounded memory of compressed chunks, each with its question: what was used last stays.

    It belongs to weights that do not change: it is emptied when the model is put into training mode, and at the next
    use after weights were changed in place, loaded, or given another type or device. A change through `.data` leaves no
    trace in torch: call `clear` after one.

    Args:
        max_entries (`int`): Chunks to keep; one takes `slots · hidden_size` numbers on the model's device.
    """

    def __init__(self, max_entries: int):
        if max_entries < 1:
            raise ScaleDownError(f"max_entries={max_entries} must be at least 1.")
        self.max_entries = max_entries
        self.hits = self.misses = 0
        self._entries = OrderedDict()
        self._weights = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def hit_rate(self) -> float:
        """Share of the chunks asked for that were there."""
        return self.hits / max(self.hits + self.misses, 1)

    def belong_to(self, *modules: nn.Module):
        """Forgets all chunks unless the modules that make them have the weights they had at the last call."""
        # Whatever is written into a tensor raises its version; those of inference mode have none.
        weights = tuple(
            (tensor.data_ptr(), tensor.dtype, tensor.device, 0 if tensor.is_inference() else tensor._version)
            for module in modules
            for tensor in itertools.chain(module.parameters(), module.buffers())
        )
        if self._weights is not None and weights != self._weights:
            self.clear()
        self._weights = weights

    def get(self, key: tuple) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Memory embeddings `(slots, hidden)` and score `()` of a chunk, or `None`; counts either."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        with contextlib.suppress(KeyError):  # another thread may just have dropped it
            self._entries.move_to_end(key)
        return found

    def put(self, key: tuple, memory: torch.Tensor, score: torch.Tensor | None):
        """Keeps a chunk, in the place of the one that was not used for longest."""
        self._entries[key] = (memory, score)
        self._entries.move_to_end(key)
        while len(self._entries) > self.max_entries:
            self._entries.popitem(last=False)

    def clear(self):
        """Forgets all chunks, and the counts."""
        self._entries.clear()
        self.hits = self.misses = 0


def pass_sizes(lengths: list[int], batch_size: int, large: int) -> list[int]:
    """
    Cuts chunks into passes of similar length.

    Args:
        lengths (`list[int]`): Tokens of each chunk, longest first.
        batch_size (`int`): Chunks of a pass at most.
        large (`int`): Tokens from which on a pass may end before it is full.

    Returns:
        `list[int]`: Chunks of each pass.
    """
    sizes, longest = [], 0
    for length in lengths:
        full = not sizes or sizes[-1] == batch_size
        if full or (sizes[-1] * longest >= large and length < SIMILAR_LENGTH * longest):
            sizes.append(0)
            longest = length
        sizes[-1] += 1
    return sizes


def compress_by_length(
    compressor: ScaleDownCompressor,
    device: torch.device,
    chunks: tuple[torch.Tensor | None, ...],
    batch_size: int,
    embeddings: nn.Module | None = None,
) -> CompressedDocuments:
    """
    Compresses chunks in passes of similar length, and reads a question in front of several chunks once.

    Args:
        compressor (`ScaleDownCompressor`): The compressor.
        device (`torch.device`): Where it computes.
        chunks (`tuple`): The values of `CHUNK_INPUTS`, as in `ScaleDownModel.get_memory_embeddings`.
        batch_size (`int`): Chunks of a pass at most.
        embeddings (`nn.Module`, *optional*): The generator's token embeddings, for slots that point at text.

    Returns:
        `CompressedDocuments`: Chunks in the order given.
    """
    input_ids, attention_mask, chunk_slots, document_mask, windows = chunks
    large = LARGE_PASS.get(device.type, LARGE_PASS_ELSEWHERE)
    parts, places = [], []
    for group, prefixes, left in compressor.read_prefixes(input_ids, attention_mask, document_mask, batch_size):
        lengths, order = left[group].sum(dim=1).sort(descending=True, stable=True)
        for rows in order.split(pass_sizes(lengths.tolist(), batch_size, large)):
            places.append(group[rows])
            inputs = [
                None if part is None else part[places[-1]].to(device)
                for part in (input_ids, left, chunk_slots, document_mask, windows)
            ]
            before = None if prefixes is None else prefixes.of(rows.to(device))
            parts.append(compressor(*inputs, prefixes=before, embeddings=embeddings))
    back = torch.cat(places).argsort().to(parts[0].memory_mask.device)
    longest = max(part.memory_mask.shape[1] for part in parts)
    pads = [longest - part.memory_mask.shape[1] for part in parts]
    memory = [nn.functional.pad(p.memory_embeddings, (0, 0, 0, n)) for p, n in zip(parts, pads, strict=True)]
    mask = [nn.functional.pad(part.memory_mask, (0, n)) for part, n in zip(parts, pads, strict=True)]
    scores = [part.reranking_scores for part in parts]
    return CompressedDocuments(
        memory_embeddings=torch.cat(memory)[back],
        memory_mask=torch.cat(mask)[back],
        reranking_scores=torch.cat(scores)[back] if scores[0] is not None else None,
    )


def compress_chunks(model: PreTrainedModel, batch: dict[str, torch.Tensor], batch_size: int) -> CompressedDocuments:
    """
    Compresses chunks that the processor made; those in the model's cache are taken from there.

    Args:
        model (`ScaleDownModel`): The model.
        batch (`dict[str, torch.Tensor]`): What `ScaleDownProcessor.encode_documents` returned.
        batch_size (`int`): Chunks compressed at a time.

    Returns:
        `CompressedDocuments`: Chunks in the order given.
    """
    cache = model.compression_cache
    if cache is None:
        return model.get_memory_embeddings(**chunk_inputs(batch), batch_size=batch_size)
    reads_text = "compressor_windows" in batch and model.generator is not None
    cache.belong_to(model.compressor, *([model.get_input_embeddings()] if reads_text else []))
    # What the compressor reads, which part of it is the document, and the slots.
    rows = zip(
        batch["chunk_slots"].tolist(),
        batch["compressor_document_mask"].sum(dim=1).tolist(),
        batch["compressor_input_ids"],
        batch["compressor_attention_mask"].bool(),
        strict=True,
    )
    keys = [(slots, count, *ids[kept].tolist()) for slots, count, ids, kept in rows]
    if "compressor_windows" in batch:  # texts that differ for the generator alone
        own = zip(batch["compressor_windows"], batch["compressor_document_mask"].bool(), strict=True)
        texts = [windows[mask].cpu().numpy().tobytes() for windows, mask in own]
        keys = [(*key, text) for key, text in zip(keys, texts, strict=True)]
    entries = {key: cache.get(key) for key in keys}
    missing = [i for i, key in enumerate(keys) if entries[key] is None]
    if missing:
        chunks = {name: value[missing] for name, value in chunk_inputs(batch).items()}
        new = model.get_memory_embeddings(**chunks, batch_size=batch_size)
        for row, i in enumerate(missing):
            memory = new.memory_embeddings[row, : keys[i][0]].clone()  # a part would keep the whole batch alive
            score = None if new.reranking_scores is None else new.reranking_scores[row].clone()
            entries[keys[i]] = (memory, score)
            cache.put(keys[i], memory, score)
    memories, scores = zip(*(entries[key] for key in keys), strict=True)
    memory = nn.utils.rnn.pad_sequence(memories, batch_first=True)  # (num_chunks, slots, hidden)
    slot_ids = torch.arange(memory.shape[1], device=memory.device)
    return CompressedDocuments(
        memory_embeddings=memory,
        memory_mask=slot_ids < batch["chunk_slots"].to(memory.device).unsqueeze(1),
        reranking_scores=None if scores[0] is None else torch.stack(scores),
    )


def chunk_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the compressor takes of a batch of the processor."""
    return {name: batch[name] for name in CHUNK_INPUTS if name in batch}


def chunks_per_pass(device: torch.device) -> int:
    """Chunks that a device compresses at a time without the work growing slower for each."""
    return CHUNKS_PER_PASS.get(device.type, CHUNKS_PER_PASS_ELSEWHERE)


def check_batch_size(batch_size: int):
    """Refuses a number of chunks or questions that is none, or below 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
        raise ScaleDownError(f"batch_size={batch_size!r} must be a whole number of at least 1.")
