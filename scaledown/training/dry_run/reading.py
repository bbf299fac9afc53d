"""What a run reads, looked at before it begins: micro-batches of its own data, or of the paper's protocol."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from compression_scaledown import chunk_inputs
from compressor_scaledown import own_tokens
from processing_scaledown import ScaleDownProcessor
from reranking_scaledown import slots_by_document

from ...data.records import load_records
from ..arguments import DataArguments, ScaleDownTrainingArguments
from ..cache import STATE_DTYPES, make_plan
from ..collators import CompressionCollator, GenerationCollator, JointCollator, PointerCollator, PretrainingCollator
from ..pretraining import AUTOENCODING, load_pretraining_data
from ..reader import ReaderCollator
from ..sampling import record_length

# Records looked at; the others are taken to be like them.
SAMPLE = 256
# OSCAR, section 4 and table 7: documents per question, and tokens of a question.
PROTOCOL_DOCUMENTS = 5
PROTOCOL_QUESTION = 32
WORDS = ("of", "the", "river", "that", "rises", "in", "hills", "and", "runs", "to", "sea", "past", "mills")


@dataclass
class Reading:
    """What micro-batches hold.

    Args:
        source: Where the figures come from, as reported to the user.
        largest: The micro-batch that needs most memory, as the collator made it.
        batch_size: Its rows.
        compressor_tokens: Tokens the compressor reads for an example, memory embeddings included, padding aside.
        generator_tokens: Tokens the generator reads for an example, slots included, padding aside.
        num_examples: Examples of the whole data; `None` where that is unknown.
        cache_bytes: Bytes of the cache for an example.
    """

    source: str
    largest: dict[str, Any]
    batch_size: int
    compressor_tokens: float = 0.0
    generator_tokens: float = 0.0
    num_examples: int | None = None
    cache_bytes: float = 0.0


def read_sample(
    processor: ScaleDownProcessor, config: Any, data_args: DataArguments, args: ScaleDownTrainingArguments
) -> Reading:
    """Collate a sample of what a stage reads.

    Args:
        processor: The model's.
        config: The model's configuration.
        data_args: The data; where there is none, the paper's protocol stands in for it.
        args: The stage, and the size of a micro-batch.

    Returns:
        What the micro-batches hold.

    Raises:
        ValueError: The data breaks the format, or a record does not fit the generator.
    """
    pretraining = args.stage == "pretrain"
    rows, num_examples, source = _rows(processor, config, data_args, pretraining)
    size = args.per_device_train_batch_size
    reading = Reading(source, {}, size, num_examples=num_examples)
    if args.stage == "compress":
        _read_chunks(reading, processor, config, rows, data_args)
        return reading
    if args.stage == "generate":
        rows = [_as_cached(row, processor, config, STATE_DTYPES[data_args.cache_dtype]) for row in rows]
    collators: dict[str, Callable] = {
        "joint": JointCollator(processor, data_args.max_answer_length),
        "pretrain": PretrainingCollator(processor),
        "pointer": PointerCollator(processor, data_args.max_answer_length),
        "generate": GenerationCollator(processor, data_args.max_answer_length),
        "reader": ReaderCollator(processor, data_args.max_answer_length),
    }
    collate = collators[args.stage]
    random.Random(0).shuffle(rows)
    by_length = args.stage in ("joint", "pointer", "reader") and args.train_sampling_strategy != "random"
    if by_length:  # the longest may meet in one batch
        rows.sort(key=lambda row: record_length(row, args.stage), reverse=True)
    parts = [rows[i : i + size] for i in range(0, max(len(rows) - size + 1, 1), size)]
    batches = list(map(collate, parts))
    reading.largest = max(batches, key=lambda batch: _cost(batch, config))
    counted = sum(map(len, parts))
    read = [batch["attention_mask"] for batch in batches if "attention_mask" in batch]
    reading.generator_tokens = sum(int(mask.sum()) for mask in read) / counted
    reading.compressor_tokens = sum(_compressor_tokens(batch, config) for batch in batches) / counted
    return reading


def _rows(
    processor: ScaleDownProcessor, config: Any, data_args: DataArguments, pretraining: bool
) -> tuple[list[dict[str, Any]], int | None, str]:
    """Rows to look at, how many there are in all, and where they come from."""
    if not Path(data_args.train_file).is_file():
        row = _passage(processor) if pretraining else _record(processor, data_args.max_answer_length)
        size = f"{PROTOCOL_DOCUMENTS} documents of {processor.chunk_length} tokens, question of {PROTOCOL_QUESTION}"
        size = f"a passage of {processor.chunk_length} tokens to write" if pretraining else size
        answer = "" if pretraining else f", answer of {data_args.max_answer_length}"
        return [row] * SAMPLE, None, f"the paper's protocol ({size}{answer}); {data_args.train_file} is no file here"
    if pretraining:
        settings = (processor.compressor_tokenizer, config.chunk_length, data_args.text_column)
        rows = load_pretraining_data(
            data_args.train_file, *settings, data_args.dataset_config, data_args.train_split, data_args.streaming
        )
        total = None if data_args.streaming else len(rows)
    else:
        rows = load_records(data_args.train_file)
        total = len(rows)
    if data_args.max_train_examples is not None:
        total = data_args.max_train_examples if total is None else min(total, data_args.max_train_examples)
    if data_args.streaming and pretraining:
        sample = list(rows.take(min(SAMPLE, total or SAMPLE)))
    else:
        sample = [rows[i * total // min(SAMPLE, total)] for i in range(min(SAMPLE, total))]
    of_all = f" of {total:,}" if total is not None else ""
    return sample, total, f"{data_args.train_file}: {len(sample)}{of_all} examples looked at"


def _record(processor: ScaleDownProcessor, max_answer_length: int) -> dict[str, Any]:
    """A record of the paper's sizes."""
    document = _text(processor.compressor_tokenizer, processor.chunk_length)
    return {
        "query": _text(processor.tokenizer, PROTOCOL_QUESTION),
        "documents": [document] * PROTOCOL_DOCUMENTS,
        "answer": [_text(processor.tokenizer, 2 * max_answer_length)],  # cut by the collator
        "reranking_scores": [0.0] * PROTOCOL_DOCUMENTS,
    }


def _passage(processor: ScaleDownProcessor) -> dict[str, Any]:
    """A row of pretraining of the paper's size."""
    text = _text(processor.compressor_tokenizer, processor.chunk_length)
    return {"task": AUTOENCODING, "text": text, "target": text}


def _text(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> str:
    """Words that come as close to a number of tokens as whole words do, and never above it."""
    words = [WORDS[i % len(WORDS)] for i in range(num_tokens)]
    low, high = 1, num_tokens
    while low < high:
        middle = (low + high + 1) // 2
        length = len(tokenizer(" ".join(words[:middle]), add_special_tokens=False)["input_ids"])
        low, high = (middle, high) if length <= num_tokens else (low, middle - 1)
    return " ".join(words[:low])


def _as_cached(row: dict[str, Any], processor: ScaleDownProcessor, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """A record as a row of the cache, without what the compressor would make of it."""
    chunks = processor.encode_documents([row["query"]], [row["documents"]])
    empty = torch.zeros(0, dtype=torch.long)
    slots = chunks.get("chunk_slots", empty)
    documents = chunks.get("chunk_to_document", empty)
    hidden = config.compressor_config.hidden_size
    return {
        **{name: row.get(name) for name in ("id", "query", "answer", "reranking_scores")},
        "memory_states": torch.zeros(int(slots.sum()), config.memory_state_size, dtype=dtype),
        "rerank_states": torch.zeros(len(slots), hidden, dtype=dtype) if config.enable_reranking else None,
        "chunk_slots": slots,
        "chunk_documents": documents,
        "document_slots": slots_by_document(chunks, [row["documents"]])[0],
    }


def _read_chunks(
    reading: Reading,
    processor: ScaleDownProcessor,
    config: Any,
    rows: Sequence[dict[str, Any]],
    data_args: DataArguments,
) -> None:
    """Stage 1 compresses chunks of like length together: the largest batch is that of the longest."""
    chunks = CompressionCollator(processor)(rows)
    if not chunks:
        return
    reading.compressor_tokens = _compressor_tokens(chunks, config) / len(rows)
    lengths = chunks["compressor_attention_mask"].sum(dim=1)
    longest = lengths.argsort(descending=True, stable=True)[: data_args.compression_batch_size]
    reading.largest = {name: value[longest] for name, value in chunk_inputs(chunks).items()}
    reading.batch_size = len(longest)
    counts = (len(chunks["chunk_slots"]), int(chunks["chunk_slots"].sum()))
    settings = (
        config.memory_state_size,
        config.compressor_config.hidden_size,
        data_args.cache_dtype,
        config.enable_reranking,
    )
    reading.cache_bytes = make_plan([counts], {}, *settings, "1000TB").num_bytes() / len(rows)


def _compressor_tokens(batch: dict[str, Any], config: Any) -> int:
    if "compressor_attention_mask" not in batch:
        return 0
    return int(batch["compressor_attention_mask"].sum() + own_tokens(batch["chunk_slots"], config).sum())


def _cost(batch: dict[str, Any], config: Any) -> int:
    """What a batch keeps alive, to compare batches by."""
    sides = [("input_ids", config.generator_config), ("compressor_input_ids", config.compressor_config)]
    cost = sum(batch[name].numel() * c.hidden_size * c.num_hidden_layers for name, c in sides if name in batch)
    if "logits_to_keep" not in batch:
        return cost
    return cost + batch["input_ids"].shape[0] * batch["logits_to_keep"] * config.generator_config.vocab_size
