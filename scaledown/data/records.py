"""The project's data format: one JSON object per line, or the same columns in Parquet, validated where they enter.

    {"query": str, "documents": [str, ...], "answer": str | [str, ...], "gold_answers": [str, ...]?,
     "reranking_scores": [float, ...]?, "positives": [int, ...]?, "id": str?}

`documents` may be empty (closed book). The first `answer` is the one that is learned; where a teacher wrote it, the
data set's own are `gold_answers`. `reranking_scores` are a teacher's, one per document. `positives` are the indices of
the documents known to hold the answer; absent means unknown. Other keys are ignored.
"""

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError

from ..common.files import atomic_writer, check_is_file
from ..common.reading import (
    CONVERT,
    PARQUET_ROWS,
    RecordError,
    is_columnar,
    read_columnar_rows,
    read_json_lines,
    record_error,
)
from ..common.text import half_of_a_pair, is_blank, shorten

_TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        "id": _TEXT,
        "query": _TEXT,
        "documents": datasets.List(_TEXT),
        "answer": datasets.List(_TEXT),
        "gold_answers": datasets.List(_TEXT),
        "reranking_scores": datasets.List(datasets.Value("float64")),
        "positives": datasets.List(datasets.Value("int32")),
    }
)


def read_records(path: str | os.PathLike, require_answer: bool = True) -> Iterator[dict[str, Any]]:
    """Read and validate a file of records, one record at a time.

    Args:
        path: A JSON Lines file in UTF-8, plain or compressed with gzip, xz, bzip2 or zip, or a Parquet or Arrow file;
            the content decides, not the name. Blank lines are skipped.
        require_answer: Whether a record without an answer is an error; otherwise its `answer` is an empty list.

    Returns:
        An iterator over dicts with the keys `id` (str, by default the zero-based index of the line), `query` (str),
        `documents` (list of str), `answer` (list of str), `gold_answers` (list of str, or None), `reranking_scores`
        (list of float, or None) and `positives` (list of int, or None).

    Raises:
        FileNotFoundError: There is no such file (raised by the call, not by the first item).
        RecordError: A line breaks the format, or the file holds no record (raised while iterating).
    """
    check_is_file(path)
    return _generate_records(str(path), require_answer)


def load_records(path: str | os.PathLike) -> datasets.Dataset:
    """Load a file of records as a disk-backed dataset; memory does not grow with the file.

    The Arrow file is kept in the cache folder of `datasets`; a changed file is read anew.

    Args:
        path: As in `read_records`.

    Returns:
        A `datasets.Dataset` with the columns that `read_records` names as keys.

    Raises:
        FileNotFoundError: There is no such file.
        RecordError: A line breaks the format, or the file holds no record.
    """
    check_is_file(path)
    path = Path(path).resolve()
    stat = path.stat()
    # Size and modification time are arguments of the generator only to be part of the cache's key.
    arguments = {
        "path": str(path),
        "require_answer": True,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
    }
    try:
        return datasets.Dataset.from_generator(_generate_records, features=FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, RecordError):
            raise error.__cause__ from None
        raise


def write_records(path: str | os.PathLike, records: Iterable[dict[str, Any]], overwrite: bool = False) -> int:
    """Write records as JSON Lines or Parquet: all of them, or on any error none.

    Args:
        path: The file to write. A name ending in `.parquet` is Parquet, any other JSON Lines; one ending in `.gz` or
            `.xz` is compressed. Missing folders are created.
        records: Records in the project's format, validated as they are written; an answer may be absent.
        overwrite: Whether an existing file is replaced.

    Returns:
        The number of records written.

    Raises:
        FileExistsError: The file exists and `overwrite` is off.
        RecordError: A record breaks the format, or there is none.
        OSError: The disk is full.
    """
    normalized = (
        normalize_record(record, f"{path}, record {index + 1}", str(index), require_answer=False)
        for index, record in enumerate(records)
    )
    with atomic_writer(path, overwrite) as stream:
        write = _write_parquet if Path(path).suffix == ".parquet" else _write_json_lines
        count = write(stream, normalized)
        if count == 0:
            raise RecordError(f"{path}: found no records to write, expected at least one; check what selects them.")
    return count


def normalize_record(record: Any, location: str, default_id: str, require_answer: bool = True) -> dict[str, Any]:
    """Validate one record and bring it into the form `read_records` returns.

    Args:
        record: A record as parsed from JSON.
        location: Where it comes from, for the messages: file and line.
        default_id: The id of a record that has none.
        require_answer: Whether a record without an answer is an error.

    Returns:
        A new dict with the keys that `read_records` names.

    Raises:
        RecordError: The record breaks the format.
    """
    if not isinstance(record, dict):
        raise record_error(
            location,
            _describe(record),
            'an object like {"query": ..., "documents": [...], "answer": ...}',
            f"Write one object per line, or {CONVERT}.",
        )
    for name in ("query", "documents"):
        if name not in record:
            found = f"the keys {_keys(record)}"
            raise record_error(location, found, f'a key "{name}"', f"Add the field, or {CONVERT}.")
    documents = _texts(record["documents"], "documents", location)
    identifier = record.get("id")
    return {
        "id": default_id if identifier is None else _text(_spelt(identifier), "id", location),
        "query": _text(record["query"], "query", location),
        "documents": documents,
        "answer": _answers(record, location, require_answer),
        "gold_answers": _gold_answers(record.get("gold_answers"), location),
        "reranking_scores": _scores(record.get("reranking_scores"), len(documents), location),
        "positives": _positives(record.get("positives"), len(documents), location),
    }


def answers_of(record: dict[str, Any]) -> list[str]:
    """A record's answers, also where it holds a single one as plain text, as a user's own data set may.

    Args:
        record: A record with an `answer`.

    Returns:
        The answers, of which the first is the one to learn.
    """
    answer = record["answer"]
    return [answer] if isinstance(answer, str) else answer


def gold_answers_of(record: dict[str, Any]) -> list[str]:
    """A record's gold answers: the data set's own where a teacher wrote those to learn.

    Args:
        record: A record with an `answer`, and perhaps `gold_answers`.

    Returns:
        The answers a prediction is compared with.
    """
    gold = record.get("gold_answers")
    return [gold] if isinstance(gold, str) else gold or answers_of(record)


def _generate_records(
    path: str, require_answer: bool, size: int | None = None, mtime_ns: int | None = None
) -> Iterator[dict[str, Any]]:
    empty = True
    if is_columnar(path):
        rows = ((f"row {index}", index, row) for index, row in enumerate(read_columnar_rows(path)))
    else:
        rows = ((f"line {number}", number - 1, value) for number, value in read_json_lines(path))
    for place, index, value in rows:
        empty = False
        yield normalize_record(value, f"{path}, {place}", str(index), require_answer)
    if empty:
        raise RecordError(f"{path}: found no records, expected one JSON object per line; check what wrote the file.")


def _write_json_lines(stream: BinaryIO, records: Iterable[dict[str, Any]]) -> int:
    count = 0
    for record in records:
        present = {key: value for key, value in record.items() if value is not None}
        if not present["answer"]:
            del present["answer"]
        stream.write(json.dumps(present, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")
        count += 1
    return count


def _write_parquet(stream: BinaryIO, records: Iterable[dict[str, Any]]) -> int:
    count = 0
    records = iter(records)
    with pq.ParquetWriter(stream, FEATURES.arrow_schema) as writer:
        while rows := list(itertools.islice(records, PARQUET_ROWS)):
            writer.write_table(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema))
            count += len(rows)
    return count


def _answers(record: dict[str, Any], location: str, required: bool) -> list[str]:
    answer = record.get("answer")
    if answer is None or answer == []:
        if required:
            found = f"the keys {_keys(record)}" if "answer" not in record else f'"answer": {json.dumps(answer)}'
            raise record_error(
                location,
                found,
                'a key "answer" with a string or a non-empty list of strings',
                "Add the gold or teacher answer, or read with require_answer=False.",
            )
        return []
    return _texts(_listed_answers(answer), "answer", location)


def _gold_answers(value: Any, location: str) -> list[str] | None:
    return None if value is None else _texts(_listed_answers(value), "gold_answers", location)


def _listed_answers(value: Any) -> Any:
    """A list of answers, from one or several, of which numbers are spelt out."""
    value = value if isinstance(value, list) else _spelt(value)
    return [value] if isinstance(value, str) else [_spelt(item) for item in value] if isinstance(value, list) else value


def _spelt(value: Any) -> Any:
    """A number as text, such as a year that is an answer; anything else as it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and _is_finite(value) else value


def _texts(value: Any, name: str, location: str) -> list[str]:
    if not isinstance(value, list):
        kind = "a string or a list of strings" if name == "answer" else "a list of strings"
        raise record_error(location, f'"{name}": {_describe(value)}', kind, 'Write it as ["...", "..."].')
    return [_text(item, f"{name}[{index}]", location) for index, item in enumerate(value)]


def _text(value: Any, name: str, location: str) -> str:
    if not isinstance(value, str):
        raise record_error(
            location,
            f'"{name}": {_describe(value)}',
            "a non-empty string",
            "Put the text in quotes, or drop the entry.",
        )
    if is_blank(value):
        found = "invisible characters only" if value.strip() else "an empty string"
        raise record_error(location, f'"{name}": {found}', "a non-empty string", "Fill in the text, or drop the entry.")
    half = half_of_a_pair(value)
    if half is not None:
        raise record_error(
            location,
            f'"{name}": half of a surrogate pair, {half}',
            "text that can be written as UTF-8",
            "Remove the character, or write the whole pair.",
        )
    return value


def _scores(value: Any, num_documents: int, location: str) -> list[float] | None:
    if value is None:
        return None
    name = "reranking_scores"
    remedy = "Give every document one score, or leave the field out."
    if not isinstance(value, list):
        raise record_error(location, f'"{name}": {_describe(value)}', "a list of numbers", remedy)
    if len(value) != num_documents:
        raise record_error(location, f'{len(value)} "{name}"', f"{num_documents}, one per document", remedy)
    for index, score in enumerate(value):
        if isinstance(score, bool) or not isinstance(score, int | float) or not _is_finite(score):
            raise record_error(location, f'"{name}[{index}]": {_describe(score)}', "a finite number", remedy)
    return [float(score) for score in value]


def _positives(value: Any, num_documents: int, location: str) -> list[int] | None:
    if value is None:
        return None
    expected = f"a list of distinct indices into the {num_documents} documents, counted from 0"
    remedy = "Correct the indices, or leave the field out."
    if not isinstance(value, list):
        raise record_error(location, f'"positives": {_describe(value)}', expected, remedy)
    for index, position in enumerate(value):
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < num_documents:
            raise record_error(location, f'"positives[{index}]": {_describe(position)}', expected, remedy)
    if len(set(value)) != len(value):
        raise record_error(location, f'"positives": {value}, with repetitions', expected, remedy)
    return list(value)


def _is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond the largest float
        return False


def _describe(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    kind = names.get(type(value), "a number")
    return kind if value is None else f"{kind}, {shorten(str(value), 60)}"


def _keys(record: dict[str, Any]) -> str:
    return shorten(", ".join(record) or "(none)", 60)
