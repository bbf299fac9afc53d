"""Writes a model's generator as an ordinary language model, with what its LoRA learned merged in.

    python -m scaledown.tools.export_generator --model runs/mistral --output runs/mistral-generator
    vllm serve runs/mistral-generator --enable-prompt-embeds --host 127.0.0.1 --port 8001

The result answers with the prompts of `ScaleDownModel.prompt_embeddings` in any engine that reads embeddings.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from errors_scaledown import ScaleDownError
from modeling_scaledown import ScaleDownModel

from ..common.command_line import parse_options, refuse_same_folder, run_command
from ..common.loading import load_model


@dataclass
class ExportArguments:
    """Which model, and where to."""

    model: str = field(metadata={"help": "A ScaleDown model: a folder, or a name on the Hub."})
    output: str = field(metadata={"help": "Folder for the generator."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str | None = field(
        default=None, metadata={"help": "Type of the weights: float32, bfloat16 or float16; the model's by default."}
    )

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ScaleDownError(f"dtype is {self.dtype!r}, expected float32, bfloat16 or float16.")


def export_generator(model: ScaleDownModel, output: Path) -> None:
    """Save a model's generator, LoRA merged.

    Args:
        model: The model; its LoRA is merged.
        output: Folder to write.

    Raises:
        ScaleDownError: The generator is quantized, so that merging would lose what LoRA learned.
    """
    model.merge_lora()
    model.generator.generation_config = model.generation_config
    model.generator.save_pretrained(output)
    model.processor.tokenizer.save_pretrained(output)


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(
            ExportArguments,
            prog="python -m scaledown.tools.export_generator",
            description="Write the generator, LoRA merged.",
        )
        refuse_same_folder(args.output, model=args.model)
        dtype = "auto" if args.dtype is None else getattr(torch, args.dtype)
        model = load_model(
            lambda: ScaleDownModel.from_pretrained(args.model, revision=args.revision, dtype=dtype),
            args.model,
            "--model",
        )
        export_generator(model, Path(args.output))
        return f"the generator of {args.model} in {args.output}"

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
