"""From a corpus to passages: how texts are cut, which files are read, and what is refused."""

import gzip
import itertools
import json
import lzma
from pathlib import Path

import datasets
import pytest

from scaledown.common.reading import RecordError
from scaledown.data import corpus
from scaledown.data.corpus import CorpusReader, build_passages
from scaledown.data.questions import SourceError
from scaledown.data.splitting import PassageSplitter, merge_lines
from tiny import build_tokenizer

WORDS = [f"w{index}" for index in range(1000)]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("num_words", [1, 96, 97, 500, 1000])
@pytest.mark.parametrize("overlap", [0, 32])
def test_words_are_cut_into_passages_of_about_equal_length(num_words, overlap):
    passages = PassageSplitter(length=128, overlap=overlap)("", " ".join(WORDS[:num_words]))
    cut = [passage.split() for passage in passages]
    assert max(map(len, cut)) <= 96
    assert max(map(len, cut)) - min(map(len, cut)) <= 1
    repeated = overlap * 3 // 4
    for before, after in itertools.pairwise(cut):
        assert after[:repeated] == before[len(before) - repeated :]
    assert [word for index, words in enumerate(cut) for word in (words[repeated:] if index else words)] == (
        WORDS[:num_words]
    )


def test_a_text_that_cannot_be_seen_has_no_passage():
    assert PassageSplitter(length=128)("Title", "\u200b \ufeff") == []


@pytest.mark.parametrize("overlap", [0, 10])
def test_tokens_are_counted_by_the_tokenizer_and_words_stay_whole(overlap):
    tokenizer = build_tokenizer()
    text = "  The historical novels of Sir Walter Scott,\n\npublished in 1819 — Cévennes and 日本語 included.  " * 9
    passages = PassageSplitter(tokenizer, length=32, overlap=overlap)("", text)
    assert len(passages) > 5
    for passage in passages:
        assert passage == passage.strip()
        assert len(tokenizer(passage, add_special_tokens=False)["input_ids"]) <= 32
        assert set(passage.split()) <= set(text.split())
    if overlap == 0:
        assert " ".join(passages).split() == text.split()
    else:
        assert len(" ".join(passages).split()) > len(text.split())


def test_a_word_longer_than_a_passage_is_cut_and_nothing_is_lost():
    tokenizer = build_tokenizer()
    text = "x" * 300 + " end"
    passages = PassageSplitter(tokenizer, length=16)("", text)
    assert "".join(passages).replace(" ", "") == text.replace(" ", "")


def test_text_without_blanks_is_counted_by_its_characters_where_there_is_no_tokenizer():
    text = "漢字" * 500 + " " + "ไทย" * 100 + " " + "x" * 3000
    passages = PassageSplitter(length=128)("", text)
    assert "".join(passages).replace(" ", "") == text.replace(" ", "")
    assert all(len(passage.replace(" ", "")) <= 96 for passage in passages if "漢" in passage)
    assert max(map(len, passages)) <= 96 * 20
    # Ordinary words are whole, however long.
    words = " ".join(["Donaudampfschifffahrtsgesellschaft"] * 60)
    assert set(" ".join(PassageSplitter(length=16)("", words)).split()) == {"Donaudampfschifffahrtsgesellschaft"}


def test_the_title_stands_before_each_passage_and_counts():
    passages = PassageSplitter(length=16)(" A title ", " ".join(WORDS[:30]))
    assert all(passage.startswith("A title: w") for passage in passages)
    assert max(len(passage.split()) for passage in passages) <= 12
    crowded = PassageSplitter(length=8)("a very long title of many many words", "one two three")
    assert crowded[0].endswith("one two three")
    assert PassageSplitter()("title", " \n ") == []


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="passage_length is 4"):
        PassageSplitter(length=4)
    with pytest.raises(ValueError, match="passage_overlap is 20, expected 0 to 16"):
        PassageSplitter(length=32, overlap=20)


def test_merged_lines_end_at_a_blank_one_or_when_long():
    assert list(merge_lines(["a\n", "b\n", "\n", "\n", "c"])) == ["a\nb", "c"]
    assert list(merge_lines(["12345"] * 5, limit=10)) == ["12345\n12345", "12345\n12345", "12345"]


def texts_of(path: object, **settings) -> list[tuple[str, str]]:
    return list(CorpusReader(str(path), **settings)())


def test_every_kind_of_file_reads_the_same(tmp_path):
    rows = [{"title": "A", "text": "One."}, {"title": "", "text": "Two —\ntwo."}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "c.jsonl").write_text(lines)
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "c.csv").write_text('title,text\nA,One.\n,"Two —\ntwo."\n')
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "c.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    expected = [("A", "One."), ("", "Two —\ntwo.")]
    names = ["c.jsonl", "c.json", "c.jsonl.gz", "c.jsonl.xz", "c.csv", "c.parquet", "saved"]
    for name in names:
        assert texts_of(tmp_path / name) == expected, name
        assert list(CorpusReader(str(tmp_path / name))(skip=1)) == expected[1:], name


def test_text_files_folders_and_columns(tmp_path):
    (tmp_path / "b.txt").write_text("First line.\nSecond line.\n\nThird line.\n")
    assert [text for _, text in texts_of(tmp_path / "b.txt")] == ["First line.", "Second line.", "", "Third line."]
    merged = texts_of(tmp_path / "b.txt", merge_lines=True)
    assert [text for _, text in merged] == ["First line.\nSecond line.", "Third line."]
    (tmp_path / "sub").mkdir()
    row = {"wikipedia_title": "Ada", "text": {"paragraph": ["One.", "Two."]}}
    (tmp_path / "sub" / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / "b.txt.bak").write_text("An older line.\n")
    kilt = texts_of(tmp_path / "sub" / "a.jsonl", text_column="text.paragraph", title_column="wikipedia_title")
    assert kilt == [("Ada", "One.\nTwo.")]
    (tmp_path / "sub" / "a.jsonl").write_text('"Just a text."\n')
    assert [text for _, text in texts_of(tmp_path)][-1] == "Just a text."


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("c.txt", "fine\ncafé\n".encode("latin-1"), RecordError, "c.txt, line 2: found the byte 0xe9"),
        ("c.jsonl", b'{"text": "a"}\n{"text": \n', RecordError, "c.jsonl, line 2: found"),
        (
            "c.jsonl",
            b'{"txet": "a"}\n',
            SourceError,
            "line 1: found txet; expected the column 'text'. Correct --text_c",
        ),
        ("c.jsonl", rb'{"text": "a \ud83d"}', SourceError, "line 1: found half of a surrogate pair, .ud83d, in a text"),
        ("c.jsonl", b'{"text": 5}\n', SourceError, "line 1: found 5 under 'text'; expected a text"),
        ("c.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-20], RecordError, "damaged compressed data"),
        ("c.txt", b" \n\n", SourceError, "2 texts and no word in them"),
        ("c.txt", b"", SourceError, "0 texts"),
    ],
)
def test_bad_corpora_are_refused_with_place_and_remedy(tmp_path, name, content, error, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        build_passages(tmp_path / "out", CorpusReader(str(tmp_path / name)), PassageSplitter())
    assert not list(tmp_path.glob("out/*.tmp"))


def test_a_data_set_on_the_hub_is_streamed_and_read_on(monkeypatch):
    rows = [{"title": "T", "text": f"Text {index}."} for index in range(5)]
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read = CorpusReader("owner/name", config="en", split="full", revision="abc")
    assert list(read(skip=3)) == [("T", "Text 3."), ("T", "Text 4.")]
    assert asked == [(("owner/name", "en"), {"split": "full", "revision": "abc", "streaming": True})]
    monkeypatch.undo()
    with pytest.raises(SourceError, match=r"owner/name: is no local file or folder, .* Check --corpus, "):
        list(CorpusReader("owner/name")())


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        texts_of(tmp_path / "no.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="found no file ending in"):
        texts_of(tmp_path / "empty")


def test_passages_are_kept_in_shards_and_building_goes_on_after_the_last_whole_one(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "TEXTS_PER_BATCH", 2)
    monkeypatch.setattr(corpus, "PASSAGES_PER_SHARD", 5)
    texts = [("", f"text {index} " + "word " * (index * 20)) for index in range(11)]
    read = []

    def open_texts(skip: int, upto: int = len(texts)):
        read.append(skip)
        yield from texts[skip:upto]
        if upto < len(texts):
            raise KeyboardInterrupt

    whole = build_passages(tmp_path / "whole", open_texts, PassageSplitter())
    with pytest.raises(KeyboardInterrupt):
        build_passages(tmp_path / "cut", lambda skip: open_texts(skip, 7), PassageSplitter())
    read.clear()
    again = build_passages(tmp_path / "cut", open_texts, PassageSplitter())
    assert again["text"][:] == whole["text"][:]
    assert 0 < read[0] < 7
    assert len(list(tmp_path.glob("whole/*.arrow"))) > 2
    for path in sorted(tmp_path.glob("whole/passages*")):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    # Opening what is there reads no text.
    read.clear()
    assert build_passages(tmp_path / "cut", open_texts, PassageSplitter())["text"][:] == whole["text"][:]
    assert not read


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here")
def test_a_real_corpus(tmp_path, monkeypatch):
    with lzma.open(DATA / "text" / "factbook.txt.xz", "rt", encoding="utf-8") as lines:
        (tmp_path / "c.txt").write_text("".join(next(lines) for _ in range(2000)))
    passages = build_passages(tmp_path / "p", CorpusReader(str(tmp_path / "c.txt")), PassageSplitter())
    assert len(passages) > 2000
    assert max(len(text.split()) for text in passages["text"]) <= 96
