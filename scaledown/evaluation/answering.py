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
from .resuming import KeptAnswers
from .systems import Answer, System, timed

logger = logging.getLogger(__name__)

START_ON_CPU = 8
START_ON_DEVICE = 32


def answer_all(
    systems: Sequence[System],
    examples: Sequence[Example],
    batch_size: str,
    device: torch.device,
    state: PartialState,
    kept: KeptAnswers,
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
        kept: Where this process's answers go; questions that it has answers of are not asked again.

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
    answers = {example.index: kept[example.index] for example in own if example.index in kept}
    batches = [answer.batch for by_system in answers.values() for answer in by_system.values()]
    number = max(batches, default=-1) // state.num_processes + 1
    total = len(own)
    own = [example for example in own if example.index not in answers]
    warm = False
    bar = tqdm(
        total=total,
        initial=len(answers),
        desc="Answering",
        unit="question",
        disable=not state.is_main_process or None,
    )
    with bar:
        while own:
            batch = own[:size]
            try:
                found = _answer_batch(systems, batch, device, warm, reverse=number % 2 == 1)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                message = str(error).splitlines()[0]
            else:
                warm = True
                for by_system in found.values():
                    for answer in by_system.values():
                        answer.batch = number * state.num_processes + state.process_index
                kept.add(found)
                answers |= found
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
    return _gathered(systems, examples, answers), gather_object([size])


def _answer_batch(
    systems: Sequence[System], batch: Sequence[Example], device: torch.device, warm: bool, reverse: bool
) -> dict[int, dict[str, Answer]]:
    if not warm:
        for system in systems:
            system.answer(batch)
    answers: dict[int, dict[str, Answer]] = {example.index: {} for example in batch}
    for system in reversed(systems) if reverse else systems:
        for example, answer in zip(batch, timed(system, batch, device), strict=True):
            answers[example.index][system.name] = answer
    return answers


def _gathered(
    systems: Sequence[System], examples: Sequence[Example], answers: dict[int, dict[str, Answer]]
) -> dict[str, list[Answer]]:
    by_index = dict(gather_object(list(answers.items())))
    return {system.name: [by_index[example.index][system.name] for example in examples] for system in systems}


def _length(example: Example) -> int:
    return len(example.query) + sum(map(len, example.documents))
