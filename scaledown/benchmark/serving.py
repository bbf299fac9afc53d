"""Requests per second over HTTP: whole documents through vLLM, and compressed ones through the service.

The servers run already. Every request has a question and documents of its own, so that no cache knows them; the two
sides alternate, so that what else the machine does meets both alike, and gains are medians over rounds of the ratio
within a round.
"""

import asyncio
import json
import random
import re
import statistics
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import openai
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from configuration_scaledown import DEFAULT_SYSTEM_PROMPT, DEFAULT_USER_PROMPT
from errors_scaledown import ScaleDownError

from ..common.tables import table
from .arguments import BenchmarkArguments

FULL_TEXT, COMPRESSED = "full text", "compressed"
QUESTION_TOKENS = 16
# Each of the requests under way at once is followed by so many others; a single one by more of them.
REQUESTS_PER_PLACE, LEAST_REQUESTS = 3, 8
SECONDS = 600  # for an answer
# Tokens that are words with the space in front of them; where a tokenizer has none, tokens that are words.
WORDS = re.compile(r"[Ġ▁]([a-z]{3,})"), re.compile(r"([a-z]{3,})")
# What vLLM counts of its prefix cache: tokens it looked up, and those it had.
LOOKUPS, HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
COMPRESSION_HIT_RATE = "scaledown_compression_cache_hit_rate"


@dataclass(frozen=True)
class Question:
    """What a request asks.

    Args:
        text: The question.
        documents: Its documents.
    """

    text: str
    documents: list[str]


@dataclass(frozen=True)
class Reply:
    """When an answer came.

    Args:
        started: When it was asked for.
        first: When its first text came.
        ended: When its last came.
        prompt_tokens: Positions that the generator read.
    """

    started: float
    first: float
    ended: float
    prompt_tokens: int


class Questions:
    """Questions and documents of random words, no two alike.

    Args:
        tokenizer: Counts their tokens.
        arguments: How many tokens, and the seed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: BenchmarkArguments):
        self._tokenizer, self._arguments = tokenizer, arguments
        self._random = random.Random(arguments.seed)
        marked, plain = (
            [word[1] for token in tokenizer.get_vocab() if (word := kind.fullmatch(token))] for kind in WORDS
        )
        self._words = sorted(marked or plain)
        if len(self._words) < 100:
            raise ScaleDownError(
                f"the tokenizer of {arguments.generator} has {len(self._words)} words to make documents of, expected "
                "at least 100; name the folder that vLLM serves."
            )

    def draw(self) -> Question:
        """A question with its documents."""
        arguments = self._arguments
        documents = [self._text(arguments.document_length) for _ in range(arguments.num_documents)]
        return Question(self._text(arguments.query_length or QUESTION_TOKENS), documents)

    def _text(self, tokens: int) -> str:
        words = self._random.choices(self._words, k=tokens)
        while True:
            count = len(self._tokenizer(" ".join(words), add_special_tokens=False)["input_ids"])
            if count <= tokens or len(words) == 1:
                return " ".join(words)
            words.pop()


class Side:
    """One of the two that are compared.

    Args:
        name: `FULL_TEXT` or `COMPRESSED`.
        url: Its API.
        arguments: How an answer is asked for.
    """

    def __init__(self, name: str, url: str, arguments: BenchmarkArguments):
        self.name, self._url, self._arguments = name, url.rstrip("/"), arguments
        self._client = openai.AsyncOpenAI(base_url=self._url, api_key="none", max_retries=0, timeout=SECONDS)
        self._model = ""

    def request(self, question: Question) -> dict[str, Any]:
        """Arguments of a chat completion: documents as text in the prompt, or in a field of their own."""
        arguments = self._arguments
        more: dict[str, Any] = {"min_tokens": arguments.new_tokens}
        if self.name == COMPRESSED:
            messages = [{"role": "user", "content": question.text}]
            more |= {"documents": question.documents, "compression_rate": arguments.compression_rate}
        else:
            prompt = DEFAULT_USER_PROMPT.format(documents="\n".join(question.documents), question=question.text)
            messages = [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
        return {
            "model": self._model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "max_tokens": arguments.new_tokens,
            "extra_body": more,
        }

    async def prepare(self) -> None:
        """Ask which model is served.

        Raises:
            ScaleDownError: Nobody answers.
        """
        try:
            self._model = (await self._client.models.list()).data[0].id
        except openai.OpenAIError as error:
            raise ScaleDownError(
                f"no API at {self._url} ({self.name}): {error} Start the server, or correct its URL."
            ) from error

    async def ask(self, question: Question) -> Reply:
        """Stream an answer.

        Raises:
            ScaleDownError: It is an error, or not as long as was asked for.
        """
        place = f"{self._url} ({self.name})"
        started, times, usage = time.perf_counter(), [], {}
        try:
            # Lines as they come: what the client makes of them takes time from the servers, which share its cores.
            asked = self._client.chat.completions.with_streaming_response.create(**self.request(question))
            async with asked as reply:
                async for line in reply.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ScaleDownError(f"{place} broke off: {event['error']}")
                    usage = event.get("usage") or usage
                    if any(choice["delta"].get("content") for choice in event["choices"]):
                        times.append(time.perf_counter())
        except openai.OpenAIError as error:
            raise ScaleDownError(f"{place} failed: {error}") from error
        asked_for, written = self._arguments.new_tokens, usage.get("completion_tokens")
        if not times or written != asked_for:
            raise ScaleDownError(f"{place} wrote {written} tokens where {asked_for} were asked for.")
        return Reply(started, times[0], times[-1], usage["prompt_tokens"])

    async def run(self, questions: Sequence[Question], concurrency: int) -> list[Reply]:
        """Ask all questions, so many at once."""
        waiting, replies = list(reversed(questions)), []

        async def work() -> None:
            while waiting:
                replies.append(await self.ask(waiting.pop()))

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        return replies

    def metric(self, name: str) -> float:
        """A figure from the server's page for Prometheus, summed over its labels; 0 where it is not there."""
        with urllib.request.urlopen(f"{self._url.removesuffix('/v1')}/metrics", timeout=SECONDS) as reply:
            text = reply.read().decode()
        return sum(map(float, re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)))


def measure(arguments: BenchmarkArguments) -> list[dict[str, Any]]:
    """Measure both sides at each number of requests at once.

    Args:
        arguments: Where the servers are, and what is read and written.

    Returns:
        A JSON object for each side and number.

    Raises:
        ScaleDownError: A server does not answer, or not as it should.
    """
    tokenizer = AutoTokenizer.from_pretrained(arguments.generator)
    try:
        return asyncio.run(_measure(arguments, Questions(tokenizer, arguments)))
    except ExceptionGroup as group:
        raise group.exceptions[0] from group


async def _measure(arguments: BenchmarkArguments, questions: Questions) -> list[dict[str, Any]]:
    sides = [Side(FULL_TEXT, arguments.text_url, arguments), Side(COMPRESSED, arguments.service_url, arguments)]
    for side in sides:
        await side.prepare()
    rows = []
    for concurrency in tqdm(arguments.levels, desc="Requests at once", disable=None):
        rows += await _measure_level(sides, questions, concurrency, arguments.repeats)
    return rows


async def _measure_level(
    sides: Sequence[Side], questions: Questions, concurrency: int, repeats: int
) -> list[dict[str, Any]]:
    count = max(LEAST_REQUESTS, REQUESTS_PER_PLACE * concurrency)
    rounds: dict[str, list[_Round]] = {side.name: [] for side in sides}
    for side in sides:
        await side.run([questions.draw() for _ in range(concurrency)], concurrency)  # warm-up
    text, compressed = sides
    for _ in range(repeats):
        for side in sides:
            before = text.metric(LOOKUPS), text.metric(HITS)
            replies = await side.run([questions.draw() for _ in range(count)], concurrency)
            lookups, hits = text.metric(LOOKUPS) - before[0], text.metric(HITS) - before[1]
            rounds[side.name].append(_Round(replies, hits / max(lookups, 1)))
    rates = {name: [found.requests_per_second for found in listed] for name, listed in rounds.items()}
    rows = []
    for side in sides:
        replies = [reply for found in rounds[side.name] for reply in found.replies]
        totals = sorted(reply.ended - reply.started for reply in replies)
        firsts = sorted(reply.first - reply.started for reply in replies)
        gains = [rate / base for rate, base in zip(rates[side.name], rates[text.name], strict=True)]
        rows.append(
            {
                "concurrency": concurrency,
                "side": side.name,
                "requests": len(replies),
                "prompt_tokens": statistics.median(reply.prompt_tokens for reply in replies),
                "requests_per_second": statistics.median(rates[side.name]),
                "requests_per_second_of_rounds": rates[side.name],
                "gain": statistics.median(gains),
                "gain_of_rounds": gains,
                "seconds_p50": _quantile(totals, 0.5),
                "seconds_p95": _quantile(totals, 0.95),
                "first_token_p50": _quantile(firsts, 0.5),
                "first_token_p95": _quantile(firsts, 0.95),
                "prefix_cache_hit_rate": statistics.median(found.prefix_hit_rate for found in rounds[side.name]),
                "compression_cache_hit_rate": compressed.metric(COMPRESSION_HIT_RATE) if side is compressed else None,
            }
        )
    return rows


@dataclass(frozen=True)
class _Round:
    """Replies of one side in one round, and the share of their prompts' tokens that vLLM's prefix cache had."""

    replies: list[Reply]
    prefix_hit_rate: float

    @property
    def requests_per_second(self) -> float:
        started, ended = min(reply.started for reply in self.replies), max(reply.ended for reply in self.replies)
        return len(self.replies) / (ended - started)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The least value that a share of all does not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the figures.

    Args:
        rows: What `measure` returned.

    Returns:
        A table in Markdown.
    """
    head = ("at once", "prompt", "tokens", "requests/s", "gain", "p50, s", "p95, s", "first token, p50", "p95")
    body = []
    for row in rows:
        low, high = min(row["gain_of_rounds"]), max(row["gain_of_rounds"])
        gain = "" if row["side"] == FULL_TEXT else f"{row['gain']:.2f}× ({low:.2f}–{high:.2f})"
        times = ("seconds_p50", "seconds_p95", "first_token_p50", "first_token_p95")
        figures = (f"{row['prompt_tokens']:.0f}", f"{row['requests_per_second']:.2f}", gain)
        body.append((row["concurrency"], row["side"], *figures, *(f"{row[name]:.2f}" for name in times)))
    return table([head, *body], text_columns=2)
