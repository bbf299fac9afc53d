"""The page: its functions where Gradio is installed, and in Chromium where Playwright is. `make test-app` runs all."""

import os
import re
import shutil

import pytest

from scaledown.app.answers import Answerer
from scaledown.app.arguments import AppArguments
from scaledown.app.examples import draw_examples
from scaledown.app.model import load

pytest.importorskip("gradio", reason="`make test-app` installs it")
from scaledown.app.page import ALL, answer_panels, build_page, open_page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
# None of these may run, or be taken for a template of Gradio's HTML.
INJECTIONS = [
    "<img src=x onerror=\"document.title='taken'\">",
    "</p><script>document.title='taken'</script>",
    "${(document.title='taken')}",
    "{{constructor.constructor(\"document.title='taken'\")()}}",
]


@pytest.fixture(scope="module")
def answerer():
    """Of the embedded model."""
    return Answerer(load(AppArguments()))


@pytest.fixture(scope="module")
def examples():
    return draw_examples()


def panels(answerer, examples, question, passages):
    return list(answer_panels(answerer, examples, question, passages, 16, ALL))


def test_an_example_is_answered_with_the_right_answer_beside_it(answerer, examples):
    example = examples[0]
    line, from_text, from_slots, ranking = panels(answerer, examples, example.question, "\n\n".join(example.passages))[
        -1
    ]
    assert f"The right answer: {example.answer}." in line
    assert example.answer in from_slots and example.answer in from_text
    assert ranking.count("<li") == len(example.passages)


def test_errors_are_one_line(answerer, examples):
    ((line, *_),) = panels(answerer, examples, " ", "A heron.")
    assert 'role="alert"' in line and "Please ask a question." in line


def test_an_emptied_field_of_a_slider_is_a_line(answerer, examples):
    ((line, *_),) = answer_panels(answerer, examples, "Who?", "A heron.", None, ALL)
    assert "compression rate" in line


def test_a_failure_is_a_line_too(examples, caplog):
    class Broken:
        def answer(self, request):
            raise RuntimeError("out of memory")

    *_, (line, _, _, ranking) = panels(Broken(), examples, "Who?", "A heron.")
    assert "Something went wrong" in line and "out of memory" not in line and ranking == ""
    assert "out of memory" in caplog.text


@pytest.fixture(scope="module")
def url(answerer, examples):
    page = build_page(answerer, examples, "The embedded model.")
    _, address, _ = open_page(page, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    yield address
    page.close()


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="`make test-app` installs it")
    if CHROMIUM is None:
        pytest.skip("chromium is missing; CHROMIUM names it where it is not on the path")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, url):
    opened = chromium.new_page()
    opened.set_default_timeout(60_000)
    opened.errors, opened.elsewhere = [], []
    opened.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.on(
        "request", lambda r: opened.elsewhere.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None
    )
    opened.goto(url)
    opened.wait_for_selector("#answer")
    yield opened
    opened.close()


def ask(page, question: str, passages: list[str]) -> None:
    page.fill("#question textarea", question)
    page.fill("#passages textarea", "\n\n".join(passages))
    page.click("#answer")


@pytest.mark.slow
def test_it_answers_and_ranks(page, examples):
    page.click("#answer")
    page.wait_for_selector("#notice [role=status]")
    for column in ("#from-text", "#from-slots"):
        assert page.text_content(f"{column} .sd-answer") == examples[0].answer
        assert re.search(r"whole answer\s*[\d,]+ ms", page.text_content(column))
    assert page.locator("#ranking li").count() == len(examples[0].passages)
    best = int(page.text_content("#ranking li >> nth=0").removeprefix("Passage ")[0]) - 1
    assert examples[0].answer in examples[0].passages[best]
    assert page.errors == page.elsewhere == []


@pytest.mark.slow
def test_an_example_that_is_picked_fills_the_page(page, examples):
    page.click("#answer")
    page.wait_for_selector("#notice [role=status]")
    page.click("#example input")
    page.click("#example [role=option] >> nth=2")
    page.wait_for_function(
        "value => document.querySelector('#question textarea').value == value", arg=examples[2].question
    )
    page.wait_for_function("!document.querySelector('#notice p') && !document.querySelector('#ranking li')")
    assert page.input_value("#limit input[type=number]") == "3"
    page.click("#answer")
    page.wait_for_selector("#notice [role=status]")
    assert page.locator("#ranking .sd-in").count() == 3
    assert page.locator("#ranking .sd-out").count() == len(examples[2].passages) - 3


@pytest.mark.slow
def test_an_empty_question_is_an_error_and_the_next_one_is_answered(page, examples):
    ask(page, " ", examples[0].passages)
    page.wait_for_selector("#notice [role=alert]")
    assert "Please ask a question." in page.text_content("#notice")
    ask(page, examples[0].question, examples[0].passages)
    page.wait_for_selector("#notice [role=status]")
    assert page.locator("#notice [role=alert]").count() == 0


@pytest.mark.slow
def test_passages_are_text_whatever_they_hold(page):
    ask(page, f"Who? {INJECTIONS[0]}", INJECTIONS)
    page.wait_for_function("document.querySelectorAll('#ranking li').length == 4")
    page.wait_for_function("/whole answer\\s*[\\d,]+ ms/.test(document.querySelector('#from-text').textContent)")
    assert page.locator("#ranking img, #ranking script, #from-text img, #from-slots img").count() == 0
    shown = page.text_content("#ranking")
    assert all(injection in shown for injection in INJECTIONS)
    assert page.title() == "ScaleDown"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_runs_over_the_edge_of_a_phone(page, url, scheme):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{url}?__theme={scheme}")
    page.click("#answer")
    page.wait_for_selector("#notice [role=status]")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    boxes = [page.locator(each).bounding_box() for each in ("#from-text", "#from-slots", "#ranking")]
    assert all(box["width"] > 300 for box in boxes)
