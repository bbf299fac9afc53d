"""From data sets as distributed to records: formats, choice of documents, determinism, reports and bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from scaledown.common.reading import RecordError
from scaledown.data.indexes.pool import BM25Retriever
from scaledown.data.preparation import PreparationArguments, main, prepare
from scaledown.data.readers import SourceError, read_source
from scaledown.data.records import read_records
from scaledown.data.report import format_report

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here")

ANIMALS = ["badger", "camel", "donkey", "eagle", "falcon", "gibbon", "heron", "ibis", "jaguar", "koala"]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_json(path: Path, value: object, indent: int | None = None) -> str:
    path.write_text(json.dumps(value, indent=indent), "utf-8")
    return str(path)


def write_lines(path: Path, values: list) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return str(path)


def squad_file(num_paragraphs: int = 10) -> dict:
    paragraphs = []
    for index, animal in enumerate(ANIMALS[:num_paragraphs]):
        qas = [
            {
                "id": f"{animal}-{place}",
                "question": f"Where does the {animal} {verb}?",
                "answers": [{"text": f"den {index}", "answer_start": 3}, {"text": f"den {index}", "answer_start": 3}],
            }
            for place, verb in enumerate(["sleep", "eat"])
        ]
        context = f"In den {index} the {animal} may sleep and eat, far from the {ANIMALS[index - 1]}."
        paragraphs.append({"context": context, "qas": qas})
    return {"version": "1.1", "data": [{"title": "Animals", "paragraphs": paragraphs}]}


def hotpotqa_row(identifier: str, first: int = 0) -> dict:
    animals = [f"{animal}{first}" for animal in ANIMALS]
    context = [[f"The {animal}", [f"It is {animal}.", f" It lives in den {animal}."]] for animal in animals]
    return {
        "_id": identifier,
        "question": f"Where does the {animals[0]}, friend of the {animals[5]}, meet the {animals[7]}?",
        "answer": "the den",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": [[f"The {animals[0]}", 0], [f"The {animals[5]}", 1], [f"The {animals[0]}", 1]],
        "context": context,
    }


def as_columns(row: dict) -> dict:
    """The form that `datasets` gives a HotpotQA question."""
    titles, sentences = zip(*row["context"], strict=True)
    facts, places = zip(*row["supporting_facts"], strict=True)
    return {
        **{key: row[key] for key in ("question", "answer")},
        "id": row["_id"],
        "context": {"title": list(titles), "sentences": list(sentences)},
        "supporting_facts": {"title": list(facts), "sent_id": list(places)},
    }


def run(source: str, output: Path, **settings) -> list[dict]:
    prepare(PreparationArguments(source=source, output=str(output), **settings))
    return list(read_records(output))


# Formats


def test_every_form_of_squad_reads_the_same(tmp_path):
    articles = squad_file()
    paragraphs = articles["data"][0]["paragraphs"]
    flat = [
        {"context": p["context"], "qas": [{**qa, "answer": qa["answers"][0]["text"]} for qa in p["qas"]]}
        for p in paragraphs
    ]
    for paragraph in flat:
        for qa in paragraph["qas"]:
            del qa["answers"]
    rows = [
        {
            "id": qa["id"],
            "title": "Animals",
            "context": paragraph["context"],
            "question": qa["question"],
            "answers": {"text": [a["text"] for a in qa["answers"]], "answer_start": [3, 3]},
        }
        for paragraph in paragraphs
        for qa in paragraph["qas"]
    ]
    sources = [
        # The names say nothing about the format, or the wrong thing: the content decides.
        write_json(tmp_path / "original", articles),
        write_json(tmp_path / "indented.jsonl", articles, indent=1),
        write_json(tmp_path / "flat.json", flat),
        write_lines(tmp_path / "rows.json", rows),
    ]
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "train.parquet")
    expected = read_source(sources[0])
    assert expected.format == "squad"
    assert len(expected.questions) == 20
    assert len(expected.passages) == 10
    assert expected.questions[3].answers == ["den 1"]
    assert expected.questions[3].positives == [paragraphs[1]["context"]]
    for source in [*sources[1:], str(tmp_path / "hub")]:
        assert read_source(source) == expected


def test_every_form_of_hotpotqa_reads_the_same(tmp_path):
    original = [hotpotqa_row("a"), hotpotqa_row("b", first=1)]
    rows = [as_columns(row) for row in original]
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "train.parquet")
    expected = read_source(write_json(tmp_path / "original.json", original))
    assert expected.format == "hotpotqa"
    assert len(expected.passages) == 20
    question = expected.questions[0]
    assert question.positives == [
        "The badger0: It is badger0. It lives in den badger0.",
        "The gibbon0: It is gibbon0. It lives in den gibbon0.",
    ]
    assert len(question.candidates) == 10
    assert read_source(write_lines(tmp_path / "rows.jsonl", rows)) == expected
    assert read_source(str(tmp_path / "hub")) == expected


def test_unusable_questions_are_dropped_with_their_reason(tmp_path):
    articles = squad_file(num_paragraphs=5)
    qas = articles["data"][0]["paragraphs"][0]["qas"]
    qas += [
        {"id": "v2", "question": "Unknown?", "answers": [], "is_impossible": True},
        {"id": "empty", "question": " ", "answers": [{"text": "a"}]},
        {"id": "test-split", "question": "Hidden?"},
        {**qas[0]},
    ]
    report = prepare(PreparationArguments(write_json(tmp_path / "in.json", articles), str(tmp_path / "out.jsonl")))
    assert report["dropped"] == {
        "duplicate_id": {"count": 1, "examples": ["badger-0"]},
        "empty_question": {"count": 1, "examples": ["empty"]},
        "no_answer": {"count": 1, "examples": ["test-split"]},
        "unanswerable": {"count": 1, "examples": ["v2"]},
    }
    assert report["counts"]["questions_read"] == 14
    assert report["counts"]["questions_dropped"] == 4
    assert report["counts"]["questions_written"] == 10
    assert "dropped: unanswerable" in format_report(report)


def test_a_question_repeated_in_its_paragraph_becomes_one_with_all_answers(tmp_path):
    qas = [{"question": "Who?", "answer": "Ada"}, {"question": "Who?", "answer": "Bea"}]
    source = read_source(write_json(tmp_path / "in.json", [{"context": "Ada and Bea.", "qas": qas}]))
    assert [question.answers for question in source.questions] == [["Ada", "Bea"]]
    assert source.dropped == {"merged_into_same_question": ["0-1"]}


def test_a_supporting_fact_outside_the_context_drops_the_question(tmp_path):
    row = hotpotqa_row("a")
    row["supporting_facts"].append(["Elsewhere", 0])
    source = read_source(write_json(tmp_path / "in.json", [row, hotpotqa_row("b")]))
    assert source.dropped == {"supporting_fact_not_in_context": ["a"]}


def test_without_supporting_facts_the_right_passages_are_unknown(tmp_path):
    row = {name: value for name, value in hotpotqa_row("a").items() if name not in ("answer", "supporting_facts")}
    source = write_json(tmp_path / "in.json", [row])
    prepare(PreparationArguments(source, str(tmp_path / "out.jsonl"), keep_unanswered=True))
    (record,) = read_records(tmp_path / "out.jsonl", require_answer=False)
    assert record["positives"] is None and len(record["documents"]) == 5


def test_fields_that_are_left_out_are_named_once(tmp_path, caplog):
    rows = [{"query": "q", "documents": ["d"], "answer": "a", "answer_kind": "date", "hops": 1}] * 2
    run(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    (message,) = [line for line in caplog.messages if "left out" in line]
    assert "the records' fields answer_kind, hops are left out" in message


# Choice of documents


def test_every_record_holds_its_gold_passage_once_among_distinct_documents(tmp_path):
    articles = squad_file()
    # A copy of the first passage that differs in white space only must not come in as a distractor.
    paragraphs = articles["data"][0]["paragraphs"]
    paragraphs.append({"context": paragraphs[0]["context"].replace(" ", "  "), "qas": []})
    records = run(write_json(tmp_path / "in.json", articles), tmp_path / "out.jsonl", num_documents=10)
    contexts = {qa["id"]: paragraph["context"] for paragraph in paragraphs for qa in paragraph["qas"]}
    for record in records:
        assert len({" ".join(document.split()) for document in record["documents"]}) == 10
        assert [record["documents"][index] for index in record["positives"]] == [contexts[record["id"]]]
        assert record["reranking_scores"] is None


def test_the_position_of_the_gold_passage_tells_nothing(tmp_path):
    records = run(write_json(tmp_path / "in.json", squad_file()), tmp_path / "out.jsonl", num_documents=3)
    assert {record["positives"][0] for record in records} == {0, 1, 2}


def test_distractors_are_the_nearest_passages_or_random_ones(tmp_path):
    source = write_json(tmp_path / "in.json", squad_file())
    nearest = run(source, tmp_path / "bm25.jsonl", num_documents=2)
    for record in nearest:
        # The next paragraph names the animal of this one, and no other does.
        animal = record["id"].split("-")[0]
        assert all(animal in document for document in record["documents"])
    randomly = run(source, tmp_path / "random.jsonl", num_documents=2, distractors="random")
    assert len({document for record in randomly for document in record["documents"]}) > 5
    assert any(record["id"].split("-")[0] not in document for record in randomly for document in record["documents"])


@pytest.mark.parametrize("distractors", ["bm25", "random"])
def test_own_passages_come_before_the_pool(tmp_path, distractors):
    source = write_json(tmp_path / "in.json", [hotpotqa_row("a"), hotpotqa_row("b", first=1)])
    own = set(read_source(source).questions[0].candidates)
    settings = {"distractors": distractors, "num_examples": None}
    few = run(source, tmp_path / "few.jsonl", num_documents=4, **settings)[0]
    assert set(few["documents"]) < own
    assert len(few["positives"]) == 2
    if distractors == "bm25":
        assert any("ibis0" in document for document in few["documents"])
    many = run(source, tmp_path / "many.jsonl", num_documents=13, **settings)[0]
    assert own < set(many["documents"])
    assert len(set(many["documents"])) == 13


def test_records_can_be_prepared_again(tmp_path):
    documents = [f"The {animal} sleeps." for animal in ANIMALS]
    rows = [
        {"query": "The koala?", "documents": documents[:6], "answer": "a", "positives": [4]},
        {"query": "The koala?", "documents": documents[5:], "answer": "a", "reranking_scores": [1.0] * 5},
        {"query": "The koala?", "documents": [], "answer": "a"},
    ]
    records = run(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", num_documents=3)
    assert [records[0]["documents"][index] for index in records[0]["positives"]] == [documents[4]]
    assert set(records[0]["documents"]) <= set(documents[:6])
    # Which documents are relevant is unknown here, which is not the same as none.
    assert records[1]["positives"] is None
    assert documents[9] in records[1]["documents"]
    # Scores of other documents in another order would be wrong.
    assert records[1]["reranking_scores"] is None
    assert len(records[2]["documents"]) == 3
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["counts"]["questions_without_positives"] == 2
    assert report["counts"]["reranking_scores_discarded"] == 1


def test_distractors_with_an_answer_are_counted_as_whole_words(tmp_path):
    contexts = ["Ada won the prize.", "Ada's prize, by the ADA.", "Adagio for a prize.", "A prize for Bea."]
    paragraphs = [{"context": context, "qas": []} for context in contexts]
    paragraphs[0]["qas"] = [{"question": "Who won the prize?", "answer": "Ada"}]
    paragraphs[3]["qas"] = [{"question": "Was it a prize?", "answer": "yes"}]
    paragraphs[1]["context"] += " Yes."
    source = write_json(tmp_path / "in.json", paragraphs)
    report = prepare(PreparationArguments(source, str(tmp_path / "out.jsonl"), num_documents=4))
    assert report["counts"]["distractors"] == 6
    assert report["counts"]["distractors_with_answer"] == 1


# Determinism


@pytest.mark.parametrize("distractors", ["bm25", "random"])
def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(tmp_path, distractors):
    source = write_json(tmp_path / "in.json", squad_file())
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        run(source, tmp_path / name, seed=seed, distractors=distractors)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert (tmp_path / "a.report.json").read_bytes() == (tmp_path / "b.report.json").read_bytes()


def test_a_sample_is_part_of_every_larger_one_in_the_order_of_the_source(tmp_path):
    source = write_json(tmp_path / "in.json", squad_file())
    lines = {}
    for size in (None, 12, 5):
        run(source, tmp_path / f"{size}", num_examples=size, num_documents=4, seed=3)
        lines[size] = (tmp_path / f"{size}").read_bytes().splitlines()
    assert [len(lines[size]) for size in (None, 12, 5)] == [20, 12, 5]
    # Whole lines: a question has the same documents in the same order whichever other questions are there.
    assert [line for line in lines[None] if line in lines[12]] == lines[12]
    assert [line for line in lines[12] if line in lines[5]] == lines[5]
    run(source, tmp_path / "other", num_examples=5, num_documents=4, seed=4)
    ids = [[record["id"] for record in read_records(tmp_path / name)] for name in ("5", "other")]
    assert ids[0] != ids[1]


@pytest.mark.slow
def test_the_output_does_not_depend_on_the_hash_seed_of_the_process(tmp_path):
    source = write_json(tmp_path / "in.json", squad_file())
    for hash_seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, ROOT / "prepare_data.py", "--source", source, "--output", f"{hash_seed}.jsonl"]
        # From another folder, as a user may start it.
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "questions_written" in done.stdout
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


# Retrieval


def test_retrieval_ranks_by_stemmed_words_and_breaks_ties_by_order():
    passages = ["Nothing here.", "The dogs were running.", "A cat.", "The dogs were running.", "Dogs and cats."]
    retriever = BM25Retriever(passages)
    assert retriever.retrieve("a dog that runs", 2) == [1, 3]
    assert retriever.retrieve("a dog that runs", 2, exclude=[1]) == [3, 4]
    assert retriever.retrieve("a dog that runs", 9) == [1, 3, 4, 0, 2]
    assert retriever.retrieve("of the", 2) == [0, 1]
    assert retriever.retrieve("unheard", 2, exclude=[0]) == [1, 2]
    assert retriever.rank("a dog that runs", [4, 3, 0, 1]) == [3, 1, 4, 0]
    # Of many equals at the edge of the ranking the first in the pool are taken.
    many = BM25Retriever(["A dog.", "Dog, dog!"] * 200)
    assert many.retrieve("dog", 203) == [*range(1, 400, 2), 0, 2, 4]


def test_retrieval_works_over_passages_without_words():
    assert BM25Retriever(["!", "?"]).retrieve("dog", 1) == [0]
    with pytest.raises(ValueError, match="0 passages"):
        BM25Retriever([])


# Bad input


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("", SourceError, "no questions"),
        ("[]", SourceError, "no questions"),
        ('{"data":\n [', SourceError, "neither JSON nor JSON Lines"),
        ('{"query": "q", "documents": ["d"], "answer": "a"}\n{"query"\n', RecordError, "line 2: found"),
        ('{"query": "q", "documents": ["d"], "answer": "a"}\n{"query": 5}\n', RecordError, "line 2: found"),
        ("[1]", SourceError, "element 1: found 1; expected an object"),
        ('{"text": "hello"}', SourceError, "found the keys text; expected those of SQuAD"),
        ('[{"paragraphs": [{"qas": []}]}]', SourceError, "element 1, paragraph 1: found the keys qas"),
        ('[{"context": "c", "qas": [{"question": "q", "answer": 5}]}]', SourceError, "question 1: found the answers"),
        ('[{"question": "q", "context": [["t", "s"]]}]', SourceError, "element 1: found the sentences s"),
        ('[{"question": "q", "context": [["t"]]}]', SourceError, "expected .title, sentences. pairs"),
        (
            r'[{"context": "Ada \ud83d", "qas": []}]',
            SourceError,
            r"element 1: found half of a surrogate pair, .ud83d, in a passage that begins with Ada .*Remove the char",
        ),
        (r'[{"question": "\udc00", "possible_answers": "a"}]', SourceError, "element 1: found half .* in a question"),
        ('[{"context": "c", "qas": [{"question": "q", "answer": "a"}]}]', ValueError, "pool has 1 passages and num_"),
    ],
)
def test_bad_sources_are_refused_with_place_and_remedy(tmp_path, content, error, message):
    (tmp_path / "in.json").write_text(content)
    with pytest.raises(error, match=message):
        prepare(PreparationArguments(str(tmp_path / "in.json"), str(tmp_path / "out.jsonl")))
    assert not list(tmp_path.glob("*out.jsonl*"))


def test_bad_settings_are_refused(tmp_path):
    source = write_json(tmp_path / "in.json", squad_file())
    output = str(tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="num_documents is 0"):
        PreparationArguments(source, output, num_documents=0)
    with pytest.raises(ValueError, match="num_examples is 0"):
        PreparationArguments(source, output, num_examples=0)
    with pytest.raises(ValueError, match="the source itself"):
        PreparationArguments(source, source, overwrite=True)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    with pytest.raises(ValueError, match="the corpus itself"):
        PreparationArguments(source, output, corpus=output, overwrite=True)
    with pytest.raises(ValueError, match=r"out.jsonl, inside the corpus .*; write to another folder"):
        PreparationArguments(source, str(corpus / "sub" / "out.jsonl"), corpus=str(corpus))
    with pytest.raises(SourceError, match="split is 'train'"):
        prepare(PreparationArguments(source, output, split="train"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        prepare(PreparationArguments(str(tmp_path / "missing.json"), output))
    row = write_json(tmp_path / "hotpotqa.json", [hotpotqa_row("a")])
    with pytest.raises(ValueError, match="more_positives_than_documents 1"):
        prepare(PreparationArguments(row, output, num_documents=1))


def test_the_command_line_reports_errors_without_a_traceback(tmp_path, capsys):
    source = write_json(tmp_path / "in.json", squad_file())
    arguments = ["--source", source, "--output", str(tmp_path / "out.jsonl"), "--num-documents", "3"]
    assert main(arguments) == 0
    assert "questions_written" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--seed", "5"]) == 0
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["settings"]["seed"] == 5
    with pytest.raises(SystemExit):
        main([*arguments, "--format", "unknown"])


# Real files


@needs_data
@pytest.mark.parametrize(
    ("name", "format", "num_read", "num_positives"),
    [
        ("squad/squad-v1.1-part1.json", "squad", 4961, 1),
        ("squad/squad-train-subset.json", "squad", 4000, 1),
        ("hotpotqa/train.jsonl", "hotpotqa", 300, 2),
    ],
)
def test_real_data_sets(tmp_path, name, format, num_read, num_positives):
    arguments = PreparationArguments(str(DATA / name), str(tmp_path / "out.jsonl"), num_examples=40, seed=7)
    report = prepare(arguments)
    assert report["format"] == format
    assert report["counts"]["questions_read"] == num_read
    records = list(read_records(arguments.output))
    assert len(records) == 40
    for record in records:
        assert len(set(record["documents"])) == 5
        assert len(record["positives"]) == num_positives
        if format == "squad":
            gold = record["documents"][record["positives"][0]]
            assert any(answer in gold for answer in record["answer"])
