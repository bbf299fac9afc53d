"""Errors as OpenAI's clients read them: what is wrong, in which field, and what to do."""

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
    if isinstance(error, ScaleDownError | TypeError):
        return ServiceError(400, str(error))
    return ServiceError(500, "The request failed inside the service; its log says why.")


def as_field_error(error: RequestValidationError) -> ServiceError:
    """The first fault of a body, with the field and the place in its list.

    Args:
        error: What validation found.

    Returns:
        The error to reply with.
    """
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such field; check its spelling, or leave it out"
    elif first["type"] == "json_invalid":
        message, name = f"the body is not JSON: {first.get('ctx', {}).get('error', message)}", ""
    return ServiceError(400, f"{name}: {message}" if name else message, name or None)
