"""The forward pass: slots and what fills them, padding, cache, losses, and who receives a gradient."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import pad

import modeling_scaledown
from reranking_scaledown import document_scores, reranking_loss
from scaledown import ScaleDownConfig, ScaleDownModel, ScaleDownProcessor
from shortcuts_scaledown import CACHE_NAME
from tiny import (
    ANSWERS,
    DOCUMENTS,
    GENERATORS,
    LEARNED_POSITIONS,
    QUESTIONS,
    build_config,
    build_model,
    build_tokenizer,
    only,
    randomize_lora,
)
from weights_scaledown import is_slow_on_cpu

PROMPT = ("input_ids", "attention_mask", "slot_mask")
CHUNKS = ("compressor_input_ids", "compressor_attention_mask", "chunk_slots")
SCORES = [[1.0, -0.5], None, [0.3, 2.0, -1.0]]
KINDS = ["n_layers", "modernbert", "llm"]


def training_batch(model, scores=SCORES) -> dict[str, torch.Tensor]:
    return dict(model.processor(QUESTIONS, DOCUMENTS, ANSWERS, reranking_scores=scores))


def memory_of(model, batch: dict) -> dict[str, torch.Tensor]:
    return only(model.get_memory_embeddings(**only(batch, *CHUNKS)), "memory_embeddings", "memory_mask")


def kept(tensor: torch.Tensor, batch: dict) -> torch.Tensor:
    """The rows of real tokens, one after another."""
    return tensor[batch["attention_mask"].bool()]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict, expected: dict):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


# -- slots ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_compressing_first_equals_all_in_one(any_model):
    batch = any_model.processor(QUESTIONS, DOCUMENTS)
    whole = any_model(**batch)
    memory = memory_of(any_model, batch)
    assert_close(any_model(**only(batch, *PROMPT), **memory).logits, whole.logits)
    flat = memory["memory_embeddings"][memory["memory_mask"]]
    assert_close(any_model(**only(batch, *PROMPT), memory_embeddings=flat).logits, whole.logits)
    assert_close(whole.memory_embeddings, memory["memory_embeddings"])
    assert whole.reranking_scores.shape == batch["chunk_slots"].shape


@torch.no_grad()
def test_slots_are_filled_in_the_order_of_the_chunks(any_model):
    """Against embeddings put together one by one, read by the generator itself."""
    batch = any_model.processor(QUESTIONS, DOCUMENTS)
    memory = memory_of(any_model, batch)
    embeds = any_model.generator.get_input_embeddings()(batch["input_ids"])
    vectors = [
        memory["memory_embeddings"][chunk, slot]
        for chunk, count in enumerate(batch["chunk_slots"].tolist())
        for slot in range(count)
    ]
    for row in range(len(QUESTIONS)):
        for column in range(embeds.shape[1]):
            if batch["slot_mask"][row, column]:
                embeds[row, column] = vectors.pop(0)
    assert not vectors
    expected = any_model.generator(
        inputs_embeds=embeds,
        attention_mask=batch["attention_mask"],
        position_ids=(batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0),
    )
    assert_close(kept(any_model(**batch).logits, batch), kept(expected.logits, batch))


@torch.no_grad()
def test_the_id_at_a_slot_means_nothing_and_the_memory_does(model):
    batch = model.processor(QUESTIONS, DOCUMENTS)
    expected = model(**batch).logits
    others = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["slot_mask"], 77)}
    assert torch.equal(model(**others).logits, expected)
    memory = memory_of(model, batch)
    changed = {**memory, "memory_embeddings": memory["memory_embeddings"] + 0.5}
    assert (model(**only(batch, *PROMPT), **changed).logits[:, -1] - expected[:, -1]).abs().max() > 0.1


def test_a_prompt_without_documents_is_the_generators_own(any_model):
    batch = any_model.processor(QUESTIONS)
    expected = any_model.generator(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    output = any_model(**batch)
    assert_close(kept(output.logits, batch), kept(expected.logits, batch))
    assert output.memory_embeddings is None


def test_slots_and_memory_must_match_in_number(model):
    batch = model.processor(QUESTIONS, DOCUMENTS)
    slots = int(batch["slot_mask"].sum())
    fewer = model.processor(QUESTIONS, DOCUMENTS, num_memory_tokens=1)
    with pytest.raises(ValueError, match=f"has {slots} slots but the documents 8 memory embeddings.*same compression"):
        model(**{**batch, "chunk_slots": fewer["chunk_slots"]})
    with pytest.raises(ValueError, match=f"marks {slots} slots but there is nothing to fill them"):
        model(**only(batch, *PROMPT))
    with pytest.raises(ValueError, match=f"has 0 slots but the documents {slots} memory embeddings"):
        model(**{name: tensor for name, tensor in batch.items() if name != "slot_mask"})
    for call in (model.generate, lambda **kwargs: model.generate(kwargs.pop("input_ids"), **kwargs)):
        with pytest.raises(ValueError, match=f"has 0 slots but the documents {slots} memory embeddings"):
            call(**{name: tensor for name, tensor in batch.items() if name != "slot_mask"}, max_new_tokens=2)
        with pytest.raises(ValueError, match=f"marks {slots} slots but there is nothing to fill them"):
            call(**only(batch, *PROMPT), max_new_tokens=2)


# -- padding and cache ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[*GENERATORS, *LEARNED_POSITIONS, "modernbert", "llm"])
def any_generator(request):
    """One model per generator architecture, and one per further kind of compressor; read-only."""
    if request.param in KINDS:
        return build_model(request.param)
    return build_model("n_layers", generator=request.param)


@torch.no_grad()
def test_a_ragged_batch_equals_its_examples_one_by_one(any_generator):
    questions, documents = [*QUESTIONS, "Alone?"], [*DOCUMENTS, []]
    processor = any_generator.processor
    batch = processor(questions, documents)
    assert (batch["attention_mask"] == 0).any()
    together = kept(any_generator(**batch).logits, batch)
    alone = [any_generator(**processor(q, d)).logits[0] for q, d in zip(questions, documents, strict=True)]
    assert_close(together, torch.cat(alone))


@torch.no_grad()
def test_padding_of_the_prompt_changes_nothing_on_either_side(any_generator):
    batch = any_generator.processor(QUESTIONS, DOCUMENTS)
    expected = kept(any_generator(**batch).logits, batch)
    memory = memory_of(any_generator, batch)
    length = batch["input_ids"].shape[1]

    def moved(name: str, left: bool) -> torch.Tensor:
        rows = []
        for row, keep in zip(batch[name], batch["attention_mask"].bool(), strict=True):
            gap = length + 5 - int(keep.sum())
            rows.append(pad(row[keep].long(), (gap, 0) if left else (0, gap), value=0))
        return torch.stack(rows).to(batch[name].dtype)

    for left in (True, False):
        prompt = {name: moved(name, left) for name in PROMPT}
        assert_close(kept(any_generator(**prompt, **memory).logits, prompt), expected)


@torch.no_grad()
def test_reading_step_by_step_equals_reading_at_once(any_generator):
    batch = dict(any_generator.processor(QUESTIONS, DOCUMENTS, ANSWERS))
    batch.pop("labels")
    whole = any_generator(**batch)
    # Left padding aligns the answers' ends: the shortest of them is in the last columns of every row.
    steps = min(int((row != -100).sum()) for row in any_generator.processor(QUESTIONS, DOCUMENTS, ANSWERS)["labels"])
    assert steps >= 3
    assert not batch["slot_mask"][:, -steps:].any()
    length = batch["input_ids"].shape[1]
    first = {name: batch[name][:, : length - steps] for name in PROMPT}
    output = any_generator(**first, **only(batch, *CHUNKS), use_cache=True)
    logits = [output.logits]
    for end in range(length - steps + 1, length + 1):
        output = any_generator(
            input_ids=batch["input_ids"][:, end - 1 : end],
            attention_mask=batch["attention_mask"][:, :end],
            **{CACHE_NAME: output[CACHE_NAME]},
            use_cache=True,
        )
        assert output.logits.shape[1] == 1
        logits.append(output.logits)
    assert_close(kept(torch.cat(logits, dim=1), batch), kept(whole.logits, batch))


# -- losses -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_losses_equal_those_computed_by_hand(any_model):
    batch = training_batch(any_model)
    output = any_model(**batch)

    logarithms = output.logits.log_softmax(dim=-1)
    terms = [
        -float(logarithms[row, column - 1, batch["labels"][row, column]])
        for row in range(batch["labels"].shape[0])
        for column in range(1, batch["labels"].shape[1])
        if batch["labels"][row, column] != -100
    ]
    assert len(terms) == sum(
        len(any_model.processor.tokenizer(a, add_special_tokens=False).input_ids) + 1 for a in ANSWERS
    )
    generation = sum(terms) / len(terms)
    assert output.generation_loss.item() == pytest.approx(generation, rel=1e-4)

    best: dict[int, float] = {}
    for chunk, document in enumerate(batch["chunk_to_document"].tolist()):
        best[document] = max(best.get(document, -math.inf), float(output.reranking_scores[chunk]))
    assert batch["chunk_to_document"].tolist().count(2) > 1
    scores = [best[i] for i in range(6)]
    first = (scores[0] - 1.0) ** 2 + (scores[1] + 0.5) ** 2
    third = (scores[3] - 0.3) ** 2 + (scores[4] - 2.0) ** 2 + (scores[5] + 1.0) ** 2
    reranking = (first + third) / 2
    assert output.reranking_loss.item() == pytest.approx(reranking, rel=1e-4)
    assert output.loss.item() == pytest.approx(generation + 0.05 * reranking, rel=1e-4)


def test_a_documents_score_is_that_of_its_best_chunk():
    chunks = torch.tensor([0.5, -3.0, -1.0, -2.0], requires_grad=True)
    scores = document_scores(chunks, torch.tensor([0, 1, 1, 1]), 2)
    assert scores.tolist() == [0.5, -1.0]
    scores.sum().backward()
    assert chunks.grad.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert document_scores(chunks.bfloat16(), torch.tensor([0, 1, 1, 1]), 2).dtype == torch.float32


def test_the_reranking_loss_sums_over_documents_and_averages_over_scored_questions():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    labels = torch.tensor([0.0, 0.0, math.nan, math.nan, 3.0])
    owners = torch.tensor([0, 0, 1, 1, 2])
    loss = reranking_loss(scores, labels, owners)
    assert loss.item() == (1 + 4 + 4) / 2
    loss.backward()
    assert scores.grad.tolist() == [1.0, 2.0, 0.0, 0.0, 2.0]
    assert reranking_loss(scores, labels, owners, num_scored_examples=6).item() == 1.5


def test_no_teacher_score_at_all_is_a_loss_of_zero_with_a_gradient_of_zero():
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = reranking_loss(scores, torch.full((2,), math.nan), torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 0.0
    assert scores.grad.tolist() == [0.0, 0.0]


def test_reranking_can_be_learned_without_answers(model):
    batch = dict(model.processor(QUESTIONS, DOCUMENTS, reranking_scores=SCORES))
    output = model(**batch)
    assert output.generation_loss is None
    assert output.loss.item() == pytest.approx(0.05 * output.reranking_loss.item())


def test_teacher_scores_must_match_the_documents(model):
    """A shape that merely broadcasts would be learned from without a word."""
    batch = training_batch(model)
    for shape in ((1,), (6, 1), (5,)):
        with pytest.raises(ValueError, match=r"reranking_labels has shape \(.*\) for 6 documents"):
            model(**{**batch, "reranking_labels": torch.ones(shape)})
    for name in ("chunk_to_document", "document_to_example"):
        with pytest.raises(ValueError, match="reranking_labels need chunk_to_document and document_to_example"):
            model(**{**batch, name: None})


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_zero_is_as_if_there_were_no_scores(kind):
    model = build_model(kind, reranking_loss_weight=0.0)
    batch = training_batch(model)
    with_scores = model(**batch)
    without = model(**{name: tensor for name, tensor in batch.items() if name != "reranking_labels"})
    assert torch.equal(with_scores.loss, without.loss)
    assert torch.equal(with_scores.loss.detach(), with_scores.generation_loss)
    assert without.reranking_loss is None
    assert with_scores.reranking_loss.item() > 0
    first, second = gradients(model, with_scores.loss), gradients(model, without.loss)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any("reranking_head" in name for name in first)


def test_the_weight_of_the_reranking_loss_counts():
    heavy, light = (build_model("n_layers", reranking_loss_weight=weight) for weight in (2.0, 0.5))
    batch = training_batch(heavy)
    first, second = heavy(**batch), light(**batch)
    assert (first.loss - second.loss).item() == pytest.approx(1.5 * first.reranking_loss.item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_batch(kind):
    model = build_model(kind)
    whole = training_batch(model)
    totals = {"num_items_in_batch": (whole["labels"] != -100).sum(), "num_scored_examples": 2}
    output = model(**whole)
    expected = gradients(model, output.loss)
    losses, summed = [], {}
    for part in (slice(0, 1), slice(1, 3)):
        batch = model.processor(QUESTIONS[part], DOCUMENTS[part], ANSWERS[part], reranking_scores=SCORES[part])
        loss = model(**batch, **totals).loss
        losses.append(loss.item())
        for name, gradient in gradients(model, loss).items():
            summed[name] = summed.get(name, 0) + gradient
    assert sum(losses) == pytest.approx(output.loss.item(), rel=1e-4)
    assert_same_gradients(summed, expected)


def test_the_loss_needs_only_the_logits_of_the_answer(model):
    batch = training_batch(model)
    whole = model(**batch)
    longest = int((batch["labels"] != -100).sum(dim=1).max())
    # The token before the answer predicts its first token.
    part = model(**batch, logits_to_keep=longest + 1)
    assert part.logits.shape == (3, longest + 1, 400)
    assert_close(part.logits, whole.logits[:, -longest - 1 :])
    assert_close(part.loss, whole.loss)
    assert_same_gradients(gradients(model, part.loss), gradients(model, model(**batch).loss))


def test_labels_go_with_the_last_positions_alone(model):
    with pytest.raises(ValueError, match="pass logits_to_keep as a number"):
        model(**training_batch(model), logits_to_keep=torch.tensor([3, 4]))


def test_documents_in_two_forms_are_refused(model):
    batch = model.processor(QUESTIONS, DOCUMENTS)
    out = model(**batch)
    twice = {"memory_embeddings": torch.zeros_like(out.memory_embeddings), "memory_mask": out.memory_mask}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="given twice, as compressor_input_ids and as memory_embeddings"):
            call(**batch, **twice)


def test_a_mask_of_slots_that_stays_short_of_the_prompt_is_refused(model):
    batch = training_batch(model)
    longer = pad(batch["input_ids"], (0, 2), value=5)
    with pytest.raises(ValueError, match=r"slot_mask has shape .* add as many False"):
        model(**{**batch, "input_ids": longer, "attention_mask": pad(batch["attention_mask"], (0, 2), value=1)})


@pytest.mark.parametrize("kind", KINDS)
def test_lora_around_every_linear_layer_keeps_the_scores_as_they_were(kind):
    model = build_model(kind)
    batch = training_batch(model)
    expected = model(**batch)
    extended = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert any("reranking_head.lora_A" in name for name, _ in extended.named_modules())
    output = extended.eval()(**batch)
    assert_close(output.reranking_scores, expected.reranking_scores)
    assert_close(output.loss, expected.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_gives_the_same_loss_about(kind):
    model = build_model(kind, lora=True)
    batch = training_batch(model)
    expected = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert output.loss.item() == pytest.approx(expected.item(), rel=0.1)
    assert all(gradient.isfinite().all() for gradient in gradients(model, output.loss).values())


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_should_learn_gets_a_gradient_and_nothing_else(kind):
    model = randomize_lora(build_model(kind, lora=True)).train()
    model(**training_batch(model)).loss.backward()
    lora = 0
    for name, parameter in model.named_parameters():
        if name.startswith("compressor.") or "lora_" in name:
            assert parameter.requires_grad, name
            assert parameter.grad.abs().max() > 0, name
            lora += "lora_" in name
        else:
            assert name.startswith("generator.")
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name
    # A and B of the seven linear layers of each of the two decoder layers; the head is none of them.
    assert lora == 2 * 7 * 2
    learned = {name for name, parameter in model.compressor.named_parameters() if parameter.requires_grad}
    assert {"memory_embeddings", "rerank_embedding", "reranking_head.weight", "reranking_head.bias"} <= learned
    assert any(name.startswith("projector.") for name in learned) == (kind != "n_layers")
    assert (model.compressor.memory_embeddings.grad.abs().amax(dim=1) > 0).all()


def test_the_answer_alone_teaches_the_compressor():
    """Gradients flow from the generator's loss through the slots, not only from the scores."""
    model = build_model("n_layers")
    model(**model.processor(QUESTIONS, DOCUMENTS, ANSWERS)).loss.backward()
    assert model.compressor.memory_embeddings.grad.abs().max() > 0
    assert model.compressor.backbone.layers[0].mlp.down_proj.weight.grad.abs().max() > 0
    assert model.compressor.rerank_embedding.grad is None or not model.compressor.rerank_embedding.grad.any()


@pytest.mark.parametrize("lora", [False, True])
def test_a_step_leaves_the_generators_own_weights_bit_by_bit(lora):
    model = build_model("n_layers", lora=lora).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(**training_batch(model)).loss.backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        frozen = name.startswith("generator.") and "lora_" not in name
        assert torch.equal(tensor, before[name]) == frozen, name


@pytest.mark.parametrize("generator", GENERATORS)
def test_compressor_and_generator_share_no_storage(generator):
    model = build_model("n_layers", generator=generator, lora=True)
    sides = {"compressor": set(), "generator": set()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        sides[name.split(".")[0]].add(tensor.untyped_storage().data_ptr())
    assert sides["compressor"].isdisjoint(sides["generator"])
    assert not any("lora_" in name for name, _ in model.compressor.named_parameters())
    modules = {id(module) for module in model.compressor.modules()}
    assert modules.isdisjoint(id(module) for module in model.generator.modules())


# -- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", GENERATORS)
@torch.no_grad()
def test_lora_starts_as_nothing_and_merges_without_a_trace(generator):
    model = build_model("n_layers", generator=generator)
    names, batch = set(model.state_dict()), model.processor(QUESTIONS, DOCUMENTS)
    plain = model(**batch).logits
    model.add_lora(r=4, lora_alpha=8)
    assert torch.equal(model.eval()(**batch).logits, plain)
    assert model.config.lora_config["target_modules"] == "all-linear"
    adapted = randomize_lora(model)(**batch).logits
    assert (adapted - plain).abs().max() > 0.1
    model.merge_lora()
    assert_close(model(**batch).logits, adapted)
    assert set(model.state_dict()) == names
    assert model.config.lora_config is None
    assert not any(parameter.requires_grad for parameter in model.generator.parameters())
    model.merge_lora()  # nothing left to do
    model.add_lora(r=2)
    assert_close(model.eval()(**batch).logits, adapted)


def test_lora_over_lora_is_refused():
    model = build_model("n_layers", lora=True)
    with pytest.raises(ValueError, match=r"has LoRA layers already; call merge_lora\(\)"):
        model.add_lora()


@pytest.mark.parametrize("setting", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}])
def test_lora_that_would_train_the_generators_own_weights_is_refused(setting):
    with pytest.raises(ValueError, match="would train the generator's own weights"):
        build_model("n_layers").add_lora(**setting)


def test_a_configuration_with_lora_builds_it():
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    model = build_model("n_layers", lora_config=settings)
    names = [name for name, parameter in model.generator.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * 2
    assert all("lora_" in name for name in names)
    zeros = [parameter for name, parameter in model.generator.named_parameters() if "lora_B" in name]
    assert not any(parameter.any() for parameter in zeros)


# -- building ---------------------------------------------------------------------------------------------------------


def test_a_model_needs_a_generator_configuration():
    with pytest.raises(ValueError, match=r"has no generator_config.*from_backbones"):
        ScaleDownModel(ScaleDownConfig())


def test_a_compressor_alone_compresses_and_ranks_and_says_that_it_cannot_answer(any_model):
    alone = ScaleDownModel(any_model.config, with_generator=False).eval()
    alone.load_state_dict(any_model.state_dict(), strict=False)
    alone.processor = any_model.processor
    assert not any(name.startswith("generator") for name in alone.state_dict())
    assert_close(alone.compress(QUESTIONS, DOCUMENTS).memory_embeddings, any_model.compress(QUESTIONS, DOCUMENTS)[0])
    assert (
        alone.rank(QUESTIONS[2], DOCUMENTS[2])[0]["corpus_id"]
        == any_model.rank(QUESTIONS[2], DOCUMENTS[2])[0]["corpus_id"]
    )
    with pytest.raises(ValueError, match="loaded without its generator; it can compress and rank, not answer"):
        alone.answer(QUESTIONS[0], DOCUMENTS[0])


def test_a_model_without_a_processor_says_how_to_get_one():
    model = ScaleDownModel(build_config("n_layers"))
    with pytest.raises(ValueError, match=r"has no processor.*ScaleDownProcessor\.from_config"):
        model.answer(QUESTIONS[0], DOCUMENTS[0])


def test_a_processor_that_asks_for_more_memory_than_there_is_is_refused(model):
    processor = ScaleDownProcessor(build_tokenizer(), num_memory_tokens=5)
    with pytest.raises(ValueError, match="allows 5 slots per chunk, the model has 4"):
        model.processor = processor


@pytest.mark.parametrize("kind", ["n_layers", "modernbert"])
def test_new_tokens_reach_a_compressor_with_the_same_tokenizer(kind, tmp_path):
    model = build_model(kind)
    before = model.compressor.backbone.get_input_embeddings().weight.shape[0]
    model.processor.tokenizer.add_tokens(["wheatear"])
    if kind == "n_layers":
        model.processor.compressor_tokenizer.add_tokens(["wheatear"])
    size = len(model.processor.tokenizer)
    model.resize_token_embeddings(size)
    own = model.compressor.backbone.get_input_embeddings().weight
    assert own.shape[0] == (size if kind == "n_layers" else before)
    if kind == "n_layers":
        assert torch.equal(own[400:], model.get_input_embeddings().weight[400:])
    expected = model.rank("What is a wheatear?", ["A wheatear is a bird.", "A crane lifts."])
    model.save_pretrained(tmp_path)
    loaded = ScaleDownModel.from_pretrained(tmp_path)
    assert loaded.rank("What is a wheatear?", ["A wheatear is a bird.", "A crane lifts."]) == expected


def test_sixteen_bits_on_a_cpu_that_has_none_are_told(monkeypatch):
    warnings = []
    monkeypatch.setattr(modeling_scaledown.logger, "warning_once", warnings.append)
    for slow in (False, True):
        monkeypatch.setattr(modeling_scaledown, "is_slow_on_cpu", lambda dtype, slow=slow: slow)
        model = build_model("n_layers").to(torch.bfloat16)
        model(**model.processor(QUESTIONS, DOCUMENTS))
        model.rank(QUESTIONS[0], DOCUMENTS[0])
        assert all("bfloat16 on a CPU" in warning for warning in warnings)
        assert bool(warnings) == slow
    monkeypatch.setattr("weights_scaledown.platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert is_slow_on_cpu(torch.bfloat16)
    assert not is_slow_on_cpu(torch.float32)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    assert not is_slow_on_cpu(torch.bfloat16)
