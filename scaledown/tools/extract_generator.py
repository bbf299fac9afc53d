"""Takes the generator out of a trained model, as it was before its LoRA, to train another model on top of it.

    python -m scaledown.tools.extract_generator --model . --output runs/embedded/generator-16

The result is an ordinary causal language model with its tokenizer.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM

from modeling_scaledown import ScaleDownModel

from ..common.adapters import generator_weights
from ..common.command_line import parse_options, refuse_same_folder, run_command
from ..common.loading import load_model


@dataclass
class ExtractionArguments:
    """Which model, and where to."""

    model: str = field(metadata={"help": "Folder of a trained model whose LoRA was not merged."})
    output: str = field(metadata={"help": "Folder for the generator."})


def extract_generator(model: ScaleDownModel, output: Path) -> None:
    """Save a model's generator without its LoRA.

    Args:
        model: The model.
        output: Folder to write.

    Raises:
        ValueError: The model has no LoRA: it was merged into the weights.
    """
    weights = generator_weights(model)
    generator = AutoModelForCausalLM.from_config(model.config.generator_config, dtype=model.dtype)
    generator.load_state_dict(weights)
    generator.generation_config = model.generation_config
    generator.save_pretrained(output)
    model.processor.tokenizer.save_pretrained(output)


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(
            ExtractionArguments,
            prog="python -m scaledown.tools.extract_generator",
            description="Take out the original generator.",
        )
        refuse_same_folder(args.output, model=args.model)
        model = load_model(lambda: ScaleDownModel.from_pretrained(args.model), args.model, "--model")
        extract_generator(model, Path(args.output))
        return f"the generator of {args.model} in {args.output}"

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
