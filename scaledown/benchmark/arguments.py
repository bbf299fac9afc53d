"""Arguments of `benchmark.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from errors_scaledown import ScaleDownError

from ..common.choices import DTYPES
from ..common.command_line import check_least, parse_options, refuse_existing, refuse_options, split_names
from .shapes import SHAPES
from .workload import Workload

MODES = ("flops", "speed", "train", "scaling", "serving")
SWEPT = ("batch_size", "num_documents", "document_length", "new_tokens", "compression_rate")
DEFAULT_COMPRESSORS = "5"
# Counting has no batches, clocks or types of numbers.
_OF_MEASUREMENTS = (
    "batch_size",
    "sweep",
    "mixed_lengths",
    "compile",
    "repeats",
    "threads",
    "dtype",
    "device",
    "rivals",
)
_OF_SERVING = ("service_url", "text_url", "concurrency")
UNREAD = {
    "flops": (*_OF_MEASUREMENTS, *_OF_SERVING),
    "speed": _OF_SERVING,
    "scaling": (*_OF_MEASUREMENTS, *_OF_SERVING),
    "train": ("sweep", "compile", "rivals", *_OF_SERVING),
    # What computes, and how, was decided when the servers were started.
    "serving": (
        "compressors",
        "prompt_length",
        "batch_size",
        "sweep",
        "mixed_lengths",
        "compile",
        "threads",
        "dtype",
        "device",
        "rivals",
    ),
}
CONCURRENCY = "1,8,32"


@dataclass
class BenchmarkArguments:
    """What to measure, of which models, and where to write.

    Raises:
        ValueError: A number out of range, or a name there is not.
    """

    mode: Literal[MODES] = field(
        default="flops",
        metadata={
            "help": "flops: operations, counted without computing them; speed: time and memory of answers; train: "
            "those of training steps; scaling: operations against the number and the length of documents; serving: "
            "requests per second of running servers."
        },
    )
    generator: str | None = field(
        default=None,
        metadata={
            "help": f"The generator's shape: {', '.join(SHAPES)}, a folder, or a name on the Hub. In mode flops all of "
            "OSCAR's table 1 by default. In mode serving the folder that vLLM serves, whose tokenizer is used."
        },
    )
    compressors: str = field(
        default=DEFAULT_COMPRESSORS,
        metadata={"help": "Separated by commas: a number of the generator's layers, or the name of a compressor."},
    )
    prompt_length: int = field(default=128, metadata={"help": "Tokens of the prompt, without the documents."})
    num_documents: int = field(default=10, metadata={"help": "Documents per question."})
    document_length: int = field(default=128, metadata={"help": "Tokens per document."})
    query_length: int = field(
        default=0,
        metadata={
            "help": "Question tokens that the compressor reads with each document; 0 counts them among the document's. "
            "flops and scaling count them for every document, speed measures what the model does: once if it can."
        },
    )
    new_tokens: int = field(default=32, metadata={"help": "Tokens per answer."})
    compression_rate: int = field(default=16, metadata={"help": "Document tokens per slot."})
    batch_size: int = field(default=1, metadata={"help": "Questions per batch."})
    sweep: list[str] | None = field(
        default=None,
        metadata={
            "nargs": "+",
            "help": f"Measure at these values too, one setting at a time: NAME=VALUE,VALUE with {', '.join(SWEPT)}.",
        },
    )
    mixed_lengths: bool = field(
        default=False,
        metadata={"help": "Draw document lengths uniformly, from an eighth of document_length up."},
    )
    compile: bool = field(
        default=False,
        metadata={
            "help": "On a GPU: both sides decode with a static cache, which transformers compiles, and compressors are "
            "compiled."
        },
    )
    rivals: bool = field(
        default=False,
        metadata={
            "help": "Mode speed: time what else shortens documents too, such as LLMLingua-2, Provence, rerankers and "
            "PISCO, by the shapes of their models."
        },
    )
    repeats: int = field(default=5, metadata={"help": "Measurements of each figure, after one warm-up run."})
    threads: int | None = field(default=None, metadata={"help": "Threads on a CPU; torch's choice by default."})
    dtype: Literal[DTYPES] = field(
        default="auto",
        metadata={"help": "Type of the weights; auto is bfloat16 if the GPU supports it, float32 on a CPU."},
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, mps …"})
    service_url: str | None = field(
        default=None, metadata={"help": "Mode serving: API of ScaleDown's service, such as http://127.0.0.1:8000/v1."}
    )
    text_url: str | None = field(
        default=None,
        metadata={
            "help": "Mode serving: API of the vLLM that reads whole documents, such as http://127.0.0.1:8001/v1."
        },
    )
    concurrency: str = field(
        default=CONCURRENCY, metadata={"help": "Mode serving: requests under way at once, separated by commas."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, ids and lengths."})
    output_dir: str | None = field(
        default=None, metadata={"help": "A new folder for the JSON file, the table and the plots."}
    )

    def __post_init__(self):
        check_least(self, dict.fromkeys((*SWEPT, "prompt_length", "repeats", "threads"), 1))
        check_least(self, {"query_length": 0, "seed": 0})
        if self.mode != "flops" and self.generator is None:
            raise ScaleDownError(f"mode {self.mode} needs a generator; pass --generator, such as qwen2.5-0.5b.")
        refuse_existing(self.output_dir)
        if not self.compressor_names:
            raise ScaleDownError(f"compressors is {self.compressors!r}, expected at least one, such as 5.")
        unread = UNREAD.get(self.mode, ()) + (("compressors",) if self.generator is None else ())
        without = "" if self.generator else " without a generator"
        refuse_options(self, unread, f"mode {self.mode}{without}")
        if self.rivals and self.mixed_lengths:
            raise ScaleDownError(
                "rivals are timed on documents of one length, and mixed_lengths draws others for the models they are "
                "compared with; leave out --mixed_lengths or --rivals."
            )
        if self.rivals and self.compile:
            raise ScaleDownError(
                "compile compiles the compressors and not the models of rivals, so that their times would not be "
                "comparable; leave out --compile or --rivals."
            )
        if self.rivals and self.prompt_length < 2:
            raise ScaleDownError(
                "rivals include a cached prefix, half of the prompt, and prompt_length is 1; pass at least 2."
            )
        if self.mode == "serving" and not (self.service_url and self.text_url):
            raise ScaleDownError("mode serving measures running servers; pass --service_url and --text_url.")
        _ = self.settings, self.levels  # are read now, not after the work

    @property
    def compressor_names(self) -> list[str]:
        """The compressors asked for, each once."""
        return split_names(self.compressors)

    @property
    def levels(self) -> list[int]:
        """The numbers of requests at once, each once."""
        names = split_names(self.concurrency)
        if not names or not all(name.isdecimal() and int(name) > 0 for name in names):
            raise ScaleDownError(f"concurrency is {self.concurrency!r}, expected whole numbers such as {CONCURRENCY}.")
        return [int(name) for name in names]

    @property
    def workload(self) -> Workload:
        """What is read and written for a question."""
        return Workload(
            self.prompt_length,
            self.num_documents,
            self.document_length,
            self.query_length,
            self.new_tokens,
            self.compression_rate,
        )

    @property
    def settings(self) -> list[tuple[Workload, int]]:
        """Workload and batch size of every measurement: the base first, then the swept ones, each once."""
        found = [(self.workload, self.batch_size)]
        for text in self.sweep or []:
            name, _, values = text.partition("=")
            if name not in SWEPT or not all(value.isdecimal() and int(value) > 0 for value in values.split(",")):
                raise ScaleDownError(
                    f"sweep holds {text!r}, expected NAME=VALUE,VALUE with whole numbers and one of {', '.join(SWEPT)}."
                )
            for value in map(int, values.split(",")):
                if name == "batch_size":
                    found.append((self.workload, value))
                else:
                    found.append((replace(self.workload, **{name: value}), self.batch_size))
        return list(dict.fromkeys(found))


def parse_arguments(argv: Sequence[str] | None = None) -> BenchmarkArguments:
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
        BenchmarkArguments,
        argv,
        usage="%(prog)s --mode MODE [--option value ...]",
        description="Measure what compression saves, beside the same generator on whole documents.",
    )
