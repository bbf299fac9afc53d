"""CSV and TSV files: what their cells spell, and their quotes."""

import bz2
import json
import zipfile

import datasets
import pytest

from scaledown.common.reading import RecordError
from scaledown.data.delimited import decode_cell, read_table
from scaledown.data.questions import SourceError
from scaledown.data.readers import read_source
from scaledown.data.records import read_records

SQUAD = [
    {
        "id": "s1",
        "title": "Novels",
        "context": "Walter Scott, Sir, wrote Ivanhoe.",
        "question": "Who wrote it?",
        "answers": {"text": ["Walter Scott", "Scott's"], "answer_start": [0, 7]},
    },
    {
        "id": "s2",
        "title": "Novels",
        "context": "Nobody wrote it.",
        "question": "Who?",
        "answers": {"text": [], "answer_start": []},
    },
]
HOTPOTQA = [
    {
        "id": "h1",
        "question": "Where?",
        "answer": "Tulsa",
        "supporting_facts": {"title": ["A", "B"], "sent_id": [0, 1]},
        "context": {"title": ["A", "B", "C"], "sentences": [["One.", " It's two."], ["Three."], ["Four."]]},
    }
]
TRIVIAQA = [
    {
        "question": "Who?",
        "question_id": "t1",
        "answer": {"value": "Ada", "aliases": ["Ada", 'Lady "L"']},
        "entity_pages": {"title": ["Ada"], "wiki_context": ["She wrote it."]},
        "search_results": {"title": [], "search_context": []},
    }
]
NQ = [{"id": "n1", "question": "who?", "title": "Ada", "paragraph": "She wrote it .", "answers": ["Ada", "A, L"]}]
MSMARCO = [
    {
        "query": "what",
        "query_id": 3,
        "answers": ["A bird"],
        "passages": {"passage_text": ["A heron's a bird.", "No."], "is_selected": [1, 0]},
    }
]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_csv(path, rows, way):
    table = datasets.Dataset.from_list(rows)
    if way == "datasets":
        table.to_csv(path)
    elif way == "pandas":
        import pandas

        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        datasets.Dataset.from_list(
            [{name: v if isinstance(v, str) else json.dumps(v) for name, v in row.items()} for row in rows]
        ).to_csv(path)
    return str(path)


@pytest.mark.parametrize(
    "rows", [SQUAD, HOTPOTQA, TRIVIAQA, NQ, MSMARCO], ids=["squad", "hotpot", "trivia", "nq", "ms"]
)
@pytest.mark.parametrize("way", ["datasets", "pandas", "json"])
def test_a_data_set_written_as_csv_reads_as_it_was(tmp_path, rows, way):
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    expected = read_source(str(lines))
    assert expected.questions
    assert read_source(write_csv(tmp_path / "in.csv", rows, way)) == expected


@pytest.mark.parametrize(("spelt", "kept"), [("False", True), ("0", True), ("", True), ("True", False), ("1", False)])
def test_a_truth_value_in_a_cell_is_one(tmp_path, spelt, kept):
    path = tmp_path / "in.csv"
    path.write_text(f"question,context,answers,is_impossible\nWho?,Ada did.,\"['Ada']\",{spelt}\n", "utf-8")
    assert bool(read_source(str(path)).questions) == kept
    path.write_text("question,context,answers,is_impossible\nWho?,Ada did.,Ada,perhaps\n", "utf-8")
    with pytest.raises(SourceError, match=r"line 2: found is_impossible perhaps"):
        read_source(str(path))


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("['a' \"b's\"\n 'c']", ["a", "b's", "c"]),
        ("[array(['a b'], dtype=object) array(['c'], dtype=object)]", [["a b"], ["c"]]),
        ("{'x': array([], dtype=int32), 'y': nan}", {"x": [], "y": None}),
        ("[0.5 -0.25]", [0.5, -0.25]),
        ("[np.str_('a'), np.float64(1.5)]", ["a", 1.5]),
        ("[{'t': 'x'} {'t': 'y'}]", [{"t": "x"}, {"t": "y"}]),
        ("('a', \"b's\")", ["a", "b's"]),
        ("('a',)", ["a"]),
        ("[('a', 'b')]", [["a", "b"]]),
        ("('a')", "('a')"),
        ("(1, 2)", "(1, 2)"),
        ("(unclear) 'a', 'b')", "(unclear) 'a', 'b')"),
        ("[[1, 2], [3, 4]]", "[[1, 2], [3, 4]]"),
        ('{"name": 1} is JSON.', '{"name": 1} is JSON.'),
        ("{1, 2}", "{1, 2}"),
        ("[Applause]", "[Applause]"),
        ("__import__('os')", "__import__('os')"),
        ("[__import__('os')]", "[__import__('os')]"),
    ],
)
def test_what_a_cell_spells(cell, value):
    assert decode_cell(cell, "here") == value


@pytest.mark.parametrize("cell", ['["a", "b', "{'text': ['a', 'b'}", '["a", "b" c]', "['a' 'b' ... 'z']"])
def test_what_cannot_be_decoded_is_named_with_row_and_column(tmp_path, cell):
    path = tmp_path / "in.csv"
    quoted = cell.replace('"', '""')
    path.write_text(f'question,answers\nWhen?,x\nWho?,"{quoted}"\n', "utf-8")
    with pytest.raises(SourceError, match=r"in.csv, line 3, column answers: found .* with json.dumps"):
        read_source(str(path))


def test_records_written_as_csv_keep_scores_positives_and_gold_answers(tmp_path):
    rows = [
        {"id": "a", "query": "q", "documents": ["d", "e"], "answer": ["x"], "reranking_scores": [1.5, -2.0]},
        {"id": "b", "query": "r", "documents": ["f"], "answer": ["y"], "positives": [0], "gold_answers": ["z"]},
    ]
    source = read_source(write_csv(tmp_path / "in.csv", rows, "pandas"))
    assert [q.record["reranking_scores"] for q in source.questions] == [[1.5, -2.0], None]
    assert [q.record["positives"] for q in source.questions] == [None, [0]]
    assert source.questions[1].record["gold_answers"] == ["z"]


def test_quotes_in_a_tsv_are_text_unless_they_enclose_a_field(tmp_path):
    path = tmp_path / "in.tsv"
    path.write_text(
        'question\tanswer\n"Ivanhoe" is whose?\tScott\n"a ""b"", c"\t5" wide\n"never closed\tx\n"two\nlines"\ty\n',
        "utf-8",
    )
    assert [tuple(row.values()) for _, row in read_table(path, "\t")] == [
        ('"Ivanhoe" is whose?', "Scott"),
        ('a "b", c', '5" wide'),
        ('"never closed', "x"),
        ("two\nlines", "y"),
    ]


def test_a_table_without_a_line_of_names_says_so(tmp_path):
    path = tmp_path / "in.tsv"
    path.write_text("who wrote ivanhoe\t['Scott']\nwhen\t['1819']\n", "utf-8")
    with pytest.raises(SourceError, match="first line of a table names its columns"):
        read_source(str(path))


@pytest.mark.parametrize("kind", ["bz2", "zip", "arrow", "saved", "saved_splits"])
def test_other_kinds_of_files(tmp_path, kind):
    text = "".join(json.dumps(row) + "\n" for row in SQUAD)
    (tmp_path / "in.jsonl").write_text(text, "utf-8")
    expected = read_source(str(tmp_path / "in.jsonl"))
    path = tmp_path / f"data.{kind}"
    table = datasets.Dataset.from_list(SQUAD)
    if kind == "bz2":
        path.write_bytes(bz2.compress(text.encode()))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inside/train.jsonl", text)
    elif kind == "arrow":
        table.save_to_disk(tmp_path / "folder")
        path = next((tmp_path / "folder").glob("*.arrow"))
    elif kind == "saved":
        table.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(path)
    assert read_source(str(path)) == expected


def test_a_zipped_table_and_training_from_bzip2(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("train.csv", "question,documents,answer\nWho?,\"['x', 'y']\",Ada\n")
    assert read_source(str(tmp_path / "train.zip")).questions[0].record["documents"] == ["x", "y"]
    (tmp_path / "r.jsonl.bz2").write_bytes(bz2.compress(b'{"query": "q", "documents": ["d"], "answer": "a"}\n'))
    assert next(read_records(tmp_path / "r.jsonl.bz2"))["query"] == "q"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["[Content_Types].xml", "xl/workbook.xml"], "Excel workbook.*CSV"),
        (["a.jsonl", "b.jsonl"], r"holds 2 files \(a.jsonl, b.jsonl\), expected one"),
    ],
)
def test_archives_that_are_not_read_say_so(tmp_path, names, message):
    path = tmp_path / "in.xlsx"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    with pytest.raises(ValueError, match=message):
        read_source(str(path))


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ";"), ("a.csv", "\t"), ("a.csv", "|"), ("a.tsv", ",")])
def test_another_separator_is_told(tmp_path, name, separator):
    path = tmp_path / name
    path.write_text("".join(separator.join(row) + "\n" for row in (["question", "answer"], ["q", "a"])), "utf-8")
    with pytest.raises(SourceError, match=r"line 1: found one column, .*looks separated by .*Save the table"):
        read_source(str(path))


def test_what_pandas_has_for_a_missing_value_is_none(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [{"question": "q", "answer": value, "context": ["d"], "id": float("nan")} for value in (float("nan"), "a")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    source = read_source(str(path))
    assert [(question.id, question.answers) for question in source.questions] == [("1", ["a"])]
    assert source.dropped == {"no_answer": ["0"]}


def test_damaged_files_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", "x" * 99)
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-30])
    for reader in (read_source, read_records):
        with pytest.raises(ValueError, match=r"a\.zip is a damaged zip archive"):
            list(reader(str(tmp_path / "a.zip")))
    (tmp_path / "a.bz2").write_bytes(bz2.compress(b'{"question": "q", "answer": "a"}\n' * 9)[:-9])
    with pytest.raises(RecordError, match="damaged compressed data"):
        read_source(str(tmp_path / "a.bz2"))
    (tmp_path / "a.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(RecordError, match="damaged Arrow"):
        read_source(str(tmp_path / "a.arrow"))
