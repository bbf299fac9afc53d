"""A service on a port of this machine, in a thread of the tests."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import uvicorn

from scaledown import ScaleDownModel
from scaledown.serving.app import create_app
from scaledown.serving.arguments import ServingArguments
from scaledown.serving.engine import Engine
from scaledown.serving.metrics import Metrics
from scaledown.serving.serve import build_engine


class Service:
    """A running service.

    Args:
        port: Where it listens.
        engine: What answers.
    """

    def __init__(self, port: int, engine: Engine):
        self.url, self.engine = f"http://127.0.0.1:{port}", engine
        self._clients: dict[str, openai.OpenAI] = {}

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """OpenAI's own client, which takes long to make."""
        if api_key not in self._clients:
            self._clients[api_key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)
        return self._clients[api_key]

    def send(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
        """Status, JSON or text, and headers of a reply; `body` is JSON, or bytes as they are."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                status, text, found = reply.status, reply.read().decode(), reply.headers
        except urllib.error.HTTPError as error:
            status, text, found = error.code, error.read().decode(), error.headers
        return status, json.loads(text) if found.get_content_type() == "application/json" else text, found


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def running(app: Any, port: int = 0) -> Iterator[int]:
    """Runs an application until the block ends, on the port that it yields."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def serving(model: ScaleDownModel, **settings: Any) -> Iterator[Service]:
    """Serves a model as `tiny` until the block ends."""
    arguments = ServingArguments(**{"model": "tiny", "max_new_tokens": 8, **settings})
    metrics = Metrics()
    engine = build_engine(model, arguments, metrics)
    with running(create_app(engine, arguments, metrics, "tiny")) as port:
        yield Service(port, engine)
