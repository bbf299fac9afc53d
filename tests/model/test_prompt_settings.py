"""What a chat template is given: its variables, and a day that stays that of training."""

import datetime

import pytest
import torch

import prompt_scaledown
import text_scaledown
from scaledown import ScaleDownConfig, ScaleDownModel, ScaleDownProcessor
from tiny import CHAT_TEMPLATE, DOCUMENTS, QUESTIONS, build_config, build_model, build_tokenizer
from tiny_tokenizers import build_wordpiece

DATED = "{{ strftime_now('%d %b %Y') }}{% if enable_thinking is false %} at once{% endif %} " + CHAT_TEMPLATE


def dated_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = DATED
    return tokenizer


def on(monkeypatch, day: str):
    """Makes a day today, for the processor and for transformers."""

    class Date(datetime.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    monkeypatch.setattr(prompt_scaledown.datetime, "date", Date)


def prompt_of(processor: ScaleDownProcessor) -> str:
    return processor.tokenizer.decode(processor(QUESTIONS[0])["input_ids"][0])


def test_a_dated_template_keeps_the_day_of_training(monkeypatch, tmp_path):
    on(monkeypatch, "2026-01-31")
    model = build_model("n_layers")
    model.processor = ScaleDownProcessor.from_config(model.config, dated_tokenizer())
    expected = prompt_of(model.processor)
    assert expected.startswith("31 Jan 2026 ")
    model.save_pretrained(tmp_path)
    on(monkeypatch, "2027-02-01")
    assert prompt_of(ScaleDownProcessor.from_pretrained(tmp_path)) == expected
    loaded = ScaleDownModel.from_pretrained(tmp_path)
    assert prompt_of(loaded.processor) == expected
    assert prompt_of(ScaleDownProcessor.from_config(loaded.config, dated_tokenizer())) == expected
    other = ScaleDownModel.from_pretrained(tmp_path, prompt_date="2024-07-26")
    assert prompt_of(other.processor).startswith("26 Jul 2024 ")


def test_a_template_without_a_day_has_none():
    model = build_model("n_layers")
    assert model.processor.prompt_date is None
    assert model.config.prompt_date is None


def test_variables_of_the_chat_template(tmp_path):
    config = build_config("n_layers", chat_template_kwargs={"enable_thinking": False})
    model = ScaleDownModel(config)
    model.processor = ScaleDownProcessor.from_config(config, dated_tokenizer())
    expected = prompt_of(model.processor)
    assert " at once " in expected
    model.save_pretrained(tmp_path)
    assert prompt_of(ScaleDownModel.from_pretrained(tmp_path).processor) == expected
    changed = ScaleDownModel.from_pretrained(tmp_path, chat_template_kwargs={"enable_thinking": True})
    assert " at once " not in prompt_of(changed.processor)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template_kwargs": "thinking"}, "must be a dictionary"),
        ({"chat_template_kwargs": {"tokenize": True}}, "sets tokenize"),
        ({"chat_template_kwargs": {"day": datetime.date.min}}, "cannot be saved"),
        ({"prompt_date": "31 Jan 2026"}, "prompt_date='31 Jan 2026' must be a date such as"),
    ],
)
def test_wrong_settings_of_the_template_are_refused(settings, message, tokenizer):
    for build in (ScaleDownConfig, lambda **given: ScaleDownProcessor(tokenizer, **given)):
        with pytest.raises(ValueError, match=message):
            build(**settings)


def test_a_document_the_compressor_cannot_read_is_told(monkeypatch):
    warnings = []
    monkeypatch.setattr(text_scaledown.logger, "warning_once", warnings.append)
    config = build_config("n_layers", max_query_length=200)
    wordpiece = build_wordpiece()
    wordpiece.unk_token = "[UNK]"
    processor = ScaleDownProcessor.from_config(config, build_tokenizer(), wordpiece)
    processor(QUESTIONS, DOCUMENTS)
    assert warnings == []
    for question, document in ((QUESTIONS[0], "ภาษาไทยเป็นภาษา herons"), ("นกกระสาคืออะไร", DOCUMENTS[2][0])):
        assert isinstance(processor(question, [document])["input_ids"], torch.Tensor)
        assert "is unknown to the compressor's tokenizer" in warnings.pop()
