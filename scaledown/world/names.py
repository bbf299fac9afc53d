"""Names of the made-up world: of parts that all splits share, in combinations that only one split has."""

import random
import zlib
from functools import cache

from .text import NAME_PARTS

SPLITS = ("train", "validation", "test")


def _words(rng: random.Random, count: int, endings: list[str], taken: set[str]) -> list[str]:
    """Draw invented words, all different."""
    onsets, vowels = (
        ["b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gr", "st", "tr"],
        "aeiou",
    )
    found = []
    while len(found) < count:
        word = rng.choice(onsets) + rng.choice(vowels) + rng.choice("lmnrstvk") + rng.choice(endings)
        if word not in taken:
            taken.add(word)
            found.append(word.capitalize())
    return found


def happens(rng: random.Random, share: float) -> bool:
    """Whether something of this probability happens; at 0 no number is drawn, so that seeds give what they gave."""
    return share > 0 and rng.random() < share


class Names:
    """The parts that names are made of; the same in every world.

    A name belongs to one split, by a checksum of it.

    Args:
        mixed: Share of books and ships whose names are made of either kind's words. Books have 500 names of their own,
            ships 320, so few that a compressor learns each by heart; either kind's words make 1,620.
    """

    def __init__(self, mixed: float = 0.0):
        self.mixed = mixed
        rng, taken = random.Random(0), set()
        surnames = _words(rng, 240, ["er", "ok", "man", "sen", "ley", "wick", "ard", "ow"], taken)
        self.rivers = _words(rng, 60, ["el", "une", "isk"], taken)
        first_names = _words(rng, 120, ["a", "o", "ia", "en", "is"], taken)
        towns = _words(rng, 120, ["bury", "ford", "holm", "ton", "mouth"], taken)
        parts = {name: text.split() for name, text in NAME_PARTS.items()}
        self.parts = {
            "person": (first_names, surnames),
            "town": (parts["town"], towns),
            "company": (surnames, parts["company"]),
            "school": (surnames, parts["school"]),
            "book": ([f"The {word}" for word in parts["book, first"]], parts["book, last"]),
            "ship": (parts["ship, first"], parts["ship, last"]),
        }
        firsts, lasts = (parts[f"book, {place}"] + parts[f"ship, {place}"] for place in ("first", "last"))
        self.mixed_parts = {"book": ([f"The {word}" for word in firsts], lasts), "ship": (firsts, lasts)}

    def draw(self, rng: random.Random, kind: str, split: str) -> str:
        """Draw a name of a split.

        Args:
            rng: Random generator.
            kind: Kind of thing.
            split: Split it belongs to.

        Returns:
            The name.
        """
        mixed = kind in self.mixed_parts and happens(rng, self.mixed)
        firsts, lasts = (self.mixed_parts if mixed else self.parts)[kind]
        while True:
            name = f"{rng.choice(firsts)} {rng.choice(lasts)}"
            if split_of(name) == split:
                return name

    def like(self, rng: random.Random, kind: str, split: str, name: str) -> str:
        """Draw another name of a split that shares a part with one."""
        first, last = name.rsplit(" ", 1)
        ways = [self._starting(kind, split, first), self._ending(kind, split, last)]
        rng.shuffle(ways)
        for names in ways:
            other = rng.choice(names) if names else name
            if other != name:
                return other
        return self.draw(rng, kind, split)

    @cache  # noqa: B019 - one object serves a process
    def _starting(self, kind: str, split: str, first: str) -> list[str]:
        return [name for last in self.parts[kind][1] if split_of(name := f"{first} {last}") == split]

    @cache  # noqa: B019
    def _ending(self, kind: str, split: str, last: str) -> list[str]:
        return [name for first in self.parts[kind][0] if split_of(name := f"{first} {last}") == split]


def split_of(name: str) -> str:
    """The split a name belongs to: of 10 names, one is for validation and two are for the test."""
    place = zlib.crc32(name.encode()) % 10
    return "validation" if place == 0 else "test" if place < 3 else "train"
