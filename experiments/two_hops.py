"""Ask a generator of the invented world all questions of a context, of one and two hops, by kind of context.

    python experiments/two_hops.py --generators runs/embedded/generator-14 runs/embedded/generator-16

An answer is right if every token is the most likely one after the right ones before it, which for greedy decoding is
exact match. Contexts are from the test split; intervals resample contexts.
"""

import random
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from scaledown.common.command_line import parse_options, run_command
from scaledown.common.tables import table
from scaledown.evaluation.bootstrap import Bootstrap, Estimate
from scaledown.evaluation.report import with_interval
from scaledown.world.curriculum import Curriculum, collate
from scaledown.world.generator import read_causally
from scaledown.world.tokenizer import build_tokenizer
from scaledown.world.world import World

SHORT = {"num_facts": 3, "plain": True}
ONE_KIND = {"alike": True}
# Passages, wording, and hops.
CONTEXTS = {
    "two hops: 2 short passages": (2, SHORT, 2),
    "4 short": (4, SHORT, 2),
    "2 long": (2, {}, 2),
    "5 long": (5, {}, 2),
    "4 short of one kind": (4, SHORT | ONE_KIND, 2),
    "5 long of one kind": (5, ONE_KIND, 2),
    "one hop: 5 long": (5, {}, 1),
}


@dataclass
class HopArguments:
    """Which generators, and how many contexts."""

    generators: list[str] = field(metadata={"nargs": "+", "help": "Folders of generators."})
    num_contexts: int = field(default=100, metadata={"help": "Contexts of each kind."})
    seed: int = field(default=0, metadata={"help": "Decides contexts and questions."})


@torch.inference_mode()
def measure(
    model: PreTrainedModel, curriculum: Curriculum, documents: int, telling: dict, hops: int, args: HopArguments
) -> Estimate:
    """Exact match on one kind of context.

    Args:
        model: The generator.
        curriculum: Builds the prompts, in names of the test split.
        documents: Passages of a context.
        telling: Their wording.
        hops: Passages a question needs.
        args: How many contexts.

    Returns:
        Exact match of all questions.
    """
    rng = random.Random(args.seed)
    world = curriculum.world
    world.random = rng
    right, contexts = [], []
    for number in range(args.num_contexts):
        passages, first, second = world.context(documents, hops, **telling)
        asked = world.ask_across(passages, first, second) if hops == 2 else world.ask(passages, first)
        pairs = [(question.text, question.answer) for question in asked]
        row = curriculum.prompt([passage.text for passage in passages], pairs, gaps=[0] * documents)
        batch = collate([row], model.config.pad_token_id)
        logits, learned = read_causally(model, batch)
        groups = batch.groups[batch.labels != -100]
        hits = logits.argmax(dim=-1) == learned
        right += [hits[groups == group].all().item() for group in groups.unique()]
        contexts += [number] * len(pairs)
    return Bootstrap(seed=args.seed).clustered_mean(right, contexts)


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(HopArguments)
        curriculum = Curriculum(build_tokenizer(), args.seed)
        curriculum.world = World("test", args.seed)
        rows = [("generator", *CONTEXTS)]
        for folder in tqdm(args.generators, disable=None):
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            found = [measure(model, curriculum, *kind, args) for kind in CONTEXTS.values()]
            rows.append((Path(folder).name, *(with_interval(asdict(value)) for value in found)))
        return table(rows)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
