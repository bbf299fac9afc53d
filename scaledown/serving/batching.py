"""Requests that come close together share a pass of the model."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Work:
    """Something to be done in a batch.

    Args:
        key: Work shares a batch with work of an equal key.
        run: Does the work of a whole batch. Where it raises, each of the batch is tried alone.
        fail: Takes what was raised for this work alone.
        item: What the work is about.
    """

    key: Hashable
    run: Callable[[list[Any]], None]
    fail: Callable[[Exception], None]
    item: Any
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """A thread that takes waiting work in batches: the oldest first, and with it what has the same key.

    Args:
        max_batch_size: Requests of a batch at most.
        max_wait: Seconds that the first of a batch waits for others.
        max_queue: Requests that may wait at most.
        on_batch: Called with the size of each batch.
    """

    def __init__(
        self, max_batch_size: int, max_wait: float, max_queue: int, on_batch: Callable[[int], None] = lambda size: None
    ):
        self._max_batch_size, self._max_wait, self._max_queue = max_batch_size, max_wait, max_queue
        self._on_batch = on_batch
        self._waiting: deque[Work] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="scaledown-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether no more may wait."""
        return len(self._waiting) >= self._max_queue

    @property
    def is_alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    def submit(self, work: Work) -> None:
        """Let work wait for its batch."""
        with self._changed:
            self._waiting.append(work)
            self._changed.notify()

    async def call(self, key: Hashable, run: Callable[[list[Any]], list[Any]], argument: Any) -> Any:
        """Do a function's work in a batch.

        Args:
            key: As in `Work`.
            run: Takes the arguments of a batch, and returns a result for each.
            argument: Of this call.

        Returns:
            Its result.

        Raises:
            Exception: What `run` raised for this argument alone.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(to: asyncio.Future[Any], result: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it whoever waited
                loop.call_soon_threadsafe(_resolve, to, result)

        def work(items: list[tuple[Any, asyncio.Future[Any]]]) -> None:
            wanted = [item for item in items if not item[1].cancelled()]
            if wanted:
                results = run([argument for argument, _ in wanted])
                for (_, waiting), result in zip(wanted, results, strict=True):
                    settle(waiting, result)

        self.submit(Work(key, work, lambda error: settle(future, error), (argument, future)))
        return await future

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            self._on_batch(len(batch))
            self._run(batch)

    def _run(self, batch: list[Work]) -> None:
        try:
            batch[0].run([work.item for work in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].fail(error)
                return
            for work in batch:  # one of them is at fault, and the others are not to suffer for it
                self._run([work])

    def _next_batch(self) -> list[Work]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return []
            first = self._waiting[0]
            until = first.arrived + self._max_wait
            while not self._closed and self._fitting(first) < self._max_batch_size:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch = [work for work in self._waiting if work.key == first.key][: self._max_batch_size]
            taken = {id(work) for work in batch}
            self._waiting = deque(work for work in self._waiting if id(work) not in taken)
            return batch

    def _fitting(self, first: Work) -> int:
        return sum(work.key == first.key for work in self._waiting)


def _resolve(future: asyncio.Future, result: Any) -> None:
    if future.done():  # cancelled in between
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
