"""A chat completions server on 127.0.0.1 that behaves as a test wants it to."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does with one request.

    Args:
        status: HTTP status.
        body: A JSON value, or text that is sent as it is.
        headers: More headers.
        delay: Seconds before the reply.
        cut: Bytes of the body that are announced but not sent before the connection closes.
    """

    status: int = 200
    body: Any = ""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int = 0


def completion(text: str | None, finish: str = "stop", completion_tokens: int = 3) -> dict[str, Any]:
    """A chat completion."""
    usage = {"prompt_tokens": 11, "completion_tokens": completion_tokens, "total_tokens": 11 + completion_tokens}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion", "model": "tiny", "choices": [choice], "usage": usage}


def question_of(body: dict[str, Any]) -> str:
    """The question in a request."""
    return body["messages"][-1]["content"].rsplit("Question: ", 1)[1]


class ChatServer:
    """Counts requests and answers each as `behave` says.

    Args:
        behave: Takes how often this question was asked before, and the request; returns the reply.
        pages: What it says to GET, by path: a JSON value, or text.
    """

    def __init__(self, behave: Callable[[int, dict[str, Any]], Reply], pages: dict[str, Any] | None = None):
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = 0
        lock = threading.Lock()
        at_work = [0]
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    asked = sum(body["messages"] == other["messages"] for other in server.requests)
                    server.requests.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.times.append(time.monotonic())
                    at_work[0] += 1
                    server.most_at_once = max(server.most_at_once, at_work[0])
                try:
                    self.reply(behave(asked, body))
                finally:
                    with lock:
                        at_work[0] -= 1

            def do_GET(self):
                body = (pages or {}).get(self.path)
                self.reply(Reply(404) if body is None else Reply(body=body))

            def reply(self, reply: Reply) -> None:
                time.sleep(reply.delay)
                data = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
                with contextlib.suppress(OSError):
                    self.send_response(reply.status)
                    for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: len(data) - reply.cut])

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator["ChatServer"]:
        """Serve while the block runs."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    @property
    def questions(self) -> list[str]:
        """The questions asked, in order."""
        return [question_of(body) for body in self.requests]
