"""An endpoint that misbehaves: every failure that may pass is tried again, no answer is lost, and no key is shown."""

import email.utils
import json
import logging
import time

import pytest
from chat_server import ChatServer, Reply, completion, question_of

from scaledown.data.journal import Journal
from scaledown.data.teachers.answers import TeacherError
from scaledown.data.teachers.endpoint import EndpointTeacher, _retry_after

RECORDS = [{"query": f"Question {index}?", "documents": [f"Document {index}."]} for index in range(30)]


def good(body: dict) -> Reply:
    return Reply(body=completion(f" Answer to {question_of(body)} "))


def ask(server: ChatServer, path, records=RECORDS, **settings) -> list[dict]:
    teacher = EndpointTeacher(server.url, "tiny", **{"backoff": 0.01, "concurrency": 4, "timeout": 5.0, **settings})
    journal = Journal(path)
    try:
        teacher.answer(records.__getitem__, len(records), journal)
    finally:
        journal.close()
    journal = Journal(path)
    return [journal[index] for index in range(len(records))]


def test_every_record_is_asked_once_and_several_at_once(tmp_path):
    def behave(_, body):
        time.sleep(0.01)
        return good(body)

    paces = []
    with ChatServer(behave).running() as server:
        found = ask(server, tmp_path / "j", on_pace=lambda *pace: paces.append(pace))
    assert [result["answer"] for result in found] == [f"Answer to Question {index}?" for index in range(30)]
    assert found[0] == {"answer": "Answer to Question 0?", "cut": False, "prompt_tokens": 11, "completion_tokens": 3}
    assert sorted(server.questions) == sorted(record["query"] for record in RECORDS)
    assert 2 <= server.most_at_once <= 4
    body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.0, 128)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    # Told after the first batch: seconds per request, tokens per answer.
    ((seconds, tokens),) = paces
    assert 0 < seconds < 1 and tokens == 3


def test_the_first_failure_is_told_with_how_long_it_goes_on_trying(tmp_path, caplog):
    with pytest.raises(TeacherError, match=r"127\.0\.0\.1:9"):
        teacher = EndpointTeacher("http://127.0.0.1:9/v1", "tiny", backoff=0.01, retries=2, concurrency=2, timeout=60.0)
        teacher.answer(RECORDS.__getitem__, 3, Journal(tmp_path / "j"))
    (first,) = [record.getMessage() for record in caplog.records if "is tried" in record.getMessage()]
    assert "http://127.0.0.1:9/v1 failed: the connection failed" in first
    assert "2 more times, over about 0 s, or 2 min if each try takes the whole timeout of 60 s" in first
    assert sum("given up" in record.getMessage() for record in caplog.records) == 1


FAILURES = {
    "rate limit": Reply(429, {"error": {"message": "slow down"}}),
    "server error": Reply(500, "oops"),
    "bad gateway": Reply(502, "<html>bad gateway</html>", {"Content-Type": "text/html"}),
    "overloaded": Reply(503, {"error": {"message": "loading"}}),
    "timeout": Reply(delay=0.6, body=completion("late")),
    "truncated body": Reply(body=completion("half"), cut=20),
    "no JSON": Reply(body="{'answer': broken"),
    "JSON cut off": Reply(body=json.dumps(completion("half"))[:-20]),
    "a list": Reply(body=[1, 2]),
    "an error with status 200": Reply(body={"error": {"message": "internal"}}),
    "no choices": Reply(body={**completion("x"), "choices": []}),
    "content that is no text": Reply(body=completion(5)),
    "usage that is no number": Reply(body={**completion("x"), "usage": {"prompt_tokens": "many"}}),
    "null": Reply(body="null"),
    "nothing": Reply(body=""),
    "empty answer": Reply(body=completion(" \u200b")),
    "no answer": Reply(body=completion(None)),
    "half a surrogate pair": Reply(body='{"choices": [{"message": {"content": "\\ud800"}}]}'),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_may_pass_is_tried_again(tmp_path, failure):
    def behave(asked, body):
        return FAILURES[failure] if asked == 0 else good(body)

    with ChatServer(behave).running() as server:
        found = ask(server, tmp_path / "j", RECORDS[:3], timeout=0.3 if failure == "timeout" else 5.0)
    assert [result["answer"] for result in found] == [f"Answer to Question {index}?" for index in range(3)]
    assert len(server.requests) == 6


def test_a_connection_that_breaks_is_tried_again(tmp_path):
    with ChatServer(lambda asked, body: Reply(cut=10**6) if asked == 0 else good(body)).running() as server:
        assert len(ask(server, tmp_path / "j", RECORDS[:3])) == 3


def test_everything_at_once(tmp_path):
    kinds = [reply for name, reply in FAILURES.items() if name not in ("timeout", "empty answer", "no answer")]

    def behave(asked, body):
        # Each question meets two failures, its own ones.
        number = int(question_of(body).split()[1].rstrip("?"))
        return kinds[(number + 5 * asked) % len(kinds)] if asked < 2 else good(body)

    with ChatServer(behave).running() as server:
        found = ask(server, tmp_path / "j", concurrency=8)
    assert [result["answer"] for result in found] == [f"Answer to Question {index}?" for index in range(30)]
    assert len(server.requests) == 90


def test_retry_after_holds_for_all_requests(tmp_path):
    def behave(asked, body):
        limited = asked == 0 and question_of(body) == "Question 0?"
        return Reply(429, {"error": {"message": "wait"}}, {"Retry-After": "0.5"}) if limited else good(body)

    with ChatServer(behave).running() as server:
        ask(server, tmp_path / "j", RECORDS[:12], concurrency=1)
    assert server.times[1] - server.times[0] >= 0.5
    assert server.times[-1] - server.times[1] < 3  # not half a second for each of the eleven
    dates = {"retry-after": email.utils.formatdate(time.time() + 30, usegmt=True)}
    assert 25 < _retry_after(dates) <= 30
    assert _retry_after({"retry-after": "soon"}) is None


def test_pauses_double_and_vary(tmp_path):
    with ChatServer(lambda asked, body: Reply(500) if asked < 4 else good(body)).running() as server:
        ask(server, tmp_path / "j", RECORDS[:1], backoff=0.05)
    pauses = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert all(0.5 * 0.05 * 2**n <= pause <= 1.5 * 0.05 * 2**n + 2 for n, pause in enumerate(pauses))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"does not accept the key in MY_KEY \(HTTP 401: .*\).* --teacher_api_key_env"),
        (403, "does not accept the key in MY_KEY"),
        (404, "knows no chat completions of the model tiny .* ends in /v1"),
        (429, "the quota at .* is used up"),
        (402, "the quota at .* is used up"),
        (400, "the quota at .* is used up"),
    ],
)
def test_wrong_settings_stop_the_run_at_once_and_the_key_stays_secret(tmp_path, monkeypatch, caplog, status, message):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    said = "Your credit balance is too low" if status == 400 else "no"
    error = {"error": {"message": f"{said}: sk-very-secret", "code": "insufficient_quota" if status == 429 else None}}
    with (
        caplog.at_level(logging.DEBUG),
        ChatServer(lambda *_: Reply(status, error)).running() as server,
        pytest.raises(TeacherError, match=message) as caught,
    ):
        ask(server, tmp_path / "j", api_key_variable="MY_KEY")
    assert len(server.requests) <= 4
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
    assert "secret" not in f"{caught.value}"
    assert not [record for record in caplog.records if "secret" in record.getMessage()]
    assert b"secret" not in (tmp_path / "j").read_bytes()


def test_a_key_is_sent_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-everyone")
    with ChatServer(lambda _, body: good(body)).running() as server:
        ask(server, tmp_path / "j", RECORDS[:1])
    assert "not-for-everyone" not in str(server.headers)
    with pytest.raises(ValueError, match="NO_SUCH_KEY, but this environment variable is not set"):
        EndpointTeacher("http://127.0.0.1:1/v1", "tiny", "NO_SUCH_KEY")


def test_answers_that_could_not_be_had_are_told_and_asked_for_by_the_next_run(tmp_path):
    broken = {"Question 3?", "Question 17?"}

    def behave(_, body):
        return Reply(500, "down") if question_of(body) in broken else good(body)

    with ChatServer(behave).running() as server:
        with pytest.raises(TeacherError, match=r"2 of 30 answers are missing; each was asked for 3 times, .*HTTP 500"):
            ask(server, tmp_path / "j", retries=2)
        assert len(server.requests) == 28 + 2 * 3
        broken.clear()
        found = ask(server, tmp_path / "j", retries=2)
        assert len(server.requests) == 28 + 2 * 3 + 2
    assert [result["answer"] for result in found] == [f"Answer to Question {index}?" for index in range(30)]


def test_a_server_that_is_down_ends_the_run_early(tmp_path):
    with (
        ChatServer(lambda *_: Reply(500)).running() as server,
        pytest.raises(TeacherError, match=r"14 requests in a row failed, each 1 times"),
    ):
        ask(server, tmp_path / "j", retries=0, records=RECORDS * 100)
    assert len(server.requests) < 30
    with pytest.raises(TeacherError, match="the connection failed"):
        ask(server, tmp_path / "j", RECORDS[:2], retries=1)


def test_an_answer_that_stays_empty_is_skipped_and_noted(tmp_path):
    def behave(_, body):
        return Reply(body=completion("", finish="length")) if question_of(body) == "Question 1?" else good(body)

    with ChatServer(behave).running() as server:
        found = ask(server, tmp_path / "j", RECORDS[:3])
    assert found[1] == {"refused": "the answer is empty"}
    assert server.questions.count("Question 1?") == 3


def test_a_request_the_server_refuses_is_noted_unless_it_refuses_all(tmp_path):
    def behave(_, body):
        too_long = question_of(body) == "Question 0?"
        return Reply(400, {"error": {"message": "maximum context length"}}) if too_long else good(body)

    with ChatServer(behave).running() as server:
        found = ask(server, tmp_path / "j", RECORDS[:5])
        assert "HTTP 400" in found[0]["refused"] and "maximum context length" in found[0]["refused"]
        assert len(server.requests) == 5
    with ChatServer(lambda *_: Reply(422, {"error": {"message": "no such field"}})).running() as server:
        with pytest.raises(TeacherError, match=r"refused 5 requests and answered none; .*no such field"):
            ask(server, tmp_path / "k")
        assert len(server.requests) < 12
        with pytest.raises(TeacherError, match="refused 2 requests"):
            ask(server, tmp_path / "k", RECORDS[:2])
    assert not (tmp_path / "k").read_bytes()


def test_the_other_name_of_the_limit_and_more_fields(tmp_path):
    def behave(_, body):
        if "max_tokens" in body:
            return Reply(400, {"error": {"message": "Unsupported parameter: use 'max_completion_tokens' instead."}})
        return good(body)

    with ChatServer(behave).running() as server:
        ask(server, tmp_path / "j", RECORDS[:6], extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert server.requests[-1]["max_completion_tokens"] == 128
    assert server.requests[-1]["chat_template_kwargs"] == {"enable_thinking": False}
