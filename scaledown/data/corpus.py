"""From a corpus of any size to passages on the disk, as an Arrow data set that is read without loading it.

<folder>/settings.json          the corpus and how it was cut
<folder>/passages-00000.arrow   passages, in the order of the corpus
<folder>/passages-00000.json    what they were made from; written last, so it says that the shard is whole
<folder>/passages.json          the totals; says that every shard is there
"""

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError
from tqdm.auto import tqdm

from ..common.files import atomic_writer, write_json
from ..common.opening import kind_suffix
from ..common.reading import read_lines
from .questions import SourceError, check_can_be_written
from .sources import SUFFIXES, check_is_no_missing_path, file_elements, is_saved_dataset, load_saved
from .splitting import PassageSplitter, merge_lines

logger = logging.getLogger(__name__)

# Texts cut at once, and their characters, since every token of them is held; and passages after which a new shard
# begins, the work a kill can cost.
TEXTS_PER_BATCH = 256
CHARACTERS_PER_BATCH = 500_000
PASSAGES_PER_SHARD = 16_384
SCHEMA = pa.schema({"text": pa.string()})
# A title and a text.
Texts = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class CorpusReader:
    """Reads the texts of a corpus, one at a time.

    Args:
        corpus: A file (text with a paragraph per line, JSON Lines, JSON, CSV, TSV, plain or compressed; Parquet,
            Arrow), a folder of such files, a folder of `Dataset.save_to_disk`, or a name on the Hub, which is streamed.
        config: Configuration of a data set on the Hub.
        split: Split of a data set on the Hub.
        revision: Branch, tag or commit of a data set on the Hub.
        text_column: Column of the text; dots lead into objects, as in `text.paragraph`. Lists of texts are joined.
        title_column: Column of the title; by default `title`, where there is one.
        merge_lines: Whether consecutive lines of a text file are one text, up to a blank line.
    """

    corpus: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    text_column: str = "text"
    title_column: str | None = None
    merge_lines: bool = False

    def __call__(self, skip: int = 0) -> Texts:
        """Read the texts.

        Args:
            skip: Texts to pass over.

        Returns:
            An iterator over (title, text); both may be empty.

        Raises:
            FileNotFoundError: A path that does not exist.
            SourceError: The corpus cannot be read, or has no such column.
            RecordError: A line is not UTF-8 or not JSON.
        """
        path = Path(self.corpus)
        if path.is_file():
            texts = self._file(path)
        elif is_saved_dataset(path):
            return self._rows(f"{path}", load_saved(path, self.split), skip)
        elif path.is_dir():
            files = corpus_files(path)
            texts = itertools.chain.from_iterable(map(self._file, files))
        else:
            check_is_no_missing_path(self.corpus)
            return self._hub(skip)
        return itertools.islice(texts, skip, None)

    def _file(self, path: Path) -> Texts:
        if kind_suffix(path) == ".txt":
            lines = (line for _, line in read_lines(path))
            return (("", line.strip()) for line in (merge_lines(lines) if self.merge_lines else lines))
        elements = file_elements(path, mappings="." in self.text_column)
        return (self._text(element, location) for location, element in elements)

    def _hub(self, skip: int) -> Texts:
        try:
            rows = datasets.load_dataset(
                self.corpus, self.config, split=self.split or "train", revision=self.revision, streaming=True
            )
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise SourceError(
                f"{self.corpus}: is no local file or folder, and loading it as a data set (config {self.config}, split "
                f"{self.split or 'train'}) failed with {type(error).__name__}: {error}. Check --corpus, "
                f"--corpus_config, --corpus_split and the connection."
            ) from error
        return self._rows(self.corpus, rows, skip)

    def _rows(self, name: str, rows: Any, skip: int) -> Texts:
        for index, row in enumerate(rows.skip(skip), start=skip):
            yield self._text(row, f"{name}, row {index}")

    def _text(self, element: Any, location: str) -> tuple[str, str]:
        if isinstance(element, str):
            check_can_be_written(element, "a text", location)
            return "", element.strip()
        text = _value(element, self.text_column, location, "--text_column")
        if isinstance(text, list):
            text = "\n".join(part for part in text if isinstance(part, str))
        if self.title_column is not None:
            title = _value(element, self.title_column, location, "--title_column")
        else:
            title = element.get("title")
        if text is not None and not isinstance(text, str):
            raise SourceError(f"{location}: found {str(text)[:60]} under {self.text_column!r}; expected a text.")
        title, text = " ".join(str(title or "").split()), (text or "").strip()
        check_can_be_written(title, "a title", location)
        check_can_be_written(text, "a text", location)
        return title, text


def corpus_files(folder: Path) -> list[Path]:
    """The files of a corpus folder, by name.

    Args:
        folder: The folder; subfolders count.

    Returns:
        Its files of known kinds.

    Raises:
        SourceError: There is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and kind_suffix(path) in SUFFIXES)
    if not files:
        raise SourceError(f"{folder}: found no file ending in {', '.join(SUFFIXES)}; expected at least one.")
    return files


def build_passages(
    folder: str | os.PathLike, read: Callable[[int], Texts], splitter: PassageSplitter
) -> datasets.Dataset:
    """Cut a corpus into passages, or go on where a former run was cut off, or just open what is there.

    Args:
        folder: Where the passages are kept; it belongs to one corpus and one way to cut it.
        read: Opens the corpus's texts, skipping the given number.
        splitter: Cuts them.

    Returns:
        A data set with the column `text`, mapped from the disk.

    Raises:
        SourceError: The corpus holds no text.
    """
    folder = Path(folder)
    summary = folder / "passages.json"
    if not summary.exists():
        shards = _finished_shards(folder)
        done = sum(shard["texts"] for shard in shards)
        if done:
            logger.info("%s holds the passages of %d texts already", folder, done)
        progress = tqdm(desc="Cutting passages", unit="text", initial=done, disable=None)
        texts = read(done)
        while (counts := _write_shard(folder, len(shards), texts, splitter, progress)) is not None:
            shards.append(counts)
        progress.close()
        totals = {"shards": len(shards), **{key: sum(s[key] for s in shards) for key in ("texts", "passages", "empty")}}
        if totals["passages"] == 0:
            raise SourceError(f"the corpus has {totals['texts']} texts and no word in them; check --corpus.")
        write_json(summary, totals)
    totals = json.loads(summary.read_text("utf-8"))
    return datasets.concatenate_datasets(
        [datasets.Dataset.from_file(str(folder / f"passages-{index:05d}.arrow")) for index in range(totals["shards"])]
    )


def _finished_shards(folder: Path) -> list[dict[str, int]]:
    shards = []
    while (path := folder / f"passages-{len(shards):05d}.json").exists():
        shards.append(json.loads(path.read_text("utf-8")))
    return shards


def _write_shard(
    folder: Path, number: int, texts: Texts, splitter: PassageSplitter, progress: tqdm
) -> dict[str, int] | None:
    """Write the next shard; None where no text is left."""
    batch = _next_batch(texts)
    if not batch:
        return None
    counts = {"texts": 0, "passages": 0, "empty": 0}
    with (
        atomic_writer(folder / f"passages-{number:05d}.arrow", overwrite=True) as stream,
        pa.ipc.new_stream(stream, SCHEMA) as writer,
    ):
        while batch:
            cut = splitter.split_many(batch)
            passages = list(itertools.chain.from_iterable(cut))
            writer.write_table(pa.table({"text": passages}, schema=SCHEMA))
            counts["texts"] += len(cut)
            counts["passages"] += len(passages)
            counts["empty"] += sum(not listed for listed in cut)
            progress.update(len(batch))
            if counts["passages"] >= PASSAGES_PER_SHARD:
                break
            batch = _next_batch(texts)
    write_json(folder / f"passages-{number:05d}.json", counts)
    return counts


def _next_batch(texts: Texts) -> list[tuple[str, str]]:
    batch: list[tuple[str, str]] = []
    size = 0
    while len(batch) < TEXTS_PER_BATCH and size < CHARACTERS_PER_BATCH and (text := next(texts, None)) is not None:
        batch.append(text)
        size += len(text[1])
    return batch


def _value(element: Any, column: str, location: str, option: str) -> Any:
    value = element
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            keys = ", ".join(map(str, value)) if isinstance(value, dict) else str(value)[:60]
            raise SourceError(
                f"{location}: found {keys or '(none)'}; expected the column {column!r}. Correct {option}."
            )
        value = value[name]
    return value
