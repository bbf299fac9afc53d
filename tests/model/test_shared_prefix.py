"""A question is read once for all its chunks, to the same result."""

import pytest
import torch
from accelerate import cpu_offload
from tiny_compressors import CASES, WHOLE, build

import compressor_scaledown
from scaledown import ScaleDownConfig, ScaleDownModel
from tiny import build_model

QUESTIONS = [
    "Where do grey herons build their nests in spring?",
    "Who?",
    "When was the old bridge over the river built?",
]
TEXTS = ["Herons are birds.", "A crane lifts heavy things. " * 3, "The bridge was built in 1824 by two brothers."]
DOCUMENTS = [TEXTS, TEXTS[:1], [*TEXTS, "It fell."]]
CAUSAL = [case for case in CASES if case[0] != "modernbert"]


@pytest.fixture(autouse=True)
def shares_however_little(monkeypatch):
    """With models this small, a pass of its own costs more than it saves."""
    monkeypatch.setitem(compressor_scaledown.MIN_SPARED_OPERATIONS, "cpu", 0)


def chunks_of(model: ScaleDownModel, questions: list[str], documents: list[list[str]]) -> dict[str, torch.Tensor]:
    batch = model.processor.encode_documents(questions, documents)
    return {name: value for name, value in batch.items() if name not in ("chunk_to_document", "document_to_example")}


def read_lengths(model: ScaleDownModel, batch: dict[str, torch.Tensor], **settings):
    """Result of a compression, and `(chunks, tokens)` of each pass."""
    seen = []
    first = model.compressor.backbone.layers[0]
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    compressed = model.get_memory_embeddings(**batch, **settings)
    handle.remove()
    return compressed, seen


@pytest.mark.parametrize(("kind", "name", "attention"), CAUSAL, ids=["-".join(map(str, case)) for case in CAUSAL])
@torch.no_grad()
def test_a_question_read_once_gives_the_result_of_reading_it_with_every_chunk(kind, name, attention):
    model = build(kind, name, attention)
    for questions, documents in ((QUESTIONS, DOCUMENTS), (QUESTIONS[:1], [["Herons fly.", "Cranes fly."]])):
        batch = chunks_of(model, questions, documents)
        expected, (every,) = read_lengths(model, batch)
        for size in (64, 3):
            compressed, (prefixes, *passes) = read_lengths(model, batch, batch_size=size)
            assert prefixes[0] == len(questions)
            assert sum(count for count, _ in passes) == every[0]
            assert max(length for _, length in passes) < every[1]
            assert_same(compressed, expected)


@torch.no_grad()
def test_a_question_is_not_read_apart_where_that_costs_more_than_it_saves(monkeypatch):
    model = build_model("n_layers", num_layers=4)
    batch = chunks_of(model, QUESTIONS, DOCUMENTS)
    assert len(read_lengths(model, batch, batch_size=64)[1]) > 1
    spared = 2 * sum(parameter.numel() for parameter in model.compressor.backbone.layers[0].parameters())
    monkeypatch.setitem(compressor_scaledown.MIN_SPARED_OPERATIONS, "cpu", 1000 * spared)  # of a thousand tokens
    assert len(read_lengths(model, batch, batch_size=64)[1]) == 1


@torch.no_grad()
def test_the_last_layer_behind_a_prefix_computes_few_positions():
    model = build_model("n_layers", num_layers=4)
    seen = []
    model.compressor.backbone.layers[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    batch = chunks_of(model, QUESTIONS[:1], DOCUMENTS[:1])
    model.get_memory_embeddings(**batch, batch_size=64)
    assert seen[1:] == [int(batch["chunk_slots"].max()) + 1]


@torch.no_grad()
def test_what_is_not_shared_is_read_as_before():
    model = build_model("n_layers", num_layers=4)
    alone = chunks_of(model, QUESTIONS, [[text] for text in TEXTS])  # a question per chunk
    together = chunks_of(model, QUESTIONS, DOCUMENTS)
    for batch, settings in ((alone, {"batch_size": 64}), (together, {})):
        _, passes = read_lengths(model, batch, **settings)
        assert sum(count for count, _ in passes) == len(batch["chunk_slots"])
    ids, mask, own = prefix_inputs(together)
    assert shares(model, ids, mask, own)
    assert not shares(model, ids, mask, mask.bool())  # nothing stands before the chunks
    assert not shares(model, ids, mask, None)
    with torch.enable_grad():
        assert not shares(model, ids, mask, own)


@torch.no_grad()
def test_many_questions_are_read_a_few_at_a_time():
    model = build_model("n_layers", num_layers=4)
    questions = [f"Who wrote {'so ' * n}much?" for n in range(7)]
    batch = chunks_of(model, questions, [TEXTS] * 7)
    expected = model.get_memory_embeddings(**batch)
    compressed, passes = read_lengths(model, batch, batch_size=3)
    assert sum(count for count, _ in passes) == 7 + len(batch["chunk_slots"])
    assert max(count for count, _ in passes) == 3
    assert_same(compressed, expected)


@torch.no_grad()
def test_checkpointed_layers_in_training_share_nothing():
    """transformers takes caches away from them, with gradients or without."""
    model = build_model("n_layers", num_layers=4)
    model.gradient_checkpointing_enable()
    batch = chunks_of(model, QUESTIONS, DOCUMENTS)
    assert_same(model.train().get_memory_embeddings(**batch, batch_size=64), model.get_memory_embeddings(**batch))


@torch.no_grad()
def test_an_offloaded_compressor_compresses_all_at_once():
    model = build_model("n_layers", num_layers=4)
    batch = model.processor(QUESTIONS, DOCUMENTS)
    expected = model.generate(**batch, max_new_tokens=4)
    cpu_offload(model, execution_device="cpu")
    assert model.generate(**batch, max_new_tokens=4).tolist() == expected.tolist()


def shares(model: ScaleDownModel, *inputs: torch.Tensor) -> bool:
    return all(prefixes is not None for _, prefixes, _ in model.compressor.read_prefixes(*inputs, 64))


def assert_same(actual, expected):
    for key in ("memory_embeddings", "memory_mask", "reranking_scores"):
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=2e-5)


def prefix_inputs(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [batch[f"compressor_{name}"] for name in ("input_ids", "attention_mask", "document_mask")]


@pytest.mark.parametrize(("kind", "name"), [*WHOLE, ("modernbert", "bert")])
def test_backbones_that_see_both_ways_or_have_no_known_cache_share_nothing(kind, name):
    assert not build(kind, name).compressor.shares_prefixes


@pytest.mark.parametrize(
    ("generator", "flag"), [("gemma3", {"use_bidirectional_attention": True}), ("qwen2", {"is_causal": False})]
)
@torch.no_grad()
def test_a_decoder_that_sees_both_ways_shares_nothing(generator, flag):
    model = build_model("n_layers", generator=generator, num_layers=4)
    config = model.config.to_dict()
    for side in ("generator_config", "compressor_config"):
        config[side].update(flag)
    changed = ScaleDownModel(ScaleDownConfig.from_dict(config)).eval()
    assert changed.compressor.prunes_last_layer
    assert not changed.compressor.shares_prefixes
    batch = chunks_of(model, QUESTIONS, DOCUMENTS)
    assert_same(changed.get_memory_embeddings(**batch, batch_size=64), changed.get_memory_embeddings(**batch))


def test_answers_are_the_same_alone_together_and_without_sharing():
    model = build_model("n_layers", num_layers=4)
    answers = model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=6)
    assert model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=6, batch_size=1) == answers
    model.compressor.shares_prefixes = False
    assert model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=6) == answers
