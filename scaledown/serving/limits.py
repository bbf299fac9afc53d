"""What keeps a request from harming the service: the size of its body, a key, and its time."""

import hmac
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from .errors import ServiceError

# A body so many times too large is not even read to its end.
DRAINED = 10


class BodyLimit:
    """Middleware that refuses a body larger than a limit, and keeps none of it.

    Args:
        app: The application behind it.
        max_bytes: Size of a body at most.
        on_refusal: Called for each body that is refused.
    """

    def __init__(self, app: Any, max_bytes: int, on_refusal: Callable[[], None]):
        self._app, self._max_bytes, self._on_refusal = app, max_bytes, on_refusal

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        messages, size, more = [], 0, True
        while more and size <= DRAINED * self._max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            # Read to its end all the same: a client that is still sending would not see the reply.
            messages = [*messages, message] if size <= self._max_bytes else []
        if size > self._max_bytes:
            error = ServiceError(
                413, f"the body is larger than {self._max_bytes} bytes; send fewer or shorter documents"
            )
            reply = JSONResponse(error.body(), error.status, {"Connection": "close"})
            self._on_refusal()
            await reply(scope, receive, send)
            return

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)


def check_key(request: Request, api_key: str | None) -> None:
    """Refuse a request without the service's key.

    Args:
        request: The request.
        api_key: The key; None asks for none.

    Raises:
        ServiceError: There is no key, or another.
    """
    if api_key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(errors="replace"), api_key.encode()):
        raise ServiceError(
            401, "send the service's key as `Authorization: Bearer KEY`", headers={"WWW-Authenticate": "Bearer"}
        )
