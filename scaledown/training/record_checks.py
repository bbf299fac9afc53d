"""What records must be like for a run to end: checked before its first step."""

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
from tqdm.auto import tqdm

from errors_scaledown import ScaleDownError
from processing_scaledown import ScaleDownProcessor
from windows_scaledown import find_evidence

from ..common.reading import RecordError
from ..data.records import answers_of
from .arguments import DataArguments
from .collators import INSTRUCTIONS, evidence_of

logger = logging.getLogger(__name__)

# Hardly any vocabulary lacks these, so that a text with one of them has a token.
COMMON = re.compile("[A-Za-z0-9]")
# Tokens of a byte of text at most: one, but a tokenizer may spell a character out as several.
TOKENS_PER_BYTE = 2
# A tokenizer takes a hundred texts at once many times as fast as one by one.
TRIED_AT_ONCE = 64


def check_documents(data: Mapping[str, datasets.Dataset], data_args: DataArguments) -> None:
    """Check that there is something to compress.

    Args:
        data: Records by split, `train` and perhaps `eval`.
        data_args: Names their files, and says whether questions alone are meant.

    Raises:
        RecordError: No record of a split has a document.
    """
    if data_args.closed_book:
        return
    for name, records in data.items():
        if not any(records["documents"]):
            raise RecordError(
                f"{name}_file={getattr(data_args, f'{name}_file')} has {len(records)} records and not one document, "
                "expected some to compress. prepare_data.py adds them: --documents_column names the column of a table "
                "that holds them, --corpus retrieves them. Set closed_book=true to train on questions alone."
            )


def keep_fitting(
    data: Mapping[str, Any],
    collate: Callable[[Sequence[dict[str, Any]]], Any],
    may_not_fit: Callable[[dict[str, Any]], bool],
    data_args: DataArguments,
) -> dict[str, Any]:
    """Find the rows no batch can be built of, before one of them ends the run.

    Args:
        data: Records or passages by split, `train` and perhaps `eval`. What is streamed is not looked at.
        collate: Builds a batch; called with many rows, and with fewer where one of them does not fit.
        may_not_fit: Tells quickly which rows need to be tried.
        data_args: Names the files; `too_long` says what becomes of such rows.

    Returns:
        The data, without such rows where they are skipped.

    Raises:
        RecordError: A row does not fit and is not to be skipped, or none is left.
    """
    kept = dict(data)
    for name, rows in data.items():
        if isinstance(rows, datasets.IterableDataset):
            continue
        wrong: dict[int, str] = {}
        doubtful: list[tuple[int, dict[str, Any]]] = []
        for index, row in enumerate(tqdm(rows, desc=f"Checking {name}_file", disable=None)):
            if may_not_fit(row):
                doubtful.append((index, row))
            if len(doubtful) == TRIED_AT_ONCE:
                wrong |= _wrong_rows(doubtful, collate)
                doubtful = []
        wrong |= _wrong_rows(doubtful, collate)
        if not wrong:
            continue
        file, first = getattr(data_args, f"{name}_file"), next(iter(wrong.values()))
        if data_args.too_long == "error" or len(wrong) == len(rows):
            more = f" {len(wrong) - 1} more of {len(rows)} cannot be read either." if len(wrong) > 1 else ""
            remedy = " too_long=skip leaves such records out." if len(wrong) < len(rows) else ""
            raise RecordError(f"{name}_file={file}: {first}{more}{remedy}")
        logger.warning(
            "%d of %d records of %s_file=%s are left out; the first: %s", len(wrong), len(rows), name, file, first
        )
        kept[name] = rows.select([index for index in range(len(rows)) if index not in wrong])
    return kept


def _wrong_rows(
    rows: Sequence[tuple[int, dict[str, Any]]], collate: Callable[[Sequence[dict[str, Any]]], Any]
) -> dict[int, str]:
    if not rows:
        return {}
    try:
        collate([row for _, row in rows])
    except ScaleDownError as error:
        if len(rows) == 1:
            return {rows[0][0]: str(error)}
        half = len(rows) // 2
        return _wrong_rows(rows[:half], collate) | _wrong_rows(rows[half:], collate)
    return {}


def has_scores(records: datasets.Dataset) -> bool:
    """Whether a record has a teacher's scores."""
    return any(scores is not None for scores in records["reranking_scores"])


def learns_from_positives(data: Mapping[str, datasets.Dataset], config: Any) -> bool:
    """Decide what the reranking head learns from, and report it.

    Args:
        data: Records by split.
        config: The model's configuration.

    Returns:
        Whether `positives` stand in for a teacher's scores: for a head that has not learned yet, where the training
        data has none.
    """
    if not config.enable_reranking or config.reranking_loss_weight == 0:
        return False
    records = data["train"]
    if has_scores(records):
        return False
    told = sum(positives is not None for positives in records["positives"])
    if config.reranking_trained is False and told:
        logger.info(
            "No record has reranking_scores; the reranking head learns from the positives of %d of %d records.",
            told,
            len(records),
        )
        return True
    remedy = "prepare_data.py --reranker scores documents; enable_reranking=false makes a model without the head."
    if config.reranking_trained is False:
        logger.warning(
            "No record has reranking_scores or positives, so the reranking head does not learn: rank and max_documents "
            "order documents at random. %s",
            remedy,
        )
    else:
        logger.warning(
            "No record has reranking_scores, so the reranking head stays as it is while the rest changes. %s", remedy
        )
    return False


def with_documents(data: Mapping[str, datasets.Dataset], data_args: DataArguments) -> dict[str, datasets.Dataset]:
    """Leave out questions without documents, of which the compressor alone learns nothing.

    Args:
        data: Records by split.
        data_args: Names their files.

    Returns:
        The other records.

    Raises:
        RecordError: None is left.
    """
    kept = {}
    for name, records in data.items():
        kept[name] = records.select([i for i, documents in enumerate(records["documents"]) if documents])
        left_out = len(records) - len(kept[name])
        file = getattr(data_args, f"{name}_file")
        if left_out == len(records):
            raise RecordError(
                f"{name}_file={file} has {left_out} records and not one document, and stage=pointer trains the "
                "compressor alone, which reads nothing else. Choose stage=joint for questions alone."
            )
        if left_out:
            logger.warning(
                "%d of %d records of %s_file=%s have no documents and are left out of stage=pointer.",
                left_out,
                len(records),
                name,
                file,
            )
    return kept


def check_answers_stand_in_documents(records: datasets.Dataset, data_args: DataArguments, needed: bool) -> None:
    """Check that there is something to point at; the search ends at the first answer found.

    Args:
        records: Records to train on.
        data_args: Names their file.
        needed: Whether nothing else is learned.

    Raises:
        RecordError: No document holds an answer, and nothing else is learned.
    """
    for record in records:
        if any(len(find_evidence(*pair)) for pair in zip(record["documents"], evidence_of(record), strict=True)):
            return
    problem = (
        f"train_file={data_args.train_file} has {len(records)} records, and in none do the documents (the positives, "
        "where those are known) hold an answer word for word, so that the compressor does not learn where to point."
    )
    remedy = "Add answers as the documents spell them, or choose another slot_pooling."
    if needed:
        raise RecordError(f"{problem} There are no reranking scores to learn either. {remedy}")
    logger.warning("%s %s", problem, remedy)


def doubtful_records(
    processor: ScaleDownProcessor, max_answer_length: int, whole_documents: bool = False
) -> Callable[[dict[str, Any]], bool]:
    """Tell which records must be tokenized to know that a batch can be built of them; most are short enough for any.

    Args:
        processor: That of the model.
        max_answer_length: Answer tokens learned at most.
        whole_documents: Whether the generator reads the documents' text.

    Returns:
        Whether a record may not fit.
    """
    frame = functools.cache(lambda closed_book: sum(map(len, processor.prompt_frame(closed_book)[:3])))

    def may_not_fit(record: dict[str, Any]) -> bool:
        documents = record["documents"]
        if not whole_documents and not all(COMMON.search(document) for document in documents):
            return True
        if processor.max_prompt_length is None:
            return False
        length = frame(not documents) + _most_tokens(record["query"])
        length += min(_most_tokens(answers_of(record)[0]), max_answer_length)
        length += len(documents) * _most_tokens(processor.document_separator)
        for document in documents:
            tokens = _most_tokens(document)
            if not whole_documents:
                chunks = math.ceil(tokens / processor.chunk_length)
                slots = math.ceil(tokens / processor.compression_rate) + chunks
                tokens = min(slots, chunks * processor.num_memory_tokens)
            length += tokens
        return length > processor.max_prompt_length

    return may_not_fit


def doubtful_passages(processor: ScaleDownProcessor) -> Callable[[dict[str, Any]], bool]:
    """Tell which passages of pretraining must be tokenized: all or none, since they are of one length.

    Args:
        processor: That of the model.

    Returns:
        Whether a passage may not fit.
    """
    limit = processor.max_prompt_length
    frame = sum(map(len, processor.prompt_frame(False)[:3]))
    longest = frame + _most_tokens(max(INSTRUCTIONS.values(), key=len)) + processor.num_memory_tokens
    doubtful = limit is not None and longest + 2 * processor.chunk_length > limit
    return lambda row: doubtful


def _most_tokens(text: str) -> int:
    return TOKENS_PER_BYTE * len(text.encode("utf-8")) + 1
