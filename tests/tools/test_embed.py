"""A trained model becomes the repository's own: code and README stay, names of folders do not come along."""

import re
import shutil

import pytest
import torch
from transformers import AutoModel

from folders import CODE, ROOT, SETTINGS, save_generator
from scaledown import ScaleDownModel
from scaledown.common.metrics import exact_match
from scaledown.tools.embed import MAX_BYTES, embed
from scaledown.world.world import World
from tiny import build_model


@pytest.fixture
def model(tmp_path):
    model = build_model("n_layers")
    model.config.generator_name_or_path = str(tmp_path / "backbone")
    model.config.generator_config._name_or_path = str(tmp_path / "backbone")
    model.config.generator_gguf_file = "backbone.gguf"
    model.save_pretrained(tmp_path / "model")
    return model


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in CODE:
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "README.md").write_text("of the project", encoding="utf-8")
    return folder


def test_the_checkout_loads_as_the_model(model, checkout, tmp_path):
    embed(tmp_path / "model", checkout)
    loaded = AutoModel.from_pretrained(checkout, trust_remote_code=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor)
    assert loaded.processor.tokenizer.get_vocab() == model.processor.tokenizer.get_vocab()


def test_a_delta_is_embedded_whole(checkout, tmp_path):
    model = ScaleDownModel.from_backbones(str(save_generator(tmp_path / "generator")), **SETTINGS)
    model.save_pretrained(tmp_path / "delta", weights_format="delta")
    embed(tmp_path / "delta", checkout)
    shutil.rmtree(tmp_path / "generator")
    loaded = AutoModel.from_pretrained(checkout, trust_remote_code=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor)


def test_readme_and_code_stay_and_paths_do_not_come_along(model, checkout, tmp_path):
    code = {name: (checkout / name).read_bytes() for name in CODE}
    mode = checkout.stat().st_mode
    embed(tmp_path / "model", checkout)
    assert (checkout / "README.md").read_text(encoding="utf-8") == "of the project"
    assert {name: (checkout / name).read_bytes() for name in CODE} == code
    assert checkout.stat().st_mode == mode
    for path in checkout.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8")
        assert "backbone.gguf" not in path.read_text(encoding="utf-8")


def test_too_large_a_model_is_refused_before_anything_is_copied(model, checkout, tmp_path, monkeypatch):
    monkeypatch.setattr("scaledown.tools.embed.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="the embedded model has at most 1,000"):
        embed(tmp_path / "model", checkout)
    assert not (checkout / "config.json").exists()
    assert MAX_BYTES == 25_000_000


def test_something_else_is_refused(checkout, tmp_path):
    with pytest.raises(ValueError, match="--model names"):
        embed(tmp_path, checkout)


def test_the_repository_is_a_model_that_answers_and_ranks():
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()
    world = World("test", seed=1)
    records = [world.record(number, 5, 0.0) for number in range(24)]
    answers, scores = model.answer(
        [record["query"] for record in records],
        [record["documents"] for record in records],
        return_reranking_scores=True,
        max_new_tokens=8,
    )
    right = [exact_match(answer, [record["answer"]]) for answer, record in zip(answers, records, strict=True)]
    first = [row.index(max(row)) in record["positives"] for row, record in zip(scores, records, strict=True)]
    assert sum(right) >= 12 and sum(first) >= 12  # chance is 1 and 5
    assert (ROOT / "model.safetensors").stat().st_size <= MAX_BYTES


def test_the_repository_names_no_folder_of_a_machine():
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"):
        assert not re.search(r'"/(tmp|work|home|root|Users)/', (ROOT / name).read_text(encoding="utf-8"))
