"""Stage 1 of two-stage training: run the frozen compressor over all chunks and keep what it makes of them."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from compression_scaledown import chunk_inputs
from modeling_scaledown import ScaleDownModel
from processing_scaledown import ScaleDownProcessor

from .cache import (
    CachePlan,
    Shard,
    format_size,
    make_plan,
    missing_shards,
    open_plan,
    write_plan,
    write_shard,
)
from .collators import CompressionCollator

logger = logging.getLogger(__name__)

FINGERPRINTED_SETTINGS = (
    "compressor_type",
    "slot_pooling",
    "num_memory_tokens",
    "compression_rate",
    "chunk_length",
    "max_query_length",
    "enable_reranking",
)
# Named only where they are set, so that caches of before there were any stay valid.
FINGERPRINTED_IF_SET = (
    "compressor_prompt",
    "compressor_max_length",
    "compressor_padding_side",
    "fixed_slots",
    "learned_separator",
    "keep_final_norm",
)


def cache_fingerprint(
    records: datasets.Dataset, processor: ScaleDownProcessor, config: Any, weights: str, dtype: str
) -> dict[str, Any]:
    """Say what a cache depends on: questions and documents, settings, tokenizer and the compressor's weights.

    Args:
        records: The data. Answers and scores are not in the cache, and may change.
        processor: Cuts documents into chunks.
        config: The model's configuration.
        weights: Fingerprint of the checkpoint the compressor comes from.
        dtype: Type of the states in the cache.

    Returns:
        Names and values that JSON can hold.
    """
    digest = hashlib.sha256()
    for batch in records.select_columns(["query", "documents"]).iter(batch_size=1000):
        for query, documents in zip(batch["query"], batch["documents"], strict=True):
            for text in (query, *documents):
                digest.update(text.encode("utf-8") + b"\0")
            digest.update(b"\1")
    tokenizer = processor.compressor_tokenizer
    vocabulary = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
    )
    return {
        "records": len(records),
        "data": digest.hexdigest(),
        **{name: getattr(config, name) for name in FINGERPRINTED_SETTINGS},
        **{
            name: getattr(config, name)
            for name in FINGERPRINTED_IF_SET
            if getattr(config, name) != getattr(type(config), name)
        },
        "num_compressor_layers": config.num_compressor_layers if config.compressor_type == "n_layers" else None,
        "tokenizer": hashlib.sha256(vocabulary.encode("utf-8")).hexdigest(),
        "weights": weights,
        "dtype": dtype,
    }


def compress_records(
    load_model: Callable[[], ScaleDownModel],
    processor: ScaleDownProcessor,
    config: Any,
    records: datasets.Dataset,
    folder: str | Path,
    fingerprint: dict[str, Any],
    max_shard_size: str | int,
    batch_size: int,
    num_workers: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    wait_for_everyone: Callable[[], None] = lambda: None,
) -> CachePlan:
    """Write the cache of some records, or what is missing of it.

    Args:
        load_model: Loads the model without its generator; called only where there is something to compress.
        processor: Its processor.
        config: Its configuration.
        records: The data.
        folder: The cache.
        fingerprint: As `cache_fingerprint` returns it.
        max_shard_size: Size of a shard at most; what a kill can lose is one shard per process.
        batch_size: Chunks compressed at a time.
        num_workers: Processes that tokenize ahead.
        process_index, num_processes: This process's share of the shards.
        wait_for_everyone: Returns when all processes have called it.

    Returns:
        The plan of the whole cache.

    Raises:
        CacheError: The cache was made for something else, or the disk is too small.
    """
    plan = open_plan(folder, fingerprint)
    wait_for_everyone()  # until all have looked, so that all find the same
    if plan is None:
        if process_index == 0:
            counts = _count(records, processor, num_workers)
            plan = make_plan(
                counts,
                fingerprint,
                config.memory_state_size,
                config.compressor_config.hidden_size,
                fingerprint["dtype"],
                config.enable_reranking,
                max_shard_size,
            )
            logger.info(
                "The cache of %d examples takes %s in %d shards: %d slots of %d × %s.",
                plan.num_examples,
                format_size(plan.num_bytes()),
                len(plan.shards),
                sum(shard.num_slots for shard in plan.shards),
                plan.memory_size,
                plan.dtype,
            )
            write_plan(folder, plan)
        wait_for_everyone()
        plan = open_plan(folder, fingerprint)
        if plan is None:
            raise FileNotFoundError(f"{folder} has no plan; all processes must share one cache_dir.")
    missing = missing_shards(folder, plan)
    wait_for_everyone()
    if len(missing) < len(plan.shards):
        logger.info("%d of %d shards are there already.", len(plan.shards) - len(missing), len(plan.shards))
    own = missing[process_index::num_processes]
    if own:
        _write_shards(load_model(), processor, records, folder, plan, own, batch_size, num_workers)
    wait_for_everyone()
    return plan


class _Shards(Dataset):
    """The chunks of whole shards, so that a data loader can tokenize ahead."""

    def __init__(self, records: datasets.Dataset, shards: list[Shard], collate: CompressionCollator):
        self.records, self.shards, self.collate = records, shards, collate

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        shard = self.shards[index]
        return self.collate(_rows(self.records, shard.start, shard.end))


@torch.inference_mode()
def _write_shards(model, processor, records, folder, plan, shards, batch_size, num_workers):
    model.eval()
    loader = DataLoader(
        _Shards(records, shards, CompressionCollator(processor)), batch_size=None, num_workers=num_workers
    )
    total = sum(shard.num_chunks for shard in shards)
    with tqdm(total=total, desc="Compressing", unit="chunk", disable=None) as progress:
        for shard, chunks in zip(shards, loader, strict=True):
            tensors = _compress(model, chunks, shard, batch_size, progress)
            write_shard(folder, plan, shard, tensors)


def _compress(model, chunks, shard: Shard, batch_size: int, progress) -> dict[str, torch.Tensor]:
    num_examples = shard.end - shard.start
    width, hidden = model.config.memory_state_size, model.config.compressor_config.hidden_size
    if not chunks:
        empty = torch.zeros(0, dtype=torch.long)
        tensors = {"memory_states": torch.zeros(0, width), "chunk_slots": empty, "chunk_documents": empty}
        if model.config.enable_reranking:
            tensors["rerank_states"] = torch.zeros(0, hidden)
        return {**tensors, "example_chunks": torch.zeros(num_examples + 1)}
    chunk_slots = chunks["chunk_slots"]
    lengths = chunks["compressor_attention_mask"].sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)  # of like length together: little padding
    starts = torch.cat([chunk_slots.new_zeros(1), chunk_slots.cumsum(0)])
    memory = torch.empty(int(chunk_slots.sum()), width, dtype=model.dtype)
    rerank = torch.empty(len(chunk_slots), hidden, dtype=model.dtype)
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        longest = int(lengths[rows].max())
        batch = {name: value[rows] for name, value in chunk_inputs(chunks).items()}
        batch = {name: value[:, :longest] if value.dim() == 2 else value for name, value in batch.items()}
        states, mask, scored = model.compressor.hidden_states(*(value.to(model.device) for value in batch.values()))
        slots = chunk_slots[rows]
        places = torch.cat([torch.arange(starts[i], starts[i] + n) for i, n in zip(rows, slots, strict=True)])
        memory[places] = states[mask].cpu()
        if scored is not None:
            rerank[rows] = scored.cpu()
        progress.update(len(rows))
    example = chunks["document_to_example"][chunks["chunk_to_document"]]  # (num_chunks,)
    first_document = torch.searchsorted(chunks["document_to_example"], example)
    tensors = {
        "memory_states": memory,
        "chunk_slots": chunk_slots,
        "chunk_documents": chunks["chunk_to_document"] - first_document,
        "example_chunks": torch.searchsorted(example, torch.arange(num_examples + 1)),
    }
    if model.config.enable_reranking:
        tensors["rerank_states"] = rerank
    return tensors


def _count(records, processor, num_workers) -> list[tuple[int, int]]:
    """Chunks and slots of each example."""
    counts = []
    batches = [Shard("", start, min(start + 64, len(records)), 0, 0) for start in range(0, len(records), 64)]
    loader = DataLoader(
        _Shards(records, batches, CompressionCollator(processor)), batch_size=None, num_workers=num_workers
    )
    for batch, chunks in zip(batches, tqdm(loader, desc="Counting slots", unit="batch", disable=None), strict=True):
        size = batch.end - batch.start
        num_chunks, num_slots = torch.zeros(size).long(), torch.zeros(size).long()
        if chunks:
            example = chunks["document_to_example"][chunks["chunk_to_document"]]
            num_chunks.index_add_(0, example, torch.ones_like(example))
            num_slots.index_add_(0, example, chunks["chunk_slots"])
        counts += zip(num_chunks.tolist(), num_slots.tolist(), strict=True)
    return counts


def _rows(records: datasets.Dataset, start: int, end: int) -> list[dict[str, Any]]:
    columns = records[start:end]
    return [{"query": q, "documents": d} for q, d in zip(columns["query"], columns["documents"], strict=True)]
