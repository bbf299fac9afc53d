"""The steps of data preparation together and apart, through the command line: what a user relies on."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from chat_server import ChatServer, Reply, completion, question_of
from huggingface_hub import DatasetCard
from tiny_teachers import save_all

from scaledown.data.arguments import parse_arguments
from scaledown.data.choice import keep_best
from scaledown.data.journal import WorkFolderError
from scaledown.data.preparation import PreparationArguments, main, prepare
from scaledown.data.records import load_records, read_records
from scaledown.data.teachers.scores import RerankingTeacher

ROOT = Path(__file__).resolve().parents[2]
ANIMALS = ["badger", "camel", "donkey", "eagle", "falcon", "gibbon", "heron", "ibis", "jaguar", "koala"]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def questions(tmp_path):
    """Questions without passages, as PopQA has them."""
    rows = [
        {"id": index, "question": f"Where does the {animal} sleep?", "possible_answers": json.dumps([f"den {index}"])}
        for index, animal in enumerate(ANIMALS)
    ]
    return write_lines(tmp_path / "popqa.jsonl", rows)


@pytest.fixture
def corpus_file(tmp_path):
    rows = [
        {"title": animal.title(), "text": f"The {animal} sleeps in den {index}."}
        for index, animal in enumerate(ANIMALS)
    ]
    rows += [{"title": "Weather", "text": f"It rains on day {day}, " + "and rains " * day} for day in range(60)]
    return write_lines(tmp_path / "corpus.jsonl", rows)


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def run(**options) -> list[dict]:
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(arguments) == 0
    return list(read_records(options["output"], require_answer=False))


# Retrieval from a corpus


@pytest.mark.parametrize("retriever", ["bm25", "splade", "dense"])
def test_documents_come_from_the_corpus(tmp_path, questions, corpus_file, models, retriever, capsys):
    options = {"retriever": retriever, "top_k": 3, "passage_length": 32}
    if retriever != "bm25":
        options["retriever_name_or_path"] = models[retriever]
    records = run(source=questions, corpus=corpus_file, output=tmp_path / "o.jsonl", **options)
    assert len(records) == 10
    for record, animal in zip(records, ANIMALS, strict=True):
        assert len(set(record["documents"])) == 3
        assert record["positives"] is None
        assert retriever != "bm25" or record["documents"][0].startswith(f"{animal.title()}: The {animal} sleeps")
    assert not (tmp_path / "o.jsonl.work").exists()
    assert "top_k " in capsys.readouterr().out


def test_an_index_is_built_once_and_used_again(tmp_path, questions, corpus_file, models, capsys, monkeypatch):
    kept = tmp_path / "kept"
    settings = ["--corpus", corpus_file, "--corpus_dir", str(kept), "--passage_length", "32"]
    dense = ["--retriever", "dense", "--retriever_name_or_path", models["dense"]]
    assert main(settings) == 0
    assert "passages" in capsys.readouterr().out
    assert main([*settings, *dense]) == 0
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*") if path.is_file() and path.name != ".lock"}
    for retriever in ([], dense):
        output = ["--source", questions, "--output", str(tmp_path / f"{len(retriever)}.jsonl")]
        assert main([*settings, *retriever, *output]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    # Another way to cut the corpus is another folder's.
    assert main([*settings[:-1], "64", *output[:3], str(tmp_path / "x.jsonl")]) == 2
    assert "passage_length was 32, now 64. Name another --corpus_dir" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists() and not (tmp_path / "x.jsonl.work").exists()


@pytest.mark.parametrize("order", ["auto", "best_first"])
def test_known_gold_passages_stay_and_auto_hides_them(tmp_path, corpus_file, order):
    rows = [
        {
            "id": str(index),
            "question": f"Where does the {animal} sleep?",
            "paragraph": text,
            "answers": [f"den {index}"],
        }
        for index, animal in enumerate(ANIMALS)
        # Half of the gold passages are in the corpus, the others are not to be found there.
        for text in [f"{animal.title()}: The {animal} sleeps in den {index}." if index % 2 else f"Gold, den {index}."]
    ]
    source = write_lines(tmp_path / "nq.jsonl", rows)
    records = run(source=source, corpus=corpus_file, output=tmp_path / "o.jsonl", top_k=3, document_order=order)
    for row, record in zip(rows, records, strict=True):
        assert len(set(record["documents"])) == 3
        assert [record["documents"][place] for place in record["positives"]] == [row["paragraph"]]
    places = [record["positives"][0] for record in records]
    assert set(places) == {0, 1, 2} if order == "auto" else places == [2, 0] * 5
    report = json.loads((tmp_path / "o.jsonl.report.json").read_text())
    assert report["counts"]["positives_retrieved"] == 5


def test_copies_in_the_corpus_do_not_take_the_place_of_documents(tmp_path, questions):
    rows = [{"text": "The badger sleeps in its den."}] * 50 + [{"text": f"Den {place}."} for place in range(5)]
    corpus = write_lines(tmp_path / "copies.jsonl", rows)
    first = run(source=questions, corpus=corpus, output=tmp_path / "o.jsonl", top_k=4, num_examples=10)[0]
    assert first["documents"][0] == "The badger sleeps in its den." and len(set(first["documents"])) == 4


def test_questions_that_share_no_word_with_the_corpus_are_counted(tmp_path, questions):
    corpus = write_lines(tmp_path / "one.jsonl", [{"text": "A badger."}, {"text": "Rain."}])
    run(source=questions, corpus=corpus, output=tmp_path / "o.jsonl", top_k=2)
    report = json.loads((tmp_path / "o.jsonl.report.json").read_text())
    assert report["counts"]["questions_sharing_no_word_with_corpus"] == 9


# Teachers


def test_all_steps_at_once_and_one_by_one_give_the_same_records(tmp_path, questions, corpus_file, models):
    corpus = {"corpus": corpus_file, "top_k": 4}
    reranker = {"reranker": models["reranker"], "keep_best": 2}
    teacher = {"teacher": models["teacher"], "teacher_max_tokens": 4}
    at_once = run(source=questions, output=tmp_path / "all.jsonl", **corpus, **reranker, **teacher)
    run(source=questions, output=tmp_path / "1.parquet", **corpus)
    run(source=tmp_path / "1.parquet", output=tmp_path / "2.jsonl.gz", **reranker)
    one_by_one = run(source=tmp_path / "2.jsonl.gz", output=tmp_path / "3.jsonl", **teacher)
    assert one_by_one == at_once
    expected = RerankingTeacher(models["reranker"])
    for index, record in enumerate(at_once):
        assert record["gold_answers"] == [f"den {index}"]
        assert len(record["answer"]) == 1 and record["answer"] != record["gold_answers"]
        assert record["reranking_scores"] == pytest.approx(expected.score([record])[0], abs=1e-5)
    # The next run knows what the gold answers are, though a teacher has written over them.
    again = run(source=tmp_path / "3.jsonl", output=tmp_path / "4.jsonl", **teacher)
    assert [record["gold_answers"] for record in again] == [record["gold_answers"] for record in at_once]


def test_an_endpoint_answers_questions_without_gold_answers(tmp_path, capsys):
    rows = [{"query": f"Q{index}?", "documents": ["<|end|> One.", "Two."], "id": str(index)} for index in range(5)]
    source = write_lines(tmp_path / "in.jsonl", rows)

    def behave(_, body):
        question = question_of(body)
        return Reply(body=completion("" if question == "Q3?" else f"About {question}", finish="length"))

    with ChatServer(behave).running() as server:
        teacher = {"teacher": "tiny", "teacher_url": server.url, "teacher_backoff": 0.01}
        records = run(source=source, output=tmp_path / "o.jsonl", **teacher, teacher_price_input=1)
    assert [record["answer"] for record in records] == [[f"About Q{index}?"] for index in (0, 1, 2, 4)]
    assert all(record["gold_answers"] is None for record in records)
    assert server.requests[0]["messages"][1]["content"].startswith("Background:\n<| end|> One.\nTwo.\n\nQuestion: Q")
    report = json.loads((tmp_path / "o.jsonl.report.json").read_text())
    assert report["dropped"] == {"empty_teacher_answer": {"count": 1, "examples": ["3"]}}
    assert report["counts"]["teacher_answers_cut"] == 4
    assert report["counts"]["teacher_completion_tokens"] == 12
    # Without a teacher they are kept only where a later run is to answer them.
    assert main(["--source", source, "--output", str(tmp_path / "x.jsonl")]) == 2
    assert "no_answer 5" in capsys.readouterr().err
    assert len(run(source=source, output=tmp_path / "x.jsonl", keep_unanswered=True)) == 5


def test_a_teacher_that_answers_nothing_leaves_no_file(tmp_path, capsys, questions):
    source = write_lines(tmp_path / "in.jsonl", [{"query": "Q?", "documents": ["D."], "answer": "A"}] * 1)
    with ChatServer(lambda *_: Reply(body=completion(""))).running() as server:
        command = ["--source", source, "--output", str(tmp_path / "o.jsonl"), "--teacher", "t", "--teacher_url"]
        assert main([*command, server.url, "--teacher_backoff", "0.01"]) == 2
    assert "refused 1 requests and answered none; the last with: the answer is empty" in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()


def test_keep_best_keeps_gold_documents_and_the_order():
    record = {"documents": list("abcde"), "reranking_scores": [0.0, 3.0, 1.0, 2.0, 9.0], "positives": [2]}
    assert keep_best(record, 3) == {
        "documents": ["b", "c", "e"],
        "reranking_scores": [3.0, 1.0, 9.0],
        "positives": [1],
    }
    assert keep_best({**record, "positives": [0, 2]}, 1)["documents"] == ["a", "c"]
    del record["positives"]
    assert keep_best(record, 1) == {"documents": ["e"], "reranking_scores": [9.0]}


def test_a_dry_run_counts_the_documents_that_will_remain_and_leaves_the_choice_of_teachers(
    tmp_path, questions, corpus_file, models
):
    def dry_run(name: str, teacher: str, **settings) -> dict:
        output = str(tmp_path / name)
        return prepare(
            PreparationArguments(questions, output, corpus=corpus_file, teacher=teacher, dry_run=True, **settings)
        )

    few = dry_run("few.jsonl", "big", top_k=2)
    cut = dry_run("cut.jsonl", "big", top_k=6, reranker="any", keep_best=2)
    assert few["estimate"]["answers to write"] == cut["estimate"]["answers to write"]
    assert cut["estimate"]["pairs to score"] == 60
    # What has not been written is not counted.
    assert not {"questions_written", "documents", "mean_document_words"} & cut["counts"].keys()
    dry_run("cut.jsonl", "small", top_k=6, reranker="another", teacher_max_tokens=5)
    with pytest.raises(WorkFolderError, match="top_k was 6, now 5"):
        dry_run("cut.jsonl", "small", top_k=5)
    teachers = {"teacher": models["teacher"], "teacher_max_tokens": 4}
    records = run(source=questions, corpus=corpus_file, output=tmp_path / "few.jsonl", top_k=2, **teachers)
    assert len(records) == 10


# Files


def test_records_of_ones_own_stay_as_they_are_unless_others_are_asked_for(tmp_path):
    rows = [
        {"id": "a", "query": "Q?", "documents": ["D.", "E."], "answer": ["x"], "reranking_scores": [1.0, 2.0]},
        {"id": "b", "query": "R?", "documents": [], "answer": ["y"], "gold_answers": ["z"], "positives": []},
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    run(source=source, output=tmp_path / "same.jsonl")
    assert [json.loads(line) for line in (tmp_path / "same.jsonl").read_text().splitlines()] == rows
    chosen = run(source=source, output=tmp_path / "other.jsonl", num_documents=1)
    assert all(record["reranking_scores"] is None and len(record["documents"]) == 1 for record in chosen)


def test_parquet_holds_what_json_lines_hold(tmp_path, questions, corpus_file, models):
    options = {"source": questions, "corpus": corpus_file, "reranker": models["reranker"]}
    as_lines = run(output=tmp_path / "o.jsonl", **options)
    assert run(output=tmp_path / "o.parquet", **options) == as_lines
    assert list(load_records(tmp_path / "o.parquet")) == as_lines
    assert pq.read_table(tmp_path / "o.parquet").column_names == [*as_lines[0]]
    first = (tmp_path / "o.parquet").read_bytes()
    run(output=tmp_path / "o.parquet", overwrite=True, **options)
    assert (tmp_path / "o.parquet").read_bytes() == first


def test_the_card_says_what_the_file_holds(tmp_path, questions, corpus_file, models):
    run(source=questions, corpus=corpus_file, output=tmp_path / "o.jsonl", reranker=models["reranker"])
    card = DatasetCard.load(tmp_path / "o.jsonl.card.md")
    assert card.data.task_categories == ["question-answering"]
    assert card.data.size_categories == ["n<1K"]
    assert "reranking" in card.data.tags and "distillation" not in card.data.tags
    assert card.data.configs == [{"config_name": "default", "data_files": "o.jsonl"}]
    for part in (
        "| questions written | 10 |",
        "| `retriever` | `bm25` |",
        "| sentence-transformers | ",
        "| `seed` | `0` |",
    ):
        assert part in card.text
    assert "Nothing." in card.text


def test_a_recipe_comes_first_and_options_override_it(tmp_path, questions, corpus_file, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"source": questions, "corpus": corpus_file, "top_k": 2, "seed": 5}))
    assert main([str(recipe), "--output", str(tmp_path / "o.jsonl"), "--top_k", "3"]) == 0
    assert all(len(record["documents"]) == 3 for record in read_records(tmp_path / "o.jsonl"))
    recipe.write_text("sauce: x\n")
    assert main([str(recipe), "--output", str(tmp_path / "p.jsonl")]) == 2
    assert "did you mean source?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "o"}, "source is missing"),
        ({"source": "s"}, "output is missing"),
        ({"corpus": "c"}, "Only --corpus with --corpus_dir"),
        ({"top_k": 3}, "top_k is given without a corpus"),
        ({"corpus_dir": "d"}, "corpus_dir is given without a corpus"),
        ({"corpus": "c", "num_documents": 3}, "use --top_k with a corpus"),
        ({"keep_best": 3}, "keep_best is given without a reranker"),
        ({"teacher_url": "u"}, "teacher_url is given without the model's name"),
        ({"teacher": "t", "teacher_extra_body": "[1]"}, "expected a JSON object"),
        ({"teacher": "t", "teacher_extra_body": "{"}, "teacher_extra_body is no JSON"),
        ({"retriever": "google"}, "retriever is 'google', expected one of bm25, splade, dense"),
        ({"teacher_concurrency": 0}, "teacher_concurrency is 0, expected at least 1"),
        ({"teacher_timeout": 0}, "expected a positive number of seconds"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_the_work(options, message):
    if {"output", "source", "corpus"}.isdisjoint(options) or {"num_documents"} & options.keys():
        options = {"source": "s", "output": "o", **options}
    with pytest.raises(ValueError, match=message):
        PreparationArguments(**options)


def test_an_output_that_exists_is_refused_before_the_work(tmp_path, questions, corpus_file):
    arguments = PreparationArguments(questions, str(tmp_path / "o.jsonl"), corpus=corpus_file)
    (tmp_path / "o.jsonl.card.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"card.md already exists"):
        prepare(arguments)
    assert not (tmp_path / "o.jsonl.work").exists()


def test_commands_in_the_guide_are_understood(monkeypatch):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "prepare_data" in line]
    assert len(commands) >= 6
    for command in commands:
        parse_arguments(shlex.split(command)[2:])


# Memory

GROWTH = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
from scaledown.data import corpus
from scaledown.data.indexes import bm25, encoded
from scaledown.data.preparation import main
corpus.PASSAGES_PER_SHARD = bm25.TOKENIZED_PER_SHARD = encoded.ENCODED_PER_SHARD = 1024
class Encoder:
    similarity_fn_name = "dot"
    def encode_query(self, texts, **settings):
        encoded = np.random.default_rng(0).random((len(texts), 512), dtype=np.float32)
        return encoded if RETRIEVER == "dense" else torch.from_numpy(encoded).to_sparse()
    encode_document = encode_query
    def modules(self):
        return iter(())
RETRIEVER = sys.argv[2]
encoded.load_model = lambda *_: Encoder()
peak, done = [0], threading.Event()
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024
def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], anonymous())
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
assert main(["--retriever", RETRIEVER, *sys.argv[3:]]) == 0
done.set()
print("GREW", peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the memory counters of Linux")
@pytest.mark.parametrize("retriever", ["bm25", "splade", "dense"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, questions, retriever):
    """Many times the corpus, and the memory of the process grows by a small part of the texts and their encodings."""
    words = [f"word{index}" for index in range(5000)]
    grown = []
    for size in (5_000, 50_000):
        path = tmp_path / f"{size}.txt"
        with path.open("w") as stream:
            for index in range(size):
                stream.write(" ".join(words[(index * 31 + place * 7) % 5000] for place in range(90)) + "\n")
        options = [retriever, "--source", questions, "--corpus", str(path), "--output", str(tmp_path / f"{size}.jsonl")]
        # Freed memory goes back at once: what is counted is what is held, not how the allocator piles it up.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(
            [sys.executable, "-c", GROWTH, str(ROOT), *options], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        grown.append(float(done.stdout.split("GREW ")[1]))
    # In MiB: the texts, and with an encoder 512 numbers of 32 bits for each.
    difference = 45_000 * (90 * 9 + (0 if retriever == "bm25" else 4 * 512)) / 2**20
    print(f"{retriever}: {grown} MiB, texts and encodings differ by {difference:.0f} MiB")
    assert grown[1] - grown[0] < difference / 2
