import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from combinations import combinations
from fake_vllm import FakeVLLM
from server import Service, free_port, running, serving

from scaledown import ScaleDownModel
from scaledown.serving import vllm
from tiny import DOCUMENTS, QUESTIONS, build_model

ASKED = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "documents": DOCUMENTS[0]}


@pytest.fixture(scope="module")
def model() -> ScaleDownModel:
    return build_model("n_layers", lora=True).optimize_for_inference()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(vllm, "PAUSE_BEFORE_RETRY", 0.01)


@contextlib.contextmanager
def served(model, fake=None, **settings):
    """A service in front of a stand-in for vLLM, and both."""
    fake = fake or FakeVLLM(model)
    with running(fake.app) as port, serving(model, engine="vllm", vllm_url=url(port), **settings) as service:
        yield service, fake


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}/v1"


def chat(service: Service, question=QUESTIONS[0], documents=DOCUMENTS[0], min_tokens=0, **more):
    return service.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": question}],
        extra_body={"documents": documents, "min_tokens": min_tokens},
        **more,
    )


def events(service: Service, **more) -> list:
    return list(chat(service, stream=True, **more))


def text_of(stream) -> str:
    return "".join(event.choices[0].delta.content or "" for event in stream if event.choices)


def test_answers_are_those_of_the_model_streamed_and_not(model):
    with served(model) as (service, fake):
        for question, documents in zip(QUESTIONS, DOCUMENTS, strict=True):
            expected = model.answer(question, documents, return_reranking_scores=True, max_new_tokens=8)
            reply = chat(service, question, documents)
            assert reply.choices[0].message.content == expected.answers
            assert reply.usage.prompt_tokens == expected.prompt_tokens
            assert reply.usage.completion_tokens == expected.answer_tokens
            assert [found["relevance_score"] for found in reply.documents] == pytest.approx(expected.reranking_scores)
            assert text_of(events(service, question=question, documents=documents)) == expected.answers
    assert all("prompt" not in body for body in fake.bodies)  # beside embeddings vLLM takes none


def test_answers_are_written_as_by_the_engine_in_this_process(model):
    """Stop texts, limits, end tokens, log probabilities: the same reply, up to its ids and times."""
    whole = model.answer(QUESTIONS[1], DOCUMENTS[1], max_new_tokens=8)
    requests = [
        {},
        {"max_tokens": 2},
        {"min_tokens": 8, "max_tokens": 8},
        {"stop": [whole[3:5]]},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 3, "max_tokens": 4},
    ]
    with served(model) as (service, _), serving(model) as local:
        for more in requests:
            there, here = (chat(of, QUESTIONS[1], DOCUMENTS[1], **more) for of in (service, local))
            assert there.choices[0].message.content == here.choices[0].message.content
            assert there.choices[0].finish_reason == here.choices[0].finish_reason
            assert there.usage == here.usage
            if more.get("logprobs"):
                found, expected = (reply.choices[0].logprobs.content for reply in (there, here))
                assert [entry.token for entry in found] == [entry.token for entry in expected]
                assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in expected])
                for entry, other in zip(found, expected, strict=True):
                    assert [best.token for best in entry.top_logprobs] == [best.token for best in other.top_logprobs]


def test_sampling_reaches_vllm(model):
    with served(model) as (service, fake):
        chat(service, temperature=0.5, top_p=0.9, seed=7)
        chat(service)
    sampled, greedy = fake.bodies
    assert (sampled["temperature"], sampled["top_p"], sampled["seed"]) == (0.5, 0.9, 7)
    assert greedy["temperature"] == 0 and "seed" not in greedy


def test_prompts_that_vllm_could_not_read_are_refused_here(model):
    with served(model, FakeVLLM(model, max_length=60)) as (service, fake):
        assert chat(service, documents=[]).choices[0].message.content is not None
        status, reply, _ = service.send("/v1/chat/completions", {**ASKED, "max_tokens": 50})
    assert status == 400 and "the generator reads 60" in reply["error"]["message"]
    assert len(fake.bodies) == 1


@pytest.mark.parametrize(
    ("trouble", "stream"),
    combinations(
        (500, 503, ("cut", 0), ("error", 0)),
        (False, True),
        fast=[(500, True), (503, False), (("cut", 0), True), (("error", 0), False)],
    ),
)
def test_what_failed_before_the_first_token_is_tried_once_more(trouble, stream, model):
    expected = model.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=8)
    with served(model) as (service, fake):
        fake.troubles = [trouble]
        text = text_of(events(service)) if stream else chat(service).choices[0].message.content
        assert text == expected and len(fake.bodies) == 2
        fake.troubles = [trouble, trouble]
        status, reply, _ = service.send("/v1/chat/completions", {**ASKED, "stream": stream})
        assert status in (502, 503) and "vLLM" in reply["error"]["message"]
        assert len(fake.bodies) == 4
        assert chat(service).choices[0].message.content == expected  # and nothing is left of it


@pytest.mark.parametrize("trouble", ["cut", "error"])
def test_an_answer_that_breaks_off_ends_in_an_error(trouble, model):
    with served(model) as (service, fake):
        fake.troubles = [(trouble, 3)] * 2
        with pytest.raises(openai.APIError, match="vLLM broke off"):
            events(service)
        status, reply, _ = service.send("/v1/chat/completions", ASKED)
    assert status == 502 and "vLLM broke off" in reply["error"]["message"]
    assert len(fake.bodies) == 2  # what was streamed cannot be written anew


def test_what_vllm_refuses_is_a_fault_of_the_service(model, caplog):
    with served(model) as (service, fake):
        fake.troubles = [400]
        status, reply, _ = service.send("/v1/chat/completions", ASKED)
    assert status == 500 and "as asked for" not in reply["error"]["message"]  # its log says why
    assert "vLLM refused a prompt" in caplog.text and len(fake.bodies) == 1


def test_a_reply_of_vllm_that_cannot_be_read_is_in_the_log(model, monkeypatch, caplog):
    def broken(self, found, count):
        raise ValueError("invalid literal of a token")

    monkeypatch.setattr(vllm.VLLMEngine, "_logprobs", broken)
    with served(model) as (service, _):
        status, reply, _ = service.send("/v1/chat/completions", ASKED)
    assert status == 500 and "its log says why" in reply["error"]["message"]
    assert "invalid literal of a token" in caplog.text


def test_the_service_outlives_vllm(model):
    port, fake = free_port(), FakeVLLM(model)
    with serving(model, engine="vllm", vllm_url=url(port)) as service:
        status, reply, _ = service.send("/health")
        assert status == 503 and "vLLM does not answer" in reply["error"]["message"]
        for more in ({}, {"stream": True}):
            status, reply, _ = service.send("/v1/chat/completions", {**ASKED, **more})
            assert status == 503 and "vLLM" in reply["error"]["message"]
        assert service.send("/rerank", {"query": "a", "documents": ["b"]})[0] == 200  # needs no generator
        for name in ("generator", "another"):  # whichever is started
            fake.names = [name]
            with running(fake.app, port):
                assert service.send("/health")[0] == 200
                assert service.send("/v1/chat/completions", ASKED)[0] == 200
            assert service.send("/health")[0] == 503
            assert service.send("/v1/chat/completions", ASKED)[0] == 503
    assert [body["model"] for body in fake.bodies] == ["generator", "another"]


def test_vllm_must_serve_the_model_that_was_named(model):
    with served(model, vllm_model="other") as (service, _):
        for path, body in (("/health", None), ("/v1/chat/completions", ASKED)):
            status, reply, _ = service.send(path, body)
            assert status == 503 and "serves generator and not other" in reply["error"]["message"]


def test_vllm_stops_writing_where_nobody_reads(model):
    with served(model) as (service, fake):
        fake.seconds_per_token = 0.1
        stream = chat(service, stream=True, min_tokens=100, max_tokens=100)
        next(iter(stream))
        stream.close()
        started = time.monotonic()
        while not fake.streams_closed and time.monotonic() < started + 9:
            time.sleep(0.05)
        assert time.monotonic() - started < 5  # not the ten seconds of the whole answer


def test_requests_at_once_keep_their_answers(model):
    with served(model, max_wait_ms=50) as (service, _), ThreadPoolExecutor(9) as pool:
        asked = list(zip(QUESTIONS, DOCUMENTS, strict=True)) * 3
        replies = list(pool.map(lambda pair: chat(service, *pair).choices[0].message.content, asked))
    assert replies == [model.answer(*pair, max_new_tokens=8) for pair in asked]
