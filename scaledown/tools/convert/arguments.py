"""The options of the converter."""

from dataclasses import dataclass, field

from configuration_scaledown import WEIGHTS_FORMATS
from errors_scaledown import ScaleDownError
from settings_scaledown import PADDING_SIDES

from ...common.choices import DTYPES
from ...common.command_line import check_least

TYPES = tuple(name for name in DTYPES if name != "auto")


@dataclass
class ConversionArguments:
    """What to convert, where to, and what the source does not say by itself."""

    source: str = field(metadata={"help": "Folder of a published checkpoint, or its name on the Hub."})
    output: str = field(metadata={"help": "Folder for the ScaleDown model; with --verify it may be there already."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the source."})
    decoder: str | None = field(
        default=None, metadata={"help": "Folder or name of the base decoder, where it is another than the source says."}
    )
    decoder_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the decoder."})
    compressor_base: str | None = field(
        default=None, metadata={"help": "Folder or name of the compressor's base, where it is another."}
    )
    compressor_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of that base."})
    reads_question: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the compressor reads the question beside a document, as OSCAR does and PISCO does not. "
            "By default the source's name decides, where it says which of them it is."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of question and document, the frame not counted. 128 by default, as the method of "
            "published models has it; OSCAR was evaluated with 192."
        },
    )
    padding_side: str | None = field(
        default=None,
        metadata={"help": "Where the compressor's rows are padded: left or right; by default as its tokenizer does."},
    )
    final_norm: bool | None = field(
        default=None,
        metadata={"help": "Whether memory embeddings are read after the final norm, where the source is wrong."},
    )
    reranking: str | None = field(
        default=None,
        metadata={
            "help": "Name of the tensor that scores documents, or none to leave such tensors out; asked for where "
            "shapes do not tell."
        },
    )
    reranking_row: int | None = field(
        default=None, metadata={"help": "Row of the reranking token in the compressor's embeddings."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Type of the weights: float32, bfloat16 or float16; the decoder's by default."}
    )
    weights_format: str = field(
        default="full",
        metadata={"help": "full, or delta: without the decoder's own weights, where they are its base's."},
    )
    merge_lora: bool = field(default=False, metadata={"help": "Merge the decoder's LoRA into its weights."})
    verify: str | None = field(
        default=None,
        metadata={
            "help": "A Python with the packages the published class needs. Its own code is run there, on the source, "
            "and answers are compared."
        },
    )

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", TYPES), ("padding_side", PADDING_SIDES), ("weights_format", WEIGHTS_FORMATS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ScaleDownError(f"{name} is {value!r}, expected {', '.join(allowed)}; correct --{name}.")
        check_least(self, {"max_length": 1, "reranking_row": 0})
        if self.weights_format == "delta" and self.merge_lora:
            raise ScaleDownError(
                "A delta keeps LoRA apart from the decoder; leave --merge_lora or --weights_format out."
            )
