"""benchmark.py --mode serving, between two servers that answer as they are told to."""

import itertools
import json

import pytest
from chat_server import ChatServer, Reply

from errors_scaledown import ScaleDownError
from folders import ROOT
from scaledown.benchmark.arguments import parse_arguments
from scaledown.benchmark.run import main
from scaledown.benchmark.serving import measure, render

MODELS = {"object": "list", "data": [{"id": "served", "object": "model", "created": 0, "owned_by": "test"}]}


def streamed(tokens: int, prompt_tokens: int, delay: float = 0.0) -> Reply:
    """An answer of so many tokens, one to an event, as vLLM and the service stream it."""
    events = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    events += [{"choices": [{"index": 0, "delta": {"content": "a"}}], "usage": None}] * tokens
    events += [{"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}}]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    return Reply(body=text, headers={"Content-Type": "text/event-stream"}, delay=delay)


def text_server(behave=lambda asked, body: streamed(4, 900, 0.08), metrics: str = "") -> ChatServer:
    return ChatServer(behave, {"/v1/models": MODELS, "/metrics": metrics})


def service(behave=lambda asked, body: streamed(4, 90, 0.02)) -> ChatServer:
    return ChatServer(behave, {"/v1/models": MODELS, "/metrics": "scaledown_compression_cache_hit_rate 0.25\n"})


def options(text: ChatServer, compressed: ChatServer, *more: str) -> list[str]:
    return [
        *("--mode", "serving", "--generator", str(ROOT), "--text_url", text.url, "--service_url", compressed.url),
        *("--num_documents", "3", "--document_length", "20", "--new_tokens", "4", "--repeats", "2", *more),
    ]


def test_both_sides_are_asked_alike_and_compared():
    with text_server().running() as text, service().running() as compressed:
        rows = measure(parse_arguments(options(text, compressed, "--concurrency", "1,4", "--compression_rate", "8")))
    assert [(row["concurrency"], row["side"]) for row in rows] == list(
        itertools.product((1, 4), ("full text", "compressed"))
    )
    for row in rows:
        assert row["requests"] == 2 * (8 if row["concurrency"] == 1 else 12)
        assert row["first_token_p50"] <= row["seconds_p50"] <= row["seconds_p95"]
    assert [row["prompt_tokens"] for row in rows] == [900, 90] * 2
    assert all(row["gain"] == 1 for row in rows[::2]) and all(row["gain"] > 1.2 for row in rows[1::2])
    assert rows[1]["compression_cache_hit_rate"] == 0.25
    assert rows[2]["requests_per_second"] > 2 * rows[0]["requests_per_second"]  # four at once
    assert 2 < text.most_at_once <= 4 and 2 < compressed.most_at_once <= 4

    for body in [*text.requests, *compressed.requests]:
        assert (body["max_tokens"], body["min_tokens"], body["temperature"]) == (4, 4, 0)
        assert body["stream"] and body["model"] == "served"
    for body in compressed.requests:
        assert len(body["documents"]) == 3 and body["compression_rate"] == 8
    assert all("documents" not in body and "Background" in body["messages"][1]["content"] for body in text.requests)
    asked = [body["messages"][-1]["content"] for body in [*text.requests, *compressed.requests]]
    assert len(set(asked)) == len(asked)  # nothing that a cache would know
    documents = [document for body in compressed.requests for document in body["documents"]]
    assert len(set(documents)) == len(documents)

    lines = render(rows).splitlines()
    assert len(lines) == 6 and "× (" in lines[3] and "× (" not in lines[2]


def test_the_share_that_the_prefix_cache_knew():
    """It grows by 100 tokens looked up, and 40 known, from page to page."""
    counts = itertools.count(1)

    class Growing(dict):
        def get(self, path, default=None):
            if path != "/metrics":
                return super().get(path, default)
            times = next(counts) // 2  # each figure is a page of its own
            return (
                f'vllm:prefix_cache_queries_total{{engine="0"}} {100 * times}\n'
                f'vllm:prefix_cache_hits_total{{engine="0"}} {40 * times}\n'
            )

    text = ChatServer(lambda asked, body: streamed(4, 900), Growing({"/v1/models": MODELS}))
    with text.running(), service().running() as compressed:
        rows = measure(parse_arguments(options(text, compressed, "--concurrency", "1", "--repeats", "1")))
    assert [row["prefix_cache_hit_rate"] for row in rows] == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (streamed(3, 90), "wrote 3 tokens where 4 were asked for"),
        (Reply(429, {"error": {"message": "too many"}}), "too many"),
        (Reply(body='data: {"error": {"message": "broken"}}\n\n'), "broke off"),
    ],
)
def test_answers_that_are_not_what_was_asked_for_end_it(reply, message):
    compressed = service(lambda asked, body: reply)
    with text_server().running() as text, compressed.running(), pytest.raises(ScaleDownError, match=message):
        measure(parse_arguments(options(text, compressed, "--concurrency", "2")))


def test_the_command_writes_what_it_found(tmp_path, capsys):
    with text_server().running() as text, service().running() as compressed:
        folder = tmp_path / "out"
        argv = options(text, compressed, "--concurrency", "2", "--repeats", "1", "--output_dir", str(folder))
        assert main(argv) == 0
    assert capsys.readouterr().out == (folder / "serving.md").read_text()
    found = json.loads((folder / "serving.json").read_text())
    assert found["settings"]["concurrency"] == "2" and len(found["results"]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "pass --service_url and --text_url"),
        (["--service_url", "http://127.0.0.1:9/v1", "--text_url", "http://127.0.0.1:9/v1"], "no API at"),
        (["--service_url", "http://a", "--text_url", "http://b", "--concurrency", "0"], "concurrency is '0'"),
        (["--service_url", "http://a", "--text_url", "http://b", "--dtype", "float32"], "does not read dtype"),
    ],
)
def test_wrong_options_are_refused(more, message, capsys):
    assert main(["--mode", "serving", "--generator", str(ROOT), *more]) == 2
    assert message in capsys.readouterr().err
