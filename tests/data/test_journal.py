"""Journals and work folders: what survives a kill, what is refused, and that nothing is written by halves."""

import errno
import json
import os

import pytest

from scaledown.common.files import explained_disk_errors
from scaledown.common.reading import RecordError
from scaledown.data.journal import Journal, WorkFolder, WorkFolderError, blocks, run_in_batches


def test_results_come_back_by_index_in_any_order(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append([(5, {"a": "ü\u2028"}), (0, [1.5])])
    journal.append([(5, "another"), (2, None)])
    for again in (journal, Journal(tmp_path / "j.jsonl")):
        assert [again[index] for index in (0, 2, 5)] == [[1.5], None, {"a": "ü\u2028"}]
        assert len(again) == 3
        assert list(again.missing(7)) == [1, 3, 4, 6]
        assert 6 not in again and 10**6 not in again
        with pytest.raises(KeyError):
            again[1]


def test_every_cut_of_the_last_line_loses_that_line_only(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.append([(0, "first"), (1, "second")])
    journal.close()
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal(path)
        assert len(journal) == 1
        journal.append([(1, "second")])
        journal.close()
        assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "j.jsonl").write_text('{"index": 0, "value": 1}\n{"ind\n{"index": 2, "value": 1}\n')
    with pytest.raises(RecordError, match=r"j.jsonl, line 2: found a damaged line"):
        Journal(tmp_path / "j.jsonl")


def test_a_batch_done_in_part_is_done_again_as_a_whole(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append([(0, 0), (1, 1), (2, 2)])
    asked = []
    run_in_batches(journal, blocks(6, 2), lambda batch: asked.append(list(batch)) or list(batch))
    assert asked == [[2, 3], [4, 5]]
    assert [journal[index] for index in range(6)] == list(range(6))
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 6


def test_settings_of_a_step_bind_from_its_first_result(tmp_path):
    def folder(teacher: str) -> WorkFolder:
        return WorkFolder(tmp_path / "w", {"seed": 1, "teacher": teacher}, steps={"answers": ["teacher"]})

    folder("big")
    late = folder("big")
    with folder("small").locked():
        folder("small").journal("answers").append([(0, "x")])
    with pytest.raises(WorkFolderError, match="teacher was small, now big"):
        folder("big")
    # It was opened before the answer was there.
    with pytest.raises(WorkFolderError, match="teacher was small, now big"), late.locked():
        pass


def test_work_of_other_settings_is_refused_with_what_changed(tmp_path):
    folder = tmp_path / "out.work"
    WorkFolder(folder, {"seed": 1, "source": {"size": 5}}).agree("questions", 3)
    assert WorkFolder(folder, {"seed": 1, "source": {"size": 5}}).resumed
    with pytest.raises(WorkFolderError, match=r"seed was 1, now 2; source was .*5.*, now .*6.*delete .*out.work"):
        WorkFolder(folder, {"seed": 2, "source": {"size": 6}})
    with pytest.raises(WorkFolderError, match="questions was 3; now it is 4"):
        WorkFolder(folder, {"seed": 1, "source": {"size": 5}}).agree("questions", 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(WorkFolderError, match="files of something else"):
        WorkFolder(tmp_path / "mine", {})


def test_one_process_at_a_time(tmp_path):
    first, second = WorkFolder(tmp_path / "w", {}), WorkFolder(tmp_path / "w", {})
    with first.locked(), pytest.raises(WorkFolderError, match="another process"), second.locked():
        pass
    with second.locked():
        pass


@pytest.mark.parametrize("moment", ["write", "fsync"])
def test_a_full_disk_keeps_what_the_journal_had(tmp_path, monkeypatch, moment):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.append([(0, "kept")])
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr(journal, "_writer", _FullAfter(journal._writer, 7))
        else:
            patch.setattr(os, "fsync", _raise_full)
        with (
            pytest.raises(OSError, match=r"disk of .* is full .* Free space\.") as caught,
            explained_disk_errors(path, "Free space."),
        ):
            journal.append([(1, "lost")])
        assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    journal.append([(1, "second try")])
    assert Journal(path)[1] == "second try"


class _FullAfter:
    """A file on a disk with room for so many bytes."""

    def __init__(self, stream, room):
        self._stream = stream
        self._room = room

    def write(self, data):
        if not self._room:
            _raise_full()
        written = self._stream.write(bytes(data[: self._room]))
        self._room -= written
        return written

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _raise_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_settings_are_readable(tmp_path):
    WorkFolder(tmp_path / "w", {"seed": 1})
    assert json.loads((tmp_path / "w" / "settings.json").read_text()) == {"seed": 1}
