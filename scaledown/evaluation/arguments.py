"""Arguments of `evaluate.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from errors_scaledown import ScaleDownError

from ..common.choices import BASELINES, DTYPES, FORMATS
from ..common.command_line import check_least, parse_object, parse_options, refuse_existing, refuse_options, split_names

DEFAULT_BASELINES = "full_text,no_documents"
# What is read where no model is asked.
READ_BY_COMPARE = ("compare", "output_dir")
READ_BY_REJUDGE = (
    *READ_BY_COMPARE,
    *("rejudge", "group_by", "seed"),
    *("judge", "judge_url", "judge_api_key_env", "judge_against"),
    *("judge_concurrency", "judge_max_tokens", "judge_extra_body", "judge_cache"),
)


@dataclass
class EvaluationArguments:
    """What to measure, on which questions, against what, and where to write.

    Raises:
        ValueError: A number out of range, a name there is not, or options that contradict each other.
    """

    model: str | None = field(default=None, metadata={"help": "The ScaleDown model: a folder, or a name on the Hub."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    generator: str | None = field(
        default=None,
        metadata={
            "help": "The generator that reads whole documents. By default the model's own without its LoRA or, if "
            "LoRA was merged, the original that the model names; own: the model's own, unchanged."
        },
    )
    generator_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the generator."})
    reader: str | None = field(
        default=None,
        metadata={
            "help": "Output folder of train.py --stage reader: the baselines read text with the generator and that "
            "LoRA, so that a trained model is compared with a trained reader."
        },
    )

    data: str | None = field(
        default=None,
        metadata={
            "help": "Questions: records as prepare_data.py writes them, a file of SQuAD, HotpotQA, Natural Questions "
            "or another data set prepare_data.py reads, or a data set's name on the Hub."
        },
    )
    format: Literal[FORMATS] | None = field(
        default=None, metadata={"help": "The data's format; recognized from its content by default."}
    )
    config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    split: str | None = field(default=None, metadata={"help": "Split of a data set on the Hub."})
    data_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a data set."})
    limit: int | None = field(
        default=None, metadata={"help": "Questions to ask, a sample decided by the seed; all by default."}
    )
    closed_book: bool = field(
        default=False, metadata={"help": "Allow that no question has a document; without this it is an error."}
    )
    num_documents: int | None = field(
        default=None,
        metadata={
            "help": "Documents per question. For records, the first distinct ones are kept, those in `positives` "
            "first. For other formats they are chosen as in prepare_data.py, 5 by default."
        },
    )
    too_long: Literal["error", "skip"] = field(
        default="error",
        metadata={
            "help": "What to do with a question whose prompt exceeds the generator's context in one of the systems: "
            "stop, or leave it out for all of them and count it."
        },
    )
    group_by: str | None = field(
        default=None,
        metadata={"help": "Fields of the records to break the metrics down by, such as answer_kind,hops."},
    )

    baselines: str = field(
        default=DEFAULT_BASELINES,
        metadata={"help": f"What to compare with, separated by commas, or none: {', '.join(BASELINES)}."},
    )
    compression_rate: int | None = field(
        default=None, metadata={"help": "Document tokens per slot; the model's own by default."}
    )
    max_documents: int | None = field(
        default=None,
        metadata={
            "help": "The generator reads only the N documents that the model ranks best; by default as many as the "
            "model's configuration says, or all."
        },
    )
    max_slots: int | None = field(
        default=None, metadata={"help": "The generator reads the best documents that fit into N slots together."}
    )
    min_reranking_score: float | None = field(
        default=None, metadata={"help": "The generator reads only documents that score at least this."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Maximum tokens per answer."})
    batch_size: str = field(
        default="auto",
        metadata={"help": "Questions per batch; auto starts at 32 (8 on a CPU) and is halved when memory runs out."},
    )
    dtype: Literal[DTYPES] = field(
        default="auto",
        metadata={"help": "Type of the weights; auto is bfloat16 if the GPU supports it, float32 on a CPU."},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the generator; its LoRA stays unmerged."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, mps …"})
    seed: int = field(default=0, metadata={"help": "Seed of the sample, the random baselines and the intervals."})
    resamples: int = field(default=1000, metadata={"help": "Bootstrap resamples for each interval."})

    judge: str | None = field(
        default=None, metadata={"help": "Model behind an OpenAI-compatible endpoint that judges the answers."}
    )
    judge_url: str | None = field(default=None, metadata={"help": "The endpoint, such as http://localhost:8000/v1."})
    judge_api_key_env: str | None = field(
        default=None, metadata={"help": "Environment variable that holds the endpoint's key."}
    )
    judge_against: str | None = field(
        default=None,
        metadata={"help": "Also judge each answer against that of these baselines, separated by commas."},
    )
    judge_concurrency: int = field(default=16, metadata={"help": "Concurrent requests."})
    judge_max_tokens: int = field(default=32, metadata={"help": "Maximum tokens per judgement."})
    judge_extra_body: str | None = field(
        default=None, metadata={"help": "Additional fields of each request to the judge, as a JSON object."}
    )
    judge_cache: str = field(
        default="runs/judge_cache", metadata={"help": "Folder that stores judgements, so that none is requested twice."}
    )

    output_dir: str | None = field(
        default=None,
        metadata={"help": "A new folder; by default runs/evaluation/MODEL-DATA-TIME. It is never overwritten."},
    )
    update_card: bool = field(
        default=False, metadata={"help": "Write the results into the card (README.md) of the model's folder."}
    )
    rejudge: str | None = field(
        default=None,
        metadata={"help": "Folder of an earlier run whose answers are judged, instead of running a model."},
    )
    compare: list[str] | None = field(
        default=None, metadata={"nargs": "+", "help": "Folders of earlier runs to include in one report with this one."}
    )

    def __post_init__(self):
        self._check_names()
        counts = ("limit", "num_documents", "compression_rate", "max_documents", "max_slots", "max_new_tokens")
        check_least(self, {**dict.fromkeys((*counts, "judge_concurrency", "resamples"), 1), "seed": 0})
        if self.min_reranking_score is not None and not math.isfinite(self.min_reranking_score):
            raise ScaleDownError(
                f"min_reranking_score is {self.min_reranking_score}, expected a finite number, or none to keep all."
            )
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise ScaleDownError(f"batch_size is {self.batch_size!r}, expected auto or a number of at least 1.")
        if (self.judge is None) != (self.judge_url is None):
            raise ScaleDownError("a judge needs both its name and its endpoint; pass --judge and --judge_url.")
        _ = self.judge_request  # is read now, not after the answers
        if self.judge_against is not None and self.judge is None:
            raise ScaleDownError("judge_against needs a judge; pass --judge and --judge_url, or leave it out.")
        if self.update_card and not (self.model and Path(self.model).is_dir()):
            raise ScaleDownError(
                f"update_card needs a model in a local folder to write its README.md, and {self.model} is none; load "
                "the model, save it with save_pretrained, and evaluate that folder."
            )
        refuse_existing(self.output_dir)

    def _check_names(self) -> None:
        if self.rejudge is not None and (self.model is not None or self.judge is None):
            raise ScaleDownError("rejudge takes answers of an earlier run and a judge, no model; pass --judge.")
        if self.model is None and self.compare is None and self.rejudge is None:
            raise ScaleDownError(
                "model is missing; pass --model and --data, or --compare with folders of earlier runs."
            )
        if self.model is not None and self.data is None:
            raise ScaleDownError("data is missing; pass --data with the questions to ask.")
        if self.rejudge is not None:
            refuse_options(self, self._others(READ_BY_REJUDGE), "rejudge takes earlier answers as they are and")
        elif self.model is None:
            refuse_options(self, self._others(READ_BY_COMPARE), "compare puts earlier runs side by side and")
        unknown = [name for name in self.baseline_names if name not in BASELINES]
        if unknown:
            raise ScaleDownError(
                f"there is no baseline {unknown[0]!r}; expected some of {', '.join(BASELINES)}, or none."
            )
        absent = [name for name in self.judged_against if name not in self.baseline_names]
        if absent and self.rejudge is None:
            raise ScaleDownError(
                f"judge_against names {absent[0]!r}, which is not among the baselines; add it to those."
            )

    def _others(self, read: tuple[str, ...]) -> set[str]:
        return {option.name for option in fields(self)}.difference(read)

    @property
    def baseline_names(self) -> list[str]:
        """The baselines asked for, each once."""
        return [] if self.baselines == "none" else split_names(self.baselines)

    @property
    def selection(self) -> dict[str, float]:
        """Which of its documents the model's generator reads; empty for what the model's configuration says."""
        names = ("min_reranking_score", "max_documents", "max_slots")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def judge_request(self) -> dict[str, Any]:
        """More fields of each request to the judge."""
        return parse_object("judge_extra_body", self.judge_extra_body)

    @property
    def group_fields(self) -> list[str]:
        """The fields to group by, each once."""
        return split_names(self.group_by)

    @property
    def judged_against(self) -> list[str]:
        """The baselines whose answers the judge compares the model's with, each once."""
        return split_names(self.judge_against)


def default_name(arguments: EvaluationArguments) -> str:
    """Where a run is written that names no folder, without what tells it from others of its kind.

    Args:
        arguments: The model and the data, or what is judged again.

    Returns:
        The beginning of a path.
    """
    sources = [arguments.model, arguments.data] if arguments.model else [arguments.rejudge or "comparison"]
    return "runs/evaluation/" + "-".join(Path(source).resolve().name.split(".")[0] for source in sources)


def parse_arguments(argv: Sequence[str] | None = None) -> EvaluationArguments:
    """Parse the command line.

    Args:
        argv: `[--option value …]`; the command line by default.

    Returns:
        The arguments.

    Raises:
        FileExistsError: The output folder exists.
        ValueError: An option is wrong.
    """
    return parse_options(
        EvaluationArguments,
        argv,
        usage="%(prog)s --model MODEL --data DATA [--option value ...]",
        description="Measure a ScaleDown model, and compare it with the same generator on whole documents.",
    )
