"""Measure whether a model finds, by a name, the passage whose slots hold the value that belongs to it.

    python experiments/names_in_slots.py --models . --num_facts 7 --compression_rate 16

Every context is asked a question of two hops, and the same question about all passages ("Who? ..."), whose
answer pairs the names of all passages of a kind with their values. A part of an answer is right if each of its tokens
is the most likely one after the right ones before it; for the question of two hops this is exact match. Contexts are
from the test split; all passages except the first of the two are of one kind and state the same facts. Intervals
resample contexts.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_scaledown import ScaleDownModel
from scaledown.common.command_line import parse_options, run_command
from scaledown.common.tables import table
from scaledown.evaluation.bootstrap import Bootstrap
from scaledown.evaluation.report import with_interval
from scaledown.world.world import Passage, World, WorldQuestion

BATCH_SIZE = 25
PARTS = ("two hops", "name of the second passage", "value after it", "values after the other names")


@dataclass
class NameArguments:
    """Which models, on what passages, at which rate."""

    models: list[str] = field(metadata={"nargs": "+", "help": "Folders of models trained on the invented world."})
    compression_rate: int = field(default=4, metadata={"help": "Document tokens per slot."})
    num_documents: int = field(default=5, metadata={"help": "Passages of a context."})
    num_facts: int = field(default=2, metadata={"help": "Facts per passage; from 4 on in passages of full length."})
    num_contexts: int = field(default=400, metadata={"help": "Contexts."})
    seed: int = field(default=0, metadata={"help": "Decides contexts and questions."})


def draw(args: NameArguments) -> list[tuple[list[Passage], WorldQuestion, WorldQuestion]]:
    """Contexts with their two questions, the second about all passages."""
    world, drawn = World("test", args.seed), []
    for _ in range(args.num_contexts):
        passages, first, second = world.context(
            args.num_documents, 2, True, True, num_facts=args.num_facts, plain=args.num_facts < 4
        )
        state = world.random.getstate()
        asked = next(world.ask_across(passages, first, second))
        world.random.setstate(state)
        drawn.append((passages, asked, next(world.ask_across(passages, first, second, everything=True))))
    return drawn


@torch.inference_mode()
def token_hits(model: ScaleDownModel, contexts: list[list[Passage]], questions: list[WorldQuestion], rate: int):
    """For every question, whether each token of its answer is the most likely one.

    Args:
        model: The model.
        contexts: The passages of each question.
        questions: As many questions.
        rate: Document tokens per slot.

    Yields:
        A bool tensor per question, [answer tokens].
    """
    for start in range(0, len(questions), BATCH_SIZE):
        some = slice(start, start + BATCH_SIZE)
        inputs = model.processor(
            [question.text for question in questions[some]],
            [[passage.text for passage in passages] for passages in contexts[some]],
            answers=[question.answer for question in questions[some]],
            compression_rate=rate,
        ).to(model.device)
        labels = inputs["labels"][:, 1:]
        hits = model(**inputs).logits[:, :-1].argmax(dim=-1) == labels
        yield from (row[learned] for row, learned in zip(hits, labels != -100, strict=True))


def measure(model: ScaleDownModel, args: NameArguments) -> list[str]:
    """The share of right answers, by part.

    Args:
        model: The model.
        args: What it is asked.

    Returns:
        An estimate with its interval for each of `PARTS`.
    """
    contexts, asked, everything = map(list, zip(*draw(args), strict=True))
    right = {part: ([], []) for part in PARTS}

    def note(part: str, context: int, hits: torch.Tensor):
        values, clusters = right[part]
        values.append(hits.all().item())
        clusters.append(context)

    for context, hits in enumerate(token_hits(model, contexts, asked, args.compression_rate)):
        note(PARTS[0], context, hits)

    def length(text: str) -> int:
        return len(model.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    for context, hits in enumerate(token_hits(model, contexts, everything, args.compression_rate)):
        told = ""
        for place, entry in enumerate(everything[context].answer.split(", ")):
            name = next(passage.name for passage in contexts[context] if entry.startswith(f"{passage.name} "))
            begin, end = length(told + name), length(told + entry)
            if place == 0:
                note(PARTS[1], context, hits[:begin])
            note(PARTS[3 if place else 2], context, hits[begin:end])
            told += f"{entry}, "
    bootstrap = Bootstrap(seed=args.seed)
    return [with_interval(asdict(bootstrap.clustered_mean(*right[part]))) for part in PARTS]


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(NameArguments)
        rows = [("model", *PARTS)]
        for folder in tqdm(args.models, disable=None):
            model = ScaleDownModel.from_pretrained(folder).eval()
            rows.append((Path(folder).resolve().name, *measure(model, args)))
        return table(rows)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
