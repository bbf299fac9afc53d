"""Turn questions into the project's records: documents chosen or retrieved, scored and answered by teachers.

    questions ──► documents ──► reranking scores ──► answers ──► records, report, data card
                  own, pool      cross-encoder        causal LM
                  or corpus                           or endpoint

Each step keeps what it has done in `<output>.work/`, so that a run goes on where it was killed.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from errors_scaledown import ScaleDownError

from ..common.command_line import run_command
from ..common.files import atomic_writer, check_is_writable, explained_disk_errors, write_json
from ..common.text import is_blank
from .arguments import SETTINGS_OF_STEPS, PreparationArguments, parse_arguments
from .card import build_card
from .choice import Chooser, CorpusDocuments, NoDocuments, OwnDocuments, PoolDocuments, keep_best, sample
from .formats import OWN_DOCUMENTS
from .journal import WorkFolder, blocks, run_in_batches
from .questions import Question, Source
from .readers import read_source
from .records import write_records
from .report import format_report, library_versions
from .searchable import load_tokenizer, open_corpus, prepare_corpus
from .splitting import PassageSplitter
from .statistics import AnswerMatcher, Statistics
from .teachers.answers import AnswerTeacher, LocalTeacher
from .teachers.cost import CostEstimate, estimate_cost
from .teachers.endpoint import EMPTY_ANSWER, EndpointTeacher
from .teachers.scores import RerankingTeacher

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
            return prepare_corpus(arguments)
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
                # A run that is refused before it has done anything leaves no files.
                if not work.has_results and not (work.path / "corpus").exists():
                    work.remove()
                raise
        if not arguments.dry_run:
            work.remove()
    return report


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
        self.statistics = Statistics()
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
            PassageSplitter(load_tokenizer(arguments), arguments.passage_length, arguments.passage_overlap),
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
        passages, index = open_corpus(arguments, Path(arguments.corpus_dir or self.work.path / "corpus"))
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
            expected = CostEstimate(
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
        return endpoint, load_tokenizer(arguments)

    def _estimate_answers(self, count: int, tokenizer: PreTrainedTokenizerBase | None) -> CostEstimate:
        arguments = self.arguments
        return estimate_cost(
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
            rows["answers to write"] = str(self._estimate_answers(count, load_tokenizer(self.arguments)))
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
        matcher = AnswerMatcher()
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
                f"{self.answers.path} says why. Check the teacher, and delete {self.work.path} to ask again."
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
            "versions": library_versions(arguments),
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
