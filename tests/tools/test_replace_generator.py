"""A generator under a model is replaced, and taken out again: nothing else of the model goes with it."""

import json
import sys
from importlib import import_module

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from folders import SETTINGS, save_generator
from scaledown import ScaleDownModel
from scaledown.tools.extract_generator import extract_generator
from scaledown.tools.replace_generator import replace_generator
from tiny import DOCUMENTS, QUESTIONS, randomize_lora


@pytest.fixture
def model(tmp_path):
    model = ScaleDownModel.from_backbones(str(save_generator(tmp_path / "generator")), **SETTINGS)
    model.add_lora(r=4, lora_alpha=8)
    return randomize_lora(model).eval()


def change(folder, target):
    """Save the generator with other weights."""
    generator = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    generator.save_pretrained(target)
    for path in folder.glob("*token*"):
        (target / path.name).write_bytes(path.read_bytes())
    return generator


def test_the_generator_is_replaced_and_nothing_else(model, tmp_path, monkeypatch):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = change(tmp_path / "generator", tmp_path / "other")
    model.config.generator_revision = "0" * 40  # of the one that goes
    model.config.generator_gguf_file = "gone.gguf"
    monkeypatch.chdir(tmp_path)
    replace_generator(model, "other")
    assert model.config.generator_revision is model.config.generator_gguf_file is None
    model.save_pretrained(tmp_path / "delta", weights_format="delta")  # the generator in it is known again
    monkeypatch.chdir("/")
    ScaleDownModel.from_pretrained(tmp_path / "delta")
    model.save_pretrained(tmp_path / "model")
    loaded = ScaleDownModel.from_pretrained(tmp_path / "model")
    for name, tensor in loaded.state_dict().items():
        if name.startswith("generator.") and ".lora_" not in name:
            expected = other.state_dict()[name.removeprefix("generator.").replace(".base_layer.", ".")]
            assert not torch.equal(tensor, before[name])
        else:
            expected = before[name]
        torch.testing.assert_close(tensor, expected, msg=name)
    assert isinstance(loaded.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=3), str)


def test_what_does_not_fit_is_refused(model, tmp_path):
    wider = save_generator(tmp_path / "wider", hidden_size=64)
    with pytest.raises(ValueError, match="has another shape than the model's generator"):
        replace_generator(model, str(wider))
    change(tmp_path / "generator", tmp_path / "turned")
    config = json.loads((tmp_path / "turned" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 123.0
    (tmp_path / "turned" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has rope_parameters=.*123\.0.*, the model's generator"):
        replace_generator(model, str(tmp_path / "turned"))
    model.merge_lora()
    with pytest.raises(ValueError, match="it was merged; train with merge_lora=false"):
        replace_generator(model, str(tmp_path / "generator"))


def test_the_generator_is_taken_out_as_it_was_before_lora(model, tmp_path):
    extract_generator(model, tmp_path / "extracted")
    generator = AutoModelForCausalLM.from_pretrained(tmp_path / "generator")
    extracted = AutoModelForCausalLM.from_pretrained(tmp_path / "extracted")
    assert extracted.state_dict().keys() == generator.state_dict().keys()
    for name, tensor in extracted.state_dict().items():
        torch.testing.assert_close(tensor, generator.state_dict()[name], msg=name, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "extracted")
    assert tokenizer.get_vocab() == model.processor.tokenizer.get_vocab()
    rebuilt = ScaleDownModel.from_backbones(str(tmp_path / "extracted"), **SETTINGS)
    assert isinstance(rebuilt.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=3), str)
    model.merge_lora()
    with pytest.raises(ValueError, match="it was merged; train with merge_lora=false"):
        extract_generator(model, tmp_path / "merged")


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("export_generator", "model"),
        ("extract_generator", "model"),
        ("replace_generator", "model"),
        ("replace_generator", "generator"),
    ],
)
def test_a_folder_that_is_read_is_not_written(command, output, tmp_path, monkeypatch, capsys):
    for name in ("model", "generator"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("whatever", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    sources = ["--model", "model"] + (["--generator", "generator"] if command == "replace_generator" else [])
    monkeypatch.setattr(sys, "argv", [command, *sources, "--output", str(tmp_path / output)])
    assert import_module(f"scaledown.tools.{command}").main() == 2
    assert f"is the folder of --{output}, which would be overwritten" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / output).iterdir()] == ["config.json"]
    assert (tmp_path / output / "config.json").read_text(encoding="utf-8") == "whatever"
