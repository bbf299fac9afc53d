"""Arguments of `prepare_data.py`: one dataclass over a YAML recipe and the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from errors_scaledown import ScaleDownError

from ..common.choices import DEFAULT_MODELS, DEFAULT_RERANKER, DTYPES, FORMATS, RETRIEVERS, Columns
from ..common.command_line import check_least, parse_object, parse_with

DEFAULT_NUM_DOCUMENTS = 5
# These decide where and how fast the work is done, not what comes out; a run may go on with other values.
PERFORMANCE = (
    "output",
    "overwrite",
    "dry_run",
    "corpus_dir",
    "retriever_batch_size",
    "reranker_batch_size",
    "teacher_url",
    "teacher_api_key_env",
    "teacher_batch_size",
    "teacher_concurrency",
    "teacher_retries",
    "teacher_timeout",
    "teacher_backoff",
    "teacher_price_input",
    "teacher_price_output",
    "dtype",
)


# What decides the scores, and what the answers: the documents that were chosen serve any teacher.
SETTINGS_OF_STEPS = {
    "scores": ("reranker", "reranker_revision", "reranker_max_length"),
    "answers": (
        "keep_best",
        "teacher",
        "teacher_revision",
        "teacher_max_tokens",
        "teacher_temperature",
        "teacher_extra_body",
    ),
}


@dataclass
class PreparationArguments:
    """What to read, how to choose the documents, which teachers to ask, and where to write.

    Raises:
        ValueError: A number out of range, options that contradict each other, or an output that is the source or the
            corpus, or inside them.
    """

    source: str | None = field(
        default=None,
        metadata={"help": "Questions: a local file, or the name of a data set on the Hub such as rajpurkar/squad."},
    )
    output: str | None = field(
        default=None, metadata={"help": "The file to write: .parquet, or JSON Lines; .gz and .xz are compressed."}
    )
    format: Literal[FORMATS] | None = field(
        default=None, metadata={"help": "The source's format; recognized from its content by default."}
    )
    config: str | None = field(default=None, metadata={"help": "Configuration of a data set, such as distractor."})
    split: str | None = field(default=None, metadata={"help": "Split of a data set; train by default."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a data set."})
    question_column: str | None = field(default=None, metadata={"help": "Column of the question, for any table."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of the answer, or a list of answers."})
    documents_column: str | None = field(default=None, metadata={"help": "Column of the list of documents."})
    id_column: str | None = field(default=None, metadata={"help": "Column of the id."})
    num_examples: int | None = field(
        default=None, metadata={"help": "Questions to write, sampled by the seed; all by default."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sample and of the order of the documents."})
    keep_unanswered: bool = field(
        default=False, metadata={"help": "Keep questions without an answer, for a later run with a teacher."}
    )

    closed_book: bool = field(
        default=False, metadata={"help": "Allow that no question has a document; without this it is an error."}
    )

    num_documents: int | None = field(
        default=None,
        metadata={
            "help": "Documents per question, the gold ones included, from the source's own passages (5 by default). "
            "Documents of records and tables stay as they are unless this is given."
        },
    )
    distractors: Literal["bm25", "random"] = field(
        default="bm25", metadata={"help": "How distractors are chosen from the source's own passages."}
    )

    corpus: str | None = field(
        default=None,
        metadata={"help": "Retrieve the documents from this corpus: a file or folder of texts, or a data set's name."},
    )
    corpus_config: str | None = field(default=None, metadata={"help": "Configuration of a corpus on the Hub."})
    corpus_split: str | None = field(default=None, metadata={"help": "Split of a corpus on the Hub."})
    corpus_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a corpus."})
    text_column: str = field(default="text", metadata={"help": "Column of the corpus's texts; dots lead into objects."})
    title_column: str | None = field(
        default=None,
        metadata={"help": "Column of the titles, put before each passage; title by default."},
    )
    merge_lines: bool = field(
        default=False, metadata={"help": "In text files, join lines up to a blank one into one text."}
    )
    passage_length: int = field(default=128, metadata={"help": "Maximum tokens per passage."})
    passage_overlap: int = field(default=0, metadata={"help": "Tokens that a passage repeats from the one before."})
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Counts the tokens of passages; without it a token counts as 3/4 of a word."},
    )
    corpus_dir: str | None = field(
        default=None,
        metadata={"help": "Keep passages and indexes here for other runs; by default they are deleted after the run."},
    )
    retriever: Literal[RETRIEVERS] = field(default="bm25", metadata={"help": "How the corpus is searched."})
    retriever_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Encoder; by default " + ", ".join(f"{v} ({k})" for k, v in DEFAULT_MODELS.items()) + "."},
    )
    retriever_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the encoder."})
    retriever_batch_size: int = field(default=64, metadata={"help": "Texts encoded per batch."})
    top_k: int | None = field(
        default=None,
        metadata={"help": "Documents per question from the corpus, known gold ones included; 5 by default."},
    )
    document_order: Literal["auto", "best_first", "shuffled"] = field(
        default="auto",
        metadata={"help": "Order of documents from the corpus. auto: best first, but shuffled if gold ones are known."},
    )

    reranker: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": DEFAULT_RERANKER,
            "help": f"Score the documents with this cross-encoder; without a value {DEFAULT_RERANKER}.",
        },
    )
    reranker_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the reranker."})
    reranker_batch_size: int = field(default=64, metadata={"help": "Pairs scored per batch."})
    reranker_max_length: int = field(
        default=512, metadata={"help": "Maximum tokens of question and document together."}
    )
    keep_best: int | None = field(
        default=None, metadata={"help": "After scoring, keep only this many documents; known gold ones stay."}
    )

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "The model that writes the answers: a causal language model, or with teacher_url its name there."
        },
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the teacher."})
    teacher_url: str | None = field(
        default=None, metadata={"help": "An OpenAI-compatible endpoint, such as http://localhost:8000/v1."}
    )
    teacher_api_key_env: str | None = field(
        default=None, metadata={"help": "Environment variable that holds the endpoint's key, such as OPENAI_API_KEY."}
    )
    teacher_batch_size: int = field(default=16, metadata={"help": "Prompts per batch of a local teacher."})
    teacher_concurrency: int = field(default=16, metadata={"help": "Concurrent requests to an endpoint."})
    teacher_retries: int = field(default=8, metadata={"help": "Retries of a failed request."})
    teacher_timeout: float = field(default=120.0, metadata={"help": "Timeout of one request in seconds."})
    teacher_backoff: float = field(
        default=1.0, metadata={"help": "Seconds before the first retry; they double with each retry."}
    )
    teacher_max_tokens: int = field(default=128, metadata={"help": "Maximum tokens per answer."})
    teacher_temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})
    teacher_extra_body: str | None = field(
        default=None, metadata={"help": "Additional fields of each request to an endpoint, as a JSON object."}
    )
    teacher_price_input: float | None = field(default=None, metadata={"help": "Price per million prompt tokens."})
    teacher_price_output: float | None = field(default=None, metadata={"help": "Price per million answer tokens."})

    dtype: Literal[DTYPES] = field(default="auto", metadata={"help": "Precision of encoder, reranker and teacher."})
    dry_run: bool = field(default=False, metadata={"help": "Choose the documents, report the costs, and stop."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing output, its report and its card."})

    def __post_init__(self):
        self._check_choices()
        self._check_numbers()
        if self.output is None and not self.only_corpus:
            raise ScaleDownError(
                "output is missing; name the file to write with --output. Only --corpus with --corpus_dir, which build "
                "an index, need neither --source nor --output."
            )
        if self.source is None and not self.only_corpus:
            raise ScaleDownError("source is missing; name the questions with --source.")
        self._check_output()
        if self.closed_book and (self.corpus is not None or self.num_documents is not None):
            raise ScaleDownError(
                "closed_book asks for questions without documents, and corpus or num_documents for some; leave one out."
            )
        if self.corpus is None and self.top_k is not None:
            raise ScaleDownError("top_k is given without a corpus; name one with --corpus, or use --num_documents.")
        if self.corpus is None and self.corpus_dir is not None:
            raise ScaleDownError("corpus_dir is given without a corpus; name the one it belongs to with --corpus.")
        if self.corpus_dir is not None and Path(self.corpus).resolve() in (
            Path(self.corpus_dir).resolve(),
            *Path(self.corpus_dir).resolve().parents,
        ):
            raise ScaleDownError(f"corpus_dir is {self.corpus_dir}, inside the corpus itself; name a folder elsewhere.")
        if self.corpus is not None and self.num_documents is not None:
            raise ScaleDownError(
                "num_documents chooses from the source's own passages and corpus replaces them; use --top_k with a "
                "corpus."
            )
        if self.keep_best is not None and self.reranker is None:
            raise ScaleDownError("keep_best is given without a reranker, which says what is best; add --reranker.")
        if self.teacher_url is not None and self.teacher is None:
            raise ScaleDownError("teacher_url is given without the model's name there; add --teacher.")
        self.extra_body  # noqa: B018 - refused now, not after the work

    def _check_output(self) -> None:
        if self.output is None:
            return
        output = Path(self.output).resolve()
        for name, value in (("source", self.source), ("corpus", self.corpus)):
            if value is None:
                continue
            path = Path(value).resolve()
            if path == output:
                raise ScaleDownError(f"output is {self.output}, the {name} itself; write to another file.")
            # The unfinished work beside the output would be read as a part of it, and change it.
            if path.is_dir() and path in output.parents:
                raise ScaleDownError(f"output is {self.output}, inside the {name} {value}; write to another folder.")

    def _check_choices(self) -> None:
        choices = {
            "format": (*FORMATS, None),
            "distractors": ("bm25", "random"),
            "retriever": RETRIEVERS,
            "document_order": ("auto", "best_first", "shuffled"),
            "dtype": DTYPES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(choice for choice in allowed if choice)
                raise ScaleDownError(f"{name} is {getattr(self, name)!r}, expected one of {names}; correct --{name}.")

    def _check_numbers(self) -> None:
        least = {
            "num_documents": 1,
            "num_examples": 1,
            "top_k": 1,
            "keep_best": 1,
            "retriever_batch_size": 1,
            "reranker_batch_size": 1,
            "reranker_max_length": 8,
            "teacher_batch_size": 1,
            "teacher_concurrency": 1,
            "teacher_retries": 0,
            "teacher_max_tokens": 1,
            "teacher_temperature": 0,
            "teacher_price_input": 0,
            "teacher_price_output": 0,
            "teacher_backoff": 0,
        }
        check_least(self, least)
        if self.teacher_timeout <= 0:
            raise ScaleDownError(f"teacher_timeout is {self.teacher_timeout}, expected a positive number of seconds.")

    @property
    def only_corpus(self) -> bool:
        """Whether the run only builds passages and an index."""
        return self.source is None and self.output is None and None not in (self.corpus, self.corpus_dir)

    @property
    def report_path(self) -> Path:
        """The file of the report, beside the output."""
        return Path(f"{self.output}.report.json")

    @property
    def card_path(self) -> Path:
        """The file of the data card, beside the output."""
        return Path(f"{self.output}.card.md")

    @property
    def work_path(self) -> Path:
        """The folder of unfinished work, beside the output."""
        return Path(f"{self.output}.work")

    @property
    def columns(self) -> Columns:
        """Names of the source's columns."""
        return Columns(self.question_column, self.answer_column, self.documents_column, self.id_column)

    @property
    def retriever_model(self) -> str | None:
        """The encoder; None for BM25, which has none."""
        return self.retriever_name_or_path or DEFAULT_MODELS.get(self.retriever)

    @property
    def documents_per_question(self) -> int:
        """How many documents a question gets, where they are chosen."""
        return self.top_k or self.num_documents or DEFAULT_NUM_DOCUMENTS

    @property
    def extra_body(self) -> dict[str, Any]:
        """More fields of each request to an endpoint."""
        return parse_object("teacher_extra_body", self.teacher_extra_body)

    @property
    def corpus_settings(self) -> dict[str, Any]:
        """What decides the passages."""
        names = ("corpus_config", "corpus_split", "corpus_revision", "text_column", "title_column", "merge_lines")
        names += ("passage_length", "passage_overlap")
        return {
            "corpus": _describe_source(self.corpus),
            **{name: getattr(self, name) for name in names},
            "tokenizer": _describe_model(self.tokenizer_name_or_path),
        }

    @property
    def index_settings(self) -> dict[str, Any]:
        """What decides the index over the passages."""
        return {
            "retriever": self.retriever,
            "model": _describe_model(self.retriever_model),
            "revision": self.retriever_revision,
        }

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the output: unfinished work belongs to these settings alone."""
        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in PERFORMANCE}
        settings["source"] = _describe_source(self.source)
        if self.corpus is not None:
            settings["corpus"] = _describe_source(self.corpus)
        for name in ("tokenizer_name_or_path", "retriever_name_or_path", "reranker"):
            settings[name] = _describe_model(settings[name])
        if self.teacher_url is None:
            settings["teacher"] = _describe_model(self.teacher)
        return settings


def parse_arguments(argv: Sequence[str] | None = None) -> PreparationArguments:
    """Parse a recipe and the options that override it.

    Args:
        argv: `[recipe.yaml] [--option value …]`; the command line by default.

    Returns:
        The arguments.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: The recipe or an option is wrong.
    """
    parser = HfArgumentParser(
        PreparationArguments,
        usage="%(prog)s [recipe.yaml] --source SOURCE --output FILE [--option value ...]",
        description="Turn a data set into the project's records, with documents, scores and answers of teachers.",
    )
    (arguments,) = parse_with(parser, argv)
    return arguments


def _describe_model(name: str | None) -> Any:
    return name if name is None or not Path(name).exists() else _describe_source(name)


def _describe_source(source: str) -> dict[str, Any]:
    from .sources import describe_source  # which reads data sets, and takes seconds to import

    return describe_source(source)
