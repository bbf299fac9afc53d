"""The page's layout, and what its buttons do."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import gradio as gr

from configuration_scaledown import ScaleDownConfig
from errors_scaledown import ScaleDownError

from .answers import Answerer, Answers, read_request
from .examples import Example, right_answer
from .panels import CSS, answer_panel, notice, ranking_panel

logger = logging.getLogger(__name__)

RATES = (4, 32)
ALL = 20  # the slider's end, which stands for all passages
TEXT_PANEL = ("From whole passages", "The language model reads every passage, word for word.")
SLOTS_PANEL = ("From slots", "The language model reads slots made by the compressor.")
# Nothing is loaded from elsewhere, fonts included.
THEME = gr.themes.Default(
    primary_hue="teal",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(block_info_text_color="*neutral_600")
Panels = tuple[str, str, str, str]


def build_page(answerer: Answerer, examples: list[Example], about: str) -> gr.Blocks:
    """Lay out the page.

    Args:
        answerer: Answers.
        examples: What can be picked.
        about: What the model is, in Markdown.

    Returns:
        The page, for `open_page`.
    """
    config = answerer.model.config
    lowest = max(RATES[0], math.ceil(config.chunk_length / config.num_memory_tokens))
    rates = (lowest, max(min(RATES[1], config.chunk_length), lowest))
    first = examples[0]
    with gr.Blocks(title="ScaleDown", analytics_enabled=False) as page:
        gr.Markdown(f"# ScaleDown\n{about}")
        example = gr.Dropdown(
            [(each.title, number) for number, each in enumerate(examples)],
            value=0,
            label="Pick an example",
            elem_id="example",
        )
        question = gr.Textbox(
            first.question, label="Question", max_lines=3, elem_id="question", placeholder="Ask about the passages."
        )
        passages = gr.Textbox(
            "\n\n".join(first.passages),
            label="Passages, a blank line between two",
            lines=8,
            max_lines=8,
            elem_id="passages",
            placeholder="Paste passages here.",
        )
        with gr.Row():
            rate = gr.Slider(
                *rates,
                value=min(max(config.compression_rate, rates[0]), rates[1]),
                step=1,
                label="Compression rate",
                info="Tokens of a passage per slot.",
                min_width=280,
                elem_id="rate",
            )
            limit = gr.Slider(
                1,
                ALL,
                value=_slider(first, config),
                step=1,
                label="Passages read from slots",
                info=f"The best by score; {ALL} means all." if answerer.ranks else "This model has no scores.",
                interactive=answerer.ranks,
                min_width=280,
                elem_id="limit",
            )
        button = gr.Button("Answer", variant="primary", elem_id="answer")
        empty_text, empty_slots, _ = _panels(Answers())
        line = gr.HTML(elem_id="notice")
        with gr.Row():
            with gr.Column(min_width=320):
                from_text = gr.HTML(empty_text, elem_id="from-text")
            with gr.Column(min_width=320):
                from_slots = gr.HTML(empty_slots, elem_id="from-slots")
        ranking = gr.HTML(elem_id="ranking")
        panels = [line, from_text, from_slots, ranking]

        def respond(question: str, passages: str, rate: float | None, limit: float | None) -> Iterator[Panels]:
            yield from answer_panels(answerer, examples, question, passages, rate, limit)

        def pick(number: int) -> tuple[Any, ...]:
            picked = examples[number]  # what was answered before is not about it
            return picked.question, "\n\n".join(picked.passages), _slider(picked, config), "", *_panels(Answers())

        gr.on(
            [button.click, question.submit],
            respond,
            [question, passages, rate, limit],
            panels,
            show_progress="hidden",
            concurrency_limit=1,  # two at a time would be timed together
            api_name="answer",
        )
        example.input(
            pick, example, [question, passages, limit, *panels], show_progress="hidden", api_visibility="private"
        )
    return page.queue(max_size=16)


def open_page(page: gr.Blocks, host: str | None, port: int | None, **settings: Any) -> tuple[Any, str, str]:
    """Serve a page as it is meant to look.

    Args:
        page: What `build_page` returned.
        host: Address to listen on; None leaves it to Gradio.
        port: Port to listen on; None leaves it to Gradio.
        **settings: Of `gr.Blocks.launch`.

    Returns:
        What that returns: the application, the local address and the public one.
    """
    look = {"theme": THEME, "css": CSS, "footer_links": []}
    return page.launch(server_name=host, server_port=port, ssr_mode=False, **look, **settings)


def answer_panels(
    answerer: Answerer,
    examples: list[Example],
    question: str,
    passages: str,
    rate: float | None,
    limit: float | None,
) -> Iterator[Panels]:
    """Answer what stands on the page.

    Args:
        answerer: Answers.
        examples: Tell the right answer, where an example was not changed.
        question: The question.
        passages: Passages with a blank line between two.
        rate: Passage tokens per slot; None where the field was emptied.
        limit: Passages read from slots at most, `ALL` for every one; None where the field was emptied.

    Yields:
        HTML of the line, of both answers and of the ranking.
    """
    try:
        if not rate or not limit:
            raise ScaleDownError("Please set the compression rate and the number of passages.")
        request = read_request(question, passages, int(rate), None if limit >= ALL else int(limit))
        answers = Answers()
        yield "", *_panels(answers)
        for answers in answerer.answer(request):
            yield "", *_panels(answers)
        right = right_answer(examples, request.question, request.passages)
        if right is not None:
            yield notice(f"The right answer: {right}."), *_panels(answers)
    except ScaleDownError as error:
        yield notice(str(error), is_error=True), *_panels(Answers())
    except Exception:
        logger.exception("a question could not be answered")
        line = notice("Something went wrong here; the log of the page has the details.", is_error=True)
        yield line, *_panels(Answers())


def _panels(answers: Answers) -> tuple[str, str, str]:
    return (
        answer_panel(*TEXT_PANEL, answers.from_text),
        answer_panel(*SLOTS_PANEL, answers.from_slots),
        ranking_panel(answers.passages),
    )


def _slider(example: Example, config: ScaleDownConfig) -> int:
    return min(example.max_documents or config.max_documents or ALL, ALL)
