"""The service in front of a real vLLM that runs the embedded model's generator; `make test-vllm` installs one."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from server import Service, free_port, serving

from folders import ROOT
from scaledown import ScaleDownModel
from scaledown.tools.export_generator import export_generator
from scaledown.world.world import World

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="make test-vllm installs vLLM in .venv-vllm"),
]
SECONDS_TO_START = 600  # it takes half a minute on a machine that does nothing else
NUM_QUESTIONS, CONCURRENCY = 200, 8
OPTIONS = ["--enable-prompt-embeds", "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]


class VLLM:
    """A vLLM server that can be killed and started again on the same port.

    Args:
        generator: Folder of the model.
        log: File for what it prints.
    """

    def __init__(self, generator: Path, log: Path):
        self._generator, self._log, self.port = generator, log, free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", self._generator, *OPTIONS]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port)],
            cwd=self._log.parent,
            env=environment,
            stdout=self._log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its workers are processes of their own, and are to end with it
        )
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.5)
        raise RuntimeError(f"vLLM did not start: {self._log.read_text()[-2000:]}")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def metric(self, name: str) -> int:
        """One of its figures, such as `num_requests_running`."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=60).read().decode()
        counts = [line.split()[-1] for line in text.splitlines() if line.startswith(f"vllm:{name}{{")]
        return sum(int(float(count)) for count in counts)


@pytest.fixture(scope="module")
def model() -> ScaleDownModel:
    return ScaleDownModel.from_pretrained(ROOT, dtype=torch.float32).optimize_for_inference()


@pytest.fixture(scope="module")
def vllm(model, tmp_path_factory) -> Iterator[VLLM]:
    folder = tmp_path_factory.mktemp("vllm")
    export_generator(model, folder / "generator")
    server = VLLM(folder / "generator", folder / "vllm.log")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def service(model, vllm) -> Iterator[Service]:
    with serving(model, engine="vllm", vllm_url=f"{vllm.url}/v1") as running:
        yield running


@pytest.fixture(scope="module")
def records() -> list[dict]:
    world = World("test", 0)
    return [world.record(i, num_documents=5, two_hops=0.2) for i in range(NUM_QUESTIONS)]


def chat(service: Service, record: dict, min_tokens: int = 0, **more):
    return service.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": record["query"]}],
        extra_body={"documents": record["documents"], "min_tokens": min_tokens},
        **{"max_tokens": 16, **more},
    )


def answer_of(reply, stream: bool) -> str:
    if not stream:
        return reply.choices[0].message.content
    return "".join(event.choices[0].delta.content or "" for event in reply if event.choices)


@pytest.mark.parametrize("stream", [False, True])
def test_greedy_answers_are_those_of_the_model(stream, service, model, records):
    expected = [model.answer(record["query"], record["documents"], max_new_tokens=16) for record in records]
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        found = list(pool.map(lambda record: answer_of(chat(service, record, stream=stream), stream), records))
    differing = [
        (record["query"], one, other)
        for record, one, other in zip(records, found, expected, strict=True)
        if one != other
    ]
    print(f"{len(differing)} of {len(records)} differ", *differing, sep="\n")
    assert len(differing) <= len(records) // 100  # sums in another order may tip a tie


def test_replies_are_those_of_the_engine_in_this_process(service, model, records):
    requests = [
        {},
        {"max_tokens": 1},
        {"min_tokens": 8, "max_tokens": 8},
        {"min_tokens": 8, "max_tokens": 8, "stop": ["e"]},
        {"logprobs": True, "top_logprobs": 3},
    ]
    with serving(model) as local:
        for more in requests:
            there, here = chat(service, records[0], **more), chat(local, records[0], **more)
            assert there.choices[0].message == here.choices[0].message
            assert there.choices[0].finish_reason == here.choices[0].finish_reason
            assert there.usage == here.usage
            if "logprobs" in more:
                found, expected = (reply.choices[0].logprobs.content for reply in (there, here))
                assert [entry.token for entry in found] == [entry.token for entry in expected]
                best, other = ([best.logprob for best in listed[0].top_logprobs] for listed in (found, expected))
                assert best == pytest.approx(other, abs=1e-3)


def test_seeds_decide_samples(service, records):
    settings = {"min_tokens": 12, "max_tokens": 12, "temperature": 1.5}
    asked = [chat(service, records[0], seed=seed, **settings).choices[0].message.content for seed in (1, 1, 2)]
    assert asked[0] == asked[1] != asked[2]


def test_prompts_longer_than_vllm_takes_are_refused(service, records):
    with pytest.raises(openai.BadRequestError, match="the generator reads 2048"):
        chat(service, records[0], max_tokens=2048)


def test_vllm_stops_writing_where_nobody_reads(service, vllm, records):
    before = vllm.metric("generation_tokens_total")
    stream = chat(service, records[0], stream=True, min_tokens=1500, max_tokens=1500)
    next(iter(stream))
    assert vllm.metric("num_requests_running") == 1
    stream.close()
    deadline = time.monotonic() + 120
    while vllm.metric("num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert vllm.metric("num_requests_running") == 0
    assert vllm.metric("generation_tokens_total") - before < 1500  # it was ended, and did not end by itself


def test_the_service_outlives_vllm(service, vllm, records):
    expected = chat(service, records[0]).choices[0].message.content
    first_piece, ends = threading.Semaphore(0), []

    def read(stream: bool) -> None:
        body = {
            "messages": [{"role": "user", "content": records[1]["query"]}],
            "documents": records[1]["documents"],
            **{"min_tokens": 1500, "max_tokens": 1500, "stream": stream},
        }
        request = urllib.request.Request(
            f"{service.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                lines = []
                for line in reply:
                    first_piece.release()
                    lines.append(line)
                ends.append(json.loads(lines[-2].decode().removeprefix("data: "))["error"]["code"])
        except urllib.error.HTTPError as error:
            ends.append(error.code)

    readers = [threading.Thread(target=read, args=(place % 2 == 0,)) for place in range(8)]
    for reader in readers:
        reader.start()
    for _ in range(4):
        first_piece.acquire(timeout=60)
    vllm.kill()
    for reader in readers:
        reader.join(60)
    assert len(ends) == 8 and set(ends) <= {502, 503}  # none without an answer
    status, reply, _ = service.send("/health")
    assert status == 503 and "vLLM does not answer" in reply["error"]["message"]
    with pytest.raises(openai.InternalServerError, match="vLLM"):
        chat(service, records[0])
    vllm.start()
    assert service.send("/health")[0] == 200
    assert chat(service, records[0]).choices[0].message.content == expected
