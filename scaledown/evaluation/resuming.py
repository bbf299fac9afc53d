"""Answers are kept as they come, so that the same command goes on with a run that was stopped.

<output_dir>.work/settings.json            what decides the answers and their times
<output_dir>.work/answers-PROCESS.jsonl    one question per line, with all systems' answers

Without an output_dir the folder is runs/evaluation/MODEL-DATA-DIGEST.work; the digest is that of the settings.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from errors_scaledown import ScaleDownError
from weights_scaledown import fingerprint_entry

from ..data.journal import Journal, WorkFolder
from .arguments import READ_BY_REJUDGE, EvaluationArguments, default_name
from .contestants import Contestants
from .systems import Answer

logger = logging.getLogger(__name__)

# Options that decide what is done with the answers, and those whose effect the digests of questions and weights show.
OTHER_OPTIONS = {
    *(set(READ_BY_REJUDGE) - {"seed"}),
    *("resamples", "update_card"),
    *("model", "revision", "generator", "generator_revision", "reader"),
    *("data", "format", "config", "split", "data_revision", "closed_book"),
}


class KeptAnswers:
    """What this process has answered, on the disk.

    Args:
        journal: The file.
    """

    def __init__(self, journal: Journal):
        self._journal = journal
        self.num_earlier = len(journal)  # answered before the run was stopped

    def __contains__(self, index: int) -> bool:
        return index in self._journal

    def __getitem__(self, index: int) -> dict[str, Answer]:
        return {name: Answer(**values) for name, values in self._journal[index].items()}

    def add(self, answers: dict[int, dict[str, Answer]]) -> None:
        """Keep the answers of a batch.

        Args:
            answers: By the question's index and the system's name.

        Raises:
            ScaleDownError: A score is no number, so that nothing can be ranked by it.
        """
        for by_system in answers.values():
            for name, answer in by_system.items():
                wrong = [score for score in answer.scores or [] if not math.isfinite(score)]
                if wrong:
                    raise ScaleDownError(
                        f"the model scores a document with {wrong[0]} ({name}): its weights are damaged, or numbers "
                        "overflow; evaluate with --dtype float32, and look into the training if that changes nothing."
                    )
        self._journal.append(
            (index, {name: asdict(answer) for name, answer in by_system.items()})
            for index, by_system in answers.items()
        )


def deciding_settings(
    arguments: EvaluationArguments, found: Contestants, questions: str, environment: dict[str, Any]
) -> dict[str, Any]:
    """All that decides a run's answers and their times.

    Args:
        arguments: The options.
        found: The models.
        questions: Digest of the questions that are asked.
        environment: What `describe_environment` returned.

    Returns:
        JSON values by name.
    """
    options = {name: value for name, value in asdict(arguments).items() if name not in OTHER_OPTIONS}
    models = (found.model, *([found.generator] if found.generator is not None else []))
    return {
        **options,
        "questions": questions,
        "weights": [_fingerprint(model) for model in models],
        **{name: environment[name] for name in ("versions", "hardware")},
        "commit": environment["git"].get("commit"),
    }


@contextmanager
def keep_answers(
    arguments: EvaluationArguments, settings: dict[str, Any], state: PartialState
) -> Iterator[tuple[Path, KeptAnswers]]:
    """Keep answers while the systems are asked; after an error or a kill they are there for the same command.

    Args:
        arguments: Where the run is written.
        settings: What `deciding_settings` returned.
        state: The processes.

    Returns:
        A context manager that gives the folder, which is to be removed once the run is written, and this process's
        answers.

    Raises:
        WorkFolderError: The folder holds answers of other settings, or another process is at work in it.
    """
    output = arguments.output_dir
    if output is None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode("utf-8")).hexdigest()[:12]
        output = f"{default_name(arguments)}-{digest}"
    path = Path(f"{output}.work")
    if not state.is_main_process:
        state.wait_for_everyone()  # until the folder is there
        yield path, KeptAnswers(Journal(path / f"answers-{state.process_index}.jsonl"))
        return
    work = WorkFolder(path, settings)
    with work.locked():
        state.wait_for_everyone()
        journal = work.journal(f"answers-{state.process_index}")
        kept = KeptAnswers(journal)
        if kept.num_earlier:
            logger.info("Going on after %d questions, whose answers %s has.", kept.num_earlier, path)
        try:
            yield path, kept
        finally:
            journal.close()
            if not work.has_results:
                work.remove()


def _fingerprint(model: torch.nn.Module) -> str:
    """Digest of a model's configuration and of samples of its weights."""
    digest = hashlib.sha256(model.config.to_json_string().encode("utf-8"))
    for name, tensor in model.state_dict().items():
        digest.update(fingerprint_entry(name, tensor))
    return digest.hexdigest()
