"""One `generate()` for several requests, each with its own sampling, limits and stop texts, and its own stream."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation import BaseStreamer, TemperatureLogitsWarper, TopPLogitsWarper

from modeling_scaledown import ScaleDownModel

from ..common.streaming import REPLACEMENT
from .jobs import AnswerJob, End, Piece, Sampling

# Of a long answer, tokens at the end whose text is made anew with each further token; the text before them stays.
TAIL = 64


class Row:
    """The answer of one request, as it is written.

    Args:
        job: The request.
        limit: Tokens at most.
        tokenizer: The generator's.
        end_ids: Tokens that end an answer.
    """

    def __init__(self, job: AnswerJob, limit: int, tokenizer: PreTrainedTokenizerBase, end_ids: set[int]):
        self._job, self._limit, self._tokenizer, self.end_ids = job, limit, tokenizer, end_ids
        self._ids: list[int] = []
        self._head, self._tail_start = "", 0  # text of the ids before the tail
        self._sent = ""
        self._logprobs: list[dict[str, Any]] = []
        self._done = False

    @property
    def done(self) -> bool:
        """Whether nothing more is to be written, or nobody waits for it."""
        return self._done or self._job.cancelled

    @property
    def started(self) -> bool:
        """Whether anything was written."""
        return self._done or bool(self._ids)

    @property
    def too_short(self) -> bool:
        """Whether the answer may not end yet."""
        return len(self._ids) < self._job.sampling.min_tokens

    def add_logprob(self, entry: dict[str, Any]) -> None:
        """Keep the log probability of the token that comes next."""
        self._logprobs.append(entry)

    def add(self, token: int) -> None:
        """Take the next token, and hand over the text that is certain by now."""
        if self.done:
            return
        if token in self.end_ids:
            self._logprobs = self._logprobs[: len(self._ids)]
            self._finish("stop")
            return
        self._ids.append(token)
        text = self._text()
        cut = min((place for stop in self._job.sampling.stop if (place := text.find(stop)) >= 0), default=None)
        if cut is not None:
            self._finish("stop", text[:cut])
        elif len(self._ids) >= self._limit:
            self._finish("length")
        elif not text.endswith(REPLACEMENT):
            self._send(text[: len(text) - self._may_be_stop(text)])

    def end(self, reason: str) -> None:
        """End the answer where whoever writes it says that it ends."""
        self._finish(reason)

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self._done = True
        self._job.put(error)

    def _text(self) -> str:
        text = self._head + self._decode(self._tail_start)
        if len(self._ids) - self._tail_start >= 2 * TAIL:
            start = len(self._ids) - TAIL
            tail = self._decode(start)
            # Not where the tail would begin in the middle of a word or character, and so be decoded to something else.
            if tail and text.endswith(tail):
                self._head, self._tail_start = text[: -len(tail)], start
        return text.strip()

    def _decode(self, start: int) -> str:
        return self._tokenizer.decode(self._ids[start:], skip_special_tokens=True)

    def _may_be_stop(self, text: str) -> int:
        """Characters at the end of a text that may be the beginning of a stop text."""
        lengths = [n for stop in self._job.sampling.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max(lengths, default=0)

    def _send(self, text: str) -> None:
        if len(text) > len(self._sent) or self._logprobs:
            self._job.put(Piece(text[len(self._sent) :], self._logprobs))
            self._sent, self._logprobs = max(self._sent, text, key=len), []

    def _finish(self, reason: str, text: str | None = None) -> None:
        self._send(self._text() if text is None else text)
        self._done = True
        self._job.put(End(reason, len(self._ids)))


def logprob_entry(
    tokenizer: PreTrainedTokenizerBase, chosen: tuple[int, float], best: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """An entry of OpenAI's `logprobs.content`.

    Args:
        tokenizer: The generator's.
        chosen: The token that was written, and its log probability.
        best: The likeliest in its place, the best first.

    Returns:
        A JSON object.
    """

    def token(number: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([number])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {**token(*chosen), "top_logprobs": [token(*pair) for pair in best]}


def end_ids(model: ScaleDownModel) -> set[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends]), model.processor.tokenizer.eos_token_id} - {None}


class RowSampler(LogitsProcessor):
    """Chooses the next token of each row by the row's own settings; the greedy `generate()` around it takes it.

    Args:
        rows: The answers.
        samplings: How each is written.
        tokenizer: The generator's.
        device: Where the logits are.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        samplings: Sequence[Sampling],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ):
        self._rows, self._samplings, self._tokenizer = rows, samplings, tokenizer
        self._random = [torch.Generator(device) for _ in rows]
        for random, sampling in zip(self._random, samplings, strict=True):
            random.seed() if sampling.seed is None else random.manual_seed(sampling.seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """See `LogitsProcessor`; scores are `(batch, vocab_size)`."""
        chosen = scores.clone()
        for place, (row, sampling) in enumerate(zip(self._rows, self._samplings, strict=True)):
            # What is likeliest, without a report of how likely, is taken by `generate()` itself.
            as_it_is = sampling.is_greedy and sampling.top_logprobs is None and not row.too_short
            if row.done or as_it_is:
                continue
            own = scores[place : place + 1].float()  # (1, vocab_size)
            allowed = own
            if row.too_short:
                ends = torch.tensor(sorted(row.end_ids), device=own.device)
                allowed = own.index_fill(1, ends, -torch.inf)
            token = allowed.argmax(dim=-1)
            if not sampling.is_greedy:
                warped = TemperatureLogitsWarper(sampling.temperature)(None, allowed)
                if sampling.top_p < 1:
                    warped = TopPLogitsWarper(sampling.top_p)(None, warped)
                token = torch.multinomial(warped.softmax(dim=-1), 1, generator=self._random[place])[0]
            if not sampling.is_greedy or row.too_short:
                chosen[place] = -torch.inf
                chosen[place, token] = 0.0
            if sampling.top_logprobs is not None:
                row.add_logprob(self._entry(own[0].log_softmax(dim=-1), int(token), sampling.top_logprobs))
        return chosen

    def _entry(self, logprobs: torch.Tensor, token: int, count: int) -> dict[str, Any]:
        best = logprobs.topk(count).indices.tolist() if count else []
        return logprob_entry(
            self._tokenizer, (token, float(logprobs[token])), [(other, float(logprobs[other])) for other in best]
        )


class RowStreamer(BaseStreamer):
    """Hands each row its next token.

    Args:
        rows: The answers.
    """

    def __init__(self, rows: Sequence[Row]):
        self._rows, self._has_prompt = rows, False

    def put(self, value: torch.LongTensor) -> None:
        """See `BaseStreamer`; the first call brings the prompts."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        for row, token in zip(self._rows, value.tolist(), strict=True):
            row.add(token)

    def end(self) -> None:
        """Nothing: every row ends by itself."""


class RowStopping(StoppingCriteria):
    """Ends each row by itself.

    Args:
        rows: The answers.
    """

    def __init__(self, rows: Sequence[Row]):
        self._rows = rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        """See `StoppingCriteria`; returns `(batch,)`."""
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)
