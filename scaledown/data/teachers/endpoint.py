"""An answer teacher behind an OpenAI-compatible endpoint: vLLM, TGI, or a hosted one."""

import asyncio
import contextlib
import email.utils
import itertools
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm

from errors_scaledown import ScaleDownError

from ...common.prompts import build_messages
from ...common.text import is_blank
from ..journal import Journal
from .answers import TeacherError, duration

logger = logging.getLogger(__name__)

EMPTY_ANSWER = "the answer is empty"
MAX_BACKOFF = 60.0
# A server that asks for a longer pause is asked again after this one.
MAX_RETRY_AFTER = 600.0
# At temperature 0 an empty answer is likely to stay empty.
TRIES_FOR_EMPTY_ANSWER = 3
# So many records refused before the first success are a fault of the settings, not of the records.
REFUSALS_BEFORE_SUCCESS = 5
SECONDS_BETWEEN_SYNCS = 1.0
# Endpoints differ in the status with which they say that the account, not the request, is what they refuse.
SPENT_CODES = ("insufficient_quota", "insufficient_balance", "billing_hard_limit_reached", "billing_not_active")
SPENT = re.compile(r"insufficient (?:balance|credit|fund|quota)|credit balance|out of credits", re.IGNORECASE)


class _RetryError(Exception):
    """A failure that may pass.

    Args:
        reason: What happened.
        wait: Seconds the server asked to wait.
        empty: Whether all that is wrong is that the answer is empty.
    """

    def __init__(self, reason: str, wait: float | None = None, empty: bool = False):
        super().__init__(reason)
        self.wait = wait
        self.empty = empty


class _RefusedError(Exception):
    """The server does not want this request, however often it is sent."""


class EndpointTeacher:
    """Asks an endpoint for chat completions, many at a time.

    Failures that may pass (rate limits, errors of the server, timeouts, broken connections, replies that are cut off
    or no chat completion, empty answers) are tried again after a pause that doubles, with jitter; a server's
    Retry-After is honoured, by all requests. Failures of the settings (401, 403, 404, an exhausted quota or balance)
    stop the run.

    Args:
        url: The endpoint, up to and with `/v1`.
        model: The model's name there.
        api_key_variable: Environment variable that holds the key; without it none is sent. The key is neither logged
            nor written.
        concurrency: Requests under way at once.
        retries: Further tries after the first.
        timeout: Seconds for one request.
        backoff: Seconds before the second try.
        max_tokens: Tokens of an answer at most.
        temperature: 0 is greedy.
        seed: Sent along, for endpoints that sample with it.
        extra_body: More fields of the request.
        on_pace: Called after the first requests with seconds per request at this concurrency and mean tokens of an
            answer.

    Raises:
        ImportError: The package openai is missing.
        ValueError: The environment variable is not set.
    """

    # How messages call the options that set it up, and what its progress bar says.
    option = "--teacher"
    doing = "Answering"

    def __init__(
        self,
        url: str,
        model: str,
        api_key_variable: str | None = None,
        concurrency: int = 16,
        retries: int = 8,
        timeout: float = 120.0,
        backoff: float = 1.0,
        max_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        extra_body: dict[str, Any] | None = None,
        on_pace: Callable[[float, float], None] | None = None,
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                'openai, the client of endpoints, is missing; install it with `pip install ".[data]"` in the checkout.'
            ) from error
        self._openai = openai
        self._key = ""
        self._key_variable = api_key_variable
        if api_key_variable is not None:
            self._key = os.environ.get(api_key_variable, "")
            if not self._key:
                raise ScaleDownError(
                    f"{self.option}_api_key_env names {api_key_variable}, but this environment variable is not set; "
                    f"expected the key of {url} in it. Set it, or leave the option out for a server without a key."
                )
        self.url = url
        self.model = model
        self.concurrency = concurrency
        self.retries = retries
        self.timeout = timeout
        self.backoff = backoff
        self.request = {"temperature": temperature, "seed": seed, **(extra_body or {})}
        self.max_tokens = max_tokens
        # Newer models of OpenAI know the limit by another name only.
        self._limit_name = "max_completion_tokens" if "max_completion_tokens" in self.request else "max_tokens"
        self.on_pace = on_pace
        self._pause_until = 0.0
        self._last_sync = 0.0
        self._told_failure = False
        self._jitter = random.Random(seed)

    def answer(self, record_at: Callable[[int], dict[str, Any]], count: int, journal: Journal) -> None:
        """See `AnswerTeacher.answer`."""
        asyncio.run(self._answer(record_at, count, journal))

    def messages(self, record: dict[str, Any]) -> list[dict[str, str]]:
        """Say what is asked about a record.

        Args:
            record: A record.

        Returns:
            Chat messages.
        """
        return build_messages(record["query"], record["documents"])

    async def _answer(self, record_at: Callable[[int], dict[str, Any]], count: int, journal: Journal) -> None:
        client = self._openai.AsyncOpenAI(
            base_url=self.url, api_key=self._key or "none", max_retries=0, timeout=self.timeout
        )
        run = _Shared(record_at, journal)
        missing = journal.missing(count)
        async with client:
            with tqdm(desc=self.doing, unit="answer", total=count, initial=len(journal), disable=None) as progress:
                run.progress = progress
                start, before = time.perf_counter(), len(journal)
                # A first batch tells the pace and the length of the answers; its results count like any other.
                await self._work(client, run, itertools.islice(missing, 2 * self.concurrency))
                written = len(journal) - before
                if written and len(journal) < count:
                    self._tell_pace((time.perf_counter() - start) / written, run, count - len(journal))
                await self._work(client, run, missing)
        journal.sync()
        self._keep_refusals(run, final=True)
        left = sum(1 for _ in journal.missing(count))
        if left:
            raise TeacherError(
                f"{left} of {count} answers are missing; each was asked for {self.retries + 1} times, the last failure "
                f"being: {run.last_failure}. The other {count - left} are kept in {journal.path}. Fix the endpoint "
                f"({self.url}) if need be; the same command then asks for the missing ones only."
            )

    async def _work(self, client: Any, run: "_Shared", indices: Iterator[int]) -> None:
        """Answer records with as many workers as requests may be under way."""
        workers = [asyncio.create_task(self._worker(client, run, indices)) for _ in range(self.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _worker(self, client: Any, run: "_Shared", indices: Iterator[int]) -> None:
        for index in indices:
            record = run.record_at(index)
            messages = self.messages(record)
            try:
                result = await self._ask_until_answered(client, messages)
            except _RefusedError as error:
                run.refused.append((index, {"refused": str(error)}))
                self._keep_refusals(run)
                continue
            except _RetryError as error:
                run.last_failure = str(error)
                run.failures_in_a_row += 1
                limit = 10 + self.concurrency
                if run.failures_in_a_row == 1:
                    logger.warning("a request was given up: %s. The run stops after %d in a row.", error, limit)
                if run.failures_in_a_row >= limit:
                    raise TeacherError(
                        f"{run.failures_in_a_row} requests in a row failed, each {self.retries + 1} times, the last "
                        f"with: {error}. The {len(run.journal)} answers so far are kept in {run.journal.path}. Fix "
                        f"the endpoint ({self.url}); the same command then goes on."
                    ) from error
                continue
            run.failures_in_a_row = 0
            run.successes += 1
            run.completion_tokens += result["completion_tokens"]
            now = time.monotonic()
            sync = now - self._last_sync >= SECONDS_BETWEEN_SYNCS
            if sync:
                self._last_sync = now
            run.journal.append([(index, result)], sync=sync)
            self._keep_refusals(run)
            run.progress.update(1)

    def _keep_refusals(self, run: "_Shared", final: bool = False) -> None:
        """Write down refusals once a success shows that the settings are right."""
        if run.successes == 0 and len(run.journal) == 0 and (len(run.refused) >= REFUSALS_BEFORE_SUCCESS or final):
            if run.refused:
                raise TeacherError(
                    f"{self.url} refused {len(run.refused)} requests and answered none; the last with: "
                    f"{run.refused[-1][1]['refused']}. Check {self.option}, {self.option}_url and "
                    f"{self.option}_extra_body."
                )
        elif run.successes or len(run.journal):
            run.journal.append(run.refused)
            run.progress.update(len(run.refused))
            run.refused = []

    async def _ask_until_answered(self, client: Any, messages: list[dict[str, str]]) -> dict[str, Any]:
        empty = 0
        for attempt in range(self.retries + 1):
            await self._pause()
            try:
                return await self._ask(client, messages)
            except _RetryError as error:
                empty += error.empty
                if error.empty and empty >= min(TRIES_FOR_EMPTY_ANSWER, self.retries + 1):
                    raise _RefusedError(EMPTY_ANSWER) from error
                if attempt == self.retries:
                    raise
                wait = min(self.backoff * 2**attempt, MAX_BACKOFF) * (0.5 + self._jitter.random())
                if error.wait is not None:
                    # The limit is the server's, not that of one request. Some jitter, or all would come back at once.
                    wait = min(error.wait, MAX_RETRY_AFTER) + wait * self._jitter.random()
                    self._pause_until = max(self._pause_until, time.monotonic() + min(error.wait, MAX_RETRY_AFTER))
                self._tell_first_failure(error)
                logger.debug("trying again in %.1f s: %s", wait, error)
                await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    def _tell_first_failure(self, error: _RetryError) -> None:
        """Say that something is wrong, and for how long nothing else will be heard of it."""
        if self._told_failure:
            return
        self._told_failure = True
        pauses = sum(min(self.backoff * 2**attempt, MAX_BACKOFF) for attempt in range(self.retries))
        logger.warning(
            "a request to %s failed: %s. It is tried %d more times, over about %s, or %s if each try takes the whole "
            "timeout of %g s; Ctrl-C stops, and the same command goes on.",
            self.url,
            error,
            self.retries,
            duration(pauses),
            duration(pauses + self.retries * self.timeout),
            self.timeout,
        )

    async def _pause(self) -> None:
        while (wait := self._pause_until - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    async def _ask(self, client: Any, messages: list[dict[str, str]]) -> dict[str, Any]:
        openai = self._openai
        limit_name = self._limit_name
        body = self.request if limit_name in self.request else {limit_name: self.max_tokens, **self.request}
        try:
            # Raw, since what the package makes of a reply in a wrong form is no error but an object without content.
            reply = await client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, extra_body=body
            )
            return _read_reply(reply.text if isinstance(reply.text, str) else reply.text())
        except openai.APIStatusError as error:
            raise self._explain(error, limit_name) from error
        except openai.APITimeoutError as error:
            raise _RetryError(f"no reply within {self.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise _RetryError(self._redacted(f"the connection failed ({error.__cause__ or error})")) from error
        except (openai.APIError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _RetryError(self._redacted(f"the reply is not what was expected ({error})")) from error
        except openai.OpenAIError as error:
            raise _RetryError(self._redacted(f"{type(error).__name__}: {error}")) from error

    def _explain(self, error: Any, limit_name: str) -> Exception:
        """The exception that a status stands for."""
        status, text = error.status_code, self._redacted(str(error.message))[:300]
        told = f"HTTP {status}: {text}"
        code = getattr(error, "code", None)
        if status == 402 or code in SPENT_CODES or (status in (400, 403, 429) and SPENT.search(text)):
            return TeacherError(
                f"the quota at {self.url} is used up ({told}). The same command goes on once there is more."
            )
        if status in (401, 403):
            where = f"the key in {self._key_variable}" if self._key_variable else "a request without a key"
            return TeacherError(
                f"{self.url} does not accept {where} ({told}). Name the environment variable that holds the key with "
                f"{self.option}_api_key_env, and check the key."
            )
        if status == 404:
            return TeacherError(
                f"{self.url} knows no chat completions of the model {self.model} ({told}). Check {self.option} and "
                f"{self.option}_url, which ends in /v1 for most servers."
            )
        if status in (408, 409, 425, 429) or status >= 500:
            return _RetryError(told, wait=_retry_after(error.response.headers))
        if status == 400 and limit_name == "max_tokens" and "max_completion_tokens" in text:
            self._limit_name = "max_completion_tokens"
            return _RetryError(told, wait=0.0)
        return _RefusedError(told)

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _tell_pace(self, seconds: float, run: "_Shared", left: int) -> None:
        tokens = run.completion_tokens / max(run.successes, 1)
        logger.info(
            "at the pace of the first requests, the other %d answers take about %s", left, duration(seconds * left)
        )
        if self.on_pace is not None:
            self.on_pace(seconds, tokens)


class _Shared:
    """What the workers of one run share."""

    def __init__(self, record_at: Callable[[int], dict[str, Any]], journal: Journal):
        self.record_at = record_at
        self.journal = journal
        self.progress: Any = None
        self.successes = 0
        self.completion_tokens = 0
        self.failures_in_a_row = 0
        self.last_failure = "none"
        self.refused: list[tuple[int, dict[str, Any]]] = []


def _read_reply(text: str) -> dict[str, Any]:
    """The answer in a chat completion's JSON."""
    reply = json.loads(text)
    try:
        choice = reply["choices"][0]
        content = choice["message"]["content"]
        usage = reply.get("usage") or {}
        prompt_tokens, completion_tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        finish = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _RetryError(f"the reply is no chat completion: {text[:120]}") from error
    if not isinstance(content, str | None) or not all(isinstance(n, int) for n in (prompt_tokens, completion_tokens)):
        raise _RetryError(f"the reply is no chat completion: {text[:120]}")
    with contextlib.suppress(UnicodeEncodeError):
        (content or "").encode("utf-8")
        if not is_blank(content or ""):
            return {
                "answer": content.strip(),
                "cut": finish == "length",
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
            }
        raise _RetryError(EMPTY_ANSWER, empty=True)
    raise _RetryError("the answer holds half of a surrogate pair")


def _retry_after(headers: Any) -> float | None:
    """Seconds the server asks to wait, which it may give as a number or as a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(float(value), 0.0)
    with contextlib.suppress(ValueError, TypeError):
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None
