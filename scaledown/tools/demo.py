"""Answers questions from whole passages and from compressed ones, side by side.

    python -m scaledown.tools.demo                        # the embedded model, on passages it never saw
    python -m scaledown.tools.demo --num_documents 5      # as many as it was trained with, half as many as by default
    python -m scaledown.tools.demo --model MODEL --data records.jsonl --reader READER

The passages are of the project's made-up world, drawn on the spot in the names of its test split, or those of `--data`.
The same generator reads them as text, as slots, and answers without any. It reads text without the LoRA that ScaleDown
added to it, or with a reader's (`train.py --stage reader`).
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from modeling_scaledown import ScaleDownModel

from ..common.adapters import merge_adapter, without_lora
from ..common.command_line import check_least, parse_options, run_command
from ..common.loading import load_model
from ..common.metrics import exact_match
from ..common.tables import table
from ..evaluation.data import Example, load_data
from ..evaluation.systems import Answer, CompressedSystem, System, TextSystem
from ..world.world import World

ROOT = Path(__file__).resolve().parents[2]
MAX_NEW_TOKENS = 24  # an answer ends by itself before that
DEFAULT_NUM_DOCUMENTS = 10
WAYS = {"full_text": "whole passages", "compressed": "compressed", "no_documents": "no passages"}


@dataclass
class DemoArguments:
    """Which model to show, and on how much."""

    model: str = field(default=str(ROOT), metadata={"help": "A ScaleDown model; the embedded one by default."})
    num_questions: int = field(default=8, metadata={"help": "Questions to ask, one at a time."})
    num_documents: int | None = field(
        default=None, metadata={"help": "Passages per question, at least 2; 10 by default, or as many as the data has."}
    )
    data: str | None = field(
        default=None, metadata={"help": "Questions to ask, in a format of evaluate.py; made-up ones by default."}
    )
    reader: str | None = field(
        default=None, metadata={"help": "Adapter of train.py --stage reader, with which whole passages are read."}
    )
    generator_name_or_path: str | None = field(
        default=None, metadata={"help": "Where the generator is, if not where a model saved as a delta expects it."}
    )
    compression_rate: int | None = field(
        default=None, metadata={"help": "Tokens per slot; the model's own by default."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of questions and passages."})

    def __post_init__(self):
        check_least(self, {"num_questions": 1, "num_documents": 2})


def draw_examples(args: DemoArguments) -> list[Example]:
    """Questions of the data, or about made-up things of the test split, of which every third needs two passages.

    Args:
        args: How many, and how many passages.

    Returns:
        The questions.

    Raises:
        ValueError: The data cannot be read.
    """
    if args.data is not None:
        return load_data(args.data, num_documents=args.num_documents, limit=args.num_questions, seed=args.seed).examples
    world = World("test", args.seed)
    examples = []
    for number in range(args.num_questions):
        record = world.record(number, args.num_documents or DEFAULT_NUM_DOCUMENTS, float(number % 3 == 2))
        examples.append(
            Example(
                record["id"],
                record["query"],
                record["documents"],
                [record["answer"]],
                positives=record["positives"],
                index=number,
            )
        )
    return examples


def ask(system: System, examples: list[Example]) -> list[Answer]:
    """Answer one question at a time, and note how long each takes.

    Args:
        system: What answers.
        examples: The questions.

    Returns:
        An answer each, with its seconds.
    """
    system.answer(examples[:1])  # the first call pays for what is set up once
    answers = []
    for example in examples:
        started = time.perf_counter()
        (answer,) = system.answer([example])
        answer.seconds = time.perf_counter() - started
        answers.append(answer)
    return answers


def show(examples: list[Example], answers: dict[str, list[Answer]]) -> str:
    """Put the answers side by side.

    Args:
        examples: The questions.
        answers: Answers by way of reading.

    Returns:
        Text to print.
    """
    lines = []
    for number, example in enumerate(examples):
        lines += [f"{example.query}  ({len(example.documents)} passages; the answer is {example.gold[0]})"]
        for name, given in answers.items():
            answer = given[number]
            mark = "✓" if exact_match(answer.text, example.gold) else "✗"
            read = f"{answer.tokens_in:5d} tokens, {1000 * answer.seconds:4.0f} ms"
            lines.append(f"  {WAYS[name]:<15} {read}  {mark} {answer.text}")
        scores = answers["compressed"][number].scores
        if scores is not None:
            best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:3]
            ranked = ", ".join(f"{'*' if i in (example.positives or ()) else ''}{scores[i]:.2f}" for i in best)
            beginning = example.documents[best[0]][:60].rsplit(" ", 1)[0]
            lines.append(f"  {'best passages':<15} {ranked}; the first begins: {beginning} …")
        lines.append("")
    rows = [("", "right", "tokens the generator reads", "ms per question")]
    for name, given in answers.items():
        right = sum(exact_match(a.text, e.gold) for a, e in zip(given, examples, strict=True))
        tokens = median(answer.tokens_in for answer in given)
        milliseconds = 1000 * median(answer.seconds for answer in given)
        rows.append((WAYS[name], f"{right:.0f} of {len(given)}", f"{tokens:.0f}", f"{milliseconds:.0f}"))
    lines.append(table(rows))
    lines.append("\nMedians, one question at a time. Scores with * are of a passage that is needed.")
    return "\n".join(lines)


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(DemoArguments, prog="python -m scaledown.tools.demo")
        examples = draw_examples(args)
        # On a CPU 16 bits would be slower, and the scores that are shown less exact.
        where = {"dtype": torch.float32}
        if args.generator_name_or_path is not None:
            where["generator_name_or_path"] = args.generator_name_or_path
        model = load_model(lambda: ScaleDownModel.from_pretrained(args.model, **where), args.model, "--model").eval()
        generator = without_lora(model.generator)
        if args.reader is not None:
            generator = merge_adapter(generator, args.reader)
        if model.config.lora_config is not None:
            model.merge_lora()
        settings = (model.processor, model.generation_config, args.compression_rate, MAX_NEW_TOKENS)
        systems = [
            TextSystem("full_text", generator, *settings),
            CompressedSystem(model, args.compression_rate, MAX_NEW_TOKENS),
            TextSystem("no_documents", generator, *settings),
        ]
        return show(examples, {system.name: ask(system, examples) for system in systems})

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
