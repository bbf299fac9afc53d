"""Arguments of `app.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from errors_scaledown import ScaleDownError

from ..common.command_line import parse_options

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class AppArguments:
    """Which model the page shows, and where it is served.

    Raises:
        ScaleDownError: No model is named, and none is embedded here; or the port is none.
    """

    model: str = field(
        default=str(ROOT), metadata={"help": "A ScaleDown model: a folder, or a name on the Hub; the embedded one."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    host: str | None = field(
        default=None, metadata={"help": "Address to listen on; GRADIO_SERVER_NAME or 127.0.0.1 by default."}
    )
    port: int | None = field(
        default=None, metadata={"help": "Port to listen on; GRADIO_SERVER_PORT or the first free one from 7860."}
    )
    share: bool = field(default=False, metadata={"help": "Open a public link to the page through Gradio's servers."})

    def __post_init__(self) -> None:
        if self.is_embedded and not (ROOT / "config.json").is_file():
            raise ScaleDownError("no model is embedded in an installed package; name one with --model.")
        if self.port is not None and not 0 < self.port < 65_536:
            raise ScaleDownError(f"port is {self.port}, expected 1 to 65535.")

    @property
    def is_embedded(self) -> bool:
        """Whether the model is the repository's own."""
        return Path(self.model).resolve() == ROOT


def parse_arguments(argv: Sequence[str] | None = None) -> AppArguments:
    """Parse the command line.

    Args:
        argv: `[--option value …]`; None for the command line.

    Returns:
        The arguments.
    """
    return parse_options(
        AppArguments, argv, description="Show a model in the browser: answers from whole passages and from slots."
    )
