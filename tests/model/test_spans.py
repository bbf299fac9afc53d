"""Slots as weighted means over spans: where an untrained model starts, what it learns, and that it is saved whole."""

import pytest
import torch

from scaledown import ScaleDownConfig, ScaleDownModel
from spans_scaledown import SpanAttention
from tiny import ANSWERS, DOCUMENTS, QUESTIONS, assert_alike_alone_and_together, build_config, build_model

INPUTS = ("compressor_input_ids", "compressor_attention_mask", "chunk_slots", "compressor_document_mask")


@pytest.fixture
def model() -> ScaleDownModel:
    return build_model("n_layers", slot_pooling="span_attention", chunk_length=32, num_memory_tokens=32)


def inputs_of(model: ScaleDownModel, rate: int, documents: list[list[str]] = DOCUMENTS) -> dict[str, torch.Tensor]:
    batch = model.processor.encode_documents(QUESTIONS, documents, compression_rate=rate)
    return {name: batch[name] for name in INPUTS}


@torch.no_grad()
def test_an_untrained_model_passes_token_embeddings_on(model):
    """At one token per slot the generator starts by reading the text itself; at four, the mean of each four tokens."""
    generator = model.generator.get_input_embeddings()
    model.compressor.backbone.get_input_embeddings().weight.copy_(generator.weight)
    for rate in (1, 4):
        batch = inputs_of(model, rate)
        compressed = model.get_memory_embeddings(**batch)
        assert compressed.memory_mask.sum() == batch["chunk_slots"].sum()
        for i, slots in enumerate(batch["chunk_slots"].tolist()):
            ids = batch["compressor_input_ids"][i][batch["compressor_document_mask"][i]]
            spans = [[] for _ in range(slots)]
            for place, embedding in enumerate(generator(ids)):
                spans[place * slots // len(ids)].append(embedding)
            expected = torch.stack([torch.stack(span).mean(dim=0) for span in spans])
            torch.testing.assert_close(compressed.memory_embeddings[i, :slots], expected)
            assert not compressed.memory_embeddings[i, slots:].any()


@torch.no_grad()
def test_the_query_decides_which_tokens_fill_a_slot():
    attention = SpanAttention(2)
    attention.query.copy_(torch.tensor([100.0, 0.0]))
    states = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [9.0, 9.0]]])
    embeds = torch.tensor([[[1.0], [2.0], [3.0], [5.0], [7.0]]])
    own = torch.tensor([[True, True, True, True, False]])
    found = attention(states, embeds, own, torch.tensor([2]), 3)
    # The first slot is its second token's alone; the second slot's tokens are alike; there is no third slot.
    torch.testing.assert_close(found[0, :, 0], torch.tensor([2.0, 4.0, 0.0]))
    torch.testing.assert_close(found[0, 0, 1:], torch.tensor([2.0, 0.0]))  # the state, as long as its embedding


def test_states_are_as_long_as_embeddings_whatever_the_layer(model):
    states = torch.randn(2, 3, 32) * torch.tensor([1.0, 1000.0, 1e-2]).view(1, 3, 1)
    normal = model.compressor.span_attention.normalize(states)
    torch.testing.assert_close(normal.square().mean(dim=-1), torch.ones(2, 3), rtol=1e-2, atol=1e-2)


def draw(model: ScaleDownModel):
    """Weights as training leaves them: no part at its neutral beginning."""
    torch.manual_seed(3)
    with torch.no_grad():
        model.compressor.span_attention.query.normal_()
        model.compressor.projector.weight.normal_(std=0.3)


@torch.no_grad()
def test_neither_padding_nor_company_changes_a_slot(model):
    draw(model)
    assert_alike_alone_and_together(model)


@torch.no_grad()
def test_the_question_changes_the_slots(model):
    draw(model)
    first, second = (model.compress(question, DOCUMENTS[0]).memory_embeddings for question in QUESTIONS[:2])
    assert not torch.allclose(first, second, atol=1e-2)


def test_every_part_of_the_compressor_learns(model):
    draw(model)
    model.add_lora(r=2)
    scores = [[1.0] * len(documents) for documents in DOCUMENTS]
    model(**model.processor(QUESTIONS, DOCUMENTS, answers=ANSWERS, reranking_scores=scores)).loss.backward()
    without = [name for name, p in model.compressor.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_half_precision_by_autocast_computes_the_weights_in_32_bits(model):
    draw(model)
    expected = model.get_memory_embeddings(**inputs_of(model, 4)).memory_embeddings
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.get_memory_embeddings(**inputs_of(model, 4)).memory_embeddings
    assert torch.nn.functional.cosine_similarity(found.float(), expected, dim=-1).nan_to_num(1)[:, 0].min() > 0.95


@pytest.mark.parametrize("weights_format", ["full", "delta"])
@torch.no_grad()
def test_a_saved_model_gives_the_same_slots(model, weights_format, tmp_path):
    model.generator.save_pretrained(tmp_path / "generator")
    model.processor.tokenizer.save_pretrained(tmp_path / "generator")
    model = ScaleDownModel.from_backbones(
        str(tmp_path / "generator"), num_compressor_layers=2, slot_pooling="span_attention"
    )
    assert not model.compressor.span_attention.query.any()
    draw(model)
    model.save_pretrained(tmp_path / "saved", weights_format=weights_format)
    loaded = ScaleDownModel.from_pretrained(tmp_path / "saved")
    expected, found = (m.eval().compress(QUESTIONS, DOCUMENTS) for m in (model, loaded))
    torch.testing.assert_close(found.memory_embeddings, expected.memory_embeddings)
    torch.testing.assert_close(found.reranking_scores, expected.reranking_scores)


def test_another_compressor_cannot_pass_token_embeddings_on():
    with pytest.raises(ValueError, match=r"span_attention.*n_layers.*modernbert"):
        build_config("modernbert", slot_pooling="span_attention")
    with pytest.raises(ValueError, match="span_attention"):
        ScaleDownConfig(slot_pooling="attention")
