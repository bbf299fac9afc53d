"""Puts a generator that has learned more under a trained model, which then needs far less training than a new one.

    python -m scaledown.tools.replace_generator --model runs/old --generator runs/generator --output runs/new

LoRA and the compressor stay as they are; the generator must be of the same shape and vocabulary, such as the same one
after further training.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from errors_scaledown import ScaleDownError
from modeling_scaledown import ScaleDownModel
from weights_scaledown import absolute_name, load_complete, weights_fingerprint

from ..common.adapters import generator_weights
from ..common.command_line import parse_options, refuse_same_folder, run_command
from ..common.loading import load_model

# What a generator's configuration says of where it comes from, not of what it computes.
NO_MATTER = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}


@dataclass
class ReplacementArguments:
    """Which model, which generator, and where to."""

    model: str = field(metadata={"help": "Folder of a trained model whose LoRA was not merged."})
    generator: str = field(metadata={"help": "Folder of the new generator."})
    output: str = field(metadata={"help": "Folder for the new model."})


@torch.no_grad()
def replace_generator(model: ScaleDownModel, generator: str) -> None:
    """Load a generator's weights in place of those a model's LoRA stands on.

    Args:
        model: The model.
        generator: Folder of the generator.

    Raises:
        ValueError: The model has no LoRA that could stay, or the generator another shape, configuration or vocabulary.
    """
    own = generator_weights(model)
    generator = absolute_name(generator)
    other = load_model(
        lambda: load_complete(AutoModelForCausalLM, generator, dtype=model.dtype), generator, "--generator"
    )
    weights = other.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    others = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
    if differing:
        name = differing[0]
        raise ScaleDownError(
            f"{generator} has another shape than the model's generator: {name} is {others.get(name)}, not "
            f"{shapes.get(name)}; train a new model on top of it."
        )
    settings, theirs = model.config.generator_config.to_dict(), other.config.to_dict()
    for name in sorted((settings.keys() | theirs.keys()) - NO_MATTER):
        if settings.get(name) != theirs.get(name):
            raise ScaleDownError(
                f"{generator} has {name}={theirs.get(name)}, the model's generator {settings.get(name)}; train a new "
                "model on top of it."
            )
    if AutoTokenizer.from_pretrained(generator).get_vocab() != model.processor.tokenizer.get_vocab():
        raise ScaleDownError(f"{generator} has another vocabulary than the model; train a new model on top of it.")
    for name, tensor in own.items():
        tensor.copy_(weights[name])
    model.config.generator_name_or_path = generator
    model.config.generator_revision = model.config.generator_gguf_file = None
    model.config.generator_fingerprint = weights_fingerprint(generator)
    model.config.weights_format = "full"
    model.remember_generator()


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(
            ReplacementArguments,
            prog="python -m scaledown.tools.replace_generator",
            description="Exchange a model's generator.",
        )
        refuse_same_folder(args.output, model=args.model, generator=args.generator)
        model = load_model(lambda: ScaleDownModel.from_pretrained(args.model), args.model, "--model")
        replace_generator(model, args.generator)
        model.save_pretrained(Path(args.output))
        return f"{args.model} on top of {args.generator}, in {args.output}"

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
