"""What a request asks of an engine, and what comes back, piece by piece."""

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from filling_scaledown import DocumentReport, PromptSettings

from .errors import as_service_error

# Logits divided by less leave the range of their type; the likeliest token is taken then, as vLLM does.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How an answer is written.

    Args:
        max_tokens: Tokens at most; None for the model's own limit.
        min_tokens: Tokens before the model may end the answer.
        temperature: 0, and what is less than `LEAST_TEMPERATURE`, takes the likeliest token.
        top_p: Share of the probability to sample from.
        seed: Of the samples; None for a random one.
        stop: Texts the answer ends before.
        top_logprobs: Likeliest tokens to report with each token's own log probability; None reports neither.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < LEAST_TEMPERATURE


@dataclass(frozen=True)
class Start:
    """The first piece: the prompt is built.

    Args:
        documents: One report per document.
        prompt_tokens: Positions of the prompt, slots included.
    """

    documents: list[DocumentReport]
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """Some more of an answer.

    Args:
        text: What was written since the last piece.
        logprobs: One entry per token, as OpenAI's `logprobs.content` has them.
    """

    text: str
    logprobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """The last piece.

    Args:
        finish_reason: `stop` at an end token or a stop text, `length` at the limit.
        completion_tokens: Tokens written, without an end token.
    """

    finish_reason: str
    completion_tokens: int


class AnswerJob:
    """A request for an answer, on its way through an engine; pieces come out as they are written.

    Made in the event loop; an engine puts pieces into it from any thread.

    Args:
        question: A question, or messages that end in one.
        documents: Its documents.
        settings: How the documents are read; jobs with the same share a batch.
        sampling: How the answer is written.
    """

    def __init__(self, question: Any, documents: list[str], settings: PromptSettings, sampling: Sampling):
        self.question, self.documents, self.settings, self.sampling = question, documents, settings, sampling
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Any] = asyncio.Queue()
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Nobody waits any more: what is not yet done may be left."""
        self._cancelled.set()

    def put(self, piece: Start | Piece | End | Exception) -> None:
        """Hand over a piece, or what went wrong."""
        if self._cancelled.is_set():
            return
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed, and with it whoever waited
            self._cancelled.set()

    async def pieces(self) -> AsyncIterator[Start | Piece | End]:
        """The pieces in their order, up to the end.

        Raises:
            ServiceError: What went wrong.
        """
        try:
            while True:
                piece = await self._pieces.get()
                if isinstance(piece, Exception):
                    raise as_service_error(piece) from piece
                yield piece
                if isinstance(piece, End):
                    return
        finally:
            self.cancel()
