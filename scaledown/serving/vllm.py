"""The engine in front of vLLM: documents are compressed here, and vLLM's generator reads the prompts' embeddings.

vLLM loads what `python -m scaledown.tools.export_generator` writes, with `--enable-prompt-embeds`. That flag is for
trusted clients only: vLLM must be reached by this service alone, on loopback or a private address.
"""

import asyncio
import base64
import io
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import openai
import torch

from filling_scaledown import embed_prompts

from .engine import CompressorEngine, answer_limit, reports
from .errors import ServiceError
from .jobs import AnswerJob, DocumentReport, End, Piece, Start

logger = logging.getLogger(__name__)

# Seconds before what vLLM refused, or broke off before the first token, is sent once more.
PAUSE_BEFORE_RETRY = 1.0


class VLLMEngine:
    """Answers by a vLLM server.

    Args:
        compressor: The model, whose generator is never run, and its thread.
        url: vLLM's API, such as `http://127.0.0.1:8001/v1`.
        model_name: Name that vLLM serves the generator by; None asks vLLM.
        max_new_tokens: Tokens of an answer where a request asks for no number.
        timeout: Seconds that an answer may take.
    """

    name = "vllm"

    def __init__(
        self, compressor: CompressorEngine, url: str, model_name: str | None, max_new_tokens: int, timeout: float
    ):
        self.compressor, self._max_new_tokens, self._model_name = compressor, max_new_tokens, model_name
        self._url = url
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
            await self._client.with_options(timeout=5).models.list()
        except openai.OpenAIError as error:
            return f"vLLM does not answer at {self._url}: {error}"
        return None

    async def close(self) -> None:
        """See `Engine.close`."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.compressor.batcher.close)
        await self._client.close()

    async def _answer(self, job: AnswerJob) -> None:
        try:
            embeddings, documents = await self.compressor.batcher.call(("prompt", job.settings), self._embed, job)
            limit = answer_limit(self.compressor.model, len(embeddings), job.sampling.max_tokens, self._max_new_tokens)
            job.put(Start(documents, len(embeddings)))
            await self._write(job, embeddings, limit)
        except Exception as error:
            if not isinstance(error, ValueError | TypeError | ServiceError):
                logger.exception("a request failed")
            job.put(error)

    @torch.inference_mode()
    def _embed(self, jobs: Sequence[AnswerJob]) -> list[tuple[torch.Tensor, list[DocumentReport]]]:
        filled = self.compressor.fill(jobs)
        embeddings = embed_prompts(self.compressor.model, filled)  # (batch, prompt_len, hidden)
        rows = filled.batch["attention_mask"].bool()
        # `torch.save` would write the whole batch for a view of it.
        return [
            (embeddings[place][rows[place]].clone().cpu(), reports(filled, place))  # (length, hidden)
            for place in range(len(jobs))
        ]

    async def _write(self, job: AnswerJob, embeddings: torch.Tensor, limit: int) -> None:
        for is_last in (False, True):
            started = False
            try:
                async for piece in self._stream(job, embeddings, limit):
                    if job.cancelled:
                        return
                    started = True
                    job.put(piece)
                return
            except openai.APIStatusError as error:
                if error.status_code < 500:  # a fault of this service, which no second try mends
                    raise RuntimeError(f"vLLM refused a prompt: {error}") from error
                failure = ServiceError(502, f"vLLM failed with status {error.status_code}; try again")
            except (openai.APIError, openai.APIConnectionError) as error:
                logger.warning("vLLM broke off: %s", error)
                refused = isinstance(error, openai.APIConnectionError) and not started
                failure = ServiceError(503 if refused else 502, "vLLM broke off or does not answer; try again")
            if started or is_last or job.cancelled:
                raise failure
            await asyncio.sleep(PAUSE_BEFORE_RETRY)

    async def _stream(self, job: AnswerJob, embeddings: torch.Tensor, limit: int) -> AsyncIterator[Piece | End]:
        sampling = job.sampling
        if self._model_name is None:
            self._model_name = (await self._client.models.list()).data[0].id
        stream = await self._client.completions.create(
            model=self._model_name,
            prompt=openai.omit,  # an empty one is answered with an error
            max_tokens=limit,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=openai.omit if sampling.seed is None else sampling.seed,
            stop=list(sampling.stop) or openai.omit,
            logprobs=openai.omit if sampling.top_logprobs is None else sampling.top_logprobs,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"prompt_embeds": _encode(embeddings)},
        )
        text, reason, count, written = "", None, 0, 0
        async with stream:
            async for chunk in stream:
                if chunk.usage is not None:
                    count = chunk.usage.completion_tokens
                for choice in chunk.choices:
                    text += choice.text or ""
                    # As `ScaleDownModel.answer`: no white space around the answer.
                    certain = text.lstrip()
                    certain = certain[: len(certain.rstrip())]
                    logprobs = _logprobs(choice.logprobs)
                    if len(certain) > written or logprobs:
                        yield Piece(certain[written:], logprobs)
                        written = max(written, len(certain))
                    reason = choice.finish_reason or reason
        if reason is None:
            raise openai.APIConnectionError(message="the stream ended early", request=stream.response.request)
        yield End(reason, count)


def _encode(embeddings: torch.Tensor) -> str:
    """A tensor `(length, hidden)` as vLLM reads it."""
    stream = io.BytesIO()
    torch.save(embeddings, stream)
    return base64.b64encode(stream.getvalue()).decode()


def _logprobs(found: Any) -> list[dict[str, Any]]:
    """Log probabilities of the completions API in the form of the chat API."""
    if found is None or not found.tokens:
        return []
    entries = []
    for place, (token, logprob) in enumerate(zip(found.tokens, found.token_logprobs, strict=True)):
        best = (found.top_logprobs or [{}] * len(found.tokens))[place] or {}
        entries.append({**_entry(token, logprob), "top_logprobs": [_entry(*pair) for pair in best.items()]})
    return entries


def _entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
