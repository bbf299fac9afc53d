"""Formats in which a question brings the documents it is to be asked with: records, tables, results of a retriever."""

from typing import Any

from ..common.choices import Columns
from ..common.text import is_blank
from .choice import stable_hash
from .delimited import decode_cell
from .questions import QuestionCollector, SourceError, as_items, as_texts, get_identifier, is_true, passage_texts
from .records import normalize_record

# The usual names of the columns of any table, in upper or lower case.
QUESTION_COLUMNS = ("question", "query")
ANSWER_COLUMNS = ("answer", "answers")
DOCUMENTS_COLUMNS = ("documents", "passages", "contexts", "document", "passage", "context", "ctxs")
ID_COLUMNS = ("id", "_id", "qid", "question_id", "query_id")
# What DPR's training files say of a question, right passages first.
DPR_COLUMNS = ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
OPTIONAL = ("id", "gold_answers", "reranking_scores", "positives")


def usual_column(element: dict[str, Any], usual: tuple[str, ...]) -> str | None:
    """The column of a row that has one of the usual names and a value; None where there is none."""
    present = {str(name).lower(): name for name in reversed(element) if element[name] not in (None, "")}
    return next((present[name] for name in usual if name in present), None)


def add_columns(
    collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str, columns: Columns
) -> None:
    """Read a row of any table; see `formats.add_element`."""
    found = {
        "question": _column(element, columns.question, QUESTION_COLUMNS, "question", location),
        "answer": _column(element, columns.answer, ANSWER_COLUMNS, "answer", location),
        "documents": _column(element, columns.documents, DOCUMENTS_COLUMNS, "documents", location),
        "id": _column(element, columns.id, ID_COLUMNS, "id", location),
    }
    collector.note_columns(found)
    question, answer, documents, identifier = (None if name is None else element[name] for name in found.values())
    if (
        question is None
        and usual_column(dict.fromkeys(element, " "), QUESTION_COLUMNS) is None
        and not columns.question
    ):
        raise SourceError(
            f"{location}: found the keys {', '.join(map(str, element)) or '(none)'}; expected a column with the "
            f"question. Name it with --question_column."
        )
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    if isinstance(answer, dict):  # SQuAD's way to write answers
        answer = answer.get("text", answer.get("value"))
    answers = [text for text in as_texts(_decoded(answer, location), f"{location}, answer") if not is_blank(text)]
    listed = passage_texts(_decoded(documents, location), f"{location}, documents")
    texts = [text for text in listed if not is_blank(text)]
    record = {"query": str(question or ""), "documents": texts, "answer": answers}
    if len(texts) == len(listed):
        record |= {name: element[name] for name in OPTIONAL[1:] if element.get(name) not in (None, "")}
    identifier = default_id if identifier in (None, "") else str(identifier)
    if is_blank(record["query"]):
        collector.drop("empty_question", identifier)
    else:
        add_record(collector, {**record, "id": identifier}, location, default_id)


def add_dpr(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    """Read a question with the passages of a retriever (`ctxs`), or of DPR's training (`positive_ctxs` and others)."""
    query = usual_column(element, QUESTION_COLUMNS)
    identifier = get_identifier(element, default_id, *ID_COLUMNS)
    if query is None:
        collector.drop("empty_question", identifier)
        return
    answers = as_texts(element.get("answers", element.get("answer")), f"{location}, answers")
    # FiD's files name the answer to learn.
    answers = [*as_texts(element.get("target"), f"{location}, target"), *answers]
    pairs: list[tuple[str, bool | None]] = []
    if "ctxs" in element:
        rows = as_items(element["ctxs"], f"{location}, ctxs")
        texts = passage_texts(rows, f"{location}, ctxs")
        told = [row.get("has_answer") if isinstance(row, dict) else None for row in rows]
        known = bool(rows) and None not in told
        pairs = [
            (text, is_true(flag, "has_answer", location) if known else None)
            for text, flag in zip(texts, told, strict=True)
        ]
    else:
        for name in DPR_COLUMNS:
            texts = passage_texts(element.get(name), f"{location}, {name}")
            pairs += [(text, name == DPR_COLUMNS[0]) for text in texts]
        # Their order gives the right ones away.
        pairs.sort(key=lambda pair: stable_hash(0, "order", f"{identifier} {pair[0]}"))
    pairs = [(text, right) for text, right in pairs if not is_blank(text)]
    record = {
        "id": identifier,
        "query": str(element[query]),
        "documents": [text for text, _ in pairs],
        "answer": [text for text in dict.fromkeys(answers) if not is_blank(text)],
    }
    if all(right is not None for _, right in pairs):
        record["positives"] = [place for place, (_, right) in enumerate(pairs) if right]
    add_record(collector, record, location, default_id)


def read_record(element: dict[str, Any], location: str, default_id: str) -> dict[str, Any]:
    """Validate a record of a source.

    Args:
        element: The record.
        location: Where it comes from, for messages.
        default_id: The id of a record that has none.

    Returns:
        The record as `records.normalize_record` returns it; an empty answer is no answer.

    Raises:
        RecordError: The record breaks the project's format.
    """
    # In a table every row has every column.
    element = {name: value for name, value in element.items() if value != "" or name not in OPTIONAL}
    if isinstance(element.get("documents"), str):
        element["documents"] = [element["documents"]] if not is_blank(element["documents"]) else []
    answer = element.get("answer")
    if isinstance(answer, str) or (isinstance(answer, list) and all(isinstance(text, str) for text in answer)):
        # The question is dropped and counted, not refused with its whole file.
        element = {**element, "answer": [text for text in as_texts(answer, location) if not is_blank(text)]}
    return normalize_record(element, location, default_id, require_answer=False)


def add_record(collector: QuestionCollector, element: dict[str, Any], location: str, default_id: str) -> None:
    """Read a record of the project's own format; see `formats.add_element`."""
    record = read_record(element, location, default_id)
    others = collector.source.other_fields
    others += [name for name, value in element.items() if value is not None and name not in (*record, *others)]
    # The format has no empty documents, so the pool holds every one of them.
    documents = [collector.add_passage(document) for document in record["documents"]]
    positives = record["positives"]
    if positives is not None:
        positives = [documents[index] for index in positives]
    if record["reranking_scores"] is not None:
        collector.source.num_scores_discarded += 1
    collector.add_question(record["id"], record["query"], record["answer"], positives, documents, record)


def _column(
    element: dict[str, Any], name: str | None, usual: tuple[str, ...], meaning: str, location: str
) -> str | None:
    if name is None:
        return usual_column(element, usual)
    if name not in element:
        raise SourceError(
            f"{location}: found the columns {', '.join(map(str, element)) or '(none)'}; expected {name!r}, the "
            f"{meaning}. Correct --{meaning}_column."
        )
    return name


def _decoded(value: Any, location: str) -> Any:
    """What a text spells that comes from a column of texts, as Parquet may have one; anything else as it is."""
    return decode_cell(value, location, mappings=False) if isinstance(value, str) else value
