"""The compressor: which hidden states it reads, and that neither padding nor company changes them."""

import pytest
import torch
from torch.nn.functional import linear, pad

from compressor_scaledown import COMPRESSORS
from tiny import ANSWERS, DOCUMENTS, ENCODERS, GENERATORS, LEARNED_POSITIONS, QUESTIONS, build_config, build_model, only

INPUTS = ("compressor_input_ids", "compressor_attention_mask", "chunk_slots")
GENERATORS_TO_COPY = [*GENERATORS, *LEARNED_POSITIONS]
BACKBONES = [
    *(("n_layers", name) for name in GENERATORS_TO_COPY),
    *(("modernbert", name) for name in ENCODERS),
    ("llm", None),
]


def build(kind: str, name: str | None, **kwargs):
    """A model around one backbone: of the generator's architecture for `n_layers`."""
    which = {"generator": name, "num_layers": 4} if kind == "n_layers" else {"compressor": name}
    return build_model(kind, **which, **kwargs)


@pytest.fixture(scope="module", params=BACKBONES, ids=[f"{kind}-{name}" for kind, name in BACKBONES])
def any_backbone(request):
    """One model per architecture that a compressor can be made of; read-only."""
    return build(*request.param)


def chunks_of(model, **kwargs) -> dict[str, torch.Tensor]:
    return only(model.processor(QUESTIONS, DOCUMENTS, **kwargs), *INPUTS)


def assert_same(actual, expected):
    assert torch.equal(actual.memory_mask, expected.memory_mask)
    torch.testing.assert_close(actual.memory_embeddings, expected.memory_embeddings, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.reranking_scores, expected.reranking_scores, rtol=1e-4, atol=1e-4)


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", GENERATORS_TO_COPY)
@torch.no_grad()
def test_n_layers_reads_the_generators_own_hidden_state_of_layer_n(generator):
    """Against transformers' causal language model of full depth: layer N, raw, without the final norm."""
    model = build_model("n_layers", generator=generator, num_layers=4)
    backbone, language_model = model.compressor.backbone, model.generator
    incompatible = backbone.load_state_dict(language_model.base_model.state_dict(), strict=False)
    assert not incompatible.missing_keys
    # Nothing is left over but the deeper layers and the final norm.
    assert {name.split(".")[0] for name in incompatible.unexpected_keys} in ({"layers", "norm"}, {"h", "ln_f"})
    batch = chunks_of(model)
    batch["chunk_slots"] = torch.arange(len(batch["chunk_slots"])) % 4 + 1
    compressed = model.get_memory_embeddings(**batch)
    rerank_states = model.compressor.hidden_states(*batch.values())[2]
    for i, slots in enumerate(batch["chunk_slots"].tolist()):
        ids = batch["compressor_input_ids"][i][batch["compressor_attention_mask"][i].bool()]
        embeds = torch.cat(
            [
                language_model.get_input_embeddings()(ids),
                model.compressor.memory_embeddings[:slots],
                model.compressor.rerank_embedding[None],
            ]
        )
        outputs = language_model(inputs_embeds=embeds[None], output_hidden_states=True)
        assert len(outputs.hidden_states) == 5
        expected = outputs.hidden_states[2][0]
        torch.testing.assert_close(
            compressed.memory_embeddings[i, :slots], expected[len(ids) : -1], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(rerank_states[i], expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "name"), [("modernbert", "modernbert"), ("modernbert", "bert"), ("llm", None)])
@torch.no_grad()
def test_other_compressors_read_the_last_hidden_state_through_the_projector(kind, name):
    model = build(kind, name)
    compressor = model.compressor
    batch = chunks_of(model)
    compressed = model.get_memory_embeddings(**batch)
    for i, slots in enumerate(batch["chunk_slots"].tolist()):
        ids = batch["compressor_input_ids"][i][batch["compressor_attention_mask"][i].bool()]
        embeds = torch.cat(
            [
                compressor.backbone.get_input_embeddings()(ids),
                compressor.memory_embeddings[:slots],
                compressor.rerank_embedding[None],
            ]
        )
        states = compressor.backbone(inputs_embeds=embeds[None]).last_hidden_state[0]
        first, _, last = compressor.projector
        hidden = linear(states[len(ids) : -1], first.weight, first.bias).clamp(min=0)
        expected = linear(hidden, last.weight, last.bias)
        torch.testing.assert_close(compressed.memory_embeddings[i, :slots], expected, rtol=1e-4, atol=1e-4)
        score = compressor.reranking_head.weight[0] @ states[-1] + compressor.reranking_head.bias[0]
        torch.testing.assert_close(compressed.reranking_scores[i], score, rtol=1e-4, atol=1e-4)


def test_only_other_backbones_have_a_projector(any_model):
    kind = any_model.config.compressor_type
    assert (any_model.compressor.projector is None) == (kind == "n_layers")
    if kind != "n_layers":
        assert any_model.compressor.projector[0].weight.shape == (40, 24)
        assert any_model.compressor.projector[2].weight.shape == (32, 40)


@pytest.mark.parametrize("name", GENERATORS)
def test_n_layers_has_no_head_and_no_final_norm(name):
    backbone = build_model("n_layers", generator=name, num_layers=4).compressor.backbone
    assert len(backbone.layers) == 2
    assert not hasattr(backbone, "lm_head")
    assert not list(backbone.norm.parameters())


def test_an_architecture_without_a_known_final_norm_is_refused():
    with pytest.raises(ValueError, match=r'Linear has no final norm.*use compressor_type="llm"'):
        COMPRESSORS["n_layers"](build_config("n_layers"), backbone=torch.nn.Linear(1, 1))


def test_a_pooler_is_taken_off():
    assert build("modernbert", "bert").compressor.backbone.pooler is None


@torch.no_grad()
def test_memory_depends_on_query_document_and_memory_tokens(any_backbone):
    first = any_backbone.compress("Who wrote it?", ["Scott wrote Ivanhoe."])
    for question, document in (("Who read it?", "Scott wrote Ivanhoe."), ("Who wrote it?", "Scott wrote Waverley.")):
        other = any_backbone.compress(question, [document])
        assert (first.memory_embeddings - other.memory_embeddings).abs().max() > 1e-2
        assert (first.reranking_scores - other.reranking_scores).abs().max() > 1e-3
    # Slots of one chunk are not copies of each other.
    slots = any_backbone.compress("Who?", DOCUMENTS[0][:1]).memory_embeddings[0]
    assert torch.pdist(slots).min() > 1e-2


def test_without_reranking_nothing_is_scored(any_model):
    model = build_model(any_model.config.compressor_type, enable_reranking=False)
    assert model.compressor.rerank_embedding is None
    assert model.compressor.reranking_head is None
    compressed = model.compress(QUESTIONS, DOCUMENTS)
    assert compressed.reranking_scores is None
    assert compressed.memory_embeddings.abs().sum(dim=-1)[compressed.memory_mask].min() > 0


@torch.no_grad()
def test_a_causal_compressors_memory_does_not_see_the_reranking_position(model):
    without = build_model("n_layers", num_layers=4, enable_reranking=False)
    without.load_state_dict(model.state_dict(), strict=False)
    batch = chunks_of(model)
    torch.testing.assert_close(
        without.get_memory_embeddings(**batch).memory_embeddings, model.get_memory_embeddings(**batch).memory_embeddings
    )


def test_memory_can_be_drawn_from_the_vocabularys_distribution(any_model):
    model = build_model(any_model.config.compressor_type, num_memory_tokens=32, compression_rate=1)
    embedding = model.compressor.backbone.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.add_(3.0)
        rows = embedding(torch.arange(400))
    model.compressor.initialize_from_vocabulary()
    memory = model.compressor.memory_embeddings
    assert abs(memory.mean() - rows.mean()) < 0.1
    assert abs(memory.std() - rows.std()) < 0.1
    assert abs(model.compressor.rerank_embedding.mean() - rows.mean()) < 0.3
    assert memory.requires_grad


# -- padding and company ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(any_backbone):
    ids, mask, slots = chunks_of(any_backbone).values()
    expected = any_backbone.get_memory_embeddings(ids, mask, slots)
    for left, right, value in ((0, 9, 2), (9, 0, 2), (4, 5, 77)):
        moved = any_backbone.get_memory_embeddings(
            pad(ids, (left, right), value=value), pad(mask, (left, right)), slots
        )
        assert_same(moved, expected)
    # Every row to the right end of the batch, as a tokenizer with left padding gives it.
    rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    length = ids.shape[1]
    left_ids = torch.stack([pad(row, (length - len(row), 0), value=2) for row in rows])
    left_mask = torch.stack([pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])
    assert not torch.equal(left_mask, mask)
    assert_same(any_backbone.get_memory_embeddings(left_ids, left_mask, slots), expected)


@torch.no_grad()
def test_a_chunk_in_a_ragged_batch_equals_the_chunk_alone(any_backbone):
    ids, mask, slots = chunks_of(any_backbone).values()
    slots = torch.arange(len(slots)) % 4 + 1
    together = any_backbone.get_memory_embeddings(ids, mask, slots)
    assert together.memory_embeddings.shape == (len(slots), int(slots.max()), 32)
    assert together.memory_mask.sum(dim=1).tolist() == slots.tolist()
    assert (together.memory_mask.long().diff(dim=1) <= 0).all()
    assert (together.memory_embeddings[~together.memory_mask] == 0).all()
    for i, count in enumerate(slots.tolist()):
        alone = any_backbone.get_memory_embeddings(ids[i : i + 1][:, mask[i].bool()], None, slots[i : i + 1])
        torch.testing.assert_close(
            together.memory_embeddings[i, :count], alone.memory_embeddings[0], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(together.reranking_scores[i : i + 1], alone.reranking_scores, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_chunks_keep_their_order(any_model):
    batch = chunks_of(any_model)
    expected = any_model.get_memory_embeddings(**batch)
    order = torch.randperm(len(batch["chunk_slots"]))
    shuffled = any_model.get_memory_embeddings(**{name: tensor[order] for name, tensor in batch.items()})
    for name in ("memory_embeddings", "memory_mask", "reranking_scores"):
        torch.testing.assert_close(shuffled[name], expected[name][order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_size_of_a_pass_changes_nothing(any_model, size):
    expected = any_model.get_memory_embeddings(**chunks_of(any_model))
    compressed = any_model.compress(QUESTIONS, DOCUMENTS, batch_size=size)
    assert_same(compressed, expected)
    assert compressed.chunk_to_document.tolist() == sorted(compressed.chunk_to_document.tolist())
    assert compressed.document_to_example.tolist() == [0, 0, 1, 2, 2, 2]


def test_fewer_slots_are_the_first_ones_of_a_causal_compressor(model):
    two = model.compress(QUESTIONS, DOCUMENTS, num_memory_tokens=2)
    four = model.compress(QUESTIONS, DOCUMENTS)
    assert two.memory_embeddings.shape[1] == 2
    torch.testing.assert_close(
        two.memory_embeddings[two.memory_mask], four.memory_embeddings[:, :2][two.memory_mask], rtol=1e-4, atol=1e-4
    )


def test_all_slots_are_used_when_none_are_named(model):
    ids = chunks_of(model)["compressor_input_ids"]
    compressed = model.get_memory_embeddings(ids)
    assert compressed.memory_mask.shape == (len(ids), 4)
    assert compressed.memory_mask.all()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([], "chunk_slots has shape \\(0,\\) for 2 chunks"),
        ([4], "chunk_slots has shape \\(1,\\) for 2 chunks"),
        ([4, 5], "ranges from 4 to 5; this model has 1 to 4 memory embeddings.*num_memory_tokens=4 or less"),
        ([0, 4], "ranges from 0 to 4"),
    ],
)
def test_wrong_slots_are_refused(model, slots, message):
    with pytest.raises(ValueError, match=message):
        model.get_memory_embeddings(torch.ones(2, 7).long(), None, torch.tensor(slots).long())


def test_no_chunk_at_all_is_refused(model):
    with pytest.raises(ValueError, match="for 0 chunks; pass one number per chunk, and at least one chunk"):
        model.get_memory_embeddings(torch.ones(0, 7).long())


# -- every architecture, end to end -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), BACKBONES)
def test_every_architecture_answers_and_learns(kind, name):
    model = build(kind, name)
    answers = model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=4, do_sample=False)
    assert [type(answer) for answer in answers] == [str] * 3
    batch = model.processor(QUESTIONS, DOCUMENTS, ANSWERS, reranking_scores=[[1.0, 0.0], [2.0], [0.0, 1.0, 2.0]])
    model(**batch).loss.backward()
    for name, parameter in model.compressor.named_parameters():
        # Attention does not change when the same is added to all keys: no gradient but rounding.
        assert parameter.grad.abs().max() > 0 or name.endswith("key.bias"), name
    assert (model.compressor.memory_embeddings.grad.abs().amax(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in model.generator.parameters())


@pytest.mark.parametrize("generator", ["gemma3", "qwen2"])
@pytest.mark.parametrize("kind", ["modernbert", "llm"])
def test_the_generator_need_not_be_of_the_compressors_family(kind, generator):
    model = build_model(kind, generator=generator, num_layers=4)
    batch = model.processor(QUESTIONS, DOCUMENTS, ANSWERS)
    model(**batch).loss.backward()
    assert model.compressor.memory_embeddings.grad.abs().max() > 0
