"""Files are written whole or not at all, and a full disk is explained."""

import errno
import json
import os

import pytest

from scaledown.common.files import atomic_writer, explained_disk_errors, write_json


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error):
    (tmp_path / "out").write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(error, "full")))
    with (
        pytest.raises(OSError, match=r"disk of .* is full .* out was not written"),
        atomic_writer(tmp_path / "out", overwrite=True) as stream,
    ):
        stream.write(b"new")
    assert (tmp_path / "out").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(PermissionError, match=r"^no$"), explained_disk_errors(tmp_path, "Free space."):
        raise PermissionError("no")


def test_json_replaces_what_was_there(tmp_path):
    for value in ({"a": "ü"}, [1, None]):
        write_json(tmp_path / "out.json", value, ensure_ascii=False)
        assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == value
    assert os.listdir(tmp_path) == ["out.json"]
