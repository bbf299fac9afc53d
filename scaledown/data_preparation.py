"""Turn a question-answering data set into the project's records: every question with gold and distracting passages."""

import hashlib
import importlib.metadata
import json
import logging
import platform
import random
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from .command_line import run_command
from .readers import Question, Source, read_source
from .records import atomic_writer, check_is_writable, write_records
from .retrieval import BM25Retriever

logger = logging.getLogger(__name__)

NUM_EXAMPLE_IDS = 5
PUNCTUATION_REMOVAL = str.maketrans("", "", string.punctuation)


@dataclass
class PreparationArguments:
    """What to read, how to choose the documents, and where to write.

    Raises:
        ValueError: A number out of range, or an output that is the source.
    """

    source: str = field(
        metadata={"help": "A local file, or the name of a data set on the Hub such as rajpurkar/squad."}
    )
    output: str = field(metadata={"help": "The JSON Lines file to write; .gz and .xz are compressed."})
    format: Literal["squad", "hotpotqa", "records"] | None = field(
        default=None, metadata={"help": "The source's format; told from its content by default."}
    )
    config: str | None = field(default=None, metadata={"help": "Configuration of a data set, such as distractor."})
    split: str | None = field(default=None, metadata={"help": "Split of a data set; train by default."})
    num_documents: int = field(default=5, metadata={"help": "Documents per question, the gold ones included."})
    distractors: Literal["bm25", "random"] = field(
        default="bm25", metadata={"help": "How the other documents are chosen."}
    )
    num_examples: int | None = field(
        default=None, metadata={"help": "Questions to write, sampled by the seed; all by default."}
    )
    seed: int = field(default=0, metadata={"help": "Decides the sample and the order of the documents."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing output and its report."})

    def __post_init__(self):
        if self.num_documents < 1:
            raise ValueError(f"num_documents is {self.num_documents}, expected at least 1; raise --num_documents.")
        if self.num_examples is not None and self.num_examples < 1:
            raise ValueError(
                f"num_examples is {self.num_examples}, expected at least 1; raise --num_examples or leave it out."
            )
        if self.distractors not in ("bm25", "random"):
            raise ValueError(f"distractors is {self.distractors!r}, expected bm25 or random; correct --distractors.")
        if Path(self.output).resolve() == Path(self.source).resolve():
            raise ValueError(f"output is {self.output}, the source itself; write to another file.")

    @property
    def report_path(self) -> Path:
        """The file of the report, beside the output."""
        return Path(f"{self.output}.report.json")


def prepare(arguments: PreparationArguments) -> dict[str, Any]:
    """Write records with `num_documents` passages per question, and a report beside them.

    The documents are the gold passages and distractors from the same source; for a question that brings passages of
    its own, those come before the pool. Their order is shuffled. Equal input and seed give equal bytes, and a question
    gets the same documents whichever other questions are selected.

    Args:
        arguments: Source, settings and output.

    Returns:
        The report: what was read, dropped and written, the settings and the versions of the libraries.

    Raises:
        FileExistsError: The output or its report exists and `overwrite` is off.
        FileNotFoundError: The source is a path that does not exist.
        ValueError: The source cannot be read, or no question remains.
    """
    # Before the work, not after it.
    check_is_writable(arguments.output, arguments.overwrite)
    check_is_writable(arguments.report_path, arguments.overwrite)
    source = read_source(arguments.source, arguments.format, arguments.config, arguments.split)
    if source.num_scores_discarded:
        logger.warning(
            "%d records bring reranking scores; they are left out, since the documents change. Score the output anew.",
            source.num_scores_discarded,
        )
    usable, dropped = _usable_questions(source, arguments.num_documents)
    selected = _sample(usable, arguments.num_examples, arguments.seed)
    statistics = _Statistics()
    records = _generate_records(selected, source.passages, arguments, statistics)
    write_records(arguments.output, records, arguments.overwrite)
    report = _report(arguments, source, dropped, len(usable), statistics)
    with atomic_writer(arguments.report_path, arguments.overwrite) as stream:
        stream.write(json.dumps(report, ensure_ascii=False, indent=2).encode("utf-8") + b"\n")
    return report


def format_report(report: dict[str, Any]) -> str:
    """Render a report of `prepare` as a small table.

    Args:
        report: What `prepare` returned.

    Returns:
        Lines of a name and a value each.
    """
    rows = [(name, report[name]) for name in ("source", "format", "config", "split")]
    rows = [(name, value) for name, value in [*rows, *report["settings"].items()] if value is not None]
    rows += report["counts"].items()
    for reason, dropped in report["dropped"].items():
        examples = ", ".join(dropped["examples"])
        rows.append((f"dropped: {reason}", f"{dropped['count']}  (such as {examples})"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prepare_data.py`.

    Args:
        argv: Its arguments; the command line by default.

    Returns:
        The exit status: 0, or 2 after an error the user can mend.
    """

    def command() -> str:
        parser = HfArgumentParser(PreparationArguments, description="Turn a data set into the project's records.")
        (arguments,) = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
        report = format_report(prepare(arguments))
        return f"{report}\n\nwrote {arguments.output} and {arguments.report_path}"

    return run_command(command)


@dataclass
class _Statistics:
    """Counts taken while the records are written."""

    num_questions: int = 0
    num_documents: int = 0
    num_words: int = 0
    num_positives: int = 0
    num_distractors: int = 0
    num_distractors_with_answer: int = 0
    num_questions_without_positives: int = 0


class _AnswerMatcher:
    """Tells whether a passage holds an answer as whole words, after the normalisation of SQuAD's evaluation."""

    def __init__(self):
        self._passages: dict[str, str] = {}

    def contains(self, passage: str, answers: Sequence[str]) -> bool:
        """Whether any of the answers is in the passage; "yes" and "no" are no spans and never match."""
        if passage not in self._passages:
            self._passages[passage] = f" {_normalize(passage)} "
        normalized = (_normalize(answer) for answer in answers)
        return any(f" {answer} " in self._passages[passage] for answer in normalized if answer not in ("", "yes", "no"))


def _usable_questions(source: Source, num_documents: int) -> tuple[list[Question], dict[str, list[str]]]:
    """Separate the questions that `num_documents` passages can serve; returns them and all drops by reason."""
    dropped = {reason: list(ids) for reason, ids in source.dropped.items()}
    usable = []
    for question in source.questions:
        if len(question.positives or ()) > num_documents:
            # Without one of its gold passages a question may have no answer left.
            dropped.setdefault("more_positives_than_documents", []).append(question.id)
        elif len(source.passages) < num_documents:
            dropped.setdefault("too_few_passages", []).append(question.id)
        else:
            usable.append(question)
    if not usable:
        reasons = ", ".join(f"{reason} {len(ids)}" for reason, ids in dropped.items()) or "none was read"
        raise ValueError(
            f"found no usable question ({reasons}), expected at least one. The pool has {len(source.passages)} "
            f"passages and num_documents is {num_documents}; adapt --num_documents, or check the source."
        )
    return usable, dropped


def _sample(questions: list[Question], num_examples: int | None, seed: int) -> list[Question]:
    """Sample by the hash of seed and id, in the source's order: a smaller sample is part of every larger one."""
    if num_examples is None:
        return questions
    if num_examples > len(questions):
        logger.warning("num_examples is %d, but %d questions are usable; all are taken.", num_examples, len(questions))
    order = sorted(range(len(questions)), key=lambda index: _stable_hash(seed, "sample", questions[index].id))
    return [questions[index] for index in sorted(order[:num_examples])]


def _generate_records(
    questions: Sequence[Question], passages: list[str], arguments: PreparationArguments, statistics: _Statistics
) -> Iterator[dict[str, Any]]:
    pool_index = {passage: index for index, passage in enumerate(passages)}
    retriever = BM25Retriever(passages) if arguments.distractors == "bm25" else None
    matcher = _AnswerMatcher()
    for question in tqdm(questions, desc="Choosing documents", unit="question", disable=None):
        generator = random.Random(_stable_hash(arguments.seed, "documents", question.id))
        positives = [pool_index[passage] for passage in question.positives or ()]
        candidates = [pool_index[passage] for passage in question.candidates]
        own = [index for index in candidates if index not in positives]
        num_wanted = arguments.num_documents - len(positives)
        if retriever is not None:
            distractors = _bm25_distractors(retriever, question.query, num_wanted, positives, own)
        else:
            distractors = _random_distractors(generator, len(passages), num_wanted, positives, own)
        # Shuffled, so that the position says nothing about the relevance.
        chosen = _shuffled(positives + distractors, generator)
        record = {
            "id": question.id,
            "query": question.query,
            "documents": [passages[index] for index in chosen],
            "answer": question.answers,
        }
        if question.positives is not None:
            record["positives"] = [place for place, index in enumerate(chosen) if index in positives]
        _count(record, statistics, matcher)
        yield record


def _bm25_distractors(
    retriever: BM25Retriever, query: str, num_wanted: int, positives: list[int], own: list[int]
) -> list[int]:
    """The best of the question's own passages, then of the pool."""
    distractors = retriever.rank(query, own)[:num_wanted] if own else []
    num_missing = num_wanted - len(distractors)
    if num_missing:
        distractors += retriever.retrieve(query, num_missing, exclude=positives + own)
    return distractors


def _random_distractors(
    generator: random.Random, num_passages: int, num_wanted: int, positives: list[int], own: list[int]
) -> list[int]:
    """A random choice of the question's own passages, then of the pool."""
    distractors = _shuffled(own, generator)[:num_wanted]
    taken = {*positives, *distractors}
    while len(distractors) < num_wanted:
        index = int(generator.random() * num_passages)
        if index not in taken:
            taken.add(index)
            distractors.append(index)
    return distractors


def _shuffled(items: Sequence[int], generator: random.Random) -> list[int]:
    # Python promises the same numbers in every version for random() alone, not for shuffle() or sample().
    keys = [generator.random() for _ in items]
    return [item for _, item in sorted(zip(keys, items, strict=True))]


def _stable_hash(seed: int, purpose: str, identifier: str) -> int:
    # Python's hash() of a string differs from process to process.
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}\0{identifier}".encode()).digest()[:8], "big")


def _count(record: dict[str, Any], statistics: _Statistics, matcher: _AnswerMatcher) -> None:
    statistics.num_questions += 1
    statistics.num_documents += len(record["documents"])
    statistics.num_words += sum(len(document.split()) for document in record["documents"])
    if "positives" not in record:
        statistics.num_questions_without_positives += 1
        return
    statistics.num_positives += len(record["positives"])
    for index, document in enumerate(record["documents"]):
        if index not in record["positives"]:
            statistics.num_distractors += 1
            statistics.num_distractors_with_answer += matcher.contains(document, record["answer"])


def _normalize(text: str) -> str:
    text = text.lower().translate(PUNCTUATION_REMOVAL)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _report(
    arguments: PreparationArguments,
    source: Source,
    dropped: dict[str, list[str]],
    num_usable: int,
    statistics: _Statistics,
) -> dict[str, Any]:
    return {
        "source": arguments.source,
        "format": source.format,
        "config": arguments.config,
        "split": arguments.split,
        "settings": {
            "num_documents": arguments.num_documents,
            "distractors": arguments.distractors,
            "num_examples": arguments.num_examples,
            "seed": arguments.seed,
        },
        "counts": {
            "questions_read": source.num_read,
            "questions_dropped": source.num_read - num_usable,
            "questions_usable": num_usable,
            "questions_written": statistics.num_questions,
            "questions_without_positives": statistics.num_questions_without_positives,
            "reranking_scores_discarded": source.num_scores_discarded,
            "passages_in_pool": len(source.passages),
            "documents": statistics.num_documents,
            "positives": statistics.num_positives,
            "distractors": statistics.num_distractors,
            "distractors_with_answer": statistics.num_distractors_with_answer,
            "mean_document_words": round(statistics.num_words / statistics.num_documents, 1),
        },
        "dropped": {
            reason: {"count": len(ids), "examples": ids[:NUM_EXAMPLE_IDS]} for reason, ids in sorted(dropped.items())
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("bm25s", "PyStemmer", "numpy", "datasets")},
        },
    }
