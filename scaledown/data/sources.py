"""Open what a user names as a source: a file of any of the usual kinds, a folder, or a data set on the Hub."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from ..common.files import check_is_file
from ..common.opening import COMPRESSIONS, kind_suffix, open_binary
from ..common.reading import RecordError, decode_text, is_columnar, read_columnar_rows, read_json_lines
from .delimited import read_table
from .questions import SourceError

logger = logging.getLogger(__name__)

# Where an element comes from, for messages, and the element.
Elements = Iterator[tuple[str, Any]]

# What a row calls its question.
QUESTION_KEYS = ("question", "query", "Question", "QUESTION")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow")


def open_elements(source: str, config: str | None = None, split: str | None = None, revision: str | None = None):
    """Iterate over a source's elements: rows, lines, or what a JSON file lists.

    Args:
        source: A local file (JSON, JSON Lines, CSV or TSV, plain or compressed; Parquet; Arrow), a folder of
            `save_to_disk`, a folder that `datasets.load_dataset` opens, or a name on the Hub.
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
    if is_saved_dataset(path):
        return ((f"{source}, row {index}", row) for index, row in enumerate(load_saved(path, split)))
    return dataset_elements(source, config, split or "train", revision)


def is_saved_dataset(path: Path) -> bool:
    """Whether a path is a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists())


def load_saved(path: Path, split: str | None) -> datasets.Dataset:
    """Open a folder of `save_to_disk`.

    Args:
        path: The folder.
        split: Which data set of a dictionary; by default `train`, or the only one.

    Returns:
        The data set; its rows stay on the disk.

    Raises:
        SourceError: The folder cannot be read, or has no such split.
    """
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise SourceError(f"{path} cannot be read as a folder of save_to_disk ({error}); save it again.") from error
    if isinstance(found, datasets.Dataset):
        if split is not None:
            raise SourceError(f"split is {split!r}, but {path} is one data set and has none; leave the option out.")
        return found
    split = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if split not in found:
        raise SourceError(f"{path} has the splits {', '.join(found)}, not {split!r}; correct --split.")
    return found[split]


def check_is_no_missing_path(source: str) -> None:
    """Raise FileNotFoundError for a name that was meant as a path and is none."""
    path = Path(source)
    # A name on the Hub is `name` or `owner/name`; anything else was meant as a path.
    meant = source.startswith((".", "~", os.sep)) or source.count("/") > 1 or kind_suffix(path) in SUFFIXES
    if not path.exists() and (meant or path.suffix in COMPRESSIONS):
        raise FileNotFoundError(f"{source} does not exist (looked from {Path.cwd()}); check the path.")


def describe_source(source: str) -> dict[str, Any]:
    """A fingerprint of a source: sizes and times of files, or a data set's name."""
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


def file_elements(path: Path, mappings: bool = True) -> Elements:
    """Iterate over the elements of a file; JSON, JSON Lines, Parquet and Arrow are recognized by content, CSV by name.

    Args:
        path: The file.
        mappings: Whether cells of a table that spell an object are decoded.
    """
    check_is_file(path)
    if is_columnar(path):
        return ((f"{path}, row {index}", row) for index, row in enumerate(read_columnar_rows(path)))
    if kind_suffix(path) in (".csv", ".tsv"):
        return read_table(path, "\t" if kind_suffix(path) == ".tsv" else ",", mappings)
    return _json_file_elements(path)


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
    if isinstance(value, dict) and set(value) == {"header"}:  # as MRQA's files begin
        number, value = next(lines, (None, None))
        if number is None:
            return
    if _rows(value) is not None:
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
    elements = _rows(value)
    if elements is None:
        elements = [value]
    for index, element in enumerate(elements, start=1):
        yield f"{path}, element {index}", element


def _rows(value: Any) -> list[Any] | None:
    """The rows that one JSON value holds, in the layouts of data sets and of pandas; None for a row by itself."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return None
    asked = next((value[name] for name in QUESTION_KEYS if name in value), None)
    if isinstance(asked, dict):  # each column an object by row: MS MARCO's original file, and pandas
        columns = {name: column for name, column in value.items() if isinstance(column, dict)}
        return [{name: column.get(key) for name, column in columns.items()} for key in asked]
    if isinstance(asked, list):
        columns = {name: column for name, column in value.items() if isinstance(column, list)}
        if any(len(column) != len(asked) for column in columns.values()):
            return None
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if asked is not None:  # a row, which may have a "data" of its own
        return None
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):  # pandas' "split"
        return [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    # SQuAD's `data`, TriviaQA's `Data`, BioASQ's `questions`.
    listed = next((value[name] for name in ("data", "Data", "questions") if isinstance(value.get(name), list)), None)
    if listed is not None:
        return listed
    rows = list(value.values())
    if rows and all(isinstance(row, dict) and not set(QUESTION_KEYS).isdisjoint(row) for row in rows):
        # Rows by id: PubMedQA's original file, and pandas' "index".
        return [{"id": key, **row} for key, row in value.items()]
    return None
