"""The lessons of a small language model, each a way to draw endless rows of text.

Trained on passages and questions from the beginning, a small model learns what kind of value is asked for and never
whose. So it first learns to go on with what it has read before, then to look facts up in short passages, then in long
ones with distractors, and then across two passages. Every context is drawn anew, in the names of the training split.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from .names import happens
from .tokenizer import SPECIAL, SYSTEM_PROMPT
from .world import World

LEFT_OUT = 2048  # fewer positions than this are left out; 20 passages reach about as far


class Row(NamedTuple):
    """What is read, and what is learned of it.

    Attributes:
        ids: Token ids; in a batch `(batch, length)`, as all others.
        labels: The ids to learn, -100 elsewhere.
        positions: Position of each token.
        groups: 0 for tokens all later ones see; others are seen by those of their own group alone.
    """

    ids: list[int] | torch.Tensor
    labels: list[int] | torch.Tensor
    positions: list[int] | torch.Tensor
    groups: list[int] | torch.Tensor

    def followed_by(self, row: "Row") -> "Row":
        """Both rows as one."""
        return Row(*(mine + others for mine, others in zip(self, row, strict=True)))


def whole(ids: list[int], labels: list[int] | None = None, begin: int = 0, group: int = 0) -> Row:
    """A row of one piece, of which nothing is learned unless labels say so."""
    return Row(ids, labels or [-100] * len(ids), list(range(begin, begin + len(ids))), [group] * len(ids))


def collate(rows: list[Row], padding: int) -> Row:
    """Rows of any length as a batch; padding comes after what a causal model reads, and has no labels."""
    length = max(len(row.ids) for row in rows)
    columns = zip(Row(padding, -100, 0, 0), zip(*rows, strict=True), strict=True)
    return Row(*(torch.tensor([part + [fill] * (length - len(part)) for part in parts]) for fill, parts in columns))


@dataclass
class Lesson:
    """One step of the curriculum.

    Attributes:
        name: What is learned.
        draw: Draws one row.
        batch_size: Rows per step.
        target: Share of answer tokens that must be right before the next lesson begins.
        steps: In place of a target: number of steps; over the last 70 % of them the learning rate falls to 0.
        rate: Its learning rate, as a multiple of the run's.
    """

    name: str
    draw: Callable[[random.Random], Row]
    batch_size: int
    target: float = 0.9
    steps: int | None = None
    rate: float = 1.0


class Rows(IterableDataset):
    """Endless batches of a lesson.

    Args:
        lesson: The lesson.
        seed: Decides what is drawn.
        padding: Id of the padding token.
    """

    def __init__(self, lesson: Lesson, seed: int, padding: int):
        self.lesson, self.seed, self.padding = lesson, seed, padding

    def __iter__(self) -> Iterator[Row]:
        if get_worker_info() is not None:  # a process of its own, beside the one that learns
            torch.set_num_threads(1)
        rng = random.Random(f"{self.lesson.name} {self.seed}")
        while True:
            yield collate([self.lesson.draw(rng) for _ in range(self.lesson.batch_size)], self.padding)


class Curriculum:
    """The lessons.

    Args:
        tokenizer: The world's tokenizer.
        seed: Decides what is drawn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int):
        self.tokenizer = tokenizer
        self.world = World("train", seed)
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "Background:\n"}]
        self.before = self._ids(tokenizer.apply_chat_template(messages, tokenize=False))
        self.user, self.asked = self._ids("<|user|>"), self._ids("Question:")
        self.turn, self.end = self._ids("<|assistant|>"), self._ids("</s>")

    def lessons(self) -> list[Lesson]:
        """From the first to the last."""
        lessons = self.echoes()
        for documents, size, target in ((1, 96, 0.95), (2, 96, 0.95), (3, 64, 0.9)):
            lessons.append(self.reading(f"{documents} passages of 3 facts", documents, size, 3, True, target=target))
        lessons.append(self.reading("2 long passages", 2, 48))
        lessons.append(self.reading("3 passages of 3 facts, two hops", 3, 64, 3, True, two_hops=0.6))
        lessons.append(self.reading("2 to 5 long passages, two hops", 5, 32, two_hops=0.35, fewest=2, steps=700))
        lessons.append(self.reading("3 to 5 long passages, more two hops", 5, 32, two_hops=0.7, fewest=3, steps=1000))
        name = "3 to 5 long passages, each question on its own"
        lessons.append(self.reading(name, 5, 16, two_hops=0.7, fewest=3, steps=1400, apart=10))
        # With distractors of other kinds, a second hop can be guessed without comparing names.
        name = "3 to 5 passages of 3 facts, two hops among passages of one kind"
        lessons.append(
            self.reading(name, 5, 48, 3, True, two_hops=0.8, fewest=3, steps=1500, rate=0.5, apart=6, alike=1.0)
        )
        name = "3 to 5 long passages, two hops among passages of one kind"
        lessons.append(self.reading(name, 5, 16, two_hops=0.7, fewest=3, steps=1400, rate=0.75, apart=10, alike=0.5))
        return lessons

    def echoes(self) -> list[Lesson]:
        """Lessons of random tokens: to find a token that was read, and go on with what followed it."""
        lessons = [Lesson("echo a sequence", lambda rng: self.echo(rng, [6]), 128, rate=1.5)]
        for segments in (1, 2, 4, 8, 16):
            bounds = (3, 8) if segments == 1 else (2, 4)

            def echo(rng: random.Random, count: int = segments, bounds: tuple[int, int] = bounds) -> Row:
                return self.echo(rng, [rng.randint(*bounds) for _ in range(count)])

            size, rate = (128, 1.5) if segments < 16 else (64, 1.0)
            lessons.append(Lesson(f"echo {segments} segments", echo, size, 0.93, rate=rate))
        return lessons

    def reading(
        self,
        name: str,
        documents: int,
        batch_size: int,
        num_facts: int = 7,
        plain: bool = False,
        two_hops: float = 0.0,
        fewest: int | None = None,
        target: float = 0.9,
        steps: int | None = None,
        rate: float = 1.0,
        apart: int = 0,
        alike: float = 0.0,
    ) -> Lesson:
        """A lesson of passages and questions.

        Args:
            name: What is learned.
            documents: Maximum number of passages.
            batch_size: Rows per step.
            num_facts: Maximum facts per passage.
            plain: State the facts and nothing else.
            two_hops: Share of contexts asked about across two passages.
            fewest: Minimum number of passages; `documents` by default.
            target: See `Lesson`.
            steps: See `Lesson`.
            rate: See `Lesson`.
            apart: Number of questions, which do not see each other; by default eight that follow one another.
            alike: Share of contexts whose distractors are all of the kind that is asked about.

        Returns:
            The lesson.
        """
        most, across = (apart, apart) if apart else (8, 3)

        def draw(rng: random.Random) -> Row:
            self.world.random = rng
            hops = 1 + (rng.random() < two_hops)
            count = rng.randint(fewest or documents, documents)
            one_kind = happens(rng, alike)
            passages, first, second = self.world.context(count, hops, one_kind, num_facts=num_facts, plain=plain)
            questions = list(self.world.ask_across(passages, first, second))[:across] if hops == 2 else []
            single = [question for index in range(count) for question in self.world.ask(passages, index)]
            questions += rng.sample(single, min(len(single), most - len(questions)))
            rng.shuffle(questions)
            asked = [(question.text, question.answer) for question in questions]
            gaps = None
            if apart:
                # Positions are left out in half of all rows, so that those of longer prompts are known, too.
                left_out = rng.randrange(LEFT_OUT) if rng.random() < 0.5 else 0
                cuts = sorted(rng.randint(0, left_out) for _ in passages)
                gaps = [cut - before for before, cut in itertools.pairwise([0, *cuts])]
            return self.prompt([passage.text for passage in passages], asked, gaps)

        return Lesson(name, draw, batch_size, target, steps, rate)

    def echo(self, rng: random.Random, lengths: list[int]) -> Row:
        """Segments of random tokens, and the same in another order; all but the first of each is learned."""
        segments = [[rng.randrange(len(SPECIAL), len(self.tokenizer)) for _ in range(length)] for length in lengths]
        ids = [token for segment in segments for token in segment]
        labels = [-100] * len(ids)
        for segment in rng.sample(segments, len(segments)):
            ids = ids + segment
            labels += [-100, *segment[1:]]
        return whole(ids, labels)

    def prompt(self, documents: list[str], asked: list[tuple[str, str]], gaps: list[int] | None = None) -> Row:
        """ScaleDown's prompt with the documents as text, and several questions.

        Args:
            documents: Texts of the documents.
            asked: Questions and their answers.
            gaps: Positions left out in front of each document. Then each question comes right after the documents
                and sees no other; else one follows the other.

        Returns:
            The prompt; the answers are learned.
        """
        apart = gaps is not None
        row = whole(self.before)
        for text, gap in zip(self.tokenizer(documents)["input_ids"], gaps or [0] * len(documents), strict=True):
            row = row.followed_by(whole(text, begin=row.positions[-1] + 1 + gap))
        documents_end = row.positions[-1] + 1
        for number, (question, answer) in enumerate(asked):
            part = ([] if apart or number == 0 else self.user) + self.asked + self._ids(question) + self.turn
            learned = self._ids(answer) + self.end
            begin, group = (documents_end, number + 1) if apart else (row.positions[-1] + 1, 0)
            row = row.followed_by(whole(part, begin=begin, group=group))
            row = row.followed_by(whole(learned, learned, row.positions[-1] + 1, group))
        return row

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
