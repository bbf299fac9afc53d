"""The wrong kind of checkpoint is refused with the call that is meant; encoders with narrow embeddings run."""

import json
import shutil

import pytest
import torch
from transformers import AlbertConfig, AutoModel, ElectraConfig, OPTConfig, T5Config, T5ForConditionalGeneration

from folders import from_backbones, outputs, save_encoder, save_generator
from scaledown import ScaleDownConfig, ScaleDownModel
from scaledown.common.loading import load_model
from tiny import ANSWERS, DOCUMENTS, ENCODER_SHAPE, GENERATORS, QUESTIONS, build_model, build_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    save_generator(root / "generator")
    save_encoder(root / "encoder", "bert")
    build_model("n_layers").save_pretrained(root / "scaledown")
    (root / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    sizes = {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(root / "t5")
    build_tokenizer().save_pretrained(root / "t5")
    return root


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("generator", "is a llama model, not a ScaleDown model.*from_backbones"),
        ("encoder", "is a bert model, not a ScaleDown model.*from_backbones"),
        ("adapter", "holds an adapter for 'some/base' and no model"),
    ],
)
def test_what_is_no_scaledown_model(kind, message, folders):
    with pytest.raises(ValueError, match=message):
        ScaleDownModel.from_pretrained(folders / kind)
    if kind != "adapter":
        with pytest.raises(ValueError, match=message):
            ScaleDownConfig.from_pretrained(folders / kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("scaledown", "is a ScaleDown model, not a generator.*from_pretrained"),
        ("adapter", "holds an adapter for 'some/base' and no model"),
        ("encoder", "is a bert model, and the generator must be a causal language model"),
        ("t5", "is a t5 model, and the generator must be a causal language model"),
    ],
)
def test_what_is_no_generator(kind, message, folders):
    with pytest.raises(ValueError, match=message):
        from_backbones((folders / kind, None))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("scaledown", "is a ScaleDown model, not a compressor"),
        ("adapter", "holds an adapter for 'some/base' and no model"),
        ("t5", "compressor_config: t5 has an encoder and a decoder"),
    ],
)
def test_what_is_no_compressor(kind, message, folders):
    with pytest.raises(ValueError, match=message):
        from_backbones((folders / "generator", folders / kind))


NARROW = {
    "electra": ElectraConfig(**ENCODER_SHAPE, embedding_size=16),
    "albert": AlbertConfig(**ENCODER_SHAPE, embedding_size=16),
}


@pytest.mark.parametrize("kind", NARROW)
def test_an_encoder_with_narrow_embeddings_runs_and_learns(kind, folders, tmp_path):
    torch.manual_seed(0)
    AutoModel.from_config(NARROW[kind]).save_pretrained(tmp_path / "encoder")
    build_tokenizer(pair=True).save_pretrained(tmp_path / "encoder")
    model = from_backbones((folders / "generator", tmp_path / "encoder"))
    assert model.compressor.memory_embeddings.shape[1] == 16
    model(**model.processor(QUESTIONS, DOCUMENTS, ANSWERS)).loss.backward()
    assert model.compressor.memory_embeddings.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "saved")
    loaded = outputs(ScaleDownModel.from_pretrained(tmp_path / "saved"))
    for name, value in outputs(model).items():
        torch.testing.assert_close(loaded[name], value)


def test_a_generator_with_narrow_embeddings_is_refused():
    config = OPTConfig(vocab_size=400, hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=2, ffn_dim=32)
    with pytest.raises(ValueError, match=r"opt reads embeddings of 16 numbers .* states of 32"):
        ScaleDownConfig(generator_config=config, num_compressor_layers=1)
    assert ScaleDownConfig(generator_config=GENERATORS["llama"](), num_compressor_layers=1)


def test_a_model_of_code_of_its_own_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders / "generator", tmp_path / "own")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "ownlm", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"has model_type='ownlm', which transformers .* has no model for"):
        from_backbones((folder, None), trust_remote_code=True)
    assert from_backbones((folders / "generator", None), trust_remote_code=True).config.hidden_size == 32


def test_types_by_either_name(folders):
    pair = (folders / "generator", None)
    for given in ({"dtype": torch.float16}, {"torch_dtype": "float16"}):
        assert {parameter.dtype for parameter in from_backbones(pair, **given).parameters()} == {torch.float16}
    with pytest.raises(ValueError, match="two names of one thing"):
        from_backbones(pair, dtype="float16", torch_dtype="float32")


@pytest.mark.parametrize("name", ["runs/nothere", "/no/such", "./nothere", "a/b/c"])
def test_a_folder_that_is_not_there_is_told_without_asking_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--model names .*, which cannot be loaded: there is no such folder"):
        load_model(lambda: pytest.fail("loaded"), name, "--model")


def test_damaged_weights_are_named(folders, tmp_path):
    for kind in ("generator", "scaledown"):
        path = shutil.copytree(folders / kind, tmp_path / kind) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-99])
    with pytest.raises(ValueError, match=r"generator/model.safetensors is damaged .*download it again"):
        ScaleDownModel.from_backbones(str(tmp_path / "generator"), num_compressor_layers=2)
    model = str(tmp_path / "scaledown")
    with pytest.raises(ValueError, match=r"--model names .*scaledown, which cannot be loaded"):
        load_model(lambda: ScaleDownModel.from_pretrained(model), model, "--model")
