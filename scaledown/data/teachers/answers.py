"""The answer teacher: writes the answers that are learned, from the documents' full texts.

Two kinds with one interface: `LocalTeacher` here, and `endpoint.EndpointTeacher`. Each puts into a journal, for every
record, one of

    {"answer": str, "cut": bool, "prompt_tokens": int, "completion_tokens": int}
    {"refused": str}                                                             no answer can be had, and why
"""

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from errors_scaledown import ScaleDownError
from prompt_scaledown import pad
from text_scaledown import padding_id

from ...common.devices import pick_device, pick_dtype
from ...common.loading import load_model, refuse_missing
from ...common.prompts import PromptEncoder
from ..journal import Journal, blocks, run_in_batches

logger = logging.getLogger(__name__)

# Prompts of so many batches are sorted by length together, which saves padding.
BATCHES_PER_WINDOW = 32


class TeacherError(ScaleDownError):
    """The answers cannot be had, or not all of them; the message says why, and that what there is is kept."""


class AnswerTeacher(Protocol):
    """Writes answers."""

    def answer(self, record_at: Callable[[int], dict[str, Any]], count: int, journal: Journal) -> None:
        """Put an answer to every record into the journal that has none there.

        Args:
            record_at: Returns the record of an index, with `query` and `documents`.
            count: Number of records.
            journal: Takes the results.

        Raises:
            TeacherError: Answers are missing.
        """


class LocalTeacher:
    """A causal language model of transformers.

    Args:
        model_name_or_path: The model.
        revision: Branch, tag or commit of the model.
        dtype: One of `scaledown.common.choices.DTYPES`.
        batch_size: Prompts answered at once.
        max_new_tokens: Tokens of an answer at most.
        temperature: 0 is greedy; above, answers are sampled.
        seed: Decides what is sampled.

    Raises:
        ValueError: The model cannot be loaded.
    """

    def __init__(
        self,
        model_name_or_path: str,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int = 16,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self.tokenizer = load_model(
            lambda: AutoTokenizer.from_pretrained(model_name_or_path, revision=revision),
            model_name_or_path,
            "--teacher",
        )
        device = pick_device()
        # Over several GPUs, where one does not hold the model.
        place = {"device_map": "auto"} if device == "cuda" else {}
        self._model, info = load_model(
            lambda: AutoModelForCausalLM.from_pretrained(
                model_name_or_path, revision=revision, dtype=pick_dtype(dtype), output_loading_info=True, **place
            ),
            model_name_or_path,
            "--teacher",
        )
        refuse_missing(info, model_name_or_path, "--teacher")
        self._model.eval()
        if not place:
            self._model.to(device)
        self._encode = PromptEncoder(self.tokenizer)
        self._positions = getattr(self._model.config, "max_position_embeddings", None)
        ends = self._model.generation_config.eos_token_id
        self._ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def answer(self, record_at: Callable[[int], dict[str, Any]], count: int, journal: Journal) -> None:
        """See `AnswerTeacher.answer`."""
        with tqdm(desc="Answering", unit="answer", total=count, initial=len(journal), disable=None) as progress:
            for window in blocks(count, self.batch_size * BATCHES_PER_WINDOW):
                if all(index in journal for index in window):
                    continue
                records = {index: record_at(index) for index in window}
                prompts = {index: self._encode(row["query"], row["documents"]) for index, row in records.items()}
                # The longest first: a batch too large for the memory fails at once. Equal lengths keep their order.
                order = sorted(window, key=lambda index: -len(prompts[index]))
                batches = [[order[place] for place in block] for block in blocks(len(order), self.batch_size)]
                self._time_first_batch(journal, batches[0], prompts, count, is_first=window.start == 0)
                run_in_batches(journal, batches, functools.partial(self._generate_checked, prompts))
                progress.n = len(journal)
                progress.refresh()

    def _time_first_batch(
        self, journal: Journal, batch: Sequence[int], prompts: dict[int, list[int]], count: int, is_first: bool
    ) -> None:
        start, before = time.perf_counter(), len(journal)
        run_in_batches(journal, [batch], functools.partial(self._generate_checked, prompts))
        written, left = len(journal) - before, count - len(journal)
        if is_first and written and left:
            seconds = (time.perf_counter() - start) / written * left
            logger.info("at the pace of the first batch, the other %d answers take about %s", left, duration(seconds))

    def _generate_checked(self, prompts: dict[int, list[int]], batch: Sequence[int]) -> list[dict[str, Any]]:
        limit = None if self._positions is None else self._positions - self.max_new_tokens
        fits = [index for index in batch if limit is None or len(prompts[index]) <= limit]
        try:
            answers = dict(zip(fits, self._generate([prompts[index] for index in fits], batch[0]), strict=True))
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"the memory of the device does not hold a batch of {len(fits)} prompts of up to "
                f"{max(len(prompts[index]) for index in fits)} tokens. Lower --teacher_batch_size; the same command "
                f"goes on from here."
            ) from error
        refusal = f"the prompt is longer than {limit} tokens, the teacher's context less the answer"
        return [answers.get(index, {"refused": refusal}) for index in batch]

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], first_index: int) -> list[dict[str, Any]]:
        if not prompts:
            return []
        input_ids, mask = pad(prompts, padding_id(self.tokenizer), side="left")
        settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature > 0:
            settings = {"do_sample": True, "temperature": self.temperature, "top_p": 1.0, "top_k": 0}
            # Of this batch alone, so that a restarted run samples the same.
            digest = hashlib.sha256(f"{self.seed}\0{first_index}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:4], "big"))
        output = self._model.generate(
            input_ids=input_ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            max_new_tokens=self.max_new_tokens,
            pad_token_id=padding_id(self.tokenizer),
            num_beams=1,
            repetition_penalty=1.0,
            **settings,
        )
        return [
            self._result(prompt, new)
            for prompt, new in zip(prompts, output[:, input_ids.shape[1] :].tolist(), strict=True)
        ]

    def _result(self, prompt: list[int], new: list[int]) -> dict[str, Any]:
        end = next((place for place, token_id in enumerate(new) if token_id in self._ends), None)
        return {
            "answer": self.tokenizer.decode(new[:end], skip_special_tokens=True).strip(),
            "cut": end is None,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(new) if end is None else end + 1,
        }


def duration(seconds: float) -> str:
    """A time as people say it.

    Args:
        seconds: The time.

    Returns:
        Such as `3 h 20 min`.
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
