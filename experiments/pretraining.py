"""Measure pretraining: does the text flow through the slots, or does the generator guess it?

    python train.py --stage pretrain … --output_dir runs/pretrained
    python experiments/pretraining.py --model runs/pretrained --generator runs/backbones/generator --text dev.txt

Losses are per token, over the same tokens of unseen passages.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from scaledown import ScaleDownModel
from scaledown.common.command_line import parse_options, run_command
from scaledown.training.collators import PretrainingCollator
from scaledown.training.pretraining import AUTOENCODING, CONTINUATION, load_pretraining_data


@dataclass
class MeasurementArguments:
    """What to measure, and on what."""

    model: str = field(metadata={"help": "Folder of the pretrained ScaleDown model."})
    generator: str = field(metadata={"help": "Folder of the generator before training."})
    text: str = field(metadata={"help": "Text that was not used in training."})
    num_passages: int = field(default=512, metadata={"help": "Passages of each task."})
    output: str | None = field(default=None, metadata={"help": "Where to write the results as JSON."})


@torch.no_grad()
def loss_from_slots(model: ScaleDownModel, rows: list[dict], swapped: bool = False, batch_size: int = 32) -> float:
    """Loss per token of the targets, read from their slots.

    Args:
        model: The model.
        rows: Rows of `load_pretraining_data`.
        swapped: Give each passage the slots of another.
        batch_size: Rows at a time.

    Returns:
        Cross-entropy in nats, without the end token.
    """
    collator = PretrainingCollator(model.processor)
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        if swapped:
            part = [{**row, "text": other["text"]} for row, other in zip(part, part[1:] + part[:1], strict=True)]
        batch = {**collator(part), "logits_to_keep": 0}
        labels = batch.pop("labels")
        labels[labels == model.processor.tokenizer.eos_token_id] = -100
        logits = model(**batch).logits
        total += cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    return total / count


@torch.no_grad()
def loss_without_memory(generator, tokenizer, rows: list[dict], max_length: int) -> float:
    """Loss per token of the targets for the generator as a plain language model.

    Args:
        generator: A causal language model.
        tokenizer: Its tokenizer.
        rows: Rows of `load_pretraining_data`.
        max_length: Tokens of a target at most, as the collator cuts it.

    Returns:
        Cross-entropy in nats.
    """
    total, count = 0.0, 0
    for row in rows:
        ids = tokenizer(row["target"], add_special_tokens=False)["input_ids"][:max_length]
        ids = torch.tensor([[tokenizer.bos_token_id, *ids]])
        logits = generator(ids).logits[0, :-1]
        total += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(MeasurementArguments)
        model = ScaleDownModel.from_pretrained(args.model).eval()
        generator = AutoModelForCausalLM.from_pretrained(args.generator).eval()
        rows = load_pretraining_data(args.text, model.processor.compressor_tokenizer, model.config.chunk_length)
        tasks = {name: [row for row in rows if row["task"] == name] for name in (AUTOENCODING, CONTINUATION)}
        tasks = {name: listed[: args.num_passages] for name, listed in tasks.items()}
        longest = 2 * model.config.chunk_length - 1
        results = {
            name: {
                "own slots": loss_from_slots(model, listed),
                "slots of another passage": loss_from_slots(model, listed, swapped=True),
                "language model, no memory": loss_without_memory(generator, model.processor.tokenizer, listed, longest),
            }
            for name, listed in tasks.items()
        }
        if args.output:
            Path(args.output).write_text(json.dumps({**results, "settings": asdict(args)}, indent=2) + "\n", "utf-8")
        lines = [f"{'nats per token':<28}" + "".join(f"{name:>16}" for name in results)]
        for case in results[AUTOENCODING]:
            lines.append(f"{case:<28}" + "".join(f"{results[name][case]:>16.3f}" for name in results))
        return "\n".join(lines)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
