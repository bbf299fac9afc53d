"""Questions and passages to begin with, drawn from the made-up world in the names of its test split.

They are the first that come, not chosen by how they are answered.
"""

from dataclasses import dataclass

from ..world.world import World

SEED = 0
# Passages, passages the question needs, how many of the best are read, and whether the needed one is there.
KINDS = (
    (5, 1, None, True),
    (5, 2, None, True),
    (10, 1, 3, True),
    (10, 2, None, True),
    (20, 1, None, True),
    (20, 2, 10, True),
    (6, 1, None, False),
)


@dataclass(frozen=True)
class Example:
    """A question to pick.

    Args:
        title: What the menu shows.
        question: The question.
        passages: The passages.
        answer: The right answer.
        max_documents: How many passages are read from slots; None for all.
    """

    title: str
    question: str
    passages: list[str]
    answer: str
    max_documents: int | None


def draw_examples() -> list[Example]:
    """The examples of the page, the same at every start."""
    world, examples = World("test", SEED), []
    for number, (count, hops, max_documents, is_answered) in enumerate(KINDS):
        record = world.record(number, count, float(hops == 2))
        passages, answer = record["documents"], record["answer"]
        note = "two of them needed" if hops == 2 else "one of them needed"
        if max_documents is not None:
            note += f", the {max_documents} best read"
        if not is_answered:
            passages = [text for place, text in enumerate(passages) if place not in record["positives"]]
            note, answer = "none of them tells", "none; it is not in the passages"
        title = f"{record['query']} ({len(passages)} passages, {note})"
        examples.append(Example(title, record["query"], passages, answer, max_documents))
    return examples


def right_answer(examples: list[Example], question: str, passages: list[str]) -> str | None:
    """The right answer, where question and passages are an example's; None where somebody wrote their own.

    Args:
        examples: The examples.
        question: The question.
        passages: The passages.

    Returns:
        The answer.
    """
    return next((e.answer for e in examples if (e.question, e.passages) == (question, passages)), None)
