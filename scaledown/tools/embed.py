"""Makes a trained model the one that the repository itself loads.

    python -m scaledown.tools.embed --model runs/embedded/model

Weights, configuration and tokenizers go to the repository's root, beside the code and the README that are there; names
of folders on this machine are left out.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from errors_scaledown import ScaleDownError
from modeling_scaledown import ScaleDownModel

from ..common.command_line import parse_options, run_command
from ..common.loading import load_model

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 25_000_000  # every clone carries it


@dataclass
class EmbedArguments:
    """Which model, and where to."""

    model: str = field(metadata={"help": "Folder of a trained model."})
    output: str = field(default=str(ROOT), metadata={"help": "Folder of the code; the repository by default."})


def embed(source: Path, target: Path) -> int:
    """Copy what a model has besides code and card.

    Args:
        source: Folder of the model.
        target: Folder that holds the code.

    Returns:
        Size of the weights in bytes.

    Raises:
        ValueError: The model cannot be loaded, or its weights are larger than a clone should carry.
    """
    model = load_model(lambda: ScaleDownModel.from_pretrained(source), str(source), "--model")
    for config in (model.config, model.config.generator_config, model.config.compressor_config):
        config._name_or_path = ""
    model.config.generator_name_or_path = model.config.generator_revision = None
    model.config.generator_gguf_file = None
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, weights_format="full")
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        if size > MAX_BYTES:
            raise ScaleDownError(
                f"the weights of {source} take {size:,} bytes; the embedded model has at most {MAX_BYTES:,}. Train a "
                "smaller one."
            )
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.suffix not in (".py", ".md"):
                place = target / path.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)
    return size


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(EmbedArguments)
        size = embed(Path(args.model), Path(args.output))
        return f"{args.output} loads as a model; its weights take {size / 1e6:.1f} MB"

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
