"""What the command lines share: logging, and errors reported in one line."""

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser

from errors_scaledown import ScaleDownError

from .recipes import expand_recipe

Arguments = TypeVar("Arguments")

logger = logging.getLogger(__name__)
OWN_LOGGER = logging.getLogger("scaledown")
# Libraries that log too much below WARNING; some set their own level when they are imported.
QUIET = ("bm25s", "datasets", "httpx", "httpx2")


def _matters(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] not in QUIET


def run_command(command: Callable[[], str], interrupted: str = "") -> int:
    """Run a command and print what it returns.

    Args:
        command: Does the work and returns its report.
        interrupted: What becomes of the work when Ctrl-C stops it.

    Returns:
        The exit status: 0, 130 after Ctrl-C, or 2 after an error the user can mend, which is printed without a
        traceback unless the options hold `--debug`. Any other exception is raised.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_matters)
    level = OWN_LOGGER.level
    try:
        report = command()
    except (ScaleDownError, OSError, ImportError) as error:
        by_statement = isinstance(error, ImportError) and not isinstance(error, PackageNotFoundError)
        if by_statement and error.name is not None:
            raise  # by an import statement: a broken installation, not a package we ask for
        logger.debug("the traceback of this error", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        logger.debug("where it was interrupted", exc_info=True)
        print(f"interrupted. {interrupted}".rstrip(), file=sys.stderr)
        return 130
    finally:
        OWN_LOGGER.setLevel(level)
    print(report)
    return 0


@contextlib.contextmanager
def settings_checked_by_libraries(what: str) -> Iterator[None]:
    """Report settings that a library refuses as a user's error.

    Args:
        what: What the settings belong to, for the message.

    Raises:
        ScaleDownError: A library raised a ValueError or ImportError; those of our own code stay what they are.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        if isinstance(error, ScaleDownError) or "-packages" not in place:
            raise
        raise ScaleDownError(f"{what}: {error}") from error


def parse_options(kind: type[Arguments], argv: Sequence[str] | None = None, **described: Any) -> Arguments:
    """Parse options into a dataclass.

    Args:
        kind: The dataclass.
        argv: `[--option value …]`; None for the command line.
        **described: How `ArgumentParser` describes the program.

    Returns:
        The arguments.
    """
    (arguments,) = parse_with(HfArgumentParser(kind, **described), argv)
    return arguments


def parse_with(parser: HfArgumentParser, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse options into the dataclasses of a parser, and `--debug`, which every command line has.

    Args:
        parser: The parser; `--debug` is added to its help.
        argv: `[recipe.yaml] [--option value …]`; None for the command line.

    Returns:
        One object of each dataclass.

    Raises:
        FileNotFoundError: There is no such recipe.
        ScaleDownError: An option is wrong.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser.epilog = "With --debug, errors come with a traceback, and the log says more."
    for place, option in enumerate(argv):
        # The Trainer has a --debug of its own, which takes a value.
        if option == "--debug" and (place + 1 == len(argv) or argv[place + 1].startswith("--")):
            del argv[place]
            OWN_LOGGER.setLevel(logging.DEBUG)
            break
    argv = expand_recipe(parser, argv)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            args=argv, look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            raise ScaleDownError(f"there is no option {' '.join(unknown)}; --help lists the options.")
        return tuple(parsed)
    except ScaleDownError:
        raise
    except ValueError as error:  # the parser's own, or that of transformers' arguments
        raise ScaleDownError(str(error)) from error


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
            raise ScaleDownError(f"{reader} does not read {option.name}={value}; leave --{option.name} out.")


def check_least(arguments: Any, least: Mapping[str, float]) -> None:
    """Check numbers against their lower limits.

    Args:
        arguments: A dataclass of options; None where a number was left out.
        least: The lower limit of each option.

    Raises:
        ValueError: A number is below its limit.
    """
    for name, limit in least.items():
        value = getattr(arguments, name)
        if value is not None and value < limit:
            raise ScaleDownError(f"{name} is {value}, expected at least {limit}; correct --{name}.")


def parse_object(name: str, text: str | None) -> dict[str, Any]:
    """Read the value of an option that is a JSON object.

    Args:
        name: The option's name.
        text: Its value; None for an empty object.

    Returns:
        The object.

    Raises:
        ValueError: The value is no JSON, or no object.
    """
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise ScaleDownError(f"{name} is no JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise ScaleDownError(f"{name} is {text}, expected a JSON object.")
    return value


def refuse_existing(output_dir: str | None) -> None:
    """Refuse a folder of results that is there already, or that cannot be made: before the work, not after it.

    Args:
        output_dir: The folder; None where none is named.

    Raises:
        FileExistsError: It exists.
        ScaleDownError: It cannot be made.
    """
    if output_dir is None:
        return
    if Path(output_dir).exists():
        raise FileExistsError(f"{output_dir} already exists; results are never overwritten. Name a new folder.")
    above = next(path for path in Path(output_dir).absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ScaleDownError(f"{output_dir} cannot be made in {above}; name a folder that can.")


def refuse_same_folder(output_dir: str, **sources: str) -> None:
    """Refuse to write where a model lies that is only to be read: before the work.

    Args:
        output_dir: The folder to write.
        sources: Folders or names on the Hub that are read, each by the name of its option.

    Raises:
        ScaleDownError: The folder is one of those.
    """
    for name, source in sources.items():
        if Path(source).exists() and Path(output_dir).resolve() == Path(source).resolve():
            raise ScaleDownError(
                f"--output {output_dir} is the folder of --{name}, which would be overwritten; name another folder."
            )


def split_names(text: str | None) -> list[str]:
    """The names in a text that separates them by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
