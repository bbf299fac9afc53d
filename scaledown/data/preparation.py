"""Turn questions into the project's records: documents chosen or retrieved, scored and answered by teachers.

    questions ──► documents ──► reranking scores ──► answers ──► records, report, data card
                  own, pool      cross-encoder        causal LM
                  or corpus                           or endpoint

Each step keeps what it has done in `<output>.work/`, so that a run goes on where it was killed.
"""

import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from errors_scaledown import ScaleDownError

from ..common.command_line import run_command
from ..common.devices import load_model
from ..common.files import atomic_writer, check_is_writable, explained_disk_errors, write_json
from ..common.metrics import normalize_answer
from ..common.text import is_blank
from .arguments import SETTINGS_OF_STEPS, PreparationArguments, parse_arguments
from .card import build_card
from .choice import Chooser, CorpusDocuments, NoDocuments, OwnDocuments, PoolDocuments, keep_best, sample
from .corpus import CorpusReader, build_passages
from .formats import OWN_DOCUMENTS
from .indexes.index import Index, open_index
from .journal import WorkFolder, blocks, run_in_batches
from .questions import Question, Source
from .readers import read_source
from .records import write_records
from .splitting import PassageSplitter
from .teachers.answers import AnswerTeacher, LocalTeacher
from .teachers.cost import Estimate, estimate
from .teachers.endpoint import EMPTY_ANSWER, EndpointTeacher
from .teachers.scores import RerankingTeacher

__all__ = ["PreparationArguments", "format_report", "main", "prepare"]

logger = logging.getLogger(__name__)

NUM_EXAMPLE_IDS = 5
# Records scored together, their pairs sorted by length: the work a kill can cost.
RECORDS_PER_SCORING = 64
GO_ON = "What is done so far is kept in {}; free space, and the same command goes on."


def prepare(arguments: PreparationArguments) -> dict[str, Any]:
    """Write records, and a report and a data card beside them.

    Documents come from the questions' own source (gold passages and distractors, shuffled) or are retrieved from a
    corpus; those of records and tables stay as they are unless others are asked for. A reranker, where one is named,
    scores them, and a teacher writes the answers. Equal input and settings give equal bytes, whether or not the run was
    interrupted on the way.

    Args:
        arguments: Source, settings and output.

    Returns:
        The report: what was read, dropped and written, the settings and the versions of the libraries. In a dry run,
        what is left to do and an estimate of its cost.

    Raises:
        FileExistsError: The output, its report or its card exists and `overwrite` is off.
        FileNotFoundError: The source is a path that does not exist.
        ValueError: The source cannot be read, no question remains, answers are missing, or the unfinished work beside
            the output belongs to other settings.
        OSError: The disk is full; what is done so far is kept.
    """
    if arguments.only_corpus:
        with explained_disk_errors(arguments.corpus_dir, GO_ON.format(arguments.corpus_dir)):
            return _prepare_corpus(arguments)
    # Before the work, not after it. A run that goes on may find what it had written itself.
    begun = arguments.work_path / WorkFolder.SETTINGS
    for path in map(Path, (arguments.output, arguments.report_path, arguments.card_path)):
        if not (begun.exists() and path.is_file() and path.stat().st_mtime >= begun.stat().st_mtime):
            check_is_writable(path, arguments.overwrite)
    with explained_disk_errors(arguments.output, GO_ON.format(arguments.work_path)):
        work = WorkFolder(arguments.work_path, arguments.fingerprint, steps=SETTINGS_OF_STEPS)
        with work.locked():
            try:
                report = _Preparation(arguments, work).run()
            except (ValueError, OSError):
                # A run that was refused before it had done anything leaves nothing behind.
                journals = work.path.glob("*.jsonl")
                if not any(path.stat().st_size for path in journals) and not (work.path / "corpus").exists():
                    work.remove()
                raise
        if not arguments.dry_run:
            work.remove()
    return report


def format_report(report: dict[str, Any]) -> str:
    """Render a report of `prepare` as a small table.

    Args:
        report: What `prepare` returned.

    Returns:
        Lines of a name and a value each.
    """
    rows = [(name, report[name]) for name in ("source", "format", "config", "split") if name in report]
    rows = [(n, value) for n, value in [*rows, *report["settings"].items()] if value is not None and value is not False]
    if report.get("columns"):
        rows.append(("columns", "; ".join(f"{meaning}: {names}" for meaning, names in report["columns"].items())))
    rows += report["counts"].items()
    for reason, dropped in report.get("dropped", {}).items():
        examples = ", ".join(dropped["examples"])
        rows.append((f"dropped: {reason}", f"{dropped['count']}  (such as {examples})"))
    rows += report.get("estimate", {}).items()
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
        for name in ("httpx2", "openai", "sentence_transformers"):
            logging.getLogger(name).setLevel(logging.WARNING)
        arguments = parse_arguments(argv)
        report = format_report(prepare(arguments))
        if arguments.only_corpus:
            return f"{report}\n\nwrote {arguments.corpus_dir}"
        if arguments.dry_run:
            return f"{report}\n\nasked no teacher; without --dry_run the same command goes on from here"
        return f"{report}\n\nwrote {arguments.output}, {arguments.report_path} and {arguments.card_path}"

    return run_command(command, "What is done is kept beside the output; the same command goes on.")


class _Preparation:
    """One run, whether it begins or goes on."""

    def __init__(self, arguments: PreparationArguments, work: WorkFolder):
        self.arguments = arguments
        self.work = work
        self.statistics = _Statistics()
        self.dropped: dict[str, list[str]] = {}
        self.documents = work.journal("documents")
        self.scores = work.journal("scores")
        self.answers = work.journal("answers")

    def run(self) -> dict[str, Any]:
        """All steps; each does what is missing."""
        try:
            source, questions = self._read()
            count = len(questions)
            self._choose_documents(source, questions)
            # From here on the records are read from the disk.
            source_counts = self._source_counts(source, questions)
            del source, questions
            if self.arguments.dry_run:
                return self._report(source_counts) | {"estimate": self._estimate(count)}
            if self.arguments.reranker is not None:
                self._score(count)
            if self.arguments.teacher is not None:
                self._answer(count)
            return self._write(count, source_counts)
        finally:
            for journal in (self.documents, self.scores, self.answers):
                journal.close()

    def _read(self) -> tuple[Source, list[Question]]:
        arguments = self.arguments
        keep_pool: bool | None = True
        if arguments.corpus is not None:
            keep_pool = False
        elif arguments.num_documents is None:
            keep_pool = None
        source = read_source(
            arguments.source,
            arguments.format,
            arguments.config,
            arguments.split,
            arguments.revision,
            arguments.columns,
            PassageSplitter(_load_tokenizer(arguments), arguments.passage_length, arguments.passage_overlap),
            require_answer=arguments.teacher is None and not arguments.keep_unanswered,
            keep_pool=keep_pool,
        )
        self.columns = {meaning: ", ".join(names) for meaning, names in source.columns.items() if names}
        logger.info("found %s", "; ".join(f"{meaning} in {names}" for meaning, names in self.columns.items()))
        self.keeps_documents = keep_pool is None and source.format in OWN_DOCUMENTS
        self._check_documents(source)
        if source.num_scores_discarded and not self.keeps_documents:
            logger.warning(
                "%d records bring reranking scores; they are left out, since the documents change. Score the output "
                "anew.",
                source.num_scores_discarded,
            )
        if source.other_fields:
            logger.warning(
                "the records' fields %s are left out, since they are none of the format; match them by id where they "
                "are needed.",
                ", ".join(source.other_fields),
            )
        usable = self._usable_questions(source)
        if arguments.num_examples is not None and arguments.num_examples > len(usable):
            logger.warning(
                "num_examples is %d, but %d questions are usable; all are taken.", arguments.num_examples, len(usable)
            )
        self.num_usable = len(usable)
        questions = sample(usable, arguments.num_examples, arguments.seed)
        digest = hashlib.sha256()
        for question in questions:
            digest.update(json.dumps([question.id, question.query, question.positives]).encode())
        # A data set on the Hub may have changed under its name.
        self.work.agree("questions", {"count": len(questions), "sha256": digest.hexdigest()})
        return source, questions

    def _check_documents(self, source: Source) -> None:
        """Stop where no question has a passage, which nobody would notice before the model is trained."""
        arguments = self.arguments
        if arguments.corpus is not None or arguments.closed_book or not source.questions:
            return
        if source.passages or any(question.record and question.record["documents"] for question in source.questions):
            return
        raise ScaleDownError(
            f"{arguments.source}: found {len(source.questions)} questions and not one passage, expected some to "
            f"compress (questions and answers are in {', '.join(self.columns.values()) or 'no column'}). Name the "
            f"column of the passages with --documents_column, retrieve them with --corpus, or pass --closed_book true "
            f"to write questions without."
        )

    def _usable_questions(self, source: Source) -> list[Question]:
        """The questions that the wanted number of documents can serve; the others are dropped."""
        arguments = self.arguments
        num_documents = arguments.documents_per_question
        self.dropped = {reason: list(ids) for reason, ids in source.dropped.items()}
        usable = []
        for question in source.questions:
            if self.keeps_documents or arguments.closed_book:
                usable.append(question)
            elif len(question.positives or ()) > num_documents:
                # Without one of its gold passages a question may have no answer left.
                self.dropped.setdefault("more_positives_than_documents", []).append(question.id)
            elif arguments.corpus is None and len(source.passages) < num_documents:
                self.dropped.setdefault("too_few_passages", []).append(question.id)
            else:
                usable.append(question)
        if not usable:
            reasons = ", ".join(f"{reason} {len(ids)}" for reason, ids in self.dropped.items()) or "none was read"
            pool = f"The pool has {len(source.passages)} passages and num_documents is {num_documents}; "
            if arguments.corpus is not None or self.keeps_documents:
                pool = ""
            advice = "adapt --num_documents, name the passages' column with --documents_column, retrieve from a "
            advice += "--corpus, or check the source."
            if set(self.dropped) == {"no_answer"}:
                pool, advice = "", "Name the answers' column with --answer_column, or pass --keep_unanswered true "
                advice += "where a teacher is to write them."
            raise ScaleDownError(f"found no usable question ({reasons}), expected at least one. {pool}{advice}")
        return usable

    def _choose_documents(self, source: Source, questions: list[Question]) -> None:
        if len(self.documents) == len(questions):
            return
        choose = self._open_chooser(source)
        progress = tqdm(
            desc="Choosing documents", unit="question", total=len(questions), initial=len(self.documents), disable=None
        )

        def work(block: Sequence[int]) -> list[dict[str, Any]]:
            chosen = choose([questions[index] for index in block])
            progress.update(len(block))
            return chosen

        with progress:
            run_in_batches(self.documents, blocks(len(questions), choose.block_size), work)

    def _open_chooser(self, source: Source) -> Chooser:
        arguments = self.arguments
        if arguments.closed_book:
            return NoDocuments()
        if self.keeps_documents:
            return OwnDocuments()
        if arguments.corpus is None:
            num_documents = arguments.documents_per_question
            return PoolDocuments(source.passages, num_documents, arguments.distractors, arguments.seed)
        passages, index = _open_corpus(arguments, Path(arguments.corpus_dir or self.work.path / "corpus"))
        return CorpusDocuments(
            passages, index, arguments.documents_per_question, arguments.document_order, arguments.seed
        )

    def _score(self, count: int) -> None:
        arguments = self.arguments
        if len(self.scores) == count:
            return
        teacher = RerankingTeacher(
            arguments.reranker,
            arguments.reranker_revision,
            arguments.dtype,
            arguments.reranker_batch_size,
            arguments.reranker_max_length,
        )
        progress = tqdm(desc="Scoring documents", unit="question", total=count, initial=len(self.scores), disable=None)

        def work(block: Sequence[int]) -> list[list[float]]:
            scores = teacher.score([self._record_at(index) for index in block])
            progress.update(len(block))
            return scores

        with progress:
            run_in_batches(self.scores, blocks(count, RECORDS_PER_SCORING), work)

    def _answer(self, count: int) -> None:
        if len(self.answers) == count:
            return
        arguments = self.arguments
        teacher, tokenizer = self._open_teacher()
        cost = self._estimate_answers(count, tokenizer)
        logger.info("the teacher has %s", cost)

        def tell_pace(seconds: float, tokens: float) -> None:
            expected = Estimate(
                cost.requests,
                cost.prompt_tokens,
                round(cost.requests * tokens),
                arguments.teacher_price_input,
                arguments.teacher_price_output,
            )
            if expected.price is not None:
                logger.info("with answers of %.0f tokens as so far, all cost about %.2f", tokens, expected.price)

        if isinstance(teacher, EndpointTeacher):
            teacher.on_pace = tell_pace
        teacher.answer(self._scored_record_at, count, self.answers)

    def _open_teacher(self) -> tuple[AnswerTeacher, PreTrainedTokenizerBase | None]:
        arguments = self.arguments
        if arguments.teacher_url is None:
            teacher = LocalTeacher(
                arguments.teacher,
                arguments.teacher_revision,
                arguments.dtype,
                arguments.teacher_batch_size,
                arguments.teacher_max_tokens,
                arguments.teacher_temperature,
                arguments.seed,
            )
            return teacher, teacher.tokenizer
        endpoint = EndpointTeacher(
            arguments.teacher_url,
            arguments.teacher,
            arguments.teacher_api_key_env,
            arguments.teacher_concurrency,
            arguments.teacher_retries,
            arguments.teacher_timeout,
            arguments.teacher_backoff,
            arguments.teacher_max_tokens,
            arguments.teacher_temperature,
            arguments.seed,
            arguments.extra_body,
        )
        return endpoint, _load_tokenizer(arguments)

    def _estimate_answers(self, count: int, tokenizer: PreTrainedTokenizerBase | None) -> Estimate:
        arguments = self.arguments
        return estimate(
            self._expected_record_at,
            list(self.answers.missing(count)),
            arguments.teacher_max_tokens,
            tokenizer,
            arguments.teacher_price_input,
            arguments.teacher_price_output,
        )

    def _estimate(self, count: int) -> dict[str, Any]:
        """What is left to do, without a model loaded or a request sent."""
        rows: dict[str, Any] = {}
        if self.arguments.reranker is not None:
            missing = self.scores.missing(count)
            rows["pairs to score"] = sum(len(self._record_at(index)["documents"]) for index in missing)
        if self.arguments.teacher is not None:
            rows["answers to write"] = str(self._estimate_answers(count, _load_tokenizer(self.arguments)))
        return rows

    def _record_at(self, index: int) -> dict[str, Any]:
        """A record with its documents."""
        return self.documents[index]["record"]

    def _scored_record_at(self, index: int) -> dict[str, Any]:
        """A record with scores and the documents that remain."""
        record = self._record_at(index)
        if index in self.scores:
            record["reranking_scores"] = self.scores[index]
            if self.arguments.keep_best is not None:
                record = keep_best(record, self.arguments.keep_best)
        return record

    def _expected_record_at(self, index: int) -> dict[str, Any]:
        """A record of the length the teacher will read; before the scores are there, the first documents stand in."""
        record = self._scored_record_at(index)
        if self.arguments.keep_best is None or index in self.scores:
            return record
        return keep_best({**record, "reranking_scores": [0.0] * len(record["documents"])}, self.arguments.keep_best)

    def _finished_records(self, count: int) -> Iterator[dict[str, Any]]:
        matcher = _AnswerMatcher()
        for index in range(count):
            record = self._scored_record_at(index)
            gold = record.get("gold_answers") or record.get("answer") or []
            if self.arguments.teacher is not None:
                result = self.answers[index]
                if "refused" in result or is_blank(result["answer"]):
                    empty = result.get("refused", EMPTY_ANSWER) == EMPTY_ANSWER
                    reason = "empty_teacher_answer" if empty else "refused_by_teacher"
                    self.dropped.setdefault(reason, []).append(record["id"])
                    continue
                if gold:
                    record["gold_answers"] = gold
                record["answer"] = [result["answer"]]
                self.statistics.count_answer(result, gold, matcher)
            self.statistics.count(record, gold, matcher, self.documents[index])
            yield record
        if self.statistics.num_questions == 0:
            raise ScaleDownError(
                f"the teacher gave no answer that can be used to any of {count} questions, expected at least one; "
                f"{self.answers.path} tells why. Check the teacher, and delete {self.work.path} to ask again."
            )

    def _write(self, count: int, source_counts: dict[str, Any]) -> dict[str, Any]:
        """Write the records, the report and the card in the work folder, and move them to their places when all are."""
        arguments = self.arguments
        pending = self.work.path / "pending"
        # The names decide the form of the records.
        output = pending / Path(arguments.output).name
        write_records(output, self._finished_records(count), overwrite=True)
        report = self._report(source_counts)
        write_json(pending / arguments.report_path.name, report, ensure_ascii=False, indent=2)
        with atomic_writer(pending / arguments.card_path.name, overwrite=True) as stream:
            stream.write(str(build_card(report, output.name)).encode("utf-8"))
        # The records last: where they are, the others are too.
        for path in (arguments.report_path, arguments.card_path, Path(arguments.output)):
            (pending / path.name).replace(path)
        return report

    def _source_counts(self, source: Source, questions: list[Question]) -> dict[str, Any]:
        counts = {
            "questions_read": source.num_read,
            "questions_dropped": source.num_read - self.num_usable,
            "questions_usable": self.num_usable,
            "reranking_scores_discarded": 0 if self.keeps_documents else source.num_scores_discarded,
        }
        if not self.keeps_documents and self.arguments.corpus is None:
            counts["passages_in_pool"] = len(source.passages)
        return {"format": source.format, "counts": counts}

    def _report(self, source: dict[str, Any]) -> dict[str, Any]:
        arguments, counts = self.arguments, source["counts"]
        written = {} if arguments.dry_run else {"questions_written": self.statistics.num_questions}
        return {
            "source": arguments.source,
            "format": source["format"],
            "config": arguments.config,
            "split": arguments.split,
            "columns": self.columns,
            "settings": self._settings(),
            "counts": {
                **{name: counts[name] for name in ("questions_read", "questions_dropped", "questions_usable")},
                **written,
                **{name: value for name, value in counts.items() if not name.startswith("questions")},
                **({} if arguments.dry_run else self.statistics.counts()),
            },
            "dropped": {
                reason: {"count": len(ids), "examples": ids[:NUM_EXAMPLE_IDS]}
                for reason, ids in sorted(self.dropped.items())
            },
            "versions": _versions(arguments),
        }

    def _settings(self) -> dict[str, Any]:
        """What shaped the records; options of steps that were not taken are left out."""
        arguments = self.arguments
        names = ["num_examples", "seed"]
        names += [name for name in ("revision", "question_column", "answer_column") if getattr(arguments, name)]
        names += [name for name in ("documents_column", "id_column") if getattr(arguments, name)]
        if arguments.corpus is not None:
            names += ["corpus", "corpus_config", "corpus_split", "corpus_revision", "text_column", "title_column"]
            names += ["merge_lines", "passage_length", "passage_overlap", "tokenizer_name_or_path", "retriever"]
            names += ["document_order"]
        if arguments.reranker is not None:
            names += ["reranker", "reranker_revision", "reranker_max_length", "keep_best"]
        if arguments.teacher is not None:
            names += ["teacher", "teacher_revision", "teacher_max_tokens", "teacher_temperature", "teacher_extra_body"]
        settings = {name: getattr(arguments, name) for name in names}
        if arguments.corpus is not None:
            settings["retriever_name_or_path"] = arguments.retriever_model
            settings["top_k"] = arguments.documents_per_question
        elif not self.keeps_documents:
            settings["num_documents"] = arguments.documents_per_question
            settings["distractors"] = arguments.distractors
        return settings


@dataclass
class _Statistics:
    """Counts taken while the records are written."""

    num_questions: int = 0
    num_documents: int = 0
    num_words: int = 0
    num_positives: int = 0
    num_positives_retrieved: int | None = None
    num_distractors: int = 0
    num_distractors_with_answer: int = 0
    num_questions_without_positives: int = 0
    num_questions_without_documents: int = 0
    num_questions_unmatched: int = 0
    num_scored: int = 0
    num_answers: int = 0
    num_answers_cut: int = 0
    num_answers_with_gold: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    def count(self, record: dict[str, Any], gold: list[str], matcher: "_AnswerMatcher", chosen: dict[str, Any]) -> None:
        """Count a record that is written; `chosen` is what its chooser returned."""
        self.num_questions += 1
        self.num_documents += len(record["documents"])
        self.num_questions_without_documents += not record["documents"]
        self.num_words += sum(len(document.split()) for document in record["documents"])
        self.num_scored += len(record.get("reranking_scores") or ())
        self.num_questions_unmatched += chosen.get("unmatched", False)
        if "positives_retrieved" in chosen:
            self.num_positives_retrieved = (self.num_positives_retrieved or 0) + chosen["positives_retrieved"]
        if record.get("positives") is None:
            self.num_questions_without_positives += 1
            return
        self.num_positives += len(record["positives"])
        for index, document in enumerate(record["documents"]):
            if index not in record["positives"]:
                self.num_distractors += 1
                self.num_distractors_with_answer += matcher.contains(document, gold)

    def count_answer(self, result: dict[str, Any], gold: list[str], matcher: "_AnswerMatcher") -> None:
        """Count a teacher's answer."""
        self.num_answers += 1
        self.num_answers_cut += result["cut"]
        self.num_prompt_tokens += result["prompt_tokens"]
        self.num_completion_tokens += result["completion_tokens"]
        self.num_answers_with_gold += matcher.contains(result["answer"], gold)

    def counts(self) -> dict[str, Any]:
        """The counts of the steps that were taken."""
        counts = {
            "questions_without_positives": self.num_questions_without_positives,
            "questions_without_documents": self.num_questions_without_documents,
            "documents": self.num_documents,
            "positives": self.num_positives,
            "distractors": self.num_distractors,
            "distractors_with_answer": self.num_distractors_with_answer,
            "mean_document_words": round(self.num_words / max(self.num_documents, 1), 1),
        }
        if self.num_positives_retrieved is not None:
            counts["positives_retrieved"] = self.num_positives_retrieved
        if self.num_questions_unmatched:
            counts["questions_sharing_no_word_with_corpus"] = self.num_questions_unmatched
        if self.num_scored:
            counts["documents_scored"] = self.num_scored
        if self.num_answers:
            counts |= {
                "teacher_answers": self.num_answers,
                "teacher_answers_cut": self.num_answers_cut,
                "teacher_answers_with_gold": self.num_answers_with_gold,
                "teacher_prompt_tokens": self.num_prompt_tokens,
                "teacher_completion_tokens": self.num_completion_tokens,
            }
        return counts


class _AnswerMatcher:
    """Tells whether a text holds an answer as whole words, after the normalisation of SQuAD's evaluation."""

    CACHED = 20_000

    def __init__(self):
        self._texts: dict[str, str] = {}

    def contains(self, text: str, answers: Sequence[str]) -> bool:
        """Whether any of the answers is in the text; "yes" and "no" are no spans and never match."""
        if text not in self._texts:
            if len(self._texts) >= self.CACHED:
                self._texts.clear()
            self._texts[text] = f" {normalize_answer(text)} "
        normalized = (normalize_answer(answer) for answer in answers)
        return any(f" {answer} " in self._texts[text] for answer in normalized if answer not in ("", "yes", "no"))


def _prepare_corpus(arguments: PreparationArguments) -> dict[str, Any]:
    passages, _ = _open_corpus(arguments, Path(arguments.corpus_dir))
    settings = {"corpus": arguments.corpus, "retriever": arguments.retriever}
    settings |= {"retriever_name_or_path": arguments.retriever_model, "passage_length": arguments.passage_length}
    return {"settings": settings, "counts": {"passages": len(passages)}}


def _open_corpus(arguments: PreparationArguments, folder: Path) -> tuple[datasets.Dataset, Index]:
    """Passages and index, made as far as they are missing."""
    remedy = f"Name another --corpus_dir, give the same options, or delete {folder} to build it anew."
    corpus = WorkFolder(folder, arguments.corpus_settings, remedy)
    if arguments.corpus_dir is None:
        logger.info("passages and index are kept for this run only; name a --corpus_dir to use them again")
    read = CorpusReader(
        arguments.corpus,
        arguments.corpus_config,
        arguments.corpus_split,
        arguments.corpus_revision,
        arguments.text_column,
        arguments.title_column,
        arguments.merge_lines,
    )
    with corpus.locked():
        splitter = PassageSplitter(_load_tokenizer(arguments), arguments.passage_length, arguments.passage_overlap)
        passages = build_passages(folder, read, splitter)
        logger.info("the corpus has %d passages", len(passages))
        digest = hashlib.sha256(json.dumps(arguments.index_settings).encode()).hexdigest()[:8]
        index = WorkFolder(folder / f"{arguments.retriever}-{digest}", arguments.index_settings, remedy)
        settings = {}
        if arguments.retriever != "bm25":
            settings = {"revision": arguments.retriever_revision, "dtype": arguments.dtype}
            settings["batch_size"] = arguments.retriever_batch_size
        return passages, open_index(
            arguments.retriever, index.path / "data", passages, arguments.retriever_model, **settings
        )


def _load_tokenizer(arguments: PreparationArguments) -> PreTrainedTokenizerBase | None:
    name = arguments.tokenizer_name_or_path
    if name is None:
        return None
    return load_model(lambda: AutoTokenizer.from_pretrained(name), name, "--tokenizer_name_or_path")


def _versions(arguments: PreparationArguments) -> dict[str, str]:
    names = ["bm25s", "PyStemmer", "numpy", "datasets"]
    if arguments.reranker is not None or (arguments.corpus is not None and arguments.retriever != "bm25"):
        names += ["sentence-transformers"]
    if arguments.teacher_url is not None:
        names += ["openai"]
    if len(names) > 4 or arguments.teacher is not None:
        names += ["torch", "transformers"]
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in dict.fromkeys(names)},
    }
