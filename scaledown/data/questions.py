"""The intermediate form of a question-answering data set, and what its readers share."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from errors_scaledown import ScaleDownError

from ..common.text import half_of_a_pair, is_blank

# What an object calls the text of a passage.
PASSAGE_TEXTS = (
    *("text", "passage_text", "paragraph_text", "contents", "content", "page_content", "passage", "document"),
    *("contexts", "body", "snippet"),
)
# Takes a title, perhaps empty, and a long text, and returns passages.
Splitter = Callable[[str, str], list[str]]


class SourceError(ScaleDownError):
    """A source that cannot be read; the message names the place, the finding and the remedy."""


@dataclass(frozen=True)
class Question:
    """A question with what its data set says about it.

    Args:
        id: Unique within the source.
        query: The question's text.
        answers: Gold answers, distinct; empty where an answer teacher is to write one.
        positives: Passages known to hold the answer; None where the source does not say.
        candidates: The question's own passages, positives included; empty where it brings none.
        record: The record itself, where the source is in the project's own format.
    """

    id: str
    query: str
    answers: list[str]
    positives: list[str] | None
    candidates: list[str] = field(default_factory=list)
    record: dict[str, Any] | None = None


@dataclass
class Source:
    """Everything read from a source.

    Args:
        format: The name of its format.
        questions: The usable questions in the order of the source.
        passages: The pool: every passage of the source once, in order of appearance.
        dropped: Ids of the questions left out, by reason.
        num_scores_discarded: Records whose reranking scores were dropped, because their documents change.
        other_fields: What records have besides the fields of the format, each name once.
        columns: Names under which questions, answers and documents were found, each once; none where nothing was.
    """

    format: str
    questions: list[Question] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    num_scores_discarded: int = 0
    other_fields: list[str] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict, compare=False)

    @property
    def num_read(self) -> int:
        """Number of questions read, the dropped ones included."""
        return len(self.questions) + sum(len(ids) for ids in self.dropped.values())


class QuestionCollector:
    """Fills a `Source`: passages once each, ids once each, answers once each.

    Args:
        source: The source to fill.
        split: Cuts long texts into passages.
        require_answer: Whether a question without an answer is dropped.
        keep_pool: Whether passages that are no question's positive are kept; where documents come from a corpus, they
            would only cost memory.

    `location` is where the element being read comes from, for messages.

    Raises:
        SourceError: A text, or an id, cannot be written as UTF-8.
    """

    def __init__(self, source: Source, split: Splitter, require_answer: bool = True, keep_pool: bool = True):
        self.source = source
        self.location = source.format
        self._split = split
        self.require_answer = require_answer
        self.keep_pool = keep_pool
        self._passages: dict[bytes, str] = {}
        self._ids: set[str] = set()

    def split(self, title: str, text: str) -> list[str]:
        """Cut a long text into passages."""
        check_can_be_written(title, "a title", self.location)
        check_can_be_written(text, "a text", self.location)
        return self._split(title, text)

    def add_passage(self, text: str) -> str | None:
        """Put a passage into the pool; returns the pool's text of it, None for an empty one."""
        if is_blank(text):
            return None
        check_can_be_written(text, "a passage", self.location)
        # Copies that differ only in white space are one passage: a distractor must not repeat the gold passage.
        words = " ".join(text.split())
        if not self.keep_pool:
            return text.strip()
        key = hashlib.blake2b(words.encode("utf-8"), digest_size=16).digest()
        return self._passages.setdefault(key, text.strip())

    def add_passages(self, texts: Iterable[str]) -> list[str]:
        """Put passages into the pool; returns the pool's texts of those that are not empty."""
        return [passage for text in texts if (passage := self.add_passage(text)) is not None]

    def add_question(
        self,
        identifier: str,
        query: str,
        answers: Iterable[str],
        positives: list[str] | None,
        candidates: list[str],
        record: dict[str, Any] | None = None,
    ) -> None:
        """Keep a question, or drop it with a reason."""
        answers = list(dict.fromkeys(answer.strip() for answer in answers if not is_blank(answer)))
        check_can_be_written(query, "a question", self.location)
        for answer in answers:
            check_can_be_written(answer, "an answer", self.location)
        if identifier in self._ids:
            self.drop("duplicate_id", identifier)
        elif is_blank(query):
            self.drop("empty_question", identifier)
        elif not answers and self.require_answer:
            self.drop("no_answer", identifier)
        else:
            check_can_be_written(identifier, "an id", self.location)
            self._ids.add(identifier)
            if not self.keep_pool:
                candidates = []
            positives = None if positives is None else list(dict.fromkeys(positives))
            candidates = list(dict.fromkeys(candidates))
            self.source.questions.append(Question(identifier, query.strip(), answers, positives, candidates, record))

    def note_columns(self, found: dict[str, str | None]) -> None:
        """Note which columns gave what; None for what no column gave."""
        for meaning, name in found.items():
            names = self.source.columns.setdefault(meaning, [])
            if name is not None and name not in names:
                names.append(name)

    def drop(self, reason: str, identifier: str) -> None:
        """Count a question that is left out."""
        check_can_be_written(identifier, "an id", self.location)
        self.source.dropped.setdefault(reason, []).append(identifier)

    def finish(self) -> Source:
        """Close the pool and return the source."""
        self.source.passages = list(self._passages.values())
        return self.source


def check_can_be_written(text: str, what: str, location: str) -> None:
    """Raise a SourceError for a text with half of a surrogate pair."""
    half = half_of_a_pair(text)
    if half is not None:
        start = " ".join(text[:60].split()).encode("utf-8", "backslashreplace").decode("utf-8")
        raise SourceError(
            f"{location}: found half of a surrogate pair, {half}, in {what} that begins with {start}; expected text "
            f"that can be written as UTF-8. Remove the character, or write the whole pair."
        )


def get_identifier(element: dict[str, Any], default: str, *names: str) -> str:
    """The element's id under the first of the names that is there, by default `id`, `_id` and `qid`."""
    for name in names or ("id", "_id", "qid"):
        if element.get(name) is not None:
            return str(element[name])
    return default


def get_field(element: dict[str, Any], name: str, kind: type, location: str) -> Any:
    """A field of the given kind, or a SourceError that names what is there instead."""
    value = element.get(name)
    if isinstance(value, kind):
        return value
    found = f"{name} {str(value)[:60]}" if name in element else f"the keys {', '.join(map(str, element)) or '(none)'}"
    names = {str: "a string", list: "a list", dict: "an object"}
    raise SourceError(
        f"{location}: found {found}; expected {names[kind]} under {name!r}. Correct the file, or its --format."
    )


def as_mapping(value: Any, location: str) -> dict[str, Any]:
    """The value, if it is an object."""
    if isinstance(value, dict):
        return value
    raise SourceError(f"{location}: found {str(value)[:60]}; expected an object. Correct the file, or its --format.")


def as_rows(value: Any, location: str) -> list[dict[str, Any]]:
    """Rows, whether stored as a list of objects or, as `datasets` may, as an object of equally long lists."""
    if value is None:
        return []
    if isinstance(value, dict):
        columns = {name: column for name, column in value.items() if isinstance(column, list)}
        if value and not columns:  # a single row
            return [value]
        length = max(map(len, columns.values()), default=0)
        if any(len(column) != length for column in columns.values()):
            raise SourceError(f"{location}: found columns of different lengths. Correct the file, or its --format.")
        return [{name: column[index] for name, column in columns.items()} for index in range(length)]
    if isinstance(value, list):
        return [as_mapping(row, location) for row in value]
    raise SourceError(f"{location}: found {str(value)[:60]}; expected a list of objects. Correct the file.")


def as_items(value: Any, location: str) -> list[Any]:
    """Rows or texts, from several as `as_rows` takes them, one of either, or nothing."""
    if isinstance(value, dict):
        return as_rows(value, location)
    return value if isinstance(value, list) else [value] if value else []


def as_texts(value: Any, location: str) -> list[str]:
    """Texts, from one text, a list of texts or nothing."""
    if value is None:
        return []
    listed = value if isinstance(value, list) else [value]
    if all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in listed):
        return [str(item) for item in listed]  # a column of years is a column of numbers
    raise SourceError(f"{location}: found {str(value)[:60]}; expected a text or a list of texts. Correct the file.")


def is_true(value: Any, name: str, location: str) -> bool:
    """Tell a truth value, which a table spells as a text.

    Args:
        value: A boolean, 0 or 1, one of these as a text, or nothing, which is false.
        name: Of the field, for the message.
        location: Where it comes from, for the message.

    Returns:
        The truth value.

    Raises:
        SourceError: It is something else.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    spelt = str(value).strip().lower()
    if spelt in ("true", "1", "1.0", "yes"):
        return True
    if spelt in ("false", "0", "0.0", "no", ""):
        return False
    raise SourceError(f"{location}: found {name} {str(value)[:60]}; expected true or false. Correct the file.")


def titled(title: str, text: str) -> str:
    """A passage after its title, which names the entity that the text itself often calls only "he" or "the film"."""
    return f"{title.strip()}: {text}" if title.strip() else text


def passage_texts(value: Any, location: str) -> list[str]:
    """Passages, from a text, an object with a text and perhaps a title, a list of either, or columns of these.

    Args:
        value: What a source has in the place of passages.
        location: Where it comes from, for the message.

    Returns:
        One text for each passage; empty ones are among them.

    Raises:
        SourceError: There is something else.
    """
    if value is None:
        return []
    if isinstance(value, dict):
        inner = next((value[name] for name in PASSAGE_TEXTS if isinstance(value.get(name), list)), None)
        if inner is None:
            value = [value]
        else:
            value = as_rows(value, location) if not isinstance(value.get("contexts"), list) else inner
    return [_passage_text(item, location) for item in (value if isinstance(value, list) else [value])]


def _passage_text(item: Any, location: str) -> str:
    if isinstance(item, dict):
        text = next((item[name] for name in PASSAGE_TEXTS if isinstance(item.get(name), str)), None)
        if text is not None:
            return titled(str(item.get("title") or ""), text) if not is_blank(text) else ""
    elif isinstance(item, str | int | float) and not isinstance(item, bool):
        return str(item)
    raise SourceError(
        f"{location}: found {str(item)[:60]}; expected a text, or an object with a text under one of "
        f"{', '.join(PASSAGE_TEXTS)}. Correct the file."
    )
