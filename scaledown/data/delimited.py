"""Rows of CSV and TSV files, with the lists and objects their cells spell, as JSON, Python, pandas or numpy write them.

A cell has no type, so this is the one place where a text becomes a list. Readers of formats get from a table what they
would get from JSON, but for numbers and truth values, which stay text.
"""

import ast
import csv
import io
import itertools
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.reading import read_lines
from .questions import SourceError

# A field of a table may hold a whole article; csv's own limit is 128 KiB.
csv.field_size_limit(2**27)
# A quote that opens at the start of a TSV's field and is not closed within so many lines is a character of the text.
MAX_LINES_OF_FIELD = 1000
# These are texts whatever they look like.
TEXT_COLUMNS = ("id", "_id", "question", "query", "title")
# How a list or an object begins that was cut off, or whose quotes are broken: with a whole text and what follows one.
MEANT = re.compile(r"""[\[{]\s*(?:array\(|\[\s*)*(?P<quote>["'])(?:(?!(?P=quote)).)*(?P=quote)\s*[,:]""", re.DOTALL)
# What numpy prints around arrays and single values.
WRAPPERS = ("array", "str_", "bool_", "float64", "float32", "float16", "int64", "int32")
ELEMENTS = (tokenize.NUMBER, tokenize.STRING, tokenize.NAME)
QUOTED_OR_BRACKET = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[\[\]{}]""", re.DOTALL)
QUOTED = re.compile(r'"(?:[^"]|"")*"')


def read_table(path: Path, delimiter: str, mappings: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows of a CSV or TSV file whose first line names the columns.

    Args:
        path: The file, plain or compressed.
        delimiter: Stands between fields. In a TSV a quote is a character like any other unless a whole field is quoted.
        mappings: Whether cells that spell an object are decoded; otherwise they stay text, and lists alone are decoded.

    Returns:
        An iterator over (where the row comes from, the row by columns).

    Raises:
        SourceError: A row has more or fewer fields than the first line, its quotes are broken, or a cell cannot be
            decoded.
        RecordError: A line is not UTF-8.
    """
    lines = (line for _, line in read_lines(path))
    rows = _tsv_rows(lines) if delimiter == "\t" else _csv_rows(path, lines)
    names: list[str] | None = None
    for number, fields in rows:
        location = f"{path}, line {number}"
        if not fields or (len(fields) == 1 and not fields[0].strip() and names is not None and len(names) > 1):
            continue
        if names is None:
            names = fields
            _check_separator(names, delimiter, location)
            continue
        if len(fields) != len(names):
            raise SourceError(
                f"{location}: found {len(fields)} fields, expected {len(names)} as in the first line. Put fields that "
                f"hold the separator, a quote or a line end in double quotes."
            )
        yield (
            location,
            {
                name: decode_cell(text, f"{location}, column {name}", mappings) if name not in TEXT_COLUMNS else text
                for name, text in zip(names, fields, strict=True)
            },
        )


def decode_cell(text: str, location: str, mappings: bool = True) -> Any:
    """Decode the list or object that a text spells.

    Args:
        text: A cell.
        location: Where it comes from, for the message.
        mappings: Whether objects are decoded, too.

    Returns:
        The list or object; the text itself where it spells none, such as `[Applause]` or a matrix of numbers.

    Raises:
        SourceError: The text begins like a list or an object of texts and cannot be decoded.
    """
    stripped = text.strip()
    if stripped.startswith("(") and stripped.endswith(")"):
        value = _as_lists(_python_value(stripped, location))
        # Numbers in parentheses are rather an answer, such as a date or a place on a map.
        return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else text
    if not stripped.startswith(("[", "{") if mappings else "["):
        return text
    if stripped.endswith(("]", "}")):
        try:
            value = json.loads(stripped)
        except (ValueError, RecursionError):
            value = _as_lists(_python_value(stripped, location))
        if isinstance(value, (list, dict) if mappings else list):
            return text if _is_matrix(value) else value
    if MEANT.match(stripped) and _end_of_value(stripped) in (None, len(stripped)):
        raise SourceError(
            f"{location}: found {' '.join(stripped.split())[:60]}, which begins like a list or an object and cannot be "
            f"decoded; expected JSON, or what Python prints. Write lists and objects with json.dumps, and see that "
            f"they are not cut off."
        )
    return text


def _end_of_value(text: str) -> int | None:
    """Where the bracket that opens a text is closed; None where it never is."""
    depth = 0
    for match in QUOTED_OR_BRACKET.finditer(text):
        depth += (match.group() in ("[", "{")) - (match.group() in ("]", "}"))
        if depth == 0 and match.group() in ("]", "}"):
            return match.end()
    return None


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, strict=True)
    try:
        for fields in reader:
            yield reader.line_num, fields
    except csv.Error as error:
        raise SourceError(
            f"{path}, line {reader.line_num}: found a broken row ({error}), expected fields separated by ','. Repair "
            f"the quotes."
        ) from error


def _tsv_rows(lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Rows of a TSV, which may be quoted as a CSV is, or not at all: a field that only begins with a quote is text."""
    number, ahead = 0, []
    while True:
        line = ahead.pop(0) if ahead else next(lines, None)
        if line is None:
            return
        number += 1
        fields = _tsv_fields(line)
        if fields is None:  # a quote is open at the end of the line
            row = [line]
            while fields is None and len(row) < MAX_LINES_OF_FIELD:
                following = ahead[len(row) - 1] if len(row) <= len(ahead) else next(lines, None)
                if following is None:
                    break
                if len(row) > len(ahead):
                    ahead.append(following)
                row.append(following)
                fields = _tsv_fields("".join(row)) if '"' in following else None
            if fields is None:
                fields = line.rstrip("\r\n").split("\t")
            else:
                number += len(row) - 1
                del ahead[: len(row) - 1]
        yield number, fields


def _tsv_fields(text: str) -> list[str] | None:
    """The fields of a row; None where a quoted field goes on in the next line."""
    text = text.removesuffix("\n").removesuffix("\r")
    fields, start = [], 0
    while start <= len(text):
        quoted = QUOTED.match(text, start)
        end = text.find("\t", start)
        end = len(text) if end < 0 else end
        if quoted is not None and (quoted.end() == len(text) or text[quoted.end()] == "\t"):
            end = quoted.end()
            fields.append(text[start + 1 : end - 1].replace('""', '"'))
        elif "\n" in text[start:end] or (quoted is None and text.startswith('"', start)):
            return None
        else:
            fields.append(text[start:end])
        start = end + 1
    return fields


def _python_value(text: str, location: str) -> Any:
    """What a text spells in Python, or as numpy prints it; None where it is ordinary text."""
    try:
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
        return ast.literal_eval(_without_numpy(tokens, text, location))
    except SourceError:
        raise
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        return None


def _without_numpy(tokens: list[tokenize.TokenInfo], text: str, location: str) -> str:
    """The same in plain Python: arrays as lists, with commas between their elements, and None for nan."""
    if any(token.string == "..." for token in tokens) and any(token.type == tokenize.STRING for token in tokens):
        raise SourceError(
            f"{location}: found {' '.join(text.split())[:60]}, an array that numpy has abridged (...); expected all of "
            f"it. Write lists with json.dumps."
        )
    plain: list[str] = []
    depth_of_arrays: list[int] = []
    depth = 0
    skipping = False  # the type after an array's elements
    for before, token in itertools.pairwise([None, *tokens]):
        string = token.string
        if string in (".", "np", "numpy") and not skipping:
            continue
        if string in WRAPPERS and not skipping:
            depth_of_arrays.append(depth)
            string = ""
        elif string == "(" and depth_of_arrays and depth_of_arrays[-1] == depth and before.string in WRAPPERS:
            depth += 1
            if plain and _ends_element(plain[-1]):
                plain.append(",")
            continue
        elif string == ")" and depth_of_arrays and depth_of_arrays[-1] == depth - 1:
            depth -= 1
            depth_of_arrays.pop()
            skipping = False
            continue
        elif string in ("[", "{", "("):
            depth += 1
        elif string in ("]", "}", ")"):
            depth -= 1
        elif string == "," and depth_of_arrays and depth_of_arrays[-1] == depth - 1:
            skipping = True
        if skipping or not string:
            continue
        starts = token.type in ELEMENTS or string in ("[", "{", "-")
        if starts and plain and _ends_element(plain[-1]):
            plain.append(",")
        plain.append("None" if string == "nan" else string)
    return " ".join(plain)


def _ends_element(string: str) -> bool:
    return string in ("]", "}", ")") or string[0].isalnum() or string[-1] in "\"'."


def _as_lists(value: Any) -> Any:
    """A value with lists in the place of its tuples, which JSON does not have."""
    if isinstance(value, list | tuple):
        return [_as_lists(item) for item in value]
    return {name: _as_lists(item) for name, item in value.items()} if isinstance(value, dict) else value


def _check_separator(names: list[str], delimiter: str, location: str) -> None:
    """Raise SourceError for a first line that another separator would divide, as spreadsheets may write it."""
    other = next((mark for mark in ("\t", ";", "|", ",") if mark != delimiter and mark in names[0]), None)
    if len(names) == 1 and other is not None:
        spelt = {"\t": "a tab", ",": "a comma"}
        raise SourceError(
            f"{location}: found one column, {names[0].strip()[:60]!r}, which looks separated by "
            f"{spelt.get(other, repr(other))}; expected {spelt[delimiter]} between columns. Save the table with commas "
            f"as .csv, or with tabs as .tsv."
        )


def _is_matrix(value: Any) -> bool:
    """Whether a value is lists of numbers, which is more likely an answer than a list of texts."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(row, list) and all(isinstance(x, int | float) or _is_matrix([x]) for x in row) for row in value
        )
    )
