import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from safetensors.torch import load
from server import Service, serving

from errors_scaledown import ScaleDownError
from scaledown import ScaleDownModel
from scaledown.serving.arguments import ServingArguments, parse_arguments
from tiny import DOCUMENTS, QUESTIONS, build_model


@pytest.fixture(scope="module")
def model() -> ScaleDownModel:
    model = build_model("n_layers", lora=True)
    return model.optimize_for_inference(cache_entries=64)


@pytest.fixture(scope="module")
def service(model):
    with serving(model) as running:
        yield running


def chat(service: Service, question=QUESTIONS[0], documents=DOCUMENTS[0], **more):
    extra = {name: more.pop(name) for name in list(more) if name in OUR_FIELDS}
    return service.client().chat.completions.create(
        model="tiny",
        messages=question if isinstance(question, list) else [{"role": "user", "content": question}],
        extra_body={"documents": documents, **extra},
        **more,
    )


OUR_FIELDS = ("compression_rate", "max_documents", "min_reranking_score", "min_tokens")


def text_of(stream) -> str:
    return "".join(event.choices[0].delta.content or "" for event in stream if event.choices)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_model_streamed_and_not(service, model):
    for question, documents in zip(QUESTIONS, DOCUMENTS, strict=True):
        expected = model.answer(question, documents, return_reranking_scores=True, max_new_tokens=8)
        reply = chat(service, question, documents)
        assert reply.choices[0].message.content == expected.answers
        assert reply.usage.prompt_tokens == expected.prompt_tokens
        assert reply.usage.completion_tokens == expected.answer_tokens
        assert [found["relevance_score"] for found in reply.documents] == pytest.approx(expected.reranking_scores)
        assert [found["read"] for found in reply.documents] == [True] * len(documents)
        slots = model.processor(question, documents)["slot_mask"].sum()
        assert sum(found["slots"] for found in reply.documents) == slots
        assert text_of(chat(service, question, documents, stream=True)) == expected.answers


def test_requests_at_once_share_batches_and_keep_their_answers(model):
    sizes = []
    with serving(model, max_wait_ms=200) as service, ThreadPoolExecutor(9) as pool:
        service.engine.compressor.batcher._on_batch = sizes.append
        asked = list(zip(QUESTIONS, DOCUMENTS, strict=True)) * 3
        replies = list(pool.map(lambda pair: chat(service, *pair).choices[0].message.content, asked))
    assert replies == [model.answer(*pair, max_new_tokens=8) for pair in asked]
    assert max(sizes) > 1 and sum(sizes) == len(asked)


def test_settings_of_reading_are_each_requests_own(model):
    with serving(model, max_wait_ms=100) as service, ThreadPoolExecutor(4) as pool:
        settings = [{}, {"compression_rate": 4}, {"max_documents": 1}, {"min_reranking_score": 1e9}]
        replies = list(pool.map(lambda more: chat(service, QUESTIONS[2], DOCUMENTS[2], **more), settings))
    for reply, more in zip(replies, settings, strict=True):
        expected = model.answer(QUESTIONS[2], DOCUMENTS[2], return_reranking_scores=True, max_new_tokens=8, **more)
        assert reply.choices[0].message.content == expected.answers
        assert [d["index"] for d in reply.documents if d["read"]] == expected.documents_read


def test_a_conversation_is_read_as_the_model_reads_it(service, model):
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Who was Scott?"},
        {"role": "assistant", "content": "A novelist."},
        {"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]},
    ]
    plain = [{"role": "system", "content": "Be brief."}, *turns[1:3], {"role": "user", "content": QUESTIONS[0]}]
    assert chat(service, turns).choices[0].message.content == model.answer(plain, DOCUMENTS[0], max_new_tokens=8)


def test_titles_and_ids_of_documents(service, model):
    documents = [{"text": "It rises in the hills.", "title": "Loire", "id": "a"}, "Herons are birds."]
    reply = chat(service, documents=documents)
    expected = model.answer(QUESTIONS[0], ["Loire: It rises in the hills.", "Herons are birds."], max_new_tokens=8)
    assert reply.choices[0].message.content == expected
    assert [found["id"] for found in reply.documents] == ["a", None]


def test_without_documents_the_generator_is_asked_alone(service, model):
    assert chat(service, documents=[]).choices[0].message.content == model.answer(QUESTIONS[0], max_new_tokens=8)


# -- how answers are written -------------------------------------------------------------------------------------------


def test_the_limit_of_tokens_is_each_requests_own(service):
    whole = chat(service, max_tokens=8)
    short = chat(service, max_tokens=2)
    assert short.usage.completion_tokens == 2 and short.choices[0].finish_reason == "length"
    assert whole.choices[0].message.content.startswith(short.choices[0].message.content)
    assert chat(service, max_completion_tokens=3).usage.completion_tokens == 3


def test_an_answer_may_not_end_before_its_least_length(model):
    with serving(model) as service:
        ends = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = list(range(100, 400))  # nearly everything ends an answer
        try:
            assert chat(service).usage.completion_tokens < 8
            assert chat(service, min_tokens=8).usage.completion_tokens == 8
            assert chat(service, min_tokens=8, temperature=1.0, seed=3).usage.completion_tokens == 8
        finally:
            model.generation_config.eos_token_id = ends
        status, reply, _ = service.send("/v1/chat/completions", {**ASKED, "min_tokens": 9, "max_tokens": 8})
    assert status == 400 and "min_tokens is 9, expected at most max_tokens, which is 8" in reply["error"]["message"]


def test_an_answer_ends_before_a_stop_text(service, model):
    whole = model.answer(QUESTIONS[1], DOCUMENTS[1], max_new_tokens=8)
    stop = whole[3:5]
    expected = whole[: whole.find(stop)].rstrip()
    for stream in (False, True):
        reply = chat(service, QUESTIONS[1], DOCUMENTS[1], stop=stop, stream=stream)
        text = text_of(reply) if stream else reply.choices[0].message.content
        assert text.rstrip() == expected
    assert chat(service, QUESTIONS[1], DOCUMENTS[1], stop=[stop]).choices[0].finish_reason == "stop"


def test_equal_seeds_sample_equal_answers_whatever_the_batch(model):
    with serving(model, max_wait_ms=100) as service, ThreadPoolExecutor(6) as pool:

        def sample(seed):
            return chat(service, temperature=1.5, top_p=0.9, seed=seed).choices[0].message.content

        alone = [sample(seed) for seed in range(4)]
        together = list(pool.map(sample, range(4)))
        with_greedy = pool.submit(chat, service).result().choices[0].message.content
    assert alone == together
    assert len(set(alone)) > 1
    assert with_greedy == model.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=8)


def test_log_probabilities_are_those_of_the_tokens(service, model):
    reply = chat(service, max_tokens=1, logprobs=True, top_logprobs=3)
    (entry,) = reply.choices[0].logprobs.content
    batch = model.processor(QUESTIONS[0], DOCUMENTS[0])
    with torch.no_grad():
        expected = model(**batch).logits[0, -1].log_softmax(dim=-1).topk(3)
    assert entry.logprob == pytest.approx(expected.values[0].item(), abs=1e-4)
    assert [top.logprob for top in entry.top_logprobs] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert chat(service, max_tokens=1).choices[0].logprobs is None


def test_a_stream_has_the_events_of_openai(service):
    events = list(chat(service, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant" and len(events[0].documents) == len(DOCUMENTS[0])
    assert [event.choices[0].finish_reason for event in events[:-1]][-1] in ("stop", "length")
    assert events[-1].choices == [] and events[-1].usage.completion_tokens > 0
    assert len({event.id for event in events}) == 1
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "stream": True}
    status, text, headers = service.send("/v1/chat/completions", body)
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    assert text.endswith("data: [DONE]\n\n")


# -- ranking and compression -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_is_rank(path, service, model):
    body = {"model": "tiny", "query": QUESTIONS[2], "documents": DOCUMENTS[2], "top_n": 2, "return_documents": True}
    status, reply, _ = service.send(path, body)
    assert status == 200
    expected = model.rank(QUESTIONS[2], DOCUMENTS[2], top_k=2)
    assert [found["index"] for found in reply["results"]] == [found["corpus_id"] for found in expected]
    scores = [found["relevance_score"] for found in reply["results"]]
    assert scores == pytest.approx([found["score"] for found in expected])
    assert reply["results"][0]["document"]["text"] == DOCUMENTS[2][reply["results"][0]["index"]]
    assert reply["usage"]["total_tokens"] > 0


def test_what_a_client_leaves_null_is_not_set(service, model):
    """LangChain's Cohere reranker sends `rank_fields` and `max_tokens_per_doc` so; OpenAI's API allows it."""
    body = {"query": QUESTIONS[0], "documents": DOCUMENTS[0], "rank_fields": None, "max_tokens_per_doc": None}
    assert service.send("/v2/rerank", body)[0] == 200
    body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "stream": None, "logprobs": None, "tools": None}
    status, reply, _ = service.send("/v1/chat/completions", {**body, "documents": None})
    assert status == 200
    assert reply["choices"][0]["message"]["content"] == model.answer(QUESTIONS[0], max_new_tokens=8)


def test_compress_returns_the_memory_embeddings(service, model):
    body = {"query": QUESTIONS[1], "documents": DOCUMENTS[1] + ["Short."], "compression_rate": 4}
    status, reply, _ = service.send("/v1/compress", body)
    assert status == 200 and reply["format"] == "safetensors"
    tensors = load(base64.b64decode(reply["data"]))
    expected = model.compress(QUESTIONS[1], body["documents"], compression_rate=4)
    for place, document in enumerate(reply["documents"]):
        chunks = expected.chunk_to_document == place
        rows = expected.memory_embeddings[chunks][expected.memory_mask[chunks]]
        assert torch.allclose(tensors[str(place)], rows, atol=1e-5)
        assert document["slots"] == len(rows)


def test_a_document_is_compressed_once_for_a_question(service, model):
    chat(service)
    hits = model.compression_cache.hits
    chat(service)
    assert model.compression_cache.hits == hits + len(DOCUMENTS[0])


# -- what is refused ---------------------------------------------------------------------------------------------------

ASKED = {"messages": [{"role": "user", "content": "Who?"}]}


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/v1/chat/completions", b"{", None, "not JSON"),
        ("/v1/chat/completions", [], None, "Content-Type: application/json"),
        ("/v1/chat/completions", {}, "messages", "required"),
        ("/v1/chat/completions", {**ASKED, "document": ["a"]}, "document", "no such field"),
        ("/v1/chat/completions", {**ASKED, "documents": ["a", " "]}, "documents[1]", "blank"),
        ("/v1/chat/completions", {**ASKED, "documents": ["a", {"text": " "}]}, "documents[1].text", "blank"),
        ("/v1/chat/completions", {**ASKED, "documents": [{"text": 5}]}, "documents[0].text", "string"),
        ("/v1/chat/completions", {**ASKED, "documents": [5]}, "documents[0]", "neither a text nor an object"),
        ("/v1/rerank", {"query": "a", "documents": [{"text": "a", "id": "\ud800"}]}, "documents[0].id", "surrogate"),
        ("/v1/chat/completions", {**ASKED, "documents": "a"}, "documents", "list"),
        ("/v1/chat/completions", {**ASKED, "documents": ["a"] * 9}, "documents", "holds 9"),
        (
            "/v1/chat/completions",
            {**ASKED, "documents": ["a " * 300, "b " * 300]},
            "documents[1]",
            "documents[1] takes",
        ),
        (
            "/v1/chat/completions",
            {"messages": [*ASKED["messages"], {"role": "user", "content": "a " * 600}]},
            "messages[1].content",
            "past 500 tokens",
        ),
        ("/v1/rerank", {"query": "a " * 600, "documents": ["b"]}, "query", "past 500 tokens"),
        ("/v1/chat/completions", {**ASKED, "min_tokens": 9}, "min_tokens", "8 at most"),
        ("/v1/chat/completions", {**ASKED, "compression_rate": 0}, "compression_rate", "greater than"),
        ("/v1/chat/completions", {**ASKED, "compression_rate": 999}, "compression_rate", "expected at most"),
        ("/v1/chat/completions", {**ASKED, "n": 2}, "n", "should be 1"),
        ("/v1/chat/completions", {**ASKED, "tools": []}, "tools", "no such field"),
        ("/v1/chat/completions", {**ASKED, "response_format": {"type": "json_object"}}, "response_format", "only"),
        ("/v1/chat/completions", {**ASKED, "temperature": -1}, "temperature", "greater than"),
        ("/v1/chat/completions", {**ASKED, "max_tokens": 10**6}, None, "the generator reads"),
        ("/v1/chat/completions", {**ASKED, "model": "gpt"}, "model", "it is 'tiny'"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "should be"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, None, "last message"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": " "}]}, "messages", "a text as its"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "valid string"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            "messages[0].content[0].type",
            "should be 'text'",
        ),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents", "at least 1"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n", "greater than"),
        ("/v1/compress", {"query": "", "documents": ["b"]}, "query", "at least 1"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(path, body, param, message, model):
    with serving(model, max_documents=8, max_document_tokens=500) as service:
        status, reply, _ = service.send(path, body)
    assert status == (404 if param == "model" else 400)
    assert message in reply["error"]["message"]
    assert reply["error"]["param"] == param


def test_a_bad_request_changes_nothing_for_its_neighbours(model):
    with serving(model, max_wait_ms=300) as service, ThreadPoolExecutor(3) as pool:
        good = [pool.submit(chat, service, q, d) for q, d in zip(QUESTIONS[:2], DOCUMENTS[:2], strict=True)]
        # Its prompt exceeds the generator's context, which is found out when the batch is built.
        long = {"messages": [{"role": "user", "content": "Who? " * 2000}]}
        status, reply, _ = pool.submit(service.send, "/v1/chat/completions", long).result()
        answers = [future.result().choices[0].message.content for future in good]
    assert status == 400 and "needs a prompt of" in reply["error"]["message"]
    assert answers == [model.answer(q, d, max_new_tokens=8) for q, d in zip(QUESTIONS[:2], DOCUMENTS[:2], strict=True)]


def test_a_temperature_next_to_zero_takes_the_likeliest_token(service, model):
    """Logits divided by it are infinite, which would end the whole batch in an error."""
    expected = model.answer(QUESTIONS[1], DOCUMENTS[1], max_new_tokens=8)
    for temperature in (1e-6, 1e-45, 1e-320):
        reply = chat(service, QUESTIONS[1], DOCUMENTS[1], temperature=temperature, seed=1)
        assert reply.choices[0].message.content == expected


def test_a_fault_of_the_service_is_not_put_on_the_client(model, monkeypatch, caplog):
    def broken(self, jobs):
        raise TypeError("an argument of some library")

    with serving(model) as service:
        monkeypatch.setattr(type(service.engine.compressor), "fill", broken)
        status, reply, _ = service.send("/v1/chat/completions", ASKED)
    assert status == 500 and "library" not in reply["error"]["message"]
    assert "an argument of some library" in caplog.text


def test_the_body_has_a_limit(model):
    with serving(model, max_body_bytes=1000) as service:
        status, reply, _ = service.send("/v1/chat/completions", {**ASKED, "documents": ["a" * 2000]})
        assert status == 413 and "larger than 1000 bytes" in reply["error"]["message"]
        assert service.send("/v1/chat/completions", ASKED)[0] == 200
        counted = service.send("/metrics")[1]
    assert 'scaledown_requests_total{route="none",status="413"} 1.0' in counted


def test_a_key_is_asked_for(model):
    with serving(model, api_key="secret") as service:
        assert service.send("/v1/chat/completions", ASKED)[0] == 401
        assert service.send("/v1/models", None, {"Authorization": "Bearer wrong"})[0] == 401
        assert service.client("secret").models.list().data[0].id == "tiny"
        assert service.send("/health")[0] == 200  # by whoever looks after the service


def test_a_key_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv("SCALEDOWN_API_KEY", "secret")
    assert ServingArguments(model="tiny").api_key == "secret"


# -- time, queue, and clients that go ----------------------------------------------------------------------------------


@pytest.fixture
def slow_model(model, monkeypatch):
    """A model that takes a tenth of a second for each token until it is let go."""
    go = threading.Event()
    forward = type(model.generator).forward

    def held(self, *args, **kwargs):
        go.wait(0.1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.generator), "forward", held)
    yield model
    go.set()


def test_an_answer_that_takes_too_long_is_given_up(slow_model):
    with serving(slow_model, timeout=0.3, max_new_tokens=64) as service:
        status, reply, _ = service.send("/v1/chat/completions", {**ASKED, "documents": DOCUMENTS[0]})
        assert status == 504 and "longer than 0.3 seconds" in reply["error"]["message"]
        with pytest.raises(openai.APIError, match=r"longer than 0\.3 seconds"):
            list(chat(service, stream=True))


def test_a_full_queue_is_told_when_to_come_again(slow_model):
    with serving(slow_model, max_queue=1, max_batch_size=1) as service, ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: service.send("/v1/chat/completions", ASKED), range(6)))
    statuses = [status for status, _, _ in replies]
    assert set(statuses) == {200, 429}
    assert all(headers["Retry-After"] == "1" for status, _, headers in replies if status == 429)


def test_what_nobody_waits_for_is_not_written(slow_model):
    steps = []
    with serving(slow_model, max_new_tokens=100, timeout=60) as service:
        stream = chat(service, stream=True)
        next(iter(stream))
        stream.close()
        started = time.monotonic()
        assert chat(service, max_tokens=1).usage.completion_tokens == 1
        steps.append(time.monotonic() - started)
    assert steps[0] < 5  # not the ten seconds of the answer that was left


# -- operators ---------------------------------------------------------------------------------------------------------


def test_counts_for_prometheus(model):
    with serving(model) as service:
        chat(service)
        service.send("/v1/chat/completions", {})
        text = service.send("/metrics")[1]
    assert 'scaledown_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'scaledown_requests_total{route="/v1/chat/completions",status="400"} 1.0' in text
    assert 'scaledown_tokens_total{direction="out"}' in text
    assert "scaledown_batch_size_count 1.0" in text


def test_a_model_without_scores_answers_and_says_that_it_cannot_rank():
    model = build_model("n_layers", enable_reranking=False).optimize_for_inference()
    with serving(model) as service:
        reply = chat(service)
        assert [found["relevance_score"] for found in reply.documents] == [None, None]
        status, body, _ = service.send("/rerank", {"query": "a", "documents": ["b"]})
        assert status == 400 and "no reranking scores" in body["error"]["message"]
        body = {**ASKED, "documents": ["b"], "max_documents": 1}
        assert service.send("/v1/chat/completions", body)[1]["error"]["param"] == "max_documents"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_queue", "0"], "max_queue is 0"),
        (["--timeout", "0"], "timeout is 0"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--port", "70000"], "port is 70000"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ScaleDownError, match=message):
        parse_arguments(["--model", "tiny", *options])


def test_the_interface_is_described(service):
    paths = service.send("/openapi.json")[1]["paths"]
    assert {"/v1/chat/completions", "/v1/rerank", "/v1/compress", "/v1/models", "/health"} <= set(paths)
    fields = service.send("/openapi.json")[1]["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"documents", "messages", "compression_rate"} <= set(fields)
