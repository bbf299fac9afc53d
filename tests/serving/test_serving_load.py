"""The service as a process of its own, with the embedded model: many requests at once, and its end."""

import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from folders import ROOT
from scaledown import ScaleDownModel
from scaledown.world.world import World

pytestmark = pytest.mark.slow
NUM_REQUESTS, CONCURRENCY = 2000, 32


@contextlib.contextmanager
def process(*options: str):
    """A service of the embedded model; yields its address and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scaledown.serving", "--model", str(ROOT), "--served_model_name", "tiny"]
    running = subprocess.Popen([*command, "--port", str(port), *options], cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            time.sleep(0.1)
        yield url, running
    finally:
        running.kill()
        running.wait()


def post(url: str, body, timeout: float = 60.0) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def ask(record: dict, **more) -> dict:
    messages = [{"role": "user", "content": record["query"]}]
    return {"messages": messages, "documents": record["documents"], "max_tokens": 8, **more}


def answer_of(status: int, text: str) -> str:
    assert status == 200, text
    if not text.startswith("data:"):
        return json.loads(text)["choices"][0]["message"]["content"]
    assert text.endswith("data: [DONE]\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


def resident(running: subprocess.Popen) -> int:
    status = Path(f"/proc/{running.pid}/status").read_text()
    return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmRSS"))


@pytest.fixture(scope="module")
def records() -> list[dict]:
    world = World("test", 0)
    return [world.record(i, num_documents=3, two_hops=0.2) for i in range(200)]


@pytest.fixture(scope="module")
def expected(records) -> list[str]:
    model = ScaleDownModel.from_pretrained(str(ROOT)).optimize_for_inference()
    return model.answer([r["query"] for r in records], [r["documents"] for r in records], max_new_tokens=8)


def test_answers_of_the_endpoint_are_those_of_the_model(records, expected):
    with process() as (url, _), ThreadPoolExecutor(8) as pool:
        for stream in (False, True):
            bodies = [ask(record, stream=stream) for record in records]
            assert [answer_of(*reply) for reply in pool.map(lambda body: post(url, body), bodies)] == expected


def test_no_request_is_lost_and_none_gets_anothers_answer(records, expected):
    rng = random.Random(1)
    counts = {"answered": 0, "refused": 0, "left": 0}

    def one(i: int) -> None:
        place, kind = i % len(records), rng.random()
        record = records[place]
        if kind < 0.05:
            assert post(url, b'{"messages": [')[0] == 400
            counts["refused"] += 1
        elif kind < 0.08:
            assert post(url, ask(record, documents=["a" * 9_000_000]))[0] == 413
            counts["refused"] += 1
        elif kind < 0.12:
            assert post(url, ask(record, compression_rate=-1))[0] == 400
            counts["refused"] += 1
        elif kind < 0.18:
            with contextlib.suppress(OSError):  # a client that goes
                post(url, ask(record, stream=True), timeout=0.005)
            counts["left"] += 1
        else:
            assert answer_of(*post(url, ask(record, stream=kind < 0.5))) == expected[place]
            counts["answered"] += 1

    with process() as (url, running), ThreadPoolExecutor(CONCURRENCY) as pool:
        list(pool.map(one, range(NUM_REQUESTS // 4)))
        before = resident(running)
        list(pool.map(one, range(NUM_REQUESTS - NUM_REQUESTS // 4)))
        grown = resident(running) - before
    assert sum(counts.values()) == NUM_REQUESTS
    assert min(counts.values()) > 20
    assert grown < 100, f"{grown} MiB more after {NUM_REQUESTS} requests"


def test_a_service_that_is_told_to_end_answers_what_it_began(records, expected):
    with process("--max_wait_ms", "300") as (url, running), ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(post, url, ask(record)) for record in records[:8]]
        time.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        assert [answer_of(*reply.result()) for reply in replies] == expected[:8]
        assert running.wait(30) in (0, -signal.SIGTERM)
