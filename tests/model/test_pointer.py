"""Slots that point at text: what fills them, what they learn, and that the model is saved whole."""

import math

import pytest
import torch
from transformers import BertTokenizerFast

from pointer_scaledown import WindowPointer, choose_windows, pointer_loss, read_windows
from scaledown import ScaleDownConfig, ScaleDownModel
from tiny import ANSWERS, DOCUMENTS, QUESTIONS, assert_alike_alone_and_together, build_config, build_model

KINDS = ("n_layers", "modernbert", "llm")
EVIDENCE = [[["Walter Scott"], []], [["Cévennes"]], [["long-legged birds"], [], []]]


def build(kind: str, **settings) -> ScaleDownModel:
    return build_model(kind, slot_pooling="pointer", **settings)


def draw(model: ScaleDownModel):
    """Weights as training leaves them: no part at its neutral beginning."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.compressor.pointer.parameters():
            parameter.normal_(std=0.5)
        model.compressor.projector.weight.normal_(std=0.3)


def chunks_of(model: ScaleDownModel, **kwargs) -> dict[str, torch.Tensor]:
    batch = model.processor.encode_documents(QUESTIONS, DOCUMENTS, **kwargs)
    return {name: batch[name] for name in batch if name.startswith("compressor_") or name == "chunk_slots"}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_slot_is_the_generators_embedding_of_the_text_that_is_pointed_at(kind):
    model = build(kind)
    batch = chunks_of(model)
    places = batch["compressor_document_mask"].long().argmax(dim=1) + 1  # the second own token of each chunk

    class Certain(WindowPointer):
        def forward(self, states, summary, document_mask):
            return torch.zeros(states.shape[:2]).scatter(1, places.view(-1, 1), 1.0)

    model.compressor.pointer = Certain(model.config.compressor_config.hidden_size)
    compressed = model.get_memory_embeddings(**batch)
    text = batch["compressor_windows"][torch.arange(len(places)), places]
    expected = model.generator.get_input_embeddings()(text)  # (num_chunks, window, hidden)
    for i, slots in enumerate(batch["chunk_slots"].tolist()):
        torch.testing.assert_close(compressed.memory_embeddings[i, :slots], expected[i, :slots])
        assert not compressed.memory_embeddings[i, slots:].any()


@pytest.mark.parametrize("learns", [True, False])
def test_one_text_is_read_and_the_gradient_is_that_of_a_mixture(learns):
    embeddings = torch.nn.Embedding.from_pretrained(torch.tensor([[0.0], [1.0], [2.0], [4.0]]))
    windows = torch.tensor([[[1, 2], [2, 3], [3, 0]]])
    weights = torch.tensor([[0.2, 0.7, 0.1]], requires_grad=learns)
    states = torch.tensor([[[10.0], [20.0], [30.0]]], requires_grad=True)
    found = read_windows(weights, torch.tensor([[1, 0]]), windows, embeddings, states, 3)
    # Two slots of the first window, one of the second; states as long as the text beside them.
    expected = torch.tensor([[[2.0, 40.0], [4.0, 80.0], [1.0, 10.0]]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (found * torch.tensor([[1.0, 0.0], [10.0, 0.0], [0.0, 1.0]])).sum().backward()
    assert states.grad.flatten().tolist() == [1.0, 0.0, 0.0]
    if learns:
        # A slot's share: its text at each place, or the state there as long as the text that was read.
        assert weights.grad.tolist() == [[1 + 20 + 10, 2 + 40 + 20, 4 + 0 + 30]]


def test_weights_are_on_the_chunks_own_tokens_alone():
    torch.manual_seed(0)
    own = torch.tensor([[False, True, True, False], [True, True, True, True]])
    weights = WindowPointer(6)(torch.randn(2, 4, 6), torch.randn(2, 6), own)
    assert weights.shape == (2, 4)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2))
    assert not weights[~own].any()


def test_windows_overlap_only_where_the_chunk_has_no_other_place():
    own = torch.tensor([[False] + [True] * 8 + [False]])
    weights = torch.tensor([[0.0, 0.02, 0.03, 0.04, 0.3, 0.25, 0.2, 0.06, 0.1, 0.0]])
    assert choose_windows(weights, own, 3, 1).tolist() == [[4]]
    # From 4 a window covers 4 to 6; only that from 1 repeats none of them. From 6, 7 and 8 it covers 6 to 8, since
    # the chunk ends there, and repeats one.
    assert choose_windows(weights, own, 3, 2).tolist() == [[4, 1]]
    assert choose_windows(weights, own, 3, 3).tolist() == [[4, 1, 6]]
    apart = torch.tensor([[0.0, 0.1, 0.1, 0.1, 0.0, 0.0, 0.3, 0.4, 0.0, 0.0]])
    assert choose_windows(apart, own, 2, 3).tolist() == [[7, 1, 3]]
    assert choose_windows(torch.flip(weights, [1]), own, 1, 8).sort().values.tolist() == [list(range(1, 9))]


@torch.no_grad()
def test_a_lower_rate_reads_more_windows_and_keeps_the_first():
    model = build("n_layers", num_memory_tokens=16, compression_rate=4, pointer_window=2)
    draw(model)
    first = model.get_memory_embeddings(**chunks_of(model, compression_rate=4))
    more = model.get_memory_embeddings(**chunks_of(model, compression_rate=1))
    assert more.memory_mask.sum() > 2 * first.memory_mask.sum()
    for short, long, mask in zip(
        first.memory_embeddings, more.memory_embeddings, first.memory_mask.sum(dim=1), strict=True
    ):
        torch.testing.assert_close(long[:mask], short[:mask])


def test_the_loss_is_of_the_weight_where_windows_hold_the_answer():
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.8, 0.0]])
    labels = torch.tensor([[True, True, False], [False, False, False]])
    assert pointer_loss(weights, labels).item() == pytest.approx(-math.log(0.75), abs=1e-5)
    assert pointer_loss(weights, labels, 4).item() == pytest.approx(-math.log(0.75) / 4, abs=1e-5)
    labels = torch.tensor([[True, True, False], [False, True, False]])
    assert pointer_loss(weights, labels).item() == pytest.approx(-math.log(0.75 * 0.8) / 2, abs=1e-5)
    assert pointer_loss(weights, torch.zeros_like(labels)).item() == 0


def test_the_loss_of_what_is_never_pointed_at_is_finite_and_teaches():
    scores = torch.tensor([[0.0, 200.0]], requires_grad=True)
    loss = pointer_loss(scores.softmax(dim=-1), torch.tensor([[True, False]]))
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_neither_padding_nor_company_changes_slots_or_scores(kind):
    model = build(kind)
    draw(model)
    assert_alike_alone_and_together(model)


@torch.no_grad()
def test_padding_at_the_left_moves_weights_and_changes_no_slot():
    model = build("n_layers")
    draw(model)
    batch = chunks_of(model)
    expected = model.get_memory_embeddings(**batch)
    moved = {"chunk_slots": batch["chunk_slots"]}
    for name in ("compressor_input_ids", "compressor_attention_mask", "compressor_document_mask", "compressor_windows"):
        pad = torch.zeros_like(batch[name][:, :3])
        moved[name] = torch.cat([pad, batch[name]], dim=1)
    found = model.get_memory_embeddings(**moved)
    torch.testing.assert_close(found.memory_embeddings, expected.memory_embeddings, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pointer_weights[:, 3:], expected.pointer_weights, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_passes_by_length_and_a_cache_give_the_same_slots():
    model = build("modernbert")
    draw(model)
    expected = model.get_memory_embeddings(**chunks_of(model))
    found = model.get_memory_embeddings(**chunks_of(model), batch_size=2)
    torch.testing.assert_close(found.memory_embeddings, expected.memory_embeddings, rtol=1e-4, atol=1e-5)
    model.optimize_for_inference(cache_entries=100)
    for _ in range(2):
        cached = model.compress(QUESTIONS, DOCUMENTS)
        torch.testing.assert_close(cached.memory_embeddings, expected.memory_embeddings, rtol=1e-4, atol=1e-5)
    assert model.compression_cache.hits > 0
    misses = model.compression_cache.misses
    model.compress(QUESTIONS[2], DOCUMENTS[2])  # alone, and so with less padding
    assert model.compression_cache.misses == misses


@torch.no_grad()
def test_a_cache_tells_texts_apart_that_only_the_generator_spells_differently():
    model = build("modernbert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "rome", "is", "old"]
    model.processor.compressor_tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    model.optimize_for_inference(cache_entries=10)
    upper, lower = (model.compress("Is it?", [text]).memory_embeddings for text in ("ROME IS OLD", "rome is old"))
    assert not torch.allclose(upper, lower, atol=1e-3)


@torch.no_grad()
def test_a_cache_forgets_the_text_of_embeddings_that_have_changed():
    model = build("modernbert")
    model.optimize_for_inference(cache_entries=10)
    before = model.compress(QUESTIONS, DOCUMENTS).memory_embeddings
    model.compress(QUESTIONS, DOCUMENTS)
    assert model.compression_cache.hits > 0
    model.generator.get_input_embeddings().weight.mul_(2)
    torch.testing.assert_close(model.compress(QUESTIONS, DOCUMENTS).memory_embeddings, 2 * before)


def test_the_generator_learns_to_read_what_the_compressor_learns_to_choose():
    model = build("n_layers")
    draw(model)
    model.add_lora(r=2)
    scores = [[1.0] * len(documents) for documents in DOCUMENTS]
    batch = model.processor(QUESTIONS, DOCUMENTS, answers=ANSWERS, reranking_scores=scores, evidence=EVIDENCE)
    out = model(**batch)
    expected = out.generation_loss + 0.05 * out.reranking_loss + model.config.pointer_loss_weight * out.pointer_loss
    torch.testing.assert_close(out.loss.detach(), expected)
    out.loss.backward()
    # A key's bias adds the same to every token's weight.
    without = [
        name
        for name, p in model.compressor.named_parameters()
        if name != "pointer.key.bias" and (p.grad is None or not p.grad.any())
    ]
    assert not without
    assert any(p.grad is not None and p.grad.any() for n, p in model.generator.named_parameters() if "lora_B" in n)


def test_the_answers_loss_alone_reaches_the_pointer():
    model = build("n_layers")
    draw(model)
    model(**model.processor(QUESTIONS, DOCUMENTS, answers=ANSWERS)).loss.backward()
    assert model.compressor.pointer.query.weight.grad.any()


def test_without_a_prompt_the_compressor_learns_and_the_generator_does_not_run(monkeypatch):
    model = build("n_layers")
    scores = [[1.0] * len(documents) for documents in DOCUMENTS]
    batch = model.processor(QUESTIONS, DOCUMENTS, reranking_scores=scores, evidence=EVIDENCE)
    whole = model(**batch)
    alone = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask", "slot_mask")}
    monkeypatch.setattr(model.generator, "forward", lambda *args, **kwargs: pytest.fail("the generator ran"))
    out = model(**alone)
    torch.testing.assert_close(out.loss, whole.loss)
    torch.testing.assert_close(out.pointer_loss, whole.pointer_loss)
    assert out.logits is None and out.generation_loss is None


@torch.no_grad()
def test_answers_are_those_of_generate_on_the_processors_batch():
    model = build("modernbert")
    draw(model)
    batch = model.processor(QUESTIONS, DOCUMENTS)
    sequences = model.generate(**batch, max_new_tokens=5, do_sample=False)
    expected = model.processor.decode_answers(sequences, batch["input_ids"].shape[1])
    assert model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=5) == expected


@pytest.mark.parametrize("weights_format", ["full", "delta"])
@torch.no_grad()
def test_a_saved_model_gives_the_same_slots(weights_format, tmp_path):
    model = build("n_layers")
    model.generator.save_pretrained(tmp_path / "generator")
    model.processor.tokenizer.save_pretrained(tmp_path / "generator")
    model = ScaleDownModel.from_backbones(str(tmp_path / "generator"), num_compressor_layers=2, slot_pooling="pointer")
    draw(model)
    model.save_pretrained(tmp_path / "saved", weights_format=weights_format)
    loaded = ScaleDownModel.from_pretrained(tmp_path / "saved")
    assert loaded.processor.pointer_window == model.config.pointer_window == 8
    expected, found = (m.eval().compress(QUESTIONS, DOCUMENTS) for m in (model, loaded))
    torch.testing.assert_close(found.memory_embeddings, expected.memory_embeddings)
    torch.testing.assert_close(found.reranking_scores, expected.reranking_scores)


def test_what_is_missing_is_named():
    model = build("modernbert")
    batch = chunks_of(model)
    windows = batch.pop("compressor_windows")
    with pytest.raises(ValueError, match="need compressor_windows"):
        model.get_memory_embeddings(**batch)
    with pytest.raises(ValueError, match=r"generator's token embeddings.*Two-stage"):
        model.compressor(*batch.values(), windows=windows)
    model.generator = None
    with pytest.raises(ValueError, match="without its generator"):
        model.get_memory_embeddings(**batch, compressor_windows=windows)


def test_settings_that_do_not_go_together_are_refused():
    assert build_config("n_layers", slot_pooling="pointer").pointer_window == 4  # no more than there are slots
    assert ScaleDownConfig().pointer_window is None
    with pytest.raises(ValueError, match=r"pointer_window=0 .* at least 1"):
        build_config("n_layers", slot_pooling="pointer", pointer_window=0)
    with pytest.raises(ValueError, match=r'pointer_window=4 is a setting of slot_pooling="pointer", not of'):
        build_config("n_layers", pointer_window=4)
    with pytest.raises(ValueError, match=r'compressor_prompt=.*slot_pooling="pointer"'):
        build_config(
            "modernbert", slot_pooling="pointer", compressor_prompt="{question}: {document}", compressor_max_length=64
        )
    with pytest.raises(ValueError, match=r"pointer_loss_weight=-1"):
        build_config("n_layers", slot_pooling="pointer", pointer_loss_weight=-1)
