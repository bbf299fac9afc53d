"""The layouts of data sets and tools: where their passages are, and what happens where there are none."""

import json

import datasets
import pytest

from scaledown import ScaleDownError
from scaledown.data.preparation import PreparationArguments, prepare
from scaledown.data.readers import read_source
from scaledown.data.records import read_records
from scaledown.evaluation.data import load_data
from scaledown.training.run import main as train


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, *lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return str(path)


def test_results_of_a_retriever_keep_their_order(tmp_path):
    ctxs = [{"id": "1", "title": "Ada", "text": "First."}, {"id": "2", "title": "", "text": "Second."}]
    row = {"id": "x", "question": "Who?", "target": "Ada L.", "answers": ["Ada"], "ctxs": ctxs}
    for source in (write(tmp_path / "fid.jsonl", row), write(tmp_path / "fid.json", [row])):
        read = read_source(source)
        (question,) = read.questions
        assert (read.format, question.id, question.answers) == ("dpr", "x", ["Ada L.", "Ada"])
        assert question.record["documents"] == ["Ada: First.", "Second."]
        assert question.positives is None
        assert read.columns["documents"] == ["ctxs"]
    for ctx, flag in zip(ctxs, (False, True), strict=True):
        ctx["has_answer"] = flag
    assert read_source(write(tmp_path / "told.jsonl", row)).questions[0].record["positives"] == [1]


def test_training_files_of_dpr(tmp_path):
    row = {
        "question": "Who?",
        "answers": ["Ada"],
        "positive_ctxs": [{"title": "Ada", "text": "She did.", "score": 1000}],
        "negative_ctxs": [{"title": "Rain", "text": f"Falls {i}."} for i in range(3)],
        "hard_negative_ctxs": [{"title": "Bob", "text": "He did not."}],
    }
    output = tmp_path / "out.jsonl"
    report = prepare(PreparationArguments(write(tmp_path / "biencoder-nq-train.json", row), str(output)))
    (record,) = read_records(output)
    assert sorted(record["documents"]) == [
        "Ada: She did.",
        "Bob: He did not.",
        *(f"Rain: Falls {i}." for i in range(3)),
    ]
    assert [record["documents"][place] for place in record["positives"]] == ["Ada: She did."]
    assert report["columns"] == {"question": "question", "answer": "answers", "documents": "positive_ctxs"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("passage", "One."),
        ("document", "One."),
        ("Context", ["One."]),
        ("contexts", ["One."]),
        ("passages", [{"title": "", "text": "One."}]),
        ("documents", {"title": [""], "text": ["One."]}),
        ("documents", [{"contents": "One."}]),
        ("ctxs", [{"text": "One."}]),
    ],
)
def test_usual_names_of_columns_of_passages(tmp_path, name, value):
    source = read_source(write(tmp_path / "in.jsonl", {"question": "Who?", "answer": "Ada", name: value}))
    assert source.questions[0].record["documents"] == ["One."]
    assert source.columns["documents"] == [name]


def test_a_passage_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"line 1, documents: found {'url': 'u'}; expected a text, or an object"):
        read_source(write(tmp_path / "in.jsonl", {"question": "Who?", "answer": "Ada", "documents": [{"url": "u"}]}))


def test_mrqa_begins_with_a_header(tmp_path):
    header = {"header": {"dataset": "SQuAD", "split": "dev"}}
    row = {"id": "", "context": "Ada did.", "qas": [{"qid": "q1", "question": "Who?", "answers": ["Ada"]}]}
    (question,) = read_source(write(tmp_path / "SQuAD.jsonl", header, row)).questions
    assert (question.id, question.answers, question.positives) == ("q1", ["Ada"], ["Ada did."])


def test_musique(tmp_path):
    row = {
        "id": "2hop__1_2",
        "paragraphs": [
            {"idx": 0, "title": "Ada", "paragraph_text": "She did.", "is_supporting": True},
            {"idx": 1, "title": "Bob", "paragraph_text": "He did not.", "is_supporting": False},
        ],
        "question": "Who?",
        "answer": "Ada",
        "answer_aliases": ["A. L."],
        "answerable": True,
    }
    lines = (row, {**row, "id": "b", "answerable": False})
    source = read_source(write(tmp_path / "musique.jsonl", *lines))
    (question,) = source.questions
    assert (question.answers, question.positives) == (["Ada", "A. L."], ["Ada: She did."])
    assert question.candidates == ["Ada: She did.", "Bob: He did not."]
    assert source.dropped == {"unanswerable": ["b"]}


@pytest.mark.parametrize("spelt", [True, "True", "true"])
def test_boolq(tmp_path, spelt):
    row = {"question": "is it", "title": "It", "passage": "It is.", "answer": spelt}
    (question,) = read_source(write(tmp_path / "train.jsonl", row)).questions
    assert (question.answers, question.positives) == (["yes"], ["It: It is."])
    super_glue = {"question": "is it", "passage": "It is not.", "idx": 3, "label": False}
    (question,) = read_source(write(tmp_path / "val.jsonl", super_glue)).questions
    assert (question.id, question.answers) == ("3", ["no"])


def test_pubmedqa(tmp_path):
    original = {
        "21645374": {
            "QUESTION": "Do they?",
            "CONTEXTS": ["One.", "Two."],
            "LABELS": ["A", "B"],
            "LONG_ANSWER": "They do.",
            "final_decision": "yes",
        }
    }
    row = {
        "pubid": 21645374,
        "question": "Do they?",
        "context": {"contexts": ["One.", "Two."], "labels": ["A", "B"], "meshes": []},
        "long_answer": "They do.",
        "final_decision": "yes",
    }
    indented = tmp_path / "ori_pqal.json"
    indented.write_text(json.dumps(original, indent=1), "utf-8")
    sources = [str(indented), write(tmp_path / "one.json", original), write(tmp_path / "rows.jsonl", row)]
    for source in sources:
        (question,) = read_source(source).questions
        assert (question.id, question.answers) == ("21645374", ["yes"])
        assert question.positives == ["One.", "Two."]


@pytest.mark.parametrize("orient", ["columns", "index", "records", "split", "table", "list"])
def test_tables_as_pandas_writes_them_to_json(tmp_path, orient):
    import pandas

    rows = [{"question": f"Who {i}?", "passages": [f"One {i}.", "Two."], "answer": "Ada"} for i in range(3)]
    path = tmp_path / "in.json"
    table = pandas.DataFrame(rows)
    if orient == "list":
        path.write_text(json.dumps({name: list(table[name]) for name in table}), "utf-8")
    else:
        table.to_json(path, orient=orient)
    questions = read_source(str(path)).questions
    assert [(q.query, q.record["documents"], q.answers) for q in questions] == [
        (row["question"], row["passages"], ["Ada"]) for row in rows
    ]


def test_no_passage_anywhere_stops_every_command_unless_it_is_meant(tmp_path, capsys):
    table = tmp_path / "in.csv"
    table.write_text("question,answer,text\nWho?,Ada,She did.\n", "utf-8")
    output = tmp_path / "out.jsonl"
    with pytest.raises(ScaleDownError, match=r"not one passage.*--documents_column.*--corpus.*--closed_book"):
        prepare(PreparationArguments(str(table), str(output)))
    prepare(PreparationArguments(str(table), str(output), documents_column="text"))
    prepare(PreparationArguments(str(table), str(output), closed_book=True, overwrite=True))
    assert next(read_records(output))["documents"] == []
    with pytest.raises(ScaleDownError, match=r"not one document.*--closed_book true"):
        load_data(str(output))
    assert load_data(str(output), closed_book=True).examples
    assert train(["--generator_name_or_path", str(tmp_path), "--train_file", str(output)]) == 2
    assert "train_file" in (error := capsys.readouterr().err) and "closed_book=true" in error
    popqa = write(tmp_path / "popqa.jsonl", {"question": "q", "possible_answers": '["a"]'})
    prepare(PreparationArguments(popqa, str(output), closed_book=True, overwrite=True))
    assert next(read_records(output))["answer"] == ["a"]
