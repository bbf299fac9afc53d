"""What the command lines share: logging, and errors told in one line."""

import logging
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from transformers import HfArgumentParser

Arguments = TypeVar("Arguments")

logger = logging.getLogger(__name__)
# These speak at every step of their work, below what a user of a command needs.
QUIET = ("bm25s", "datasets", "httpx")


def run_command(command: Callable[[], str]) -> int:
    """Run a command and print what it returns.

    Args:
        command: Does the work and returns its report.

    Returns:
        The exit status: 0, or 2 after an error the user can mend, which is printed without a traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        report = command()
    except (ValueError, OSError, ImportError) as error:
        logger.debug("the traceback", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


def parse_options(kind: type[Arguments], argv: Sequence[str] | None = None, **described: Any) -> Arguments:
    """Parse options into a dataclass.

    Args:
        kind: The dataclass.
        argv: `[--option value …]`; None for the command line.
        **described: How `ArgumentParser` describes the program.

    Returns:
        The arguments.
    """
    parser = HfArgumentParser(kind, **described)
    argv = list(sys.argv[1:] if argv is None else argv)
    (arguments,) = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    return arguments


def refuse_options(arguments: Any, names: Collection[str], reader: str) -> None:
    """Refuse options that were given where nothing reads them.

    Args:
        arguments: A dataclass of options.
        names: Those that are not read.
        reader: What does not read them; the message begins with it.

    Raises:
        ValueError: One of them has another value than its default.
    """
    for option in fields(arguments):
        value = getattr(arguments, option.name)
        if option.name in names and value != option.default:
            raise ValueError(f"{reader} does not read {option.name}={value}; leave --{option.name} out.")


def split_names(text: str | None) -> list[str]:
    """The names in a text that separates them by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
