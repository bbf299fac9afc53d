"""What makes a long step resumable: results appended to a journal, beside the settings they were made with.

    <output>.work/settings.json        what the run was asked to do; another question gets no old answers
    <output>.work/answers.jsonl        one line per finished item, appended as the work goes on

A line counts once its line end is on the disk: what a kill cuts off is dropped at the next start, and done again.
"""

import array
import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from errors_scaledown import ScaleDownError

from ..common.files import write_json
from ..common.reading import RecordError
from ..common.text import shorten

# How `Journal.append` begins a line.
LINE = re.compile(rb'\{"index": (\d+), "value": ')


class WorkFolderError(ScaleDownError):
    """Unfinished work that does not belong to this run; the message names the difference and the remedy."""


class WorkFolder:
    """The folder where an unfinished run keeps what it has done.

    Args:
        path: The folder; created where it is missing.
        settings: What decides the result, as JSON values. Settings that only decide its speed do not belong here.
        remedy: What a user should do about a folder with other settings.
        steps: Names of settings by the journal they decide; they may change until it holds something.

    Raises:
        WorkFolderError: The folder holds the work of other settings, or something else altogether.
    """

    SETTINGS = "settings.json"
    LOCK = ".lock"

    def __init__(
        self,
        path: str | os.PathLike,
        settings: dict[str, Any],
        remedy: str = "",
        steps: Mapping[str, Sequence[str]] | None = None,
    ):
        self.path = Path(path)
        self._steps = steps or {}
        self._lock = FileLock(self.path / self.LOCK)
        self.settings = json.loads(json.dumps(settings))
        self._remedy = remedy or f"Give the same options and source to go on, or delete {self.path} to start anew."
        self.resumed = (self.path / self.SETTINGS).exists()
        if self.resumed:
            self._check()
            return
        if self.path.exists() and (not self.path.is_dir() or any(self._foreign())):
            raise WorkFolderError(
                f"{self.path}: found files of something else, expected the unfinished work of this run or no such "
                f"folder. Move it away, or choose another name."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_settings()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out; a kill frees the lock. From here on the folder is bound to these settings.

        Raises:
            WorkFolderError: Another process is at work in the folder, or was, with other settings.
        """
        try:
            with self._lock.acquire(timeout=0):
                if self._check():
                    self._write_settings()
                yield
        except Timeout as error:
            raise WorkFolderError(
                f"{self.path}: another process is at work here. Wait for it, or choose another name."
            ) from error

    def journal(self, name: str) -> "Journal":
        """Open the journal of one step."""
        return Journal(self.path / f"{name}.jsonl")

    def agree(self, name: str, value: Any) -> None:
        """Note something the work depends on; at a restart it must be the same.

        Args:
            name: What it is, in words.
            value: A JSON value.

        Raises:
            WorkFolderError: The folder was begun with another value.
        """
        path = self.path / f"{name}.json"
        if not path.exists():
            write_json(path, value)
            return
        before = json.loads(path.read_text("utf-8"))
        if before != value:
            raise WorkFolderError(
                f"{self.path} holds unfinished work in which {name} was {shorten(before)}; now it is "
                f"{shorten(value)}. {self._remedy}"
            )

    @property
    def has_results(self) -> bool:
        """Whether any journal holds something."""
        return any(path.stat().st_size for path in self.path.glob("*.jsonl"))

    def remove(self) -> None:
        """Delete the folder after the run has succeeded."""
        shutil.rmtree(self.path)

    def _foreign(self) -> Iterator[Path]:
        # A kill between creating the folder and writing the settings leaves at most the temporary file.
        names = (f".{self.SETTINGS}.", self.LOCK)
        return (path for path in self.path.iterdir() if not path.name.startswith(names))

    def _write_settings(self) -> None:
        write_json(self.path / self.SETTINGS, self.settings, ensure_ascii=False, indent=2)

    def _free(self) -> set[str]:
        """Settings that decide nothing of what has been done."""
        journals = {name: self.path / f"{name}.jsonl" for name in self._steps}
        return {
            setting
            for name, path in journals.items()
            if not path.exists() or path.stat().st_size == 0
            for setting in self._steps[name]
        }

    def _check(self) -> bool:
        """Whether the folder's settings are others, though none that decide what has been done."""
        path = self.path / self.SETTINGS
        try:
            before = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise WorkFolderError(f"{path}: found no JSON ({error}). Delete {self.path} to start anew.") from error
        changed = [name for name in {**before, **self.settings} if before.get(name) != self.settings.get(name)]
        names = [name for name in changed if name not in self._free()]
        if names:
            changes = "; ".join(
                f"{name} was {shorten(before.get(name))}, now {shorten(self.settings.get(name))}" for name in names
            )
            raise WorkFolderError(f"{self.path} holds the work of another run: {changes}. {self._remedy}")
        return bool(changed)


class Journal:
    """An append-only file of results by index. Memory: 8 bytes per index; the results stay on the disk.

    Args:
        path: The file; created where it is missing. A half-written last line is dropped.

    Raises:
        RecordError: A line other than the last is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._offsets = array.array("q")
        self._count = 0
        # Unbuffered: after a failed write no remainder may wait in a buffer for its chance to be written.
        self._writer = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._reader = open(self.path, "rb")  # noqa: SIM115
        self._end = self._scan()
        self._writer.truncate(self._end)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, index: int) -> bool:
        return index < len(self._offsets) and self._offsets[index] >= 0

    def __getitem__(self, index: int) -> Any:
        if index not in self:
            raise KeyError(index)
        self._reader.seek(self._offsets[index])
        return json.loads(self._reader.readline())["value"]

    def append(self, results: Iterable[tuple[int, Any]], sync: bool = True) -> None:
        """Write results; those of an index that is there already are skipped.

        Args:
            results: Pairs of an index and its JSON value.
            sync: Whether to wait for the disk. Without it, what was written survives the death of the process but
                perhaps not that of the machine.

        Raises:
            OSError: The disk is full; what was there before is whole.
        """
        new: list[tuple[int, int]] = []
        lines = []
        position = self._end
        seen: set[int] = set()
        for index, value in results:
            if index in self or index in seen:
                continue
            seen.add(index)
            line = json.dumps({"index": index, "value": value}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            new.append((index, position))
            lines.append(line)
            position += len(line)
        if not lines:
            return
        try:
            data = memoryview(b"".join(lines))
            while data:
                data = data[self._writer.write(data) :]
            if sync:
                self.sync()
        except OSError:
            with contextlib.suppress(OSError):
                self._writer.truncate(self._end)
            raise
        self._end = position
        for index, offset in new:
            self._note(index, offset)

    def sync(self) -> None:
        """Wait until the disk has everything that was appended."""
        os.fsync(self._writer.fileno())

    def missing(self, count: int) -> Iterator[int]:
        """The indices below `count` that have no result yet, in order."""
        return (index for index in range(count) if index not in self)

    def close(self) -> None:
        """Close the file."""
        self._reader.close()
        self._writer.close()

    def _note(self, index: int, offset: int) -> None:
        if index >= len(self._offsets):
            # In steps, since the array would be copied for every index otherwise.
            self._offsets.extend([-1] * max(index + 1 - len(self._offsets), len(self._offsets) // 8 + 1024))
        self._count += self._offsets[index] < 0
        self._offsets[index] = offset

    def _scan(self) -> int:
        end = 0
        for number, line in enumerate(self._reader, start=1):
            if not line.endswith(b"\n"):
                break
            # Not parsed, since there may be gigabytes of them.
            start = LINE.match(line)
            if start is None or not line.endswith(b"}\n"):
                raise RecordError(
                    f"{self.path}, line {number}: found a damaged line of a journal, expected one JSON object with "
                    f"index and value. Delete this line to have its result made again, or the folder to start anew."
                )
            self._note(int(start.group(1)), end)
            end += len(line)
        return end


def run_in_batches(journal: Journal, batches: Iterable[Sequence[int]], work: Any) -> None:
    """Do what the journal lacks, batch by batch.

    Batches must not depend on what is done already: a batch cut off by a kill is done again as a whole, so that its
    results are those of an uninterrupted run to the last bit.

    Args:
        journal: Where the results go.
        batches: Lists of indices.
        work: Takes such a list and returns the result of each index.
    """
    for batch in batches:
        if all(index in journal for index in batch):
            continue
        journal.append(zip(batch, work(batch), strict=True))


def blocks(count: int, size: int) -> Iterator[range]:
    """The indices below `count` in blocks of `size`."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))
