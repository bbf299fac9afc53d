"""Readers of files whose content is anybody's: lines, JSON Lines, Parquet and Arrow."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from errors_scaledown import ScaleDownError

from .opening import DAMAGED, open_binary
from .text import shorten

PARQUET_MAGIC = b"PAR1"
# The two forms of Arrow's files.
ARROW_MAGIC = b"ARROW1"
ARROW_STREAM_MAGIC = b"\xff\xff\xff\xff"
# Large enough for Parquet to compress well, small enough not to matter for memory.
PARQUET_ROWS = 1000
CONVERT = "have prepare_data.py make records of the file (--source)"


class RecordError(ScaleDownError):
    """A record or a file that breaks its format; the message names the file, the line, the finding and the remedy."""


def is_columnar(path: str | os.PathLike) -> bool:
    """Whether a file begins as Parquet or Arrow does."""
    with open(path, "rb") as stream:
        return stream.read(len(ARROW_MAGIC)).startswith((PARQUET_MAGIC, ARROW_MAGIC, ARROW_STREAM_MAGIC))


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """Read the lines of a text file.

    Args:
        path: A file in UTF-8, plain or compressed.

    Returns:
        An iterator over (line number from 1, the line with its end).

    Raises:
        RecordError: A line is not UTF-8, or the compressed file is damaged.
    """
    number = 0
    with open_binary(path) as stream:
        try:
            # Bytes are split at b"\n" alone: str.splitlines would also cut at U+2028 and its like inside a text.
            for number, line in enumerate(stream, start=1):
                yield number, decode_text(line, f"{path}, line {number}")
        except DAMAGED as error:
            raise RecordError(
                f"{path}, after line {number}: found damaged compressed data ({error}), expected a whole file; copy or "
                f"download the file again."
            ) from error


def read_json_lines(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """Read a JSON Lines file without regard to what its lines hold.

    Args:
        path: A JSON Lines file in UTF-8, plain or compressed.

    Returns:
        An iterator over (line number from 1, the line's value); blank lines are skipped.

    Raises:
        RecordError: A line is not UTF-8 or not JSON, or the compressed file is damaged.
    """
    for number, line in read_lines(path):
        text = line.rstrip()
        if text:
            yield number, _parse_json(text, f"{path}, line {number}")


def read_columnar_rows(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Read the rows of a Parquet or Arrow file, a few at a time.

    Args:
        path: A Parquet file, or an Arrow file or stream, as `Dataset.save_to_disk` writes it.

    Returns:
        An iterator over rows.

    Raises:
        RecordError: The file is damaged.
    """
    with open(path, "rb") as stream:
        start = stream.read(len(ARROW_MAGIC))
    kind = "Parquet" if start.startswith(PARQUET_MAGIC) else "Arrow"
    try:
        if kind == "Parquet":
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                    yield from batch.to_pylist()
            return
        with pa.memory_map(str(path)) as mapped:
            if start.startswith(ARROW_MAGIC):
                file = pa.ipc.open_file(mapped)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            else:
                batches = iter(pa.ipc.open_stream(mapped))
            for batch in batches:
                for offset in range(0, batch.num_rows, PARQUET_ROWS):
                    yield from batch.slice(offset, PARQUET_ROWS).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise RecordError(
            f"{path}: found damaged {kind} ({error}), expected a whole file; copy or download the file again."
        ) from error


def decode_text(data: bytes, location: str) -> str:
    """Decode UTF-8, with or without a byte order mark, or raise a RecordError that names `location`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise record_error(
            location,
            f"the byte 0x{data[error.start]:02x} at offset {error.start}, which is not UTF-8",
            "text in UTF-8",
            "Convert the file, for example with `iconv -t utf-8`.",
        ) from error


def _parse_json(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise record_error(
            location,
            f"{shorten(text, 60)} ({problem})",
            "one complete JSON object per line",
            f"Write each record on a line of its own, with json.dumps for example, or {CONVERT}.",
        ) from error


def record_error(location: str, found: str, expected: str, remedy: str) -> RecordError:
    """An error of the usual form.

    Args:
        location: File and line.
        found: What stands there.
        expected: What should.
        remedy: What the user can do.

    Returns:
        The error, to be raised.
    """
    return RecordError(f"{location}: found {found}; expected {expected}. {remedy}")
