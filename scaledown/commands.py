"""The console commands, which `train.py` and its siblings call too.

Help is printed before anything that takes seconds to import, and a package that is missing is named with the extra that
installs it.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec


def train() -> int:
    """Train a model: `scaledown-train`, `python train.py`."""
    from .training.options import show_help

    show_help()
    return _run("training.run", "train")


def evaluate() -> int:
    """Measure a model: `scaledown-evaluate`, `python evaluate.py`."""
    from .evaluation.arguments import parse_arguments

    _show_help(parse_arguments)
    return _run("evaluation.evaluate", "eval")


def prepare_data() -> int:
    """Make records: `scaledown-prepare-data`, `python prepare_data.py`."""
    from .data.arguments import parse_arguments

    _show_help(parse_arguments)
    return _run("data.preparation", "data")


def benchmark() -> int:
    """Measure operations, time and memory: `scaledown-benchmark`, `python benchmark.py`."""
    from .benchmark.arguments import parse_arguments

    _show_help(parse_arguments)
    return _run("benchmark.run", "eval")


def serve() -> int:
    """Serve a model over HTTP: `scaledown-serve`, `python -m scaledown.serving`."""
    from .serving.arguments import parse_arguments

    _show_help(parse_arguments)
    return _run("serving.serve", "serve")


def app() -> int:
    """Show a model in the browser: `scaledown-app`, `python app.py`."""
    from .app.arguments import parse_arguments

    _show_help(parse_arguments)
    return _run("app.launch", "app")


def _show_help(parse_arguments: Callable[[], object]) -> None:
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        parse_arguments()  # prints and exits


def _run(module: str, extra: str) -> int:
    """Import a command's module and run its `main`.

    Args:
        module: Its name inside this package.
        extra: What of pyproject.toml's optional dependencies the command needs.

    Returns:
        The exit status: 2 where a package is missing.
    """
    try:
        return import_module(f"{__package__}.{module}").main()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or find_spec(missing) is not None:
            raise  # one of our own messages, or a broken installation
        print(f'error: the package {missing} is missing: pip install ".[{extra}]" in the checkout', file=sys.stderr)
        return 2
