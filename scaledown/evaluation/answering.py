"""Asks every system every question: in batches that fit the memory, timed side by side, over several processes."""

import logging
from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

from errors_scaledown import ScaleDownError

from .data import Example
from .systems import Answer, System, timed

logger = logging.getLogger(__name__)

START_ON_CPU = 8
START_ON_DEVICE = 32


def answer_all(
    systems: Sequence[System], examples: Sequence[Example], batch_size: str, device: torch.device, state: PartialState
) -> tuple[dict[str, list[Answer]], list[int]]:
    """Answer all questions with all systems; processes share the questions out among them.

    Every batch is answered by all systems, one after the other, in an order that turns around from batch to batch, so
    that a machine that grows slower or faster treats them alike. The first batch is answered twice and timed once.

    Args:
        systems: What answers.
        examples: The questions.
        batch_size: A number, or `auto`: halved, for all systems alike, whenever memory runs out.
        device: Where the systems compute.
        state: The processes.

    Returns:
        Each system's answers in the order of the questions, the same in all processes, and the smallest batch size of
        each process.

    Raises:
        ValueError: Memory runs out at the batch size that was asked for, or at a single question.
    """
    # The longest first: if a batch does not fit, that shows at once, and like lengths need little padding.
    order = sorted(range(len(examples)), key=lambda i: (-_length(examples[i]), i))
    own = [examples[i] for i in order[state.process_index :: state.num_processes]]
    start = START_ON_CPU if device.type == "cpu" else START_ON_DEVICE
    size = start if batch_size == "auto" else int(batch_size)
    rows: list[tuple[int, str, Answer]] = []
    warm = False
    with tqdm(total=len(own), desc="Answering", unit="question", disable=not state.is_main_process or None) as bar:
        number = 0
        while own:
            batch = own[:size]
            try:
                answers = _answer_batch(systems, batch, device, warm, reverse=number % 2 == 1)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                message = str(error).splitlines()[0]
            else:
                warm = True
                for _, _, answer in answers:
                    answer.batch = number * state.num_processes + state.process_index
                rows += answers
                own = own[len(batch) :]
                number += 1
                bar.update(len(batch))
                continue
            # Out of the except clause, whose traceback keeps the tensors alive.
            if batch_size != "auto" or len(batch) == 1:
                remedy = "lower --batch_size" if len(batch) > 1 else "pass --load_in_4bit true or fewer --num_documents"
                raise ScaleDownError(f"the device's memory does not hold {len(batch)} questions ({message}); {remedy}.")
            size = len(batch) // 2
            logger.info("Memory ran out; going on with %d questions at a time.", size)
            clear_device_cache(garbage_collection=True)
    return _gathered(systems, examples, rows), gather_object([size])


def _answer_batch(
    systems: Sequence[System], batch: Sequence[Example], device: torch.device, warm: bool, reverse: bool
) -> list[tuple[int, str, Answer]]:
    if not warm:
        for system in systems:
            system.answer(batch)
    answers = []
    for system in reversed(systems) if reverse else systems:
        found = timed(system, batch, device)
        answers += [(example.index, system.name, answer) for example, answer in zip(batch, found, strict=True)]
    return answers


def _gathered(
    systems: Sequence[System], examples: Sequence[Example], rows: list[tuple[int, str, Answer]]
) -> dict[str, list[Answer]]:
    by_place = {(name, index): answer for index, name, answer in gather_object(rows)}
    names = [system.name for system in systems]
    return {name: [by_place[name, example.index] for example in examples] for name in names}


def _length(example: Example) -> int:
    return len(example.query) + sum(map(len, example.documents))
