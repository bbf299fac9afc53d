"""Tokens of an answer as they are written: `generate()` in a thread, which ends where nobody waits any more."""

import time
from collections.abc import Callable, Iterator
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from processing_scaledown import ScaleDownProcessor

REPLACEMENT = "�"  # what the bytes of half a character decode to


class _TokenQueue(BaseStreamer):
    """Takes tokens out of `generate()` with the moment each was written."""

    def __init__(self):
        self.queue: Queue[tuple[float, int | None] | Exception] = Queue()
        self.ended: float | None = None
        self._has_prompt = False

    def put(self, value: torch.LongTensor) -> None:
        """See `BaseStreamer`; the first call brings the prompt."""
        if self._has_prompt:
            moment = time.perf_counter()
            for token in value.flatten().tolist():
                self.queue.put((moment, token))
        self._has_prompt = True

    def end(self) -> None:
        """See `BaseStreamer`."""
        self.ended = time.perf_counter()


class _Stopped(StoppingCriteria):
    """Ends an answer that nobody waits for any more."""

    def __init__(self, event: Event):
        self._event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        """See `StoppingCriteria`; returns `(batch,)`."""
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


def text_so_far(processor: ScaleDownProcessor, ids: list[int]) -> str:
    """Decode an answer that is being written, up to its last whole character.

    Args:
        processor: The model's.
        ids: All its tokens: a part, decoded by itself, may lose the blank it begins with.

    Returns:
        The text, as the whole answer will begin.
    """
    (text,) = processor.decode_answers(torch.tensor([ids]))
    return text.rstrip(REPLACEMENT)


def stream_tokens(generate: Callable[..., Any]) -> Iterator[tuple[float, int | None]]:
    """Run a `generate()` for one prompt in a thread, and hand over its tokens as they are written.

    Args:
        generate: Takes `streamer` and `stopping_criteria`.

    Yields:
        The moment on `time.perf_counter` and the token; at the end, once `generate` has returned, the moment of the
        last token and None.

    Raises:
        Exception: What `generate` raised.
    """
    streamer, stopped = _TokenQueue(), Event()

    def run() -> None:
        try:
            generate(streamer=streamer, stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]))
            streamer.queue.put((streamer.ended or time.perf_counter(), None))
        except Exception as error:
            streamer.queue.put(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            item = streamer.queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item[1] is None:
                return
    finally:
        stopped.set()
        thread.join()
