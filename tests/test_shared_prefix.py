"""A question is read once for all its chunks, to the same result."""

import pytest
import torch
from test_last_layer import CASES, WHOLE, build

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
            for key in ("memory_embeddings", "memory_mask", "reranking_scores"):
                torch.testing.assert_close(compressed[key], expected[key], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_the_last_layer_behind_a_prefix_computes_few_positions():
    model = build_model("n_layers")
    seen = []
    model.compressor.backbone.layers[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    batch = chunks_of(model, QUESTIONS[:1], DOCUMENTS[:1])
    model.get_memory_embeddings(**batch, batch_size=64)
    assert seen[1:] == [int(batch["chunk_slots"].max()) + 1]


@torch.no_grad()
def test_what_is_not_shared_is_read_as_before():
    model = build_model("n_layers")
    alone = chunks_of(model, QUESTIONS, [[text] for text in TEXTS])  # a question per chunk
    together = chunks_of(model, QUESTIONS, DOCUMENTS)
    for batch, settings in ((alone, {"batch_size": 64}), (together, {"batch_size": 2}), (together, {})):
        _, passes = read_lengths(model, batch, **settings)
        assert sum(count for count, _ in passes) == len(batch["chunk_slots"])
    ids, mask, _ = prefix_inputs(together)
    assert model.compressor.read_prefixes(ids, mask, mask.bool(), 64) is None  # nothing stands before the chunks
    assert model.compressor.read_prefixes(ids, mask, None, 64) is None
    with torch.enable_grad():
        assert model.compressor.read_prefixes(*prefix_inputs(together), 64) is None
    assert model.compressor.read_prefixes(*prefix_inputs(together), 64) is not None


def prefix_inputs(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [batch[f"compressor_{name}"] for name in ("input_ids", "attention_mask", "document_mask")]


@pytest.mark.parametrize(("kind", "name"), [*WHOLE, ("modernbert", "bert")])
def test_backbones_that_see_both_ways_or_have_no_known_cache_share_nothing(kind, name):
    assert not build(kind, name).compressor.shares_prefixes


def test_a_decoder_that_sees_both_ways_shares_nothing():
    config = build_model("n_layers", generator="gemma3").config.to_dict()
    for side in ("generator_config", "compressor_config"):
        config[side]["use_bidirectional_attention"] = True
    model = ScaleDownModel(ScaleDownConfig.from_dict(config))
    assert model.compressor.prunes_last_layer
    assert not model.compressor.shares_prefixes


def test_answers_are_the_same_alone_together_and_without_sharing():
    model = build_model("n_layers")
    answers = model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=6)
    assert model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=6, batch_size=1) == answers
    model.compressor.shares_prefixes = False
    assert model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=6) == answers
