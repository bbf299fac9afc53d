"""What the page answers: from text and from slots, token by token, with scores, and errors in words for people."""

import itertools
import threading

import pytest
import torch

from folders import ROOT
from scaledown import ScaleDownError
from scaledown.app.answers import MAX_PASSAGES, Answerer, Reading, Request, read_request
from scaledown.app.arguments import AppArguments
from scaledown.app.examples import draw_examples, right_answer
from scaledown.app.model import describe, load
from scaledown.app.panels import answer_panel, notice, ranking_panel
from scaledown.common.streaming import stream_tokens
from scaledown.evaluation.contestants import Contestants
from scaledown.evaluation.data import Example
from scaledown.evaluation.systems import TextSystem
from tiny import build_model

INJECTION = "<img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def contestants():
    """The embedded model."""
    return load(AppArguments())


@pytest.fixture(scope="module")
def answerer(contestants):
    return Answerer(contestants)


@pytest.fixture(scope="module")
def examples():
    return draw_examples()


def last(answerer: Answerer, request: Request):
    *_, answers = answerer.answer(request)
    return answers


def test_both_answers_are_those_of_the_library(answerer, contestants, examples):
    example = examples[2]
    answers = last(answerer, Request(example.question, example.passages, 8, 3))
    model = contestants.model
    output = model.answer(
        example.question, example.passages, compression_rate=8, max_documents=3, return_reranking_scores=True
    )
    assert answers.from_slots.answer == output.answers == example.answer
    assert answers.from_slots.tokens == output.prompt_tokens
    assert [passage.score for passage in answers.passages] == pytest.approx(output.reranking_scores)
    assert [passage.number - 1 for passage in answers.passages if passage.read] == output.documents_read
    assert answers.from_slots.slots == sum(passage.slots for passage in answers.passages if passage.read)
    system = TextSystem("full_text", contestants.generator, model.processor, model.generation_config, None, 32)
    (from_text,) = system.answer([Example("0", example.question, example.passages, [example.answer])])
    assert answers.from_text.answer == from_text.text
    assert answers.from_text.tokens == from_text.tokens_in > 10 * answers.from_slots.tokens


def test_text_is_not_read_by_the_model_with_its_lora(contestants):
    """The baseline is the generator as it was; with the LoRA merged it would be a strawman."""
    own, other = contestants.model.generator.state_dict(), contestants.generator.state_dict()
    assert not torch.equal(own["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"])


def test_answers_grow_and_times_follow_each_other(answerer, examples):
    written = []
    for answers in answerer.answer(Request(examples[0].question, examples[0].passages)):
        written.append((answers.from_slots.answer, answers.from_text.answer))
    for texts in zip(*written, strict=True):
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert len(set(texts)) > 1
    assert 0 < answers.from_slots.compression < answers.from_slots.first_token < answers.from_slots.whole
    assert answers.from_text.compression is None
    assert 0 < answers.from_text.first_token < answers.from_text.whole


def test_text_that_is_too_long_is_said_while_slots_answer(answerer, examples):
    passages = [text for example in examples[:5] for text in example.passages]
    answers = last(answerer, Request(examples[0].question, passages[:45], 16, 5))
    assert "4,096 positions" in answers.from_text.error and answers.from_text.answer == ""
    assert answers.from_slots.answer == examples[0].answer
    assert answers.from_slots.error is None


def test_a_model_without_scores_reads_everything():
    model = build_model("n_layers", enable_reranking=False)
    model.generation_config.max_new_tokens = 4
    answers = last(Answerer(Contestants(model, model.generator)), Request("Who?", ["A heron.", "A walrus."], 8, 1))
    assert [(passage.score, passage.read) for passage in answers.passages] == [(None, True)] * 2
    assert "no scores" in ranking_panel(answers.passages)


def test_passages_are_separated_by_blank_lines():
    request = read_request("  Who? ", "One\nof two lines.\r\n \r\n\r\nTwo.\n\n", 16, None)
    assert request == Request("Who?", ["One\nof two lines.", "Two."], 16, None)


@pytest.mark.parametrize(
    ("question", "passages", "message"),
    [
        (" ", "A heron.", "ask a question"),
        ("Who?", " \n\n ", "at least one passage"),
        ("Who?" * 1_000, "A heron.", "4,000 characters"),
        ("Who?", "A heron.\n\n" * (MAX_PASSAGES + 1), "101 passages"),
        ("Who?", "A heron. " * 20_000, "180,000 characters"),
        ("Who?", "A heron.\n\nHalf of a bird: \ud83e", "Passage 2 has half of a surrogate pair"),
    ],
    ids=["no question", "no passage", "long question", "many passages", "long passages", "half a character"],
)
def test_what_cannot_be_asked_is_said_in_a_line(question, passages, message):
    with pytest.raises(ScaleDownError, match=message) as caught:
        read_request(question, passages, 16, None)
    assert "\n" not in str(caught.value)


def test_an_answer_that_nobody_waits_for_ends(contestants):
    """Closing the stream, as Gradio does when the browser is gone, ends the thread long before the limit."""
    generator, before = contestants.generator, threading.active_count()
    input_ids, seen = torch.tensor([[5, 6, 7]]), []

    def generate(**streaming):
        settings = {"min_new_tokens": 3_000, "max_new_tokens": 3_000, "do_sample": False}
        seen.append(generator.generate(input_ids=input_ids, **settings, **streaming))

    tokens = stream_tokens(generate)
    next(tokens)
    tokens.close()
    assert threading.active_count() == before
    assert seen[0].shape[1] < 1_000


def test_errors_of_the_thread_are_raised():
    def generate(**streaming):
        raise ScaleDownError("no room")

    with pytest.raises(ScaleDownError, match="no room"):
        list(stream_tokens(generate))


def test_examples_survive_the_page_and_one_leaves_passages_out(answerer, examples):
    assert len(examples) >= 6
    for example in examples:
        request = read_request(example.question, "\n\n".join(example.passages), None, None)
        assert right_answer(examples, request.question, request.passages) == example.answer
    assert right_answer(examples, examples[0].question, examples[0].passages[1:]) is None
    example = next(example for example in examples if example.max_documents is not None)
    answers = last(answerer, Request(example.question, example.passages, 16, example.max_documents))
    assert [passage.read for passage in answers.passages].count(True) == example.max_documents
    out = [passage.score for passage in answers.passages if not passage.read]
    assert max(out) <= min(passage.score for passage in answers.passages if passage.read)
    assert ranking_panel(answers.passages).count("left out") == len(out)


def test_a_page_set_to_all_passages_reads_all_whatever_the_model_says(answerer, contestants, examples, monkeypatch):
    monkeypatch.setattr(contestants.model.config, "max_documents", 1)
    answers = last(answerer, Request(examples[0].question, examples[0].passages))
    assert all(passage.read for passage in answers.passages)


def test_texts_of_others_are_escaped(answerer):
    answers = last(answerer, Request("Who?", [INJECTION, "A heron."]))
    panels = [
        ranking_panel(answers.passages),
        answer_panel(INJECTION, INJECTION, Reading(answer=INJECTION)),
        answer_panel("", "", Reading(error=INJECTION)),
        notice(INJECTION),
    ]
    for panel in panels:
        assert "<img" not in panel and "&lt;img" in panel


def test_the_best_passage_stands_first_with_the_longest_bar(answerer, examples):
    panel = ranking_panel(last(answerer, Request(examples[0].question, examples[0].passages)).passages)
    widths = [float(part.split("%")[0]) for part in panel.split('<i style="width:')[1:]]
    assert widths == sorted(widths, reverse=True) and widths[0] > 50 > widths[1]


def test_the_page_says_what_the_model_is(contestants):
    assert "invented world" in describe(contestants, True) and "2.8 million" in describe(contestants, True)
    assert f"**{ROOT.name}**" in describe(contestants, False)
    assert contestants.notes[0] in describe(contestants, False)


@pytest.mark.parametrize("port", [0, 70_000])
def test_ports_that_are_none_are_refused(port):
    with pytest.raises(ScaleDownError, match=f"port is {port}"):
        AppArguments(port=port)
