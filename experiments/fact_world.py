"""A world of facts for small models: a generator that can look a fact up in its context, and records to train on.

    python experiments/fact_world.py --output runs/facts

A document states the attributes of somebody (`mira : town lorn , tool adze , …`), a question asks for one of them
(`tool of mira`), and every context is drawn afresh, so that nothing can be memorized: a right answer was read. A
generator trained on this alone from the start never learns that names matter. A curriculum teaches it: first pairs of a
name and a value, then attributes, then ScaleDown's prompt.
"""

import json
import logging
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from scaledown.common.command_line import parse_options, run_command

logger = logging.getLogger(__name__)

SYLLABLES = ["la", "mi", "ro", "ta", "ne", "su", "ki", "vo", "be", "da", "fu", "go"]
ATTRIBUTES = ["town", "tool", "food", "beast", "craft", "stone"]
SPECIAL = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
WORDS = ["Read", "Background", "Question", ":", ",", ".", "of"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@dataclass
class FactArguments:
    """How large the world is, and how long the generator learns."""

    output: str = field(metadata={"help": "Folder for generator/, train.jsonl, dev.jsonl and text.txt."})
    num_train: int = field(default=20000, metadata={"help": "Questions for training."})
    num_dev: int = field(default=500, metadata={"help": "Questions for the test set."})
    num_documents: int = field(default=4, metadata={"help": "Documents per question."})
    max_steps: int = field(default=2500, metadata={"help": "Maximum steps per lesson."})
    seed: int = field(default=0, metadata={"help": "Random seed."})


class World:
    """Names and the values of attributes, and contexts drawn from them.

    Args:
        seed: Decides what is drawn.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        words = sorted({a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES})
        self.random.shuffle(words)
        self.names, words = words[:300], words[300:]
        self.values = {name: words[i * 40 : (i + 1) * 40] for i, name in enumerate(ATTRIBUTES)}

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word."""
        words = [*SPECIAL, *WORDS, *ATTRIBUTES, *self.names, *(v for listed in self.values.values() for v in listed)]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", "isolated")]
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            extra_special_tokens=SPECIAL[3:],
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

    def context(self, num_documents: int, num_attributes: int = 4) -> list[tuple[str, dict[str, str]]]:
        """Draw somebody for each document, and their attributes."""
        people = self.random.sample(self.names, num_documents)
        attributes = self.random.sample(ATTRIBUTES, num_attributes)
        return [
            (person, {name: self.random.choice(self.values[name]) for name in self.shuffled(attributes)})
            for person in people
        ]

    def shuffled(self, items: list) -> list:
        """A shuffled copy."""
        return self.random.sample(items, len(items))

    def pairs(self, count: int) -> tuple[str, list[tuple[str, str]]]:
        """Names with a value each, and all of them asked in another order."""
        values = [value for listed in self.values.values() for value in listed]
        pairs = list(zip(self.random.sample(self.names, count), self.random.sample(values, count), strict=True))
        return " , ".join(f"{name} {value}" for name, value in pairs), self.shuffled(pairs)

    def facts(self, num_documents: int, num_attributes: int, count: int) -> tuple[str, list[tuple[str, str]]]:
        """Documents, and some questions about them with their answers."""
        context = self.context(num_documents, num_attributes)
        asked = [(f"{name} of {person}", value) for person, facts in context for name, value in facts.items()]
        return "\n".join(document(*entry) for entry in context), self.shuffled(asked)[:count]


def document(person: str, facts: dict[str, str]) -> str:
    """State the attributes of somebody."""
    return f"{person} : " + " , ".join(f"{name} {value}" for name, value in facts.items()) + " ."


def lesson_batch(tokenizer, examples: list[tuple[str, list[tuple[str, str]]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of contexts and their questions, and labels on the answers only."""
    rows, labels = [], []
    for text, asked in examples:
        ids = tokenizer(text)["input_ids"]
        learned = [-100] * len(ids)
        for question, answer in asked:
            part = tokenizer(question)["input_ids"]
            value = tokenizer(answer)["input_ids"]
            ids, learned = ids + part + value, learned + [-100] * len(part) + value
        rows.append(ids)
        labels.append(learned)
    return torch.tensor(rows), torch.tensor(labels)


def prompt_batch(tokenizer, examples: list[tuple[str, list[tuple[str, str]]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in the prompt of ScaleDown, one question each, the end token learned."""
    chats = []
    for text, ((question, answer),) in examples:
        user = f"Background:\n{text}\n\nQuestion: {question}"
        messages = [{"role": "system", "content": "Read ."}, {"role": "user", "content": user}]
        chats.append((tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), answer))
    return lesson_batch(tokenizer, [(prompt, [("", f"{answer} </s>")]) for prompt, answer in chats])


def teach(world: World, tokenizer, args: FactArguments) -> PreTrainedModel:
    """Train a fresh generator with the curriculum.

    Args:
        world: What it learns about.
        tokenizer: Its tokenizer.
        args: How long.

    Returns:
        The generator.
    """
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    lessons = [(f"{n} pairs", lambda n=n: world.pairs(n), lesson_batch) for n in (2, 4, 6, 10)]
    for people, attributes in ((2, 2), (3, 3), (4, 4)):
        name = f"{people} people, {attributes} attributes"
        lessons.append((name, lambda p=people, a=attributes: world.facts(p, a, min(8, p * a)), lesson_batch))
    lessons.append(("prompts", lambda: world.facts(args.num_documents, 4, 1), prompt_batch))
    for name, draw, collate in lessons:
        started, step, right = time.perf_counter(), 0, 0.0
        for _ in range(args.max_steps):
            step += 1
            ids, labels = collate(tokenizer, [draw() for _ in range(128)])
            logits = model(ids).logits[:, :-1]
            known = labels[:, 1:] != -100
            loss = cross_entropy(logits[known], labels[:, 1:][known])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            right = 0.9 * right + 0.1 * (logits[known].argmax(dim=-1) == labels[:, 1:][known]).float().mean().item()
            if right > 0.97:
                break
        seconds = time.perf_counter() - started
        logger.info("%s: %d steps, %.0f s, %.3f of the answers right", name, step, seconds, right)
    return model


def record(world: World, args: FactArguments, identifier: int) -> dict:
    """A record in the project's format, with the score of a teacher that knows the right document."""
    context = world.context(args.num_documents)
    asked = world.random.randrange(len(context))
    name = world.random.choice(list(context[asked][1]))
    return {
        "id": str(identifier),
        "query": f"{name} of {context[asked][0]}",
        "documents": [document(*entry) for entry in context],
        "answer": context[asked][1][name],
        "reranking_scores": [1.0 if i == asked else -1.0 for i in range(len(context))],
        "positives": [asked],
    }


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(FactArguments)
        world, folder = World(args.seed), Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        for name, count in (("train", args.num_train), ("dev", args.num_dev)):
            lines = [json.dumps(record(world, args, i)) + "\n" for i in range(count)]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        text = [document(*world.context(1)[0]) + "\n" for _ in range(args.num_train)]
        (folder / "text.txt").write_text("".join(text), encoding="utf-8")
        tokenizer = world.tokenizer()
        model = teach(world, tokenizer, args)
        model.save_pretrained(folder / "generator")
        tokenizer.save_pretrained(folder / "generator")
        return f"generator and records in {folder}"

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
