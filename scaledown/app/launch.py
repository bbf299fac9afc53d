"""Start the page: load the model, answer once to warm up, listen."""

from collections import deque

from ..common.command_line import run_command
from .answers import Answerer, Request
from .arguments import AppArguments, parse_arguments
from .examples import draw_examples
from .model import describe, load
from .page import build_page, open_page


def main() -> int:
    """Run the command; returns its exit status."""
    return run_command(lambda: launch(parse_arguments()))


def launch(arguments: AppArguments) -> str:
    """Show the page until the process is told to end.

    Args:
        arguments: Which model, and where.

    Returns:
        A line to print at the end.
    """
    contestants = load(arguments)
    answerer, examples = Answerer(contestants), draw_examples()
    first = examples[0]
    deque(answerer.answer(Request(first.question, first.passages)), maxlen=0)  # pays for what is set up once
    page = build_page(answerer, examples, describe(contestants, arguments.is_embedded))
    open_page(page, arguments.host, arguments.port, share=arguments.share)
    return "stopped"
