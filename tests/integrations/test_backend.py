import contextlib
import json
import math
import socket
import threading

import pytest
import torch

from errors_scaledown import ScaleDownError
from scaledown.integrations.backend import EndpointBackend, LocalBackend, Reading, best_first, open_backend
from tiny import DOCUMENTS, QUESTIONS, build_model
from tiny_tokenizers import build_unigram

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"delta": {"content": "half an"}}], "documents": []}\n\n'
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)


@contextlib.contextmanager
def replying(reply: bytes, holds: bool = False):
    """A server that sends some bytes to whoever asks, and goes, or says nothing more."""
    done = threading.Event()

    def work(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as request:
                # To its end: a connection that closes on what was not read is reset, and the reply lost.
                head = iter(request.readline, b"\r\n")
                lengths = [int(line.split(b":")[1]) for line in head if line.lower().startswith(b"content-length:")]
                request.read(sum(lengths))
                connection.sendall(reply)
                done.wait(10 if holds else 0)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=work, args=(listener,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        done.set()
        thread.join(10)


def test_a_model_that_is_named_goes_to_the_accelerator(monkeypatch, tmp_path):
    """On the CPU beside a GPU nobody was told of it, and a model of 7 billion parameters took minutes."""
    build_model("n_layers").save_pretrained(tmp_path)
    monkeypatch.setattr("scaledown.integrations.backend.pick_device", lambda: "meta")
    assert LocalBackend(tmp_path)._model.device.type == "meta"


def test_pieces_add_up_to_the_answer():
    """This model begins some answers with white space, which the whole answer does not have."""
    backend = LocalBackend(build_model("n_layers", seed=2))
    for question, documents in zip(QUESTIONS, DOCUMENTS, strict=True):
        *pieces, answer = backend.stream(question, documents, Reading(max_new_tokens=30))
        assert "".join(pieces) == answer.text and len(pieces) > 1


def test_pieces_after_a_line_end_keep_the_blanks_they_begin_with():
    """Tokenizers like Llama 2's leave out the first blank of whatever they decode."""
    model = build_model("n_layers", seed=2)
    tokenizer = build_unigram()
    say(model, [tokenizer.convert_tokens_to_ids(token) for token in ("a", "\n", "▁", "▁", "-", "▁Question")])
    model.processor.tokenizer = tokenizer
    *pieces, answer = LocalBackend(model).stream("Who?", ["A heron."], Reading(max_new_tokens=6))
    assert "".join(pieces) == answer.text == "a\n  - Question"


def test_an_answer_that_nobody_reads_on_ends():
    """A client that has gone must not keep the model busy with the rest of the answer."""
    model, before = build_model("n_layers", seed=2), threading.active_count()
    written = []
    generate = model.generate
    model.generate = lambda *args, **settings: written.append(generate(*args, **settings)) or written[-1]
    pieces = LocalBackend(model).stream("Who?", ["A heron."], Reading(max_new_tokens=300))
    next(pieces)
    pieces.close()
    assert threading.active_count() == before
    assert written[0].shape[1] < 200


def test_documents_without_text_are_passed_over(place, records):
    """One blank passage in a store must not cost the questions it is retrieved for their answers."""
    backend, record, reading = open_backend(**place), records[0], Reading(max_documents=2, max_new_tokens=8)
    question, texts = record["query"], record["documents"]
    documents, ids = ["", texts[0], " \n", *texts[1:]], list("abcde")
    scores = backend.rank(question, documents)
    assert [scores[place] for place in (1, 3, 4)] == pytest.approx(backend.rank(question, texts), abs=1e-4)
    assert sorted(best_first(scores, None)) == [1, 3, 4]
    (expected,) = backend.answer([question], [texts], reading)
    (answer,) = backend.answer([question], [documents], reading, [ids])
    *pieces, streamed = backend.stream(question, documents, reading, ids)
    assert answer.text == streamed.text == "".join(pieces) == expected.text
    read = [source.read for source in expected.sources]
    for found in (answer, streamed):
        assert [source.id for source in found.sources] == ids
        assert [source.index for source in found.sources] == list(range(5))
        assert [source.read for source in found.sources] == [False, read[0], False, *read[1:]]
        assert [found.sources[place].score for place in (0, 2)] == [None, None]
    assert backend.rank(question, [" "]) == [-math.inf]
    assert backend.answer([question], [[""]], Reading(max_new_tokens=2))[0].sources[0].read is False


def test_documents_that_were_joined_are_refused():
    """Each letter would be taken for a document."""
    backend = open_backend(build_model("n_layers"))
    with pytest.raises(ScaleDownError, match="documents is 'A heron', expected a list"):
        backend.rank("Who?", "A heron")
    with pytest.raises(ScaleDownError, match="do not join them"):
        backend.answer(["Who?"], ["A heron"], Reading())


def say(model, tokens: list[int]) -> None:
    """Let a model write these tokens, whatever it reads."""
    generate, chosen = model.generate, iter(tokens)

    def choose(ids, scores):
        only = torch.full_like(scores, -torch.inf)
        only[:, next(chosen)] = 0
        return only

    model.generate = lambda *args, **settings: generate(*args, logits_processor=[choose], **settings)


def test_half_an_answer_is_not_taken_for_a_whole_one():
    with replying(HEAD + CHUNK) as url, pytest.raises(ScaleDownError, match="broke off in the middle"):
        list(EndpointBackend(url).stream("Who?", [], Reading()))


@pytest.mark.parametrize(
    ("reply", "holds"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", False),
        (HEAD + CHUNK, True),
    ],
)
def test_a_reply_that_fails_while_it_is_read_is_told(reply, holds):
    with replying(reply, holds) as url:
        backend = EndpointBackend(url, timeout=0.5)
        message = "sent nothing for 0.5 seconds" if holds else "does not answer as a service should"
        with pytest.raises(ScaleDownError, match=message):
            backend.rank("Who?", ["a"]) if reply[-1:] != b"\n" else list(backend.stream("Who?", [], Reading()))


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [{"message": {"content": "From nowhere."}}]},
        {"choices": [{"message": {"content": "From nowhere."}}], "documents": None},
        {"results": [{"index": 0, "relevance_score": 1.0}]},
        [],
    ],
)
def test_another_server_is_not_taken_for_the_service(body):
    """Servers of language models leave out fields that they do not know, such as the documents, and answer."""
    text = json.dumps(body).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text)
    with replying(head + text) as url, pytest.raises(ScaleDownError, match="another server may listen there"):
        EndpointBackend(url).answer(["Who?"], [["a"]], Reading())
    with replying(head + text) as url, pytest.raises(ScaleDownError, match="another server may listen there"):
        EndpointBackend(url).rank("Who?", ["a", "b"])


def test_another_servers_stream_is_not_taken_for_an_answer_from_documents():
    event = b'data: {"choices": [{"delta": {"content": "From nowhere."}}]}\n\ndata: [DONE]\n\n'
    reply = HEAD + b"%x\r\n%s\r\n0\r\n\r\n" % (len(event), event)
    with replying(reply) as url, pytest.raises(ScaleDownError, match="another server may listen there"):
        next(EndpointBackend(url).stream("Who?", ["a"], Reading()))


def test_an_address_without_its_scheme_is_refused():
    with pytest.raises(ScaleDownError, match=r"such as http://127\.0\.0\.1:8000"):
        EndpointBackend("127.0.0.1:8000")
