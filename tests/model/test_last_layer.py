"""The compressor's last layer computes only what is read, to the same result and the same gradients."""

import pytest
import torch
from tiny_compressors import CASES, PRUNED, WHOLE, build

from scaledown import ScaleDownModel
from shortcuts_scaledown import PRUNABLE_LAYERS
from tiny import (
    DOCUMENTS,
    ENCODERS,
    GENERATORS,
    QUESTIONS,
    build_model,
    only,
)

INPUTS = ("compressor_input_ids", "compressor_attention_mask", "chunk_slots")


def batch_of(model: ScaleDownModel, ragged: bool) -> dict[str, torch.Tensor]:
    batch = only(model.processor(QUESTIONS, DOCUMENTS), *INPUTS)
    if ragged:
        batch["chunk_slots"] = torch.arange(len(batch["chunk_slots"])) % 4 + 1
        return batch
    ids = batch["compressor_input_ids"][:, :12]
    return {
        "compressor_input_ids": ids,
        "compressor_attention_mask": torch.ones_like(ids),
        "chunk_slots": torch.full((len(ids),), 4),
    }


def run(model: ScaleDownModel, batch: dict[str, torch.Tensor], pruned: bool):
    """Result of a pass, the gradients of something that depends on all of it, and positions the last MLP read."""
    compressor, seen = model.compressor, []
    last = compressor.backbone.get_submodule(PRUNABLE_LAYERS[compressor.backbone.config.model_type])[-1]
    mlp = last.mlp if hasattr(last, "mlp") else last.intermediate
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    compressor.prunes_last_layer = pruned
    compressed = model.get_memory_embeddings(**batch)
    handle.remove()
    model.zero_grad()
    (compressed.memory_embeddings.square().sum() + compressed.reranking_scores.sin().sum()).backward()
    return compressed, {name: p.grad.clone() for name, p in compressor.named_parameters() if p.grad is not None}, seen


@pytest.mark.parametrize(("kind", "name", "attention"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_few_positions_give_the_result_and_the_gradients_of_all(kind, name, attention):
    model = build(kind, name, attention)
    for ragged in (True, False):  # with a mask, and where attention needs none
        batch = batch_of(model, ragged)
        few, few_gradients, seen = run(model, batch, pruned=True)
        assert seen == [5]
        every, gradients, seen = run(model, batch, pruned=False)
        assert seen[0] > 12
        torch.testing.assert_close(few.memory_embeddings, every.memory_embeddings, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(few.reranking_scores, every.reranking_scores, rtol=1e-4, atol=1e-5)
        assert few_gradients.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            scale = max(float(gradient.abs().max()), 0.1)  # key biases have none but rounding
            torch.testing.assert_close(few_gradients[parameter], gradient, rtol=1e-3, atol=1e-4 * scale, msg=parameter)


@pytest.mark.parametrize(("kind", "name"), WHOLE)
def test_other_architectures_compute_the_whole_layer(kind, name):
    model = build(kind, name)
    assert not model.compressor.prunes_last_layer
    assert not any(module._forward_pre_hooks for module in model.compressor.modules())


@pytest.mark.parametrize("kind", ["n_layers", "modernbert"])
def test_checkpointed_layers_are_computed_whole(kind):
    """transformers takes caches away from checkpointed layers, and with them what stands in for one."""
    model = build(kind, "bert" if kind == "modernbert" else "llama").train()
    batch = batch_of(model, ragged=True)
    torch.manual_seed(1)
    _, expected, _ = run(model, batch, pruned=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    _, gradients, seen = run(model, batch, pruned=True)
    assert seen[0] > 12
    for parameter, gradient in expected.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-3, atol=1e-4, msg=parameter)


def test_the_last_layer_of_a_loaded_model_is_pruned_too(tmp_path):
    model = build("n_layers", "llama")
    model.save_pretrained(tmp_path)
    loaded = ScaleDownModel.from_pretrained(tmp_path)
    assert not [name for name in loaded.state_dict() if name not in model.state_dict()]
    few, _, seen = run(loaded, batch_of(loaded, ragged=True), pruned=True)
    assert seen == [5]
    expected, _, _ = run(model, batch_of(model, ragged=True), pruned=False)
    torch.testing.assert_close(few.memory_embeddings, expected.memory_embeddings, rtol=1e-4, atol=1e-5)


def test_without_reranking_only_the_slots_are_computed():
    model = build_model("n_layers", enable_reranking=False, num_layers=4)
    batch = batch_of(model, ragged=True)
    seen = []
    model.compressor.backbone.layers[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    few = model.get_memory_embeddings(**batch)
    model.compressor.prunes_last_layer = False
    every = model.get_memory_embeddings(**batch)
    assert seen[0] == 4 < seen[1]
    torch.testing.assert_close(few.memory_embeddings, every.memory_embeddings, rtol=1e-4, atol=1e-5)


def test_every_kind_of_encoder_is_listed_or_whole():
    assert {name for _, name in WHOLE} | {name for _, name in PRUNED} >= {*GENERATORS, *ENCODERS}
