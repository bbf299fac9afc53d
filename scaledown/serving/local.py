"""The engine in this process: the model's own `generate()`, for all requests of a batch at once."""

import asyncio
import logging
from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from errors_scaledown import ScaleDownError
from filling_scaledown import FilledPrompts

from .batching import Work
from .decoding import Row, RowSampler, RowStopping, RowStreamer, end_ids
from .engine import CompressorEngine, answer_limit
from .jobs import AnswerJob, Start

logger = logging.getLogger(__name__)


class LocalEngine:
    """Answers by transformers, in this process.

    Args:
        compressor: The model and its thread.
        max_new_tokens: Tokens of an answer where a request asks for no number.
    """

    name = "transformers"

    def __init__(self, compressor: CompressorEngine, max_new_tokens: int):
        self.compressor, self._max_new_tokens = compressor, max_new_tokens

    def submit(self, job: AnswerJob) -> None:
        """See `Engine.submit`."""
        self.compressor.batcher.submit(
            Work(("answer", job.settings), self._answer, lambda error: _fail([job], error), job)
        )

    async def unavailable(self) -> str | None:
        """See `Engine.unavailable`."""
        return None if self.compressor.batcher.is_alive else "the thread of the model has ended"

    async def close(self) -> None:
        """See `Engine.close`."""
        await asyncio.to_thread(self.compressor.batcher.close)

    @torch.inference_mode()
    def _answer(self, jobs: Sequence[AnswerJob]) -> None:
        jobs = [job for job in jobs if not job.cancelled]
        if not jobs:
            return
        filled = self.compressor.fill(jobs)
        try:  # from here on pieces are handed over, so that no job may be tried again
            self._generate(jobs, filled)
        except Exception as error:
            _fail(jobs, error)

    def _generate(self, jobs: Sequence[AnswerJob], filled: FilledPrompts) -> None:
        model, tokenizer = self.compressor.model, self.compressor.model.processor.tokenizer
        lengths = filled.batch["attention_mask"].sum(dim=1).tolist()
        rows, ends, limits = [], end_ids(model), []
        for place, (job, length) in enumerate(zip(jobs, lengths, strict=True)):
            try:
                limits.append(answer_limit(model, length, job.sampling.max_tokens, self._max_new_tokens))
            except ScaleDownError as error:
                limits.append(1)
                rows.append(Row(job, 1, tokenizer, ends))
                rows[-1].fail(error)
                continue
            rows.append(Row(job, limits[-1], tokenizer, ends))
            job.put(Start(filled.reports(place), length))
        if all(row.done for row in rows):
            return
        sampler = RowSampler(rows, [job.sampling for job in jobs], tokenizer, model.device)
        model.generate(
            **filled.batch,
            **filled.compressed,
            max_new_tokens=max(limit for limit, row in zip(limits, rows, strict=True) if not row.done),
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([RowStopping(rows)]),
            streamer=RowStreamer(rows),
        )


def _fail(jobs: Sequence[AnswerJob], error: Exception) -> None:
    if not isinstance(error, ScaleDownError):
        logger.error("a batch of %d requests failed", len(jobs), exc_info=error)
    for job in jobs:
        job.put(error)
