"""The questions of an evaluation: records and other formats."""

import gzip
import json

import datasets
import pytest

from scaledown.evaluation.data import keep_documents, load_data


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def record(i, **fields):
    return {"id": str(i), "query": f"Question {i}?", "documents": [f"Document {i}."], "answer": f"Answer {i}", **fields}


def test_records_keep_their_own_fields(tmp_path):
    path = write(tmp_path / "a.jsonl", [record(0, hops=2, answer_kind="date", positives=[0]), record(1)])
    data = load_data(path)
    first, second = data.examples
    assert first.fields == {"hops": 2, "answer_kind": "date"} and second.fields == {}
    assert first.positives == [0] and second.positives is None
    assert (first.index, second.index) == (0, 1)
    assert data.description["name"] == "a.jsonl" and data.description["format"] == "records"
    assert data.description["num_questions"] == 2 and data.description["documents_per_question"] == 1


def test_records_are_read_from_every_form_that_preparation_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = [record(0, hops=2, answer=["A"], gold_answers=["G"]), record(1, hops=1, answer=["B"], gold_answers=["H"])]
    expected = load_data(write(tmp_path / "a.jsonl", records)).examples
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "hub" / "train.parquet")
    for name in ("a.json", "a.json.gz", "hub", "hub/train.parquet"):
        data = load_data(str(tmp_path / name))
        assert data.examples == expected and data.description["format"] == "records", name


def test_gold_answers_come_before_a_teachers(tmp_path):
    path = write(tmp_path / "a.jsonl", [record(0, gold_answers=["Gold", "Golden"]), record(1, answer=["One", "Two"])])
    assert [example.gold for example in load_data(path).examples] == [["Gold", "Golden"], ["One", "Two"]]


def test_questions_without_an_answer_are_counted(tmp_path):
    unanswered = {"query": "Why?", "documents": []}
    data = load_data(write(tmp_path / "a.jsonl", [record(0), unanswered]))
    assert len(data.examples) == 1 and data.description["dropped"] == {"no_answer": 1}
    with pytest.raises(ValueError, match=r"left out: 1 for no_answer.*; add `answer`"):
        load_data(write(tmp_path / "b.jsonl", [unanswered]))


def test_right_documents_that_do_not_fit_are_no_missing_answers(tmp_path):
    facts = [[f"Title {i}", 0] for i in range(3)]
    context = [[f"Title {i}", [f"Sentence {i}."]] for i in range(4)]
    question = {"_id": "a", "question": "Who?", "answer": "yes", "supporting_facts": facts, "context": context}
    (tmp_path / "a.json").write_text(json.dumps([question]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"1 for more_positives_than_documents.*raise --num_documents"):
        load_data(str(tmp_path / "a.json"), num_documents=2)


def test_a_smaller_sample_is_part_of_a_larger_one(tmp_path):
    path = write(tmp_path / "a.jsonl", [record(i) for i in range(30)])
    small, large = ([e.id for e in load_data(path, limit=limit).examples] for limit in (5, 12))
    assert len(small) == 5 and set(small) < set(large) and large == sorted(large, key=int)
    assert small != [e.id for e in load_data(path, limit=5, seed=1).examples]
    assert [e.index for e in load_data(path, limit=5).examples] == [0, 1, 2, 3, 4]
    assert load_data(path, limit=5).description["sha256"] != load_data(path, limit=6).description["sha256"]


def test_the_first_distinct_documents_and_the_right_ones_are_kept():
    full = {
        "documents": ["a", "b", "a  ", "c", "d", "gold"],
        "positives": [5],
        "reranking_scores": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
    }
    cut = keep_documents(full, 3)
    assert cut == {"documents": ["a", "b", "gold"], "positives": [2], "reranking_scores": [0.0, 1.0, 5.0]}
    assert keep_documents(full, 9)["documents"] == ["a", "b", "c", "d", "gold"]
    assert keep_documents({"documents": ["a", "b", "c"], "positives": [0, 2]}, 1)["documents"] == ["a", "c"]
    # Of copies, the right one stays.
    assert keep_documents({"documents": ["a", " a", "b"], "positives": [1]}, 1) == {
        "documents": [" a"],
        "positives": [0],
    }


def test_number_of_documents_of_records(tmp_path):
    path = write(tmp_path / "a.jsonl", [record(0, documents=["x", "y", "z"], positives=[2])])
    (example,) = load_data(path, num_documents=2).examples
    assert example.documents == ["x", "z"] and example.positives == [1]


def test_squad(tmp_path):
    paragraphs = [
        {
            "context": f"The river {name} is {length} km long.",
            "qas": [{"id": name, "question": f"How long is the {name}?", "answers": [{"text": f"{length} km"}] * 2}],
        }
        for name, length in (("Loire", 1006), ("Rhine", 1233), ("Po", 652))
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "Rivers", "paragraphs": paragraphs}]}), encoding="utf-8")
    data = load_data(str(path), num_documents=2)
    assert data.description["format"] == "squad" and len(data.examples) == 3
    for example in data.examples:
        (right,) = example.positives
        assert example.id in example.documents[right] and len(example.documents) == 2
        assert len(example.gold) == 1
    with pytest.raises(ValueError, match="3 passages, expected at least the 5"):
        load_data(str(path))


def test_hotpotqa(tmp_path):
    context = [[f"Title {k}", [f"Sentence {k}."]] for k in range(4)]
    element = {"_id": "h", "question": "Which?", "answer": "Yes", "context": context}
    element["supporting_facts"] = [["Title 1", 0], ["Title 3", 0]]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps([element]), encoding="utf-8")
    (example,) = load_data(str(path), num_documents=3).examples
    assert len(example.documents) == 3 and len(example.positives) == 2


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_data(str(tmp_path / "no.jsonl"))
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="no records"):
        load_data(str(tmp_path / "empty.jsonl"))
