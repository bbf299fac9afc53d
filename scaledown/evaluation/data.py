"""The questions of an evaluation: records, or any data set `readers` knows."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors_scaledown import ScaleDownError

from ..common.reading import RecordError
from ..data.arguments import DEFAULT_NUM_DOCUMENTS
from ..data.choice import NoDocuments, OwnDocuments, PoolDocuments, sample, stable_hash
from ..data.formats import OWN_DOCUMENTS, detect_format, read_record
from ..data.questions import as_mapping
from ..data.readers import read_source
from ..data.sources import open_elements

logger = logging.getLogger(__name__)

# What a record has besides fields to group by.
OWN_KEYS = ("id", "query", "documents", "answer", "gold_answers", "reranking_scores", "positives")

# Why a question is left out that has more right documents than it may have documents.
MANY_POSITIVES = "more_positives_than_documents"


@dataclass
class Example:
    """A question to ask.

    Args:
        id: Its id.
        query: Its text.
        documents: Its documents, perhaps none.
        gold: Its gold answers, at least one.
        positives: Indices of the right documents; None where they are not known.
        teacher_scores: A reranking teacher's scores, one per document, where there are any.
        fields: What else its record says, such as `answer_kind`.
        index: Its place among the questions asked.
    """

    id: str
    query: str
    documents: list[str]
    gold: list[str]
    positives: list[int] | None = None
    teacher_scores: list[float] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    index: int = 0


@dataclass
class EvaluationData:
    """The questions, and what became of the others.

    Args:
        examples: The questions to ask.
        description: Where they come from: name, format, counts, and a digest of what is asked.
    """

    examples: list[Example]
    description: dict[str, Any]


def load_data(
    source: str,
    format: str | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    num_documents: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    closed_book: bool = False,
) -> EvaluationData:
    """Read the questions of an evaluation.

    Args:
        source: A file, a folder that `datasets.load_dataset` opens, or a name on the Hub.
        format: One of `formats.FORMATS`; recognized from the content by default.
        config, split, revision: Of a data set; not for files.
        num_documents: Documents per question; those of records stay as they are by default.
        limit: Questions at most, sampled by the seed; a smaller sample is part of every larger one.
        seed: Decides the sample, and the order of documents chosen here.
        closed_book: Whether it is meant that no question has a document.

    Returns:
        Questions with at least one gold answer, in the order of the source.

    Raises:
        FileNotFoundError: A path that does not exist.
        ValueError: The source cannot be read, or no question has a gold answer.
    """
    if format is None:
        format = _format_of(source, config, split, revision)
    if format == "records":
        records, dropped = _own_records(source, config, split, revision, num_documents), {}
    else:
        records, dropped, format = _records_of(
            source, format, config, split, revision, num_documents, limit, seed, closed_book
        )
    examples = [_example(record) for record in records]
    answered = [example for example in examples if example.gold]
    dropped["no_answer"] = dropped.get("no_answer", 0) + len(examples) - len(answered)
    dropped = {reason: count for reason, count in dropped.items() if count}
    if not answered:
        reasons = list_counts(dropped) or "none"
        remedy = "add `answer` or `gold_answers`"
        if MANY_POSITIVES in dropped:
            remedy = "raise --num_documents, which must hold all right documents of a question, or " + remedy
        raise ScaleDownError(
            f"{source}: no question can be asked; left out: {reasons}. Expected at least one with a gold "
            f"answer to compare with; {remedy}."
        )
    if not closed_book and not any(example.documents for example in answered):
        raise RecordError(
            f"{source}: found {len(answered)} questions and not one document, expected some to compress. Make records "
            "with prepare_data.py, where --documents_column names the column that holds them and --corpus retrieves "
            "them; pass --closed_book true if the questions are to be asked without."
        )
    if limit is not None and limit < len(answered):
        keys = [stable_hash(seed, "sample", f"{index} {example.id}") for index, example in enumerate(answered)]
        chosen = sorted(sorted(range(len(answered)), key=keys.__getitem__)[:limit])
        answered = [answered[index] for index in chosen]
    for index, example in enumerate(answered):
        example.index = index
    description = {
        "name": Path(source).name if Path(source).exists() else source,
        **{name: value for name, value in (("config", config), ("split", split), ("revision", revision)) if value},
        "format": format,
        "num_questions": len(answered),
        "dropped": dropped,
        **describe_asked(answered),
    }
    return EvaluationData(answered, description)


def list_counts(counts: Mapping[str, int]) -> str:
    """Words for how many questions were left out, by reason.

    Args:
        counts: Questions by reason.

    Returns:
        The counts; an empty text where there are none.
    """
    return ", ".join(f"{count} for {reason}" for reason, count in counts.items())


def describe_asked(examples: list[Example]) -> dict[str, Any]:
    """Describe the questions that are asked, which are fewer than were read where some are too long.

    Args:
        examples: The questions.

    Returns:
        `documents_per_question`, and a digest of questions, documents and gold answers.
    """
    return {
        "documents_per_question": sum(len(example.documents) for example in examples) / len(examples),
        "sha256": _digest(examples),
    }


def keep_documents(record: dict[str, Any], num_documents: int) -> dict[str, Any]:
    """Keep the first distinct documents of a record, in their order; right ones come before others.

    Args:
        record: A record.
        num_documents: Documents to keep; more only where there are more right ones.

    Returns:
        A record with these documents, and the scores and positives that belong to them.
    """
    gold = set(record.get("positives") or [])
    places: dict[str, int] = {}
    for place in sorted(range(len(record["documents"])), key=lambda place: (place not in gold, place)):
        places.setdefault(" ".join(record["documents"][place].split()), place)
    distinct = list(places.values())  # right ones first
    right = sum(place in gold for place in distinct)
    kept = sorted(distinct[: max(num_documents, right)])
    cut = {**record, "documents": [record["documents"][place] for place in kept]}
    if record.get("reranking_scores") is not None:
        cut["reranking_scores"] = [record["reranking_scores"][place] for place in kept]
    if record.get("positives") is not None:
        cut["positives"] = [index for index, place in enumerate(kept) if place in gold]
    return cut


def _format_of(source: str, config: str | None, split: str | None, revision: str | None) -> str:
    first = next(open_elements(source, config, split, revision), None)
    if first is None:
        raise RecordError(f"{source}: found no records, expected at least one question; check what wrote the file.")
    return detect_format(*first)


def _own_records(
    source: str, config: str | None, split: str | None, revision: str | None, num_documents: int | None
) -> Iterator[dict[str, Any]]:
    """Records as they are, with what else they say."""
    for index, (location, element) in enumerate(open_elements(source, config, split, revision)):
        element = as_mapping(element, location)
        record = {**element, **read_record(element, location, str(index))}
        yield record if num_documents is None else keep_documents(record, num_documents)


def _records_of(
    source: str,
    format: str | None,
    config: str | None,
    split: str | None,
    revision: str | None,
    num_documents: int | None,
    limit: int | None,
    seed: int,
    closed_book: bool,
) -> tuple[list[dict[str, Any]], dict[str, int], str]:
    """Records made of another format as `prepare_data.py` makes them, what was dropped, and the format."""
    read = read_source(source, format, config, split, revision, keep_pool=None)
    dropped = {reason: len(ids) for reason, ids in read.dropped.items()}
    if read.format in OWN_DOCUMENTS:
        records = [chosen["record"] for chosen in OwnDocuments()(read.questions)]
        if num_documents is not None:
            records = [keep_documents(record, num_documents) for record in records]
        return records, dropped, read.format
    if closed_book and not read.passages:
        return [chosen["record"] for chosen in NoDocuments()(read.questions)], dropped, read.format
    wanted = num_documents or DEFAULT_NUM_DOCUMENTS
    if wanted > len(read.passages):
        raise RecordError(
            f"{source}: found {len(read.passages)} passages, expected at least the {wanted} documents of one question; "
            "lower --num_documents, or make records with prepare_data.py --corpus."
        )
    questions = [question for question in read.questions if len(question.positives or ()) <= wanted]
    dropped[MANY_POSITIVES] = len(read.questions) - len(questions)
    choose = PoolDocuments(read.passages, wanted, "bm25", seed)
    return [chosen["record"] for chosen in choose(sample(questions, limit, seed))], dropped, read.format


def _example(record: dict[str, Any]) -> Example:
    return Example(
        id=record["id"],
        query=record["query"],
        documents=record["documents"],
        gold=record.get("gold_answers") or record.get("answer") or [],
        positives=record.get("positives"),
        teacher_scores=record.get("reranking_scores"),
        fields={name: value for name, value in record.items() if name not in OWN_KEYS},
    )


def _digest(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr([example.id, example.query, example.documents, example.gold]).encode("utf-8"))
    return digest.hexdigest()
