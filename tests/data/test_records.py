"""The JSON Lines format: what is accepted, what is refused and with which message, and that files stay whole."""

import gzip
import json
import lzma
import os
from pathlib import Path

import datasets
import pytest

from scaledown.common.reading import RecordError
from scaledown.data.records import load_records, read_records, write_records

RECORD = {"query": "Who wrote it?", "documents": ["Ada wrote it.", "It rained."], "answer": "Ada"}


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def test_records_are_normalized(tmp_path):
    full = {
        **RECORD,
        "answer": ["Ada", "Ada Lovelace"],
        "gold_answers": "Lovelace",
        "reranking_scores": [3, -1.5],
        "positives": [0],
        "id": "x",
        "source": "ignored",
    }
    closed_book = {"query": "q", "documents": [], "answer": "a", "reranking_scores": None, "positives": []}
    path = write_lines(tmp_path / "data.jsonl", full, "", closed_book)
    first, second = read_records(path)
    assert first == {
        "id": "x",
        "query": "Who wrote it?",
        "documents": ["Ada wrote it.", "It rained."],
        "answer": ["Ada", "Ada Lovelace"],
        "gold_answers": ["Lovelace"],
        "reranking_scores": [3.0, -1.5],
        "positives": [0],
    }
    # The blank line counts: the id says where the record stands in the file.
    assert second == {
        "id": "2",
        "query": "q",
        "documents": [],
        "answer": ["a"],
        "gold_answers": None,
        "reranking_scores": None,
        "positives": [],
    }


def test_numbers_are_ids_and_answers(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", {**RECORD, "id": 7, "answer": [1984, "x"], "gold_answers": 2.5})
    (record,) = read_records(path)
    assert (record["id"], record["answer"], record["gold_answers"]) == ("7", ["1984", "x"], ["2.5"])


BROKEN = [
    ('{"query": "q", ', "JSON"),
    ("[1, 2]", "found a list, [1, 2]; expected an object"),
    ({"documents": ["d"], "answer": "a"}, 'expected a key "query"'),
    ({"query": "q", "answer": "a"}, 'expected a key "documents"'),
    ({"query": "q", "documents": ["d"]}, "require_answer=False"),
    ({**RECORD, "query": 5}, '"query": a number, 5'),
    ({**RECORD, "query": " \n"}, '"query": an empty string'),
    ({**RECORD, "documents": "d"}, '"documents": a string, d'),
    ({**RECORD, "documents": ["d", ""]}, r'"documents\[1\]": an empty string'),
    ({**RECORD, "documents": ["d", "\u200b\ufeff \u0301\x00"]}, r'"documents\[1\]": invisible characters only'),
    ({**RECORD, "answer": "\u200b"}, '"answer.*invisible characters only'),
    ({**RECORD, "documents": ["d", None]}, r'"documents\[1\]": null'),
    ({**RECORD, "answer": ""}, '"answer.*an empty string'),
    ({**RECORD, "answer": []}, "non-empty list"),
    ({**RECORD, "answer": {"text": "a"}}, '"answer": an object'),
    ({**RECORD, "reranking_scores": [1.0]}, '1 "reranking_scores"; expected 2'),
    ({**RECORD, "reranking_scores": [1.0, float("nan")]}, "expected a finite number"),
    ({**RECORD, "reranking_scores": [1.0, 10**400]}, "expected a finite number"),
    ({**RECORD, "reranking_scores": [1.0, True]}, "a boolean, True"),
    ({**RECORD, "positives": [2]}, r'"positives\[0\]": a number, 2'),
    ({**RECORD, "positives": [-1]}, "counted from 0"),
    ({**RECORD, "positives": [1, 1]}, "with repetitions"),
    ({**RECORD, "id": True}, '"id": a boolean, True'),
    ({**RECORD, "answer": True}, '"answer": a boolean, True'),
    ('{"query": "\\ud800", "documents": [], "answer": "a"}', "surrogate"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_a_broken_line_is_named_with_what_was_found(tmp_path, line, message):
    message = message.replace("[1, 2]", r"\[1, 2\]")
    path = write_lines(tmp_path / "data.jsonl", RECORD, line)
    with pytest.raises(RecordError, match=message) as caught:
        list(read_records(path))
    assert f"{path}, line 2: found" in str(caught.value)


def test_bytes_that_are_not_utf8_name_their_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(RECORD).encode() + b"\n" + '{"query": "café"}'.encode("latin-1"))
    with pytest.raises(RecordError, match=r"line 2: found the byte 0xe9 .* not UTF-8"):
        list(read_records(path))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_records_is_an_error(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(RecordError, match="no records"):
        list(read_records(path))


def test_a_missing_file_raises_before_the_first_record_is_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_records(tmp_path / "data.jsonl")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_records(tmp_path / "data.jsonl")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_records(tmp_path)


def test_an_answer_may_be_absent_on_request(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", {"query": "q", "documents": ["d"]})
    assert [record["answer"] for record in read_records(path, require_answer=False)] == [[]]


def test_line_separators_inside_a_text_do_not_cut_a_record(tmp_path):
    text = "one\u2028two\u0085three\x0bfour — ünï\r\n"
    path = tmp_path / "data.jsonl"
    write_records(path, [{**RECORD, "documents": [text]}])
    assert next(read_records(path))["documents"] == [text]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(RECORD).encode() + b"\r\n\r\n")
    assert [record["query"] for record in read_records(path)] == [RECORD["query"]]


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_compressed_files_are_written_and_read(tmp_path, suffix, opener):
    path = tmp_path / f"data.jsonl{suffix}"
    write_records(path, [RECORD] * 50)
    with opener(path) as stream:
        assert len(stream.read().splitlines()) == 50
    assert len(list(read_records(path))) == 50
    # Equal records give equal bytes, at another time too: gzip's header would hold it in these four bytes.
    write_records(tmp_path / f"again{suffix}", [RECORD] * 50)
    assert (tmp_path / f"again{suffix}").read_bytes() == path.read_bytes()
    assert suffix != ".gz" or path.read_bytes()[4:8] == bytes(4)
    # The content decides, so that a renamed file is read too; half a download is an error, not fewer records.
    path.rename(tmp_path / "renamed.jsonl")
    assert len(list(read_records(tmp_path / "renamed.jsonl"))) == 50
    data = (tmp_path / "renamed.jsonl").read_bytes()
    (tmp_path / "half.jsonl").write_bytes(data[: len(data) // 2])
    with pytest.raises(RecordError, match="damaged compressed data"):
        list(read_records(tmp_path / "half.jsonl"))


def test_written_records_come_back_and_absent_fields_stay_absent(tmp_path):
    path = tmp_path / "new" / "data.jsonl"
    assert write_records(path, [{**RECORD, "id": "x"}, {"query": "q", "documents": []}]) == 2
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert lines[0] == {"id": "x", **RECORD, "answer": ["Ada"]}
    assert lines[1] == {"id": "1", "query": "q", "documents": []}


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "data.jsonl"
    write_records(path, [RECORD])
    before = path.read_bytes()

    def interrupted():
        yield RECORD
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(path, interrupted(), overwrite=True)
    with pytest.raises(RecordError, match="record 2: found"):
        write_records(path, [RECORD, {"query": "q"}], overwrite=True)
    with pytest.raises(RecordError, match="no records"):
        write_records(path, [], overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["data.jsonl"]


def test_an_existing_file_is_replaced_only_on_request(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", "precious")
    with pytest.raises(FileExistsError, match="already exists"):
        write_records(path, [RECORD])
    assert path.read_text() == "precious\n"
    write_records(path, [RECORD], overwrite=True)
    assert next(read_records(path))["query"] == RECORD["query"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_a_written_file_has_the_usual_permissions(tmp_path):
    write_records(tmp_path / "data.jsonl", [RECORD])
    (tmp_path / "plain").touch()
    assert (tmp_path / "data.jsonl").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_loaded_records_equal_read_records_and_live_on_disk(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", {**RECORD, "positives": [0], "reranking_scores": [0.1, 2]}, RECORD)
    dataset = load_records(path)
    assert list(dataset) == list(read_records(path))
    assert dataset.cache_files


def test_a_changed_file_is_loaded_anew(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", RECORD)
    stat = path.stat()
    assert load_records(path)[0]["query"] == "Who wrote it?"
    # Of the same size: only the time of the change tells.
    write_lines(path, {**RECORD, "query": "Who broke it?"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load_records(path)[0]["query"] == "Who broke it?"


def test_loading_reports_the_broken_line_itself(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", RECORD, {"query": "q"})
    with pytest.raises(RecordError, match="line 2: found"):
        load_records(path)


def test_parquet_is_read_and_validated_like_json_lines(tmp_path):
    full = {**RECORD, "id": "x", "gold_answers": ["Ada"], "reranking_scores": [1.0, -2.5], "positives": [0]}
    rows = [full, {"query": "q", "documents": [], "answer": ["a"]}]
    lines, table = tmp_path / "data.jsonl", tmp_path / "data.parquet"
    write_records(lines, rows)
    assert write_records(table, rows) == 2
    assert list(read_records(table)) == list(read_records(lines)) == list(load_records(table))
    # Written by somebody else, without our schema, and under another name.
    datasets.Dataset.from_list([{**full, "answer": "Ada", "extra": 5}]).to_parquet(tmp_path / "other")
    assert next(read_records(tmp_path / "other")) == {**full, "answer": ["Ada"]}
    datasets.Dataset.from_list([full, {**full, "reranking_scores": [1.0]}]).to_parquet(tmp_path / "wrong.parquet")
    with pytest.raises(RecordError, match=r"wrong.parquet, row 1: found 1 \"reranking_scores\"; expected 2"):
        load_records(tmp_path / "wrong.parquet")
    data = table.read_bytes()
    table.write_bytes(data[: len(data) // 2])
    with pytest.raises(RecordError, match="damaged Parquet"):
        list(read_records(table))
    with pytest.raises(RecordError, match="no records to write"):
        write_records(tmp_path / "none.parquet", [])
    assert not (tmp_path / "none.parquet").exists()
