"""The engine in front of vLLM: documents are compressed here, and vLLM's generator reads the prompts' embeddings.

vLLM loads what `python -m scaledown.tools.export_generator` writes, with `--enable-prompt-embeds`. That flag is for
trusted clients only: vLLM must be reached by this service alone, on loopback or a private address.

vLLM sends token ids, and the text is made of them here, so that white space, stop texts and counts are those of the
engine in this process.
"""

import asyncio
import base64
import io
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import openai
import torch

from errors_scaledown import ScaleDownError
from filling_scaledown import embed_prompts

from .decoding import Row, end_ids, logprob_entry
from .engine import CompressorEngine, answer_limit
from .errors import ServiceError
from .jobs import AnswerJob, Start

logger = logging.getLogger(__name__)

# Seconds before what vLLM refused, or broke off before the first token, is sent once more.
PAUSE_BEFORE_RETRY = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready to be sent.

    Args:
        embeddings: `(length, hidden)`, as vLLM reads it.
        start: What the client learns of it.
    """

    embeddings: str
    start: Start


@dataclass(frozen=True)
class Served:
    """What vLLM serves.

    Args:
        name: Of the generator.
        max_length: Positions of a prompt with its answer at most; None where vLLM does not say.
    """

    name: str
    max_length: int | None


class VLLMEngine:
    """Answers by a vLLM server.

    Args:
        compressor: The model, whose generator is never run, and its thread.
        url: vLLM's API, such as `http://127.0.0.1:8001/v1`.
        model_name: Name that vLLM serves the generator by; None takes what it serves.
        max_new_tokens: Tokens of an answer where a request asks for no number.
        timeout: Seconds that an answer may take.
    """

    name = "vllm"

    def __init__(
        self, compressor: CompressorEngine, url: str, model_name: str | None, max_new_tokens: int, timeout: float
    ):
        self.compressor, self._max_new_tokens, self._model_name = compressor, max_new_tokens, model_name
        self._url, self._served, self._end_ids = url, None, end_ids(compressor.model)
        self._client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=timeout)
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, job: AnswerJob) -> None:
        """See `Engine.submit`."""
        task = asyncio.get_running_loop().create_task(self._answer(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def unavailable(self) -> str | None:
        """See `Engine.unavailable`."""
        if not self.compressor.batcher.is_alive:
            return "the thread of the model has ended"
        try:
            await self._ask_what_is_served(self._client.with_options(timeout=5))
        except (openai.OpenAIError, ServiceError) as error:
            return f"vLLM does not answer at {self._url} as it should: {error}"
        return None

    async def close(self) -> None:
        """See `Engine.close`."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.compressor.batcher.close)
        await self._client.close()

    async def _answer(self, job: AnswerJob) -> None:
        try:
            prompt = await self.compressor.batcher.call(("prompt", job.settings), self._embed, job)
            if prompt is not None:
                await self._write(job, prompt)
        except Exception as error:
            if not isinstance(error, ScaleDownError | ServiceError):
                logger.exception("a request failed")
            job.put(error)

    @torch.inference_mode()
    def _embed(self, jobs: Sequence[AnswerJob]) -> list[Prompt | None]:
        """The prompts of jobs with equal settings; None for those that nobody waits for any more."""
        waiting = [place for place, job in enumerate(jobs) if not job.cancelled]
        prompts: list[Prompt | None] = [None] * len(jobs)
        if not waiting:
            return prompts
        filled = self.compressor.fill([jobs[place] for place in waiting])
        embeddings = embed_prompts(self.compressor.model, filled)  # (batch, prompt_len, hidden)
        rows = filled.batch["attention_mask"].bool()
        for row, place in enumerate(waiting):
            own = embeddings[row][rows[row]]  # (length, hidden)
            prompts[place] = Prompt(_encode(own), Start(filled.reports(row), len(own)))
        return prompts

    async def _write(self, job: AnswerJob, prompt: Prompt) -> None:
        for is_last in (False, True):
            row = None
            try:
                if self._served is None:
                    self._served = await self._ask_what_is_served(self._client)
                length, asked = prompt.start.prompt_tokens, job.sampling.max_tokens
                limit = answer_limit(
                    self.compressor.model, length, asked, self._max_new_tokens, self._served.max_length
                )
                row = Row(job, limit, self.compressor.model.processor.tokenizer, self._end_ids)
                await self._stream(job, prompt, row, self._served.name, limit)
                return
            except openai.OpenAIError as error:
                self._served = None  # another model may be served by the time vLLM answers again
                if isinstance(error, openai.APIStatusError) and error.status_code < 500:
                    raise RuntimeError(f"vLLM refused a prompt: {error}") from error
                logger.warning("vLLM failed: %s", error)
                broke_off = isinstance(error, openai.APIStatusError) or (row is not None and row.started)
                failure = ServiceError(502 if broke_off else 503, "vLLM broke off or does not answer; try again")
            if is_last or job.cancelled or (row is not None and row.started):
                raise failure
            await asyncio.sleep(PAUSE_BEFORE_RETRY)

    async def _ask_what_is_served(self, client: openai.AsyncOpenAI) -> Served:
        models = (await client.models.list()).data
        for model in models:
            if self._model_name in (None, model.id):
                return Served(model.id, getattr(model, "max_model_len", None))
        names = ", ".join(model.id for model in models)
        raise ServiceError(503, f"vLLM serves {names} and not {self._model_name}; name one of them with --vllm_model")

    async def _stream(self, job: AnswerJob, prompt: Prompt, row: Row, model: str, limit: int) -> None:
        sampling = job.sampling
        stream = await self._client.completions.create(
            model=model,
            prompt=openai.omit,  # an empty one is answered with an error
            max_tokens=limit,
            temperature=0.0 if sampling.is_greedy else sampling.temperature,
            top_p=sampling.top_p,
            seed=openai.omit if sampling.seed is None else sampling.seed,
            logprobs=openai.omit if sampling.top_logprobs is None else sampling.top_logprobs,
            stream=True,
            extra_body={
                "prompt_embeds": prompt.embeddings,
                "min_tokens": min(sampling.min_tokens, limit),
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            },
        )
        async with stream:
            async for chunk in _chunks(stream):
                for choice in chunk.choices:
                    self._take(job, prompt, row, choice)
                if row.done:
                    return
        raise openai.APIConnectionError(message="the stream ended early", request=stream.response.request)

    def _take(self, job: AnswerJob, prompt: Prompt, row: Row, choice: Any) -> None:
        entries = self._logprobs(choice.logprobs, job.sampling.top_logprobs)
        for place, token in enumerate(choice.token_ids or []):
            if not row.started:
                job.put(prompt.start)  # not before: until then, whatever goes wrong has a status of its own
            if entries:
                row.add_logprob(entries[place])
            row.add(token)
        if choice.finish_reason in ("stop", "length") and not row.done:
            row.end(choice.finish_reason)

    def _logprobs(self, found: Any, count: int | None) -> list[dict[str, Any]]:
        if found is None or count is None:
            return []
        tokenizer, entries = self.compressor.model.processor.tokenizer, []
        for token, logprob, others in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
            best = sorted(((_token_id(name), value) for name, value in others.items()), key=lambda pair: -pair[1])
            entries.append(logprob_entry(tokenizer, (_token_id(token), logprob), best[:count]))
        return entries


async def _chunks(stream: openai.AsyncStream[Any]) -> AsyncIterator[Any]:
    """The chunks of a stream; when its connection breaks, the client raises what its transport does."""
    try:
        async for chunk in stream:
            yield chunk
    except openai.OpenAIError:
        raise
    except Exception as error:
        raise openai.APIConnectionError(message=str(error), request=stream.response.request) from error


def _encode(embeddings: torch.Tensor) -> str:
    """A tensor `(length, hidden)` as vLLM reads it."""
    stream = io.BytesIO()
    torch.save(embeddings.clone().cpu(), stream)  # a clone, since all that a view is a view of would be written
    return base64.b64encode(stream.getvalue()).decode()


def _token_id(name: str) -> int:
    """`token_id:287` as a number."""
    return int(name.removeprefix("token_id:"))
