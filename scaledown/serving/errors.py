"""Errors as OpenAI's clients read them: what is wrong, in which field, and what to do."""

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from errors_scaledown import ScaleDownError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ServiceError(Exception):
    """A request that gets no answer.

    Args:
        status: HTTP status.
        message: What is wrong and what to do.
        param: Field of the body it is about.
        headers: Of the reply.
    """

    def __init__(self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers

    def body(self) -> dict[str, Any]:
        """The reply."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


def as_service_error(error: Exception) -> ServiceError:
    """What a client is told of an exception: what it can mend in full, and nothing of the rest.

    Args:
        error: What was raised while a request was answered.

    Returns:
        The error to reply with.
    """
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, ScaleDownError):
        return ServiceError(400, str(error))
    return ServiceError(500, "The request failed inside the service; its log says why.")


def as_field_error(error: RequestValidationError) -> ServiceError:
    """The first fault of a body, with the field and the place in its list.

    Args:
        error: What validation found.

    Returns:
        The error to reply with.
    """
    found = [(_place(one["loc"], error.body), one) for one in error.errors()]
    # A field of several kinds has an error for each kind: the one that goes furthest into what was sent is of its kind.
    name, first = max((pair for pair in found if pair[0].startswith(found[0][0])), key=lambda pair: _depth(pair[0]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such field; check its spelling, or leave it out"
    elif first["type"] in ("model_attributes_type", "missing") and not name:
        message = "the body must be a JSON object, sent with the header `Content-Type: application/json`"
    elif first["type"] == "model_attributes_type":
        message = "it is neither a text nor an object" if name.startswith("documents[") else "it is no object"
    elif first["type"] == "json_invalid":
        message, name = f"the body is not JSON: {first.get('ctx', {}).get('error', message)}", ""
    return ServiceError(400, f"{name}: {message}" if name else message, name or None)


def _place(location: Sequence[str | int], body: object) -> str:
    """The place of an error in a body, such as `messages[0].content`; names of kinds among the fields are left out."""
    name, here = "", body
    for part in location[1:]:  # the first says that it is in the body
        if isinstance(part, int):
            name += f"[{part}]"
            here = here[part] if isinstance(here, list) and part < len(here) else None
        elif isinstance(here, dict):
            name += f".{part}"
            here = here.get(part)
    return name.lstrip(".")


def _depth(place: str) -> int:
    return place.count(".") + place.count("[")
