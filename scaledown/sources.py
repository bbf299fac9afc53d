"""Open what a user names as a source: a file of any of the usual kinds, a folder, or a data set on the Hub."""

import csv
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from .questions import SourceError
from .records import (
    RecordError,
    check_is_file,
    decode_text,
    is_parquet,
    open_binary,
    read_json_lines,
    read_lines,
    read_parquet_rows,
)

logger = logging.getLogger(__name__)

# Where an element comes from, for messages, and the element.
Elements = Iterator[tuple[str, Any]]

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".xz")
# A field of a table may hold a whole article; csv's own limit is 128 KiB.
csv.field_size_limit(2**27)


def open_elements(source: str, config: str | None = None, split: str | None = None, revision: str | None = None):
    """Iterate over a source's elements: rows, lines, or what a JSON file lists.

    Args:
        source: A local file (JSON, JSON Lines, CSV or TSV, Parquet; plain, gzip or xz), a folder that
            `datasets.load_dataset` opens, or a name on the Hub.
        config: The data set's configuration; not for files.
        split: The data set's split, by default `train`; not for files.
        revision: Branch, tag or commit of the data set; not for files.

    Returns:
        An iterator over (where the element comes from, the element).

    Raises:
        FileNotFoundError: A path that does not exist.
        SourceError: The source cannot be loaded.
    """
    path = Path(source)
    if path.is_file():
        for name, value in (("config", config), ("split", split), ("revision", revision)):
            if value is not None:
                raise SourceError(f"{name} is {value!r}, but {source} is a file and has none; leave --{name} out.")
        return file_elements(path)
    check_is_no_missing_path(source)
    return dataset_elements(source, config, split or "train", revision)


def check_is_no_missing_path(source: str) -> None:
    """Raise FileNotFoundError for a name that was meant as a path and is none."""
    path = Path(source)
    # A name on the Hub is `name` or `owner/name`; anything else was meant as a path.
    meant = source.startswith((".", "~", os.sep)) or source.count("/") > 1 or kind_suffix(path) in SUFFIXES
    if not path.exists() and (meant or path.suffix in COMPRESSIONS):
        raise FileNotFoundError(f"{source} does not exist (looked from {Path.cwd()}); check the path.")


def describe_source(source: str) -> dict[str, Any]:
    """What tells whether a source is still the same: for files their sizes and times, for a name the name."""
    path = Path(source)
    if path.is_file():
        stat = path.stat()
        return {"path": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listing = json.dumps([describe_source(str(file)) for file in files])
        digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
        return {"path": str(path.resolve()), "files": len(files), "sizes_and_times": digest}
    return {"name": source}


def dataset_elements(name: str, config: str | None, split: str, revision: str | None = None) -> Elements:
    """Iterate over the rows of a data set; they stay on the disk."""
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise SourceError(
            f"{name}: is no local file, and loading it as a data set (config {config}, split {split}) failed with "
            f"{type(error).__name__}: {error}. Expected a file, or a data set's name or folder; check the name, "
            f"--config, --split and the connection."
        ) from error
    for index, row in enumerate(rows):
        yield f"{name}, row {index}", row


def file_elements(path: Path) -> Elements:
    """Iterate over the elements of a file; the content tells JSON, JSON Lines and Parquet, the name tells CSV."""
    check_is_file(path)
    if is_parquet(path):
        return ((f"{path}, row {index}", row) for index, row in enumerate(read_parquet_rows(path)))
    if kind_suffix(path) in (".csv", ".tsv"):
        return _table_elements(path, "\t" if kind_suffix(path) == ".tsv" else ",")
    return _json_file_elements(path)


def kind_suffix(path: Path) -> str:
    """The suffix that tells the kind of a file: that before .gz or .xz."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _table_elements(path: Path, delimiter: str) -> Elements:
    reader = csv.DictReader((line for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            location = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                found = sum(value is not None for name, value in row.items() if name is not None)
                found += len(row.get(None, ()))
                raise SourceError(
                    f"{location}: found {found} fields, expected {len(reader.fieldnames)} as in the first line. Put "
                    f"fields that hold the separator, a quote or a line end in double quotes."
                )
            yield location, row
    except csv.Error as error:
        raise SourceError(
            f"{path}, line {reader.line_num}: found a broken row ({error}), expected fields separated by "
            f"{delimiter!r}. Repair the quotes."
        ) from error


def _json_file_elements(path: Path) -> Elements:
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
    if isinstance(value, list) or _listed(value) is not None or _transposed(value) is not None:
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
    elements = value if isinstance(value, list) else _listed(value)
    if elements is None:
        elements = _transposed(value) or [value]
    for index, element in enumerate(elements, start=1):
        yield f"{path}, element {index}", element


def _listed(value: Any) -> list[Any] | None:
    """What an original file lists: SQuAD's `data`, TriviaQA's `Data`, BioASQ's `questions`; None for anything else."""
    if not isinstance(value, dict) or not {"query", "question"}.isdisjoint(value):  # a row may have its own "data"
        return None
    return next((value[name] for name in ("data", "Data", "questions") if isinstance(value.get(name), list)), None)


def _transposed(value: Any) -> list[dict[str, Any]] | None:
    """The rows of MS MARCO's original file, which holds each column as an object by row; None for anything else."""
    if not isinstance(value, dict) or not isinstance(value.get("query"), dict):
        return None
    columns = {name: column for name, column in value.items() if isinstance(column, dict)}
    return [{name: column.get(key) for name, column in columns.items()} for key in columns["query"]]
