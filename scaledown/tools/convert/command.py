"""The command: converts, verifies on demand, and reports."""

from pathlib import Path

from modeling_scaledown import ScaleDownModel

from ...common.command_line import parse_options, refuse_existing, run_command
from ...common.loading import load_model
from .arguments import ConversionArguments
from .model import convert
from .source import Source, open_source
from .verify import compare


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(
            ConversionArguments,
            prog="python -m scaledown.tools.convert",
            description="Convert OSCAR and PISCO checkpoints.",
        )
        if args.verify is None or not Path(args.output).exists():
            refuse_existing(args.output)
            source = open_source(args.source, args.revision)
            model = convert(source, args)
            model.save_pretrained(args.output)
            report = describe(model, source, args.output)
        else:
            source, report = open_source(args.source, args.revision), f"{args.output} was there already."
        if args.verify is None:
            return f"{report}\nIt was not compared with the published class: --verify PYTHON does that."
        model = load_model(lambda: ScaleDownModel.from_pretrained(args.output), args.output, "--output")
        return f"{report}\n{compare(model, source, args.verify)}"

    return run_command(command)


def describe(model: ScaleDownModel, source: Source, output: str) -> str:
    """What was made of a checkpoint, and what was decided on the way."""
    config = model.config
    parts = {
        "compressor": f"{config.compressor_type}, {config.compressor_config.num_hidden_layers} layers, "
        f"{sum(p.numel() for p in model.compressor.parameters()):,} weights",
        "slots": f"{config.num_memory_tokens} of each document{', and a separator' * config.learned_separator}",
        "the compressor reads": repr(config.compressor_prompt or "question and document as its tokenizer's pair"),
        "tokens of its rows": f"{config.compressor_max_length}, padding counted on the "
        f"{config.compressor_padding_side} side"
        if config.compressor_padding_side
        else f"{config.compressor_max_length}",
        "reranking": "yes" if config.enable_reranking else "no",
    }
    lines = [f"{source.name} ({source.commit or 'a folder'}) is a ScaleDown model in {output}."]
    return "\n".join([*lines, *(f"- {name}: {value}" for name, value in parts.items())])
