"""Read question-answering data sets as they are distributed into one intermediate form.

| format     | what is read                                                                                          |
| ---------- | ----------------------------------------------------------------------------------------------------- |
| `squad`    | the original JSON (`data` / `paragraphs` / `qas`), a flat `[{context, qas}]`, rows of `datasets`       |
| `hotpotqa` | the original JSON (`context` as pairs) and rows of `datasets` (`context` as columns), array or lines   |
| `records`  | the project's own JSON Lines                                                                          |
"""

import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from .records import RecordError, decode_text, normalize_record, open_binary, read_json_lines

logger = logging.getLogger(__name__)

FORMATS = ("squad", "hotpotqa", "records")
Elements = Iterator[tuple[str, Any]]


class SourceError(ValueError):
    """A source that cannot be read; the message names the place, the finding and the remedy."""


@dataclass(frozen=True)
class Question:
    """A question with what its data set says about it.

    Args:
        id: Unique within the source.
        query: The question's text.
        answers: Gold answers, distinct, at least one.
        positives: Passages known to hold the answer; None where the source does not say.
        candidates: The question's own passages, positives included; empty where it brings none.
    """

    id: str
    query: str
    answers: list[str]
    positives: list[str] | None
    candidates: list[str] = field(default_factory=list)


@dataclass
class Source:
    """Everything read from a source.

    Args:
        format: One of `FORMATS`.
        questions: The usable questions in the order of the source.
        passages: The pool: every passage of the source once, in order of appearance.
        dropped: Ids of the questions left out, by reason.
        num_scores_discarded: Records whose reranking scores were left behind, since their documents change.
    """

    format: str
    questions: list[Question] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    num_scores_discarded: int = 0

    @property
    def num_read(self) -> int:
        """Number of questions read, the dropped ones included."""
        return len(self.questions) + sum(len(ids) for ids in self.dropped.values())


def read_source(source: str, format: str | None = None, config: str | None = None, split: str | None = None) -> Source:
    """Read a local file, or a data set by its name on the Hub.

    Args:
        source: A local JSON or JSON Lines file (plain, gzip or xz), a local folder that `datasets.load_dataset`
            opens, or a name on the Hub.
        format: One of `FORMATS`; told from the content by default.
        config: The data set's configuration; not for files.
        split: The data set's split, by default `train`; not for files.

    Returns:
        The questions, the pool of passages and what was dropped.

    Raises:
        FileNotFoundError: A path that does not exist.
        SourceError: The source cannot be loaded, its format is unknown, or an element does not fit the format.
        RecordError: A line is not JSON, or breaks the project's format.
    """
    if format is not None and format not in FORMATS:
        raise SourceError(f"format is {format!r}, expected one of {', '.join(FORMATS)}; correct it or leave it out.")
    elements = _open_source(source, config, split)
    try:
        first = next(elements)
    except StopIteration:
        raise SourceError(
            f"{source}: found no questions, expected at least one; check the file or the split."
        ) from None
    format = format or detect_format(*first)
    logger.info("reading %s as %s", source, format)
    collector = _Collector(Source(format=format))
    add_element = {"squad": _add_squad, "hotpotqa": _add_hotpotqa, "records": _add_record}[format]
    for index, (location, element) in enumerate(itertools.chain([first], elements)):
        add_element(collector, _mapping(element, location), location, str(index))
    return collector.finish()


def detect_format(location: str, element: Any) -> str:
    """Tell a format from one element of the source.

    Args:
        location: Where the element comes from, for the message.
        element: An article, a paragraph, a question or a record.

    Returns:
        One of `FORMATS`.

    Raises:
        SourceError: The element fits none.
    """
    element = _mapping(element, location)
    if {"query", "documents"} <= element.keys():
        return "records"
    if "paragraphs" in element or {"context", "qas"} <= element.keys():
        return "squad"
    if {"question", "context"} <= element.keys():
        # SQuAD's context is one text, HotpotQA's are ten paragraphs of sentences.
        return "squad" if isinstance(element["context"], str) else "hotpotqa"
    raise SourceError(
        f"{location}: found the keys {', '.join(element) or '(none)'}; expected those of SQuAD (paragraphs, or "
        f"context and qas, or question, context and answers), HotpotQA (question, context, supporting_facts) or the "
        f"project's records (query, documents, answer). Convert the file to records."
    )


class _Collector:
    """Fills a `Source`: passages once each, ids once each, answers once each."""

    def __init__(self, source: Source):
        self.source = source
        self._passages: dict[str, str] = {}
        self._ids: set[str] = set()

    def add_passage(self, text: str) -> str | None:
        """Put a passage into the pool; returns the pool's text of it, None for an empty one."""
        # Copies that differ only in white space are one passage: a distractor must not repeat the gold passage.
        key = " ".join(text.split())
        return self._passages.setdefault(key, text.strip()) if key else None

    def add_question(
        self, identifier: str, query: str, answers: Iterable[str], positives: list[str] | None, candidates: list[str]
    ) -> None:
        """Keep a question, or drop it with a reason."""
        answers = list(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
        if identifier in self._ids:
            self.drop("duplicate_id", identifier)
        elif not query.strip():
            self.drop("empty_question", identifier)
        elif not answers:
            self.drop("no_answer", identifier)
        else:
            self._ids.add(identifier)
            question = Question(identifier, query.strip(), answers, positives, list(dict.fromkeys(candidates)))
            self.source.questions.append(question)

    def drop(self, reason: str, identifier: str) -> None:
        self.source.dropped.setdefault(reason, []).append(identifier)

    def finish(self) -> Source:
        self.source.passages = list(self._passages.values())
        return self.source


def _open_source(source: str, config: str | None, split: str | None) -> Elements:
    path = Path(source)
    if path.is_file():
        for name, value in (("config", config), ("split", split)):
            if value is not None:
                raise SourceError(f"{name} is {value!r}, but {source} is a file and has none; leave --{name} out.")
        return _file_elements(path)
    # A name on the Hub is `name` or `owner/name`; anything else was meant as a path.
    if not path.exists() and (source.startswith((".", "~", os.sep)) or source.count("/") > 1 or _has_suffix(path)):
        raise FileNotFoundError(f"{source} does not exist (looked from {Path.cwd()}); check the path.")
    return _dataset_elements(source, config, split or "train")


def _has_suffix(path: Path) -> bool:
    return path.suffix in {".json", ".jsonl", ".gz", ".xz", ".txt", ".parquet"}


def _dataset_elements(name: str, config: str | None, split: str) -> Elements:
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise SourceError(
            f"{name}: is no local file, and loading it as a data set (config {config}, split {split}) failed with "
            f"{type(error).__name__}: {error}. Expected a file, or a data set's name or folder; check the name, "
            f"--config, --split and the connection."
        ) from error
    for index, row in enumerate(rows):
        yield f"{name}, row {index}", row


def _file_elements(path: Path) -> Elements:
    lines = read_json_lines(path)
    try:
        number, value = next(lines)
    except StopIteration:
        return
    except RecordError as error:
        # A first line that is no JSON by itself may open a JSON file that spans many lines.
        if not isinstance(error.__cause__, json.JSONDecodeError):
            raise
        yield from _json_elements(path, _read_json(path))
        return
    if isinstance(value, list) or _articles(value) is not None:
        yield from _json_elements(path, value)
        number, value = next(lines, (None, None))
        if number is not None:
            raise SourceError(f"{path}, line {number}: found more after the end of the JSON; expected one value.")
        return
    yield f"{path}, line {number}", value
    for number, value in lines:
        yield f"{path}, line {number}", value


def _read_json(path: Path) -> Any:
    with open_binary(path) as stream:
        text = decode_text(stream.read(), str(path))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path}: found neither JSON nor JSON Lines ({error}); expected one of them. Repair the file, or download "
            f"it again."
        ) from error


def _json_elements(path: Path, value: Any) -> Elements:
    elements = value if isinstance(value, list) else _articles(value)
    if elements is None:
        elements = [value]
    for index, element in enumerate(elements, start=1):
        yield f"{path}, element {index}", element


def _articles(value: Any) -> list[Any] | None:
    """The articles of SQuAD's original file, None for anything else."""
    if not isinstance(value, dict) or not {"query", "question"}.isdisjoint(value):  # a row may have its own "data"
        return None
    return value["data"] if isinstance(value.get("data"), list) else None


def _add_squad(collector: _Collector, element: dict[str, Any], location: str, default_id: str) -> None:
    if "paragraphs" in element:
        for index, paragraph in enumerate(_field(element, "paragraphs", list, location), start=1):
            place = f"{location}, paragraph {index}"
            _add_squad_paragraph(collector, _mapping(paragraph, place), place, f"{default_id}-{index - 1}")
    elif "qas" in element:
        _add_squad_paragraph(collector, element, location, default_id)
    else:
        passage = collector.add_passage(_field(element, "context", str, location))
        _add_squad_question(collector, element, passage, location, default_id)


def _add_squad_paragraph(collector: _Collector, paragraph: dict[str, Any], location: str, default_id: str) -> None:
    passage = collector.add_passage(_field(paragraph, "context", str, location))
    qas = []
    for index, qa in enumerate(_field(paragraph, "qas", list, location), start=1):
        place = f"{location}, question {index}"
        qas.append((place, f"{default_id}-{index - 1}", _mapping(qa, place)))
    for place, identifier, qa in _merge_repeated(collector, qas):
        _add_squad_question(collector, qa, passage, place, identifier)


def _merge_repeated(
    collector: _Collector, qas: list[tuple[str, str, dict[str, Any]]]
) -> list[tuple[str, str, dict[str, Any]]]:
    """Questions without an id that repeat within a paragraph become one, with the answers of all."""
    merged: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for place, identifier, qa in qas:
        if "id" in qa:
            merged[place] = (place, identifier, qa)
            continue
        key = _field(qa, "question", str, place).strip()
        if key in merged:
            merged[key][2]["answers"] += _squad_answers(qa, place)
            collector.drop("merged_into_same_question", identifier)
        else:
            merged[key] = (place, identifier, {**qa, "answers": _squad_answers(qa, place)})
    return list(merged.values())


def _add_squad_question(
    collector: _Collector, qa: dict[str, Any], passage: str | None, location: str, default_id: str
) -> None:
    identifier = _identifier(qa, default_id)
    if qa.get("is_impossible"):
        collector.drop("unanswerable", identifier)
    elif passage is None:
        collector.drop("empty_passage", identifier)
    else:
        answers = _squad_answers(qa, location)
        collector.add_question(identifier, _field(qa, "question", str, location), answers, [passage], [])


def _squad_answers(qa: dict[str, Any], location: str) -> list[str]:
    answers = qa.get("answers", qa.get("answer"))
    if answers is None:
        return []
    if isinstance(answers, str):
        answers = [answers]
    elif isinstance(answers, dict):
        answers = _field(answers, "text", list, f"{location}, answers")
    if isinstance(answers, list):
        answers = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers]
        if all(isinstance(answer, str) for answer in answers):
            return answers
    raise SourceError(
        f"{location}: found the answers {str(answers)[:60]}; expected texts, or objects with a text. Correct the file."
    )


def _add_hotpotqa(collector: _Collector, element: dict[str, Any], location: str, default_id: str) -> None:
    identifier = _identifier(element, default_id)
    passages: dict[str, list[str]] = {}
    for title, sentences in _pairs(element, "context", "title", "sentences", location):
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise SourceError(f"{location}: found the sentences {str(sentences)[:60]}; expected a list of strings.")
        # Sentences carry their own leading blanks. The title goes in front because it names the entity, which the
        # paragraph itself often calls only "he" or "the film", and which leads from one paragraph to the other.
        text = "".join(sentences).strip()
        passage = collector.add_passage(f"{title}: {text}") if text else None
        if passage is not None:
            passages.setdefault(str(title), []).append(passage)
    query = _field(element, "question", str, location)
    answer = element.get("answer") or ""
    if not isinstance(answer, str):
        raise SourceError(f"{location}: found the answer {str(answer)[:60]}; expected a string. Correct the file.")
    # Repeated titles of supporting facts are several sentences of one paragraph.
    facts = element.get("supporting_facts") or []
    titles = dict.fromkeys(str(title) for title, _ in _pairs({"facts": facts}, "facts", "title", "sent_id", location))
    if answer and not titles:
        collector.drop("no_supporting_facts", identifier)
    elif any(title not in passages for title in titles):
        collector.drop("supporting_fact_not_in_context", identifier)
    else:
        positives = list(dict.fromkeys(passage for title in titles for passage in passages[title]))
        candidates = [passage for group in passages.values() for passage in group]
        collector.add_question(identifier, query, [answer], positives, candidates)


def _pairs(element: dict[str, Any], name: str, first: str, second: str, location: str) -> list[tuple[Any, Any]]:
    """Pairs, whether stored as pairs (original file) or as two columns (rows of `datasets`)."""
    value = element.get(name)
    if isinstance(value, dict):
        columns = _field(value, first, list, location), _field(value, second, list, location)
        if len(columns[0]) == len(columns[1]):
            return list(zip(*columns, strict=True))
    elif isinstance(value, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        return [tuple(pair) for pair in value]
    raise SourceError(
        f"{location}: found {name} {str(value)[:60]}; expected [{first}, {second}] pairs or two lists of one length "
        f"under {first} and {second}. Correct the file, or its --format."
    )


def _add_record(collector: _Collector, element: dict[str, Any], location: str, default_id: str) -> None:
    record = normalize_record(element, location, default_id, require_answer=False)
    # The format has no empty documents, so the pool holds every one of them.
    documents = [collector.add_passage(document) for document in record["documents"]]
    positives = record["positives"]
    if positives is not None:
        positives = list(dict.fromkeys(documents[index] for index in positives))
    if record["reranking_scores"] is not None:
        collector.source.num_scores_discarded += 1
    collector.add_question(record["id"], record["query"], record["answer"], positives, documents)


def _identifier(element: dict[str, Any], default: str) -> str:
    identifier = element.get("id", element.get("_id"))
    return default if identifier is None else str(identifier)


def _field(element: dict[str, Any], name: str, kind: type, location: str) -> Any:
    value = element.get(name)
    if isinstance(value, kind):
        return value
    found = f"{name} {str(value)[:60]}" if name in element else f"the keys {', '.join(element) or '(none)'}"
    names = {str: "a string", list: "a list"}
    raise SourceError(
        f"{location}: found {found}; expected {names[kind]} under {name!r}. Correct the file, or its --format."
    )


def _mapping(value: Any, location: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise SourceError(f"{location}: found {str(value)[:60]}; expected an object. Correct the file, or its --format.")
