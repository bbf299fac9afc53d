"""Kill -9 at any moment of any step, start the same command again: the same bytes, and nothing is done twice."""

import errno
import json
import os
import random
import signal
from pathlib import Path

import datasets
import pytest
from chat_server import ChatServer, Reply, completion, question_of
from tiny_teachers import save_all

from scaledown.data import corpus, preparation
from scaledown.data.choice import PoolDocuments
from scaledown.data.indexes import bm25, encoded
from scaledown.data.indexes.bm25 import BM25Index
from scaledown.data.indexes.encoded import EncodingIndex
from scaledown.data.preparation import PreparationArguments, main, prepare
from scaledown.data.teachers import endpoint
from scaledown.data.teachers.endpoint import EndpointTeacher

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is a fork of this one")

NUM_QUESTIONS = 13
ANIMALS = ["badger", "camel", "donkey", "eagle", "falcon", "gibbon", "heron", "ibis", "jaguar", "koala"]


@pytest.fixture(autouse=True)
def _small_steps(tmp_path, monkeypatch):
    """Little is done between two moments at which a kill can hit, and every result is waited for."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "TEXTS_PER_BATCH", 2)
    monkeypatch.setattr(corpus, "PASSAGES_PER_SHARD", 8)
    monkeypatch.setattr(bm25, "TOKENIZED_PER_SHARD", 9)
    monkeypatch.setattr(encoded, "ENCODED_PER_SHARD", 9)
    monkeypatch.setattr(preparation, "RECORDS_PER_SCORING", 3)
    monkeypatch.setattr(endpoint, "SECONDS_BETWEEN_SYNCS", 0.0)
    for kind in (BM25Index, EncodingIndex):
        monkeypatch.setattr(kind, "queries_per_block", 3)
    monkeypatch.setattr(PoolDocuments, "block_size", 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def source(tmp_path):
    rows = [
        {
            "id": f"q{index}",
            "question": f"Where does the {ANIMALS[index % 10]} of place {index} live?",
            "title": ANIMALS[index % 10],
            "paragraph": f"The {ANIMALS[index % 10]} of place {index} lives in den {index}.",
            "answers": [f"den {index}"],
        }
        for index in range(NUM_QUESTIONS)
    ]
    (tmp_path / "nq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"The {animal} number {n} eats, " + "and sleeps, " * n for animal in ANIMALS for n in (3, 30, 60)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    return str(tmp_path / "nq.jsonl")


def options(step: str, source: str, models: dict) -> dict:
    """Settings that take one step; corpus steps build an index and search it."""
    if step == "pool":
        return {"num_documents": 4}
    if step in ("bm25", "splade", "dense"):
        return {
            "corpus": str(Path(source).parent / "corpus.txt"),
            "retriever": step,
            "retriever_name_or_path": models.get(step),
            "top_k": 4,
        }
    if step == "reranker":
        return {"num_documents": 4, "reranker": models["reranker"], "keep_best": 2}
    if step == "teacher":
        return {"num_documents": 2, "teacher": models["teacher"], "teacher_max_tokens": 4, "teacher_batch_size": 2}
    return {"num_documents": 2, "teacher": "tiny", "teacher_concurrency": 1}


def run_until_killed(arguments: PreparationArguments, num_syncs: int, cut: int) -> bool:
    """Run in a process that dies at its n-th write to the disk; its last `cut` bytes are lost too.

    Returns:
        Whether it was killed, rather than done before.
    """
    child = os.fork()
    if child == 0:
        left = [num_syncs]
        sync = os.fsync

        def dying(descriptor: int) -> None:
            sync(descriptor)
            left[0] -= 1
            if left[0] == 0:
                if cut:
                    os.ftruncate(descriptor, max(os.fstat(descriptor).st_size - cut, 0))
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = dying
        status = 1
        try:
            prepare(arguments)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


OF_THE_SAME_CODE = ("splade", "reranker", "endpoint")


def answer(_, body) -> Reply:
    return Reply(body=completion(f"It lives there: {question_of(body)}"))


# The index of splade is written by the same code as that of dense; scores and answers of an endpoint go through the
# same journal as those of a teacher.
@pytest.mark.parametrize(
    "step",
    ["pool", "bm25", "dense", "teacher", *(pytest.param(name, marks=pytest.mark.slow) for name in OF_THE_SAME_CODE)],
)
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(tmp_path, source, models, step):
    settings = options(step, source, models)
    chance = random.Random(f"{step}")
    with ChatServer(answer).running() as server:
        if step == "endpoint":
            settings["teacher_url"] = server.url
        whole, cut = (PreparationArguments(source, str(tmp_path / f / "out.jsonl"), **settings) for f in ("a", "b"))
        prepare(whole)
        asked = len(server.requests)
        kills = lost = 0
        most = 4 if step == "pool" else 7  # writes to the disk; that step has the fewest
        while kills < 40:
            # Sometimes the last line is on the disk by halves.
            half = chance.choice([0, 0, 7])
            if not run_until_killed(cut, chance.randint(2, most), half):
                break
            kills += 1
            lost += half > 0
    assert kills >= 3
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["out.jsonl", "out.jsonl.card.md", "out.jsonl.report.json"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == files
    for name in files:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    if step == "endpoint":
        assert asked == NUM_QUESTIONS
        # One more only for each answer whose line was cut.
        assert NUM_QUESTIONS <= len(server.requests) - asked <= NUM_QUESTIONS + lost


def test_with_many_requests_under_way_only_those_are_repeated(tmp_path, source, models):
    settings = {**options("endpoint", source, models), "teacher_concurrency": 4}
    with ChatServer(answer).running() as server:
        arguments = PreparationArguments(source, str(tmp_path / "out.jsonl"), teacher_url=server.url, **settings)
        kills = 0
        while run_until_killed(arguments, 12, 0):
            kills += 1
        assert 1 <= kills <= 3
    assert {server.questions.count(question) for question in server.questions} <= set(range(1, kills + 2))
    assert len(set(server.questions)) == NUM_QUESTIONS
    assert len(server.requests) <= NUM_QUESTIONS + kills * 4
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["id"] for record in written] == [f"q{index}" for index in range(NUM_QUESTIONS)]


def test_other_settings_or_another_source_do_not_take_over_unfinished_work(tmp_path, source, models, capsys):
    output = tmp_path / "out.jsonl"
    with ChatServer(lambda asked, body: Reply(500)).running() as server:
        command = ["--source", source, "--output", str(output), "--teacher", "tiny", "--teacher_url", server.url]
        command += ["--teacher_retries", "0", "--teacher_backoff", "0"]
        assert main(command) == 2
        assert "13 of 13 answers are missing" in capsys.readouterr().err
        assert main([*command, "--seed", "3"]) == 2
        assert "seed was 0, now 3. Give the same options" in capsys.readouterr().err
        # Where and how fast may change.
        assert main([*command, "--teacher_concurrency", "2"]) == 2
        assert "Fix the endpoint" in capsys.readouterr().err
        Path(source).write_text(Path(source).read_text() + "\n")
        assert main(command) == 2
        assert "source was" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("step", ["pool", "bm25", "dense", "reranker", "endpoint"])
def test_a_full_disk_is_told_and_the_same_command_goes_on(tmp_path, source, models, step, monkeypatch):
    settings = options(step, source, models)
    with ChatServer(answer).running() as server:
        if step == "endpoint":
            settings["teacher_url"] = server.url
        whole, cut = (PreparationArguments(source, str(tmp_path / f / "out.jsonl"), **settings) for f in ("a", "b"))
        prepare(whole)
        sync, left = os.fsync, [7]

        def full(descriptor: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match=r"the disk of .* is full .* the same command goes on") as caught:
                prepare(cut)
        assert caught.value.errno == errno.ENOSPC
        assert os.listdir(tmp_path / "b") == ["out.jsonl.work"]
        assert not list((tmp_path / "b").rglob("*.tmp"))
        prepare(cut)
    assert (tmp_path / "b" / "out.jsonl").read_bytes() == (tmp_path / "a" / "out.jsonl").read_bytes()
    assert len(list((tmp_path / "b").iterdir())) == 3


def test_an_endpoint_is_asked_nothing_in_a_dry_run_and_the_real_run_goes_on_from_it(
    tmp_path, source, models, monkeypatch
):
    output = tmp_path / "out.jsonl"
    with ChatServer(answer).running() as server:
        settings = {**options("endpoint", source, models), "teacher_url": server.url, "reranker": models["reranker"]}
        settings |= {"teacher_price_input": 1000.0, "teacher_price_output": 2000.0}
        report = prepare(PreparationArguments(source, str(output), dry_run=True, **settings))
        assert not server.requests and not output.exists()
        assert report["estimate"]["pairs to score"] == 2 * NUM_QUESTIONS
        assert report["estimate"]["answers to write"].startswith("13 requests, about ")
        assert "at most 1,664 tokens of answer, about " in report["estimate"]["answers to write"]
        monkeypatch.setattr(preparation, "PoolDocuments", None)  # chosen already
        prepare(PreparationArguments(source, str(output), **settings))
        assert len(server.requests) == NUM_QUESTIONS
    assert output.exists() and not (tmp_path / "out.jsonl.work").exists()


def test_interrupting_with_the_keyboard_keeps_the_answers(tmp_path, source, models, monkeypatch):
    with ChatServer(answer).running() as server:
        arguments = PreparationArguments(
            source, str(tmp_path / "out.jsonl"), teacher_url=server.url, **options("endpoint", source, models)
        )
        original = EndpointTeacher._ask

        async def interrupted(self, client, messages):
            if len(server.requests) == 5:
                raise KeyboardInterrupt
            return await original(self, client, messages)

        with monkeypatch.context() as patch:
            patch.setattr(EndpointTeacher, "_ask", interrupted)
            with pytest.raises(KeyboardInterrupt):
                prepare(arguments)
        assert not (tmp_path / "out.jsonl").exists()
        prepare(arguments)
        assert len(server.requests) == NUM_QUESTIONS
