"""Step time of joint training against a straightforward loop over documents, on the same model and records.

    python experiments/training_speed.py --data train.jsonl

The reference does what many implementations do: one document at a time through the compressor, padded to the maximum
length, then one question at a time through the generator, logits at every position. (It reads the padding like
text, because the model would skip it otherwise: useless for training, but right for timing.) Steps
alternate, and the median of their ratios is reported.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import pad
from tqdm.auto import tqdm
from transformers import LlamaConfig, set_seed

from scaledown import ScaleDownConfig, ScaleDownModel, ScaleDownProcessor
from scaledown.common.command_line import parse_options, run_command
from scaledown.data.records import read_records
from scaledown.tools.slots_demo import train_tokenizer
from scaledown.training.collators import JointCollator


@dataclass
class SpeedArguments:
    """What to time."""

    data: str = field(metadata={"help": "Records, as prepare_data.py writes them."})
    num_steps: int = field(default=7, metadata={"help": "Steps of each kind, after one warm-up step."})
    batch_size: int = field(default=8, metadata={"help": "Questions per step."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the generator."})
    num_layers: int = field(default=8, metadata={"help": "Layers of the generator; the compressor has half of them."})
    seed: int = field(default=0, metadata={"help": "Decides weights."})
    output: str | None = field(default=None, metadata={"help": "Where to write the results as JSON."})


def build_model(texts: list[str], args: SpeedArguments) -> ScaleDownModel:
    """A model of random weights at OSCAR's settings: chunks of 128 tokens, 8 slots, LoRA of rank 16."""
    set_seed(args.seed)
    tokenizer = train_tokenizer(texts, vocab_size=8192)
    generator = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 32,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = ScaleDownConfig(generator_config=generator, num_compressor_layers=args.num_layers // 2)
    model = ScaleDownModel(config)
    model.processor = ScaleDownProcessor.from_config(config, tokenizer)
    model.add_lora(lora_dropout=0.0)
    return model.train()


def step(model: ScaleDownModel, records: list[dict]) -> float:
    """One training step as the project does it; returns its loss."""
    loss = model(**JointCollator(model.processor)(records)).loss
    loss.backward()
    return loss.item()


def reference_step(model: ScaleDownModel, records: list[dict]) -> float:
    """The same step, a document and a question at a time, all padded; returns its loss."""
    collator, config = JointCollator(model.processor), model.config
    longest = config.max_query_length + config.chunk_length + 2
    num_answer_tokens = sum(int((collator([record])["labels"] != -100).sum()) for record in records)
    total = 0.0
    for record in records:
        batch = {**collator([record]), "logits_to_keep": 0}
        names = ("compressor_input_ids", "compressor_attention_mask", "compressor_document_mask")
        chunks = {name: batch.pop(name) for name in names}
        chunk_slots, compressed = batch.pop("chunk_slots"), []
        for i in range(len(chunk_slots)):
            ids, attention, own = (pad(chunks[name][i : i + 1], (0, longest - chunks[name].shape[1])) for name in names)
            attention = torch.ones_like(attention)
            compressed.append(model.get_memory_embeddings(ids, attention, chunk_slots[i : i + 1], own))
        width = max(part.memory_embeddings.shape[1] for part in compressed)
        memory = torch.cat(
            [pad(part.memory_embeddings, (0, 0, 0, width - part.memory_embeddings.shape[1])) for part in compressed]
        )
        mask = torch.cat([pad(part.memory_mask, (0, width - part.memory_mask.shape[1])) for part in compressed])
        scale = int((batch["labels"] != -100).sum()) / num_answer_tokens
        loss = scale * model(**batch, memory_embeddings=memory, memory_mask=mask).loss
        loss.backward()
        total += loss.item()
    return total


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(SpeedArguments)
        records = [
            {**record, "reranking_scores": None}
            for record, _ in zip(read_records(args.data), range(args.batch_size * (args.num_steps + 1)), strict=False)
        ]
        model = build_model([text for record in records for text in record["documents"]], args)
        times = {step: [], reference_step: []}
        for i in tqdm(range(args.num_steps + 1), desc="Timing", disable=None):
            part = records[i * args.batch_size : (i + 1) * args.batch_size]
            for kind, seconds in times.items():
                model.zero_grad()
                started = time.perf_counter()
                kind(model, part)
                if i > 0:
                    seconds.append(time.perf_counter() - started)
        own, reference = (statistics.median(seconds) for seconds in times.values())
        ratios = [r / o for o, r in zip(times[step], times[reference_step], strict=True)]
        results = {
            "seconds per step": own,
            "seconds per step, reference": reference,
            "ratio": statistics.median(ratios),
            "ratio, lowest and highest": [min(ratios), max(ratios)],
            "threads": torch.get_num_threads(),
            "settings": asdict(args),
        }
        if args.output:
            Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        return "\n".join(f"{name:<28} {value}" for name, value in results.items())

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
