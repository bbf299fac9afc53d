"""An invented world for models too small to know ours: things with names, passages about them, questions.

    python -m scaledown.world.world --output runs/world

Six kinds of things (people, towns, companies, books, ships, schools) with 40 relations between them and to dates,
numbers and words. Facts are drawn anew for every question, so that nothing can be learned by heart: what is answered
was read. Names are made of parts that all splits share, in combinations that only one split has: no thing of the test
set occurs in training. Distractors share a part of the name, the kind and the relations of what is asked about.
"""

import json
import random
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from errors_scaledown import ScaleDownError

from ..common.command_line import parse_options, run_command
from .names import SPLITS, Names, happens
from .text import (
    CONTRASTS,
    FILLERS,
    MONTHS,
    NOMINALS,
    OPENINGS,
    RELATIONS,
    WORDS,
    Relation,
)

# Words of a passage: 100 to 128 tokens of the world's tokenizer, one chunk.
PASSAGE_WORDS = (86, 96)
RIGHT, RELATED, OTHER = 1.0, -1.0, -1.5


@dataclass
class WorldArguments:
    """How much of the world to write down."""

    output: str = field(metadata={"help": "Folder for train.jsonl, validation.jsonl and test.jsonl."})
    num_train: int = field(default=32000, metadata={"help": "Questions for training."})
    num_validation: int = field(default=500, metadata={"help": "Questions for validation."})
    num_test: int = field(default=1000, metadata={"help": "Questions for the test set."})
    num_documents: int = field(default=5, metadata={"help": "Passages per question of train and validation."})
    num_test_documents: int = field(
        default=20, metadata={"help": "Passages per question of test; the first 5 suffice."}
    )
    two_hops: float = field(default=0.25, metadata={"help": "Share of questions that need two passages."})
    alike: float = field(
        default=0.0, metadata={"help": "Share of questions whose distractors are all of the right passage's kind."}
    )
    lists: float = field(
        default=0.0,
        metadata={"help": "Share of questions of two hops that ask for every thing of the kind ('Who? ...')."},
    )
    repeats: float = field(
        default=0.0,
        metadata={"help": "With one passage: share of questions that only ask to repeat it ('What?')."},
    )
    same_facts: bool = field(
        default=False,
        metadata={"help": "Passages of the right kind state the same facts about other things."},
    )
    mixed_names: float = field(
        default=0.0,
        metadata={"help": "Share of train's books and ships with names from either kind's words."},
    )
    num_facts: int = field(default=7, metadata={"help": "Maximum facts per passage."})
    plain: bool = field(default=False, metadata={"help": "State facts and nothing else, as in a first lesson."})
    seed: int = field(default=0, metadata={"help": "Random seed."})


@dataclass
class Passage:
    """What is stated about one thing.

    Attributes:
        kind: Kind of the thing.
        name: Its name.
        facts: Value of every relation that is stated.
        text: The passage.
    """

    kind: str
    name: str
    facts: dict[str, str]
    text: str


@dataclass
class WorldQuestion:
    """A question about a context.

    Attributes:
        text: The question.
        answer: Its only answer.
        answer_kind: "name", "date", "number" or "word"; "text" where the passage itself is the answer.
        hops: Number of passages that must be combined.
        positives: Their places in the context.
    """

    text: str
    answer: str
    answer_kind: str
    hops: int
    positives: list[int]


class World:
    """Draws contexts of passages, and questions about them.

    Args:
        split: "train", "validation" or "test": whose names are used.
        seed: Decides what is drawn.
        mixed_names: As in `Names`.

    Raises:
        ValueError: if the split is none of these.
    """

    def __init__(self, split: str, seed: int = 0, mixed_names: float = 0.0):
        if split not in SPLITS:
            raise ScaleDownError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}.")
        self.split = split
        self.random = random.Random(f"{split} {seed}")
        self.names = Names(mixed_names)

    def value(self, kind: str) -> str:
        """Draw a value of some kind."""
        rng = self.random
        if kind in RELATIONS:
            return self.names.draw(rng, kind, self.split)
        if kind == "river":
            return rng.choice(self.names.rivers)
        if kind == "year":
            return str(rng.randint(1780, 1999))
        if kind == "date":
            return f"{rng.randint(1, 28)} {rng.choice(MONTHS.split())} {rng.randint(1780, 1999)}"
        if kind.startswith("number"):
            _, low, high = kind.split(":")
            return str(rng.randint(int(low), int(high)))
        return rng.choice(WORDS[kind].split())

    def passage(
        self,
        kind: str,
        name: str,
        known: dict[str, str] | None = None,
        taken: Collection[str] = (),
        num_facts: int = 7,
        plain: bool = False,
    ) -> Passage:
        """Draw facts about a thing and state them.

        Args:
            kind: Kind of thing.
            name: Its name.
            known: Facts that are decided already.
            taken: Names that must not be mentioned beside it, because other passages are about them.
            num_facts: Maximum number of facts stated.
            plain: State the facts and nothing else, with the name in every sentence.

        Returns:
            The passage.
        """
        known = known or {}
        rng, relations = self.random, RELATIONS[kind]
        stated = [relation for relation in relations if relation.name in known]
        rest = [relation for relation in relations if relation.name not in known]
        stated += rng.sample(rest, min(len(rest), num_facts - len(stated)))
        rng.shuffle(stated)
        facts = {relation.name: known.get(relation.name) or self.value(relation.value) for relation in stated}
        if plain:
            woman = rng.random() < 0.5
            sentences = [self._state(kind, name, relation, facts[relation.name], woman, True) for relation in stated]
        else:
            sentences = self._tell(kind, name, [(relation, facts[relation.name]) for relation in stated], taken)
        return Passage(kind, name, facts, " ".join(sentences))

    def _tell(self, kind: str, name: str, facts: list[tuple[Relation, str]], taken: Collection[str]) -> list[str]:
        """An opening, the facts, and between them sentences that state no fact, and one about something else."""
        rng = self.random
        woman, target = rng.random() < 0.5, rng.randint(*PASSAGE_WORDS)
        # After the sentence about something else, a pronoun would refer to that.
        place = rng.randint(1, len(facts))
        sentences = [
            self._state(kind, name, relation, value, woman, by_name=number == place)
            for number, (relation, value) in enumerate(facts)
        ]
        other = self.names.like(rng, kind, self.split, name)
        while other in taken:
            other = self.names.draw(rng, kind, self.split)
        relation = rng.choice(RELATIONS[kind])
        statement = self._sentence(
            rng.choice(relation.statements), other, other, f"{other}'s", self.value(relation.value)
        )
        sentences.insert(place, rng.choice(CONTRASTS).format(n=other, statement=statement))
        sentences.insert(0, rng.choice(OPENINGS[kind]).format(n=name))
        for filler in rng.sample(FILLERS, len(FILLERS)):
            if len(" ".join([*sentences, filler]).split()) > target:
                break
            sentences.insert(rng.randint(1, len(sentences)), filler)
        return sentences

    def _state(self, kind: str, name: str, relation: Relation, value: str, woman: bool, by_name: bool) -> str:
        """State one fact, with the thing called by its name, by a pronoun, or by what it is."""
        rng = self.random
        way = "name" if by_name else rng.choices(("pronoun", "name", "nominal"), (5, 3, 2))[0]
        if way == "pronoun" and kind == "person":
            subject, possessive, obj = ("she", "her", "her") if woman else ("he", "his", "him")
        elif way == "pronoun":
            subject, possessive, obj = "it", "its", "it"
        else:
            subject = name if way == "name" else name.rsplit(" ", 1)[1] if kind == "person" else NOMINALS[kind]
            possessive, obj = f"{subject}'s", subject
        return self._sentence(rng.choice(relation.statements), subject, obj, possessive, value)

    def _sentence(self, statement: str, subject: str, obj: str, possessive: str, value: str) -> str:
        text = statement.format(s=subject, o=obj, p=possessive, v=value)
        return text[0].upper() + text[1:]

    def ask(self, passages: list[Passage], index: int) -> Iterator[WorldQuestion]:
        """All questions of one hop about a passage, in random order."""
        passage = passages[index]
        stated = [relation for relation in RELATIONS[passage.kind] if relation.name in passage.facts]
        for relation in self.random.sample(stated, len(stated)):
            text = self.random.choice(relation.questions).format(n=passage.name)
            yield WorldQuestion(text, passage.facts[relation.name], answer_kind(relation.value), 1, [index])

    def ask_across(
        self, passages: list[Passage], first: int, second: int, everything: bool = False
    ) -> Iterator[WorldQuestion]:
        """All questions about the second passage that name it only by what the first states, in random order.

        Args:
            passages: The context.
            first: Place of the passage that is named.
            second: Place of the one that states the answer.
            everything: Ask "Who? ..."; the answer gives the name, too, and then all other names of that kind, each with
                what is stated about it, in random order: only the name says which passage a value is from.

        Yields:
            The questions.
        """
        passage = passages[first]
        link = next(
            relation
            for relation in RELATIONS[passage.kind]
            if relation.description and passage.facts.get(relation.name) == passages[second].name
        )
        described = link.description.format(n=passage.name)
        stated = [relation for relation in RELATIONS[passages[second].kind] if relation.name in passages[second].facts]
        for relation in self.random.sample(stated, len(stated)):
            text = self.random.choice(relation.questions).format(n=described)
            value = passages[second].facts[relation.name]
            if everything:
                text = f"Who? {text}"
                value = self._all_that_is_stated(passages, passages[second], relation)
            yield WorldQuestion(text, value, answer_kind(relation.value), 2, sorted([first, second]))

    def _all_that_is_stated(self, passages: list[Passage], beginning: Passage, relation: Relation) -> str:
        others = [
            passage
            for passage in passages
            if passage.kind == beginning.kind and relation.name in passage.facts and passage is not beginning
        ]
        self.random.shuffle(others)
        return ", ".join(f"{passage.name} {passage.facts[relation.name]}" for passage in [beginning, *others])

    def context(
        self, num_documents: int, hops: int, alike: bool = False, same_facts: bool = False, **telling
    ) -> tuple[list[Passage], int, int]:
        """Draw passages about different things, in random order.

        Args:
            num_documents: How many.
            hops: 2: one of them names another.
            alike: Distractors are all of the kind that is asked about.
            same_facts: Passages of that kind state the same facts about other things.
            **telling: `num_facts` and `plain` of `passage`.

        Returns:
            The passages; where the one stands that is asked about; and the one it names, with one hop itself.

        Raises:
            ValueError: if two hops are to be made in fewer than two passages.
        """
        if num_documents < hops:
            raise ScaleDownError(f"{hops} hops need as many passages; num_documents is {num_documents}.")
        rng = self.random
        kind = rng.choice(list(RELATIONS))
        links = [relation for relation in RELATIONS[kind] if relation.description]
        link = rng.choice(links)
        name = self.names.draw(rng, kind, self.split)
        linked = self.names.draw(rng, link.value, self.split) if hops == 2 else None
        things = [(kind, name, {link.name: linked} if linked else {})]
        if linked:
            things.append((link.value, linked, {}))
        names = {name, linked}
        while len(things) < num_documents:
            place = hops - 1 if alike else rng.randrange(hops)
            near_kind, near, _ = things[place]
            chance = rng.random()
            if chance < 0.6:
                other_kind, other = near_kind, self.names.like(rng, near_kind, self.split, near)
            else:
                other_kind = near_kind if alike or chance < 0.75 else rng.choice(list(RELATIONS))
                other = self.names.draw(rng, other_kind, self.split)
            if other not in names:
                names.add(other)
                things.append((other_kind, other, {}))
        if same_facts:
            asked = things[hops - 1][0]
            shared = rng.sample(RELATIONS[asked], min(telling.get("num_facts", 7), len(RELATIONS[asked])))
            for other_kind, _, known in things:
                if other_kind == asked and not known:
                    known.update({relation.name: self.value(relation.value) for relation in shared})
        order = rng.sample(range(num_documents), num_documents)
        passages = [self.passage(*things[place], taken=names, **telling) for place in order]
        return passages, order.index(0), order.index(hops - 1)

    def record(
        self,
        identifier: int,
        num_documents: int,
        two_hops: float,
        alike: float = 0.0,
        lists: float = 0.0,
        same_facts: bool = False,
        repeats: float = 0.0,
        **telling,
    ) -> dict:
        """A record in the project's format, scored by a teacher that knows the right passages.

        Args:
            identifier: Number of the record.
            num_documents: Passages.
            two_hops: Chance that the question needs two of them.
            alike: Chance that distractors are all of the kind that is asked about.
            lists: Chance that a question of two hops asks for everything, as in `ask_across`.
            same_facts: As in `context`.
            repeats: Chance that nothing is asked ("What?"), and the answer is the passage itself.
            **telling: `num_facts` and `plain` of `passage`.

        Returns:
            The record; the passages that are needed stand among the first five. `kind` is that of the thing which the
            answer is about.

        Raises:
            ValueError: if a passage is to be repeated where there are several, or two are needed and there is one.
        """
        if repeats > 0 and num_documents > 1:
            raise ScaleDownError(
                f"repeats={repeats} needs num_documents=1, not {num_documents}: nothing says which one to repeat."
            )
        hops = 1 + (self.random.random() < two_hops)
        near = min(num_documents, 5)
        one_kind = happens(self.random, alike)
        passages, first, second = self.context(near, hops, one_kind, same_facts, **telling)
        if hops == 1:
            asked = self.ask(passages, first)
        else:
            asked = self.ask_across(passages, first, second, happens(self.random, lists))
        question = next(asked)
        if happens(self.random, repeats):
            question = WorldQuestion("What?", passages[first].text, "text", 1, [first])
        text = " ".join(passage.text for passage in passages)
        while len(passages) < num_documents:
            more, *_ = self.context(1, 1, **telling)
            near_names = [passage.name for passage in passages]
            if more[0].name not in text and not any(name in more[0].text for name in near_names):
                passages += more
        kinds = {passages[index].kind for index in question.positives}
        scores = [
            RIGHT if index in question.positives else RELATED if passage.kind in kinds else OTHER
            for index, passage in enumerate(passages)
        ]
        return {
            "id": f"{self.split}-{identifier}",
            "query": question.text,
            "documents": [passage.text for passage in passages],
            "answer": question.answer,
            "reranking_scores": scores,
            "positives": question.positives,
            "hops": question.hops,
            "answer_kind": question.answer_kind,
            "kind": passages[second].kind,
        }


def answer_kind(value: str) -> str:
    """ "name", "date", "number" or "word", of a relation's kind of value."""
    if value in RELATIONS or value == "river":
        return "name"
    if value in ("date", "year"):
        return "date"
    return "number" if value.startswith("number") else "word"


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(
            WorldArguments,
            prog="python -m scaledown.world.world",
            description="Write questions and passages about an invented world.",
        )
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in zip(SPLITS, (args.num_train, args.num_validation, args.num_test), strict=True):
            world = World(split, args.seed, args.mixed_names if split == "train" else 0.0)
            documents = args.num_test_documents if split == "test" else args.num_documents
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
                for number in range(count):
                    record = world.record(
                        number,
                        documents,
                        args.two_hops,
                        args.alike,
                        args.lists,
                        args.same_facts,
                        args.repeats,
                        num_facts=args.num_facts,
                        plain=args.plain,
                    )
                    file.write(json.dumps(record) + "\n")
        return f"{args.num_train} + {args.num_validation} + {args.num_test} questions in {folder}"

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
