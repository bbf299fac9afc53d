"""An offloaded model gives the results of one that is not."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from combinations import combinations

from folders import from_backbones, save_generator
from scaledown import ScaleDownModel
from tiny import ANSWERS, DOCUMENTS, QUESTIONS, build_model, randomize_lora

# Fast kinds of placement; `compressor.memory_embeddings` is a parameter that no layer of its own fetches.
DEVICE_MAPS = {
    "compressor": {"compressor": "disk", "generator": "cpu"},
    "generator": {"compressor": "cpu", "generator": "disk"},
    "all": {"": "disk"},
}


def results(model: ScaleDownModel) -> dict:
    answering = {"max_new_tokens": 4}
    pair = (QUESTIONS[:2], model.compress_documents(DOCUMENTS[0], QUESTIONS[:2]))
    compressed = model.compress(QUESTIONS, DOCUMENTS)
    return {
        "rank": torch.tensor([entry["score"] for entry in model.rank(QUESTIONS[0], DOCUMENTS[0])]),
        "answer": model.answer(QUESTIONS, DOCUMENTS, **answering),
        "one document": model.answer(QUESTIONS, DOCUMENTS, max_documents=1, **answering),
        "generate_from_text": model.generate_from_text(QUESTIONS, DOCUMENTS, **answering),
        "compress": compressed.memory_embeddings,
        "owner": compressed.chunk_to_document,
        "compress_documents": pair[1],
        "from compressed": model.generate_from_compressed_documents_and_questions(*pair, **answering),
        "loss": model(**model.processor(QUESTIONS, DOCUMENTS, ANSWERS)).loss,
    }


def assert_same(model: ScaleDownModel, expected: dict):
    for name, value in results(model).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert value == expected[name], name


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("cpu", "n_layers"),
        ("disk", "modernbert"),
        pytest.param("cpu", "modernbert", marks=pytest.mark.slow),
        pytest.param("disk", "n_layers", marks=pytest.mark.slow),
    ],
)
def test_a_model_offloaded_by_accelerate(kind, where, tmp_path):
    model = randomize_lora(build_model(kind, lora=True))
    expected = results(model)
    if where == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path, execution_device="cpu")
    assert next(model.parameters()).is_meta
    assert model.device.type == "cpu"
    assert_same(model, expected)
    model.optimize_for_inference(cache_entries=100)  # LoRA stays apart
    for _ in range(2):
        assert_same(model, expected)
    with pytest.raises(ValueError, match="offloaded"):
        model.merge_lora()


@pytest.mark.parametrize("placed", combinations(DEVICE_MAPS, fast=[("compressor",), ("all",)]))
def test_a_model_loaded_with_parts_on_disk(placed, tmp_path):
    model = randomize_lora(build_model(lora=True))
    model.save_pretrained(tmp_path / "model")
    loaded = ScaleDownModel.from_pretrained(
        tmp_path / "model", device_map=DEVICE_MAPS[placed], offload_folder=tmp_path / "offloaded"
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert_same(loaded, results(model))


@pytest.mark.parametrize("placed", combinations(DEVICE_MAPS, fast=[("generator",)]))
def test_a_delta_loaded_with_parts_on_disk(placed, tmp_path):
    model = from_backbones((save_generator(tmp_path), None))
    model.add_lora(r=4, lora_dropout=0.0)
    randomize_lora(model).eval()
    model.save_pretrained(tmp_path / "delta", weights_format="delta")
    loaded = ScaleDownModel.from_pretrained(
        tmp_path / "delta", device_map=DEVICE_MAPS[placed], offload_folder=tmp_path / "offloaded"
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert_same(loaded, results(model))


def test_backbones_with_a_generator_on_disk(tmp_path):
    folder = save_generator(tmp_path)
    torch.manual_seed(0)
    expected = results(from_backbones((folder, None)))
    torch.manual_seed(0)
    model = from_backbones((folder, None), device_map={"": "disk"}, offload_folder=tmp_path / "offloaded")
    assert_same(model, expected)
