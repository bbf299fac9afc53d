"""What transformers' own tests check of any model: attention kinds, precision, initialization, embeddings, outputs."""

import copy
import inspect

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import ModelOutput

from scaledown import ScaleDownModel
from shortcuts_scaledown import CACHE_NAME
from tiny import ANSWERS, DOCUMENTS, ENCODERS, QUESTIONS, build_config, build_model, only, randomize_lora

KINDS = ["n_layers", "modernbert", "llm"]
SCORES = [[1.0, -0.5], None, [0.3, 2.0, -1.0]]


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """A folder with a saved model, and the model; read-only."""
    model = build_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model


def inference_batch(model) -> dict[str, torch.Tensor]:
    return dict(model.processor(QUESTIONS, DOCUMENTS))


def training_batch(model) -> dict[str, torch.Tensor]:
    return dict(model.processor(QUESTIONS, DOCUMENTS, ANSWERS, reranking_scores=SCORES))


def kept(tensor: torch.Tensor, batch: dict) -> torch.Tensor:
    return tensor[batch["attention_mask"].bool()]


def assert_close(actual, expected, tolerance: float = 1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -- attention --------------------------------------------------------------------------------------------------------


def attention_kinds(model) -> set[str]:
    return {part.config._attn_implementation for part in (model.compressor.backbone, model.generator)}


@torch.no_grad()
def test_eager_attention_equals_sdpa(saved):
    folder, _ = saved
    eager, sdpa = (
        ScaleDownModel.from_pretrained(folder, attn_implementation=kind).eval() for kind in ("eager", "sdpa")
    )
    assert attention_kinds(eager) == {"eager"}
    assert attention_kinds(sdpa) == {"sdpa"}
    batch = inference_batch(eager)
    first, second = eager(**batch), sdpa(**batch)
    assert_close(kept(first.logits, batch), kept(second.logits, batch))
    assert_close(first.memory_embeddings, second.memory_embeddings)
    assert_close(first.reranking_scores, second.reranking_scores)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_can_be_chosen_for_a_model_from_a_configuration_and_later(kind):
    model = build_model(kind)
    batch = inference_batch(model)
    expected = model(**batch).logits
    assert attention_kinds(model) == {"sdpa"}
    model.set_attn_implementation("eager")
    assert attention_kinds(model) == {"eager"}
    assert_close(kept(model(**batch).logits, batch), kept(expected, batch))
    built = AutoModel.from_config(build_config(kind), attn_implementation="eager")
    assert attention_kinds(built) == {"eager"}


@torch.no_grad()
def test_each_side_can_have_its_own_attention(saved):
    folder, model = saved
    chosen = {"generator_config": "eager", "compressor_config": "sdpa"}
    loaded = ScaleDownModel.from_pretrained(folder, attn_implementation=chosen)
    assert loaded.generator.config._attn_implementation == "eager"
    assert loaded.compressor.backbone.config._attn_implementation == "sdpa"
    batch = inference_batch(model)
    assert_close(kept(loaded(**batch).logits, batch), kept(model(**batch).logits, batch))


# -- gradient checkpointing -------------------------------------------------------------------------------------------


def first_linears(model) -> list[torch.nn.Module]:
    """The first linear layer within a layer of either side."""
    backbone = model.compressor.backbone
    layers = backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer
    sides = (layers[0], model.generator.model.layers[0])
    return [next(module for module in side.modules() if isinstance(module, torch.nn.Linear)) for side in sides]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize(("kind", "name"), [("n_layers", None), ("llm", None), *(("modernbert", n) for n in ENCODERS)])
def test_gradient_checkpointing_changes_nothing_but_memory(kind, name):
    model = randomize_lora(build_model(kind, compressor=name, lora=True)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = training_batch(model)

    def step() -> tuple[torch.Tensor, dict, list[int]]:
        calls = [0, 0]
        hooks = [
            layer.register_forward_pre_hook(lambda *_, side=side: calls.__setitem__(side, calls[side] + 1))
            for side, layer in enumerate(first_linears(model))
        ]
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        for hook in hooks:
            hook.remove()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), grads, calls

    expected_loss, expected, calls = step()
    assert calls == [1, 1]
    model.gradient_checkpointing_enable()
    loss, gradients, calls = step()
    # Both sides run their layers a second time on the way back.
    assert calls == [2, 2]
    assert_close(loss, expected_loss, 1e-6)
    assert gradients.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)
    model.gradient_checkpointing_disable()
    assert step()[2] == [1, 1]


# -- precision and devices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_loads_and_runs(saved, dtype):
    folder, model = saved
    half = ScaleDownModel.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    batch = training_batch(half)
    output, expected = half(**batch), model(**batch)
    assert output.logits.dtype == output.memory_embeddings.dtype == dtype
    assert float(output.loss) == pytest.approx(float(expected.loss), rel=0.1)
    difference = (kept(output.logits, batch).float() - kept(expected.logits, batch)).abs().mean()
    assert difference < 0.1 * kept(expected.logits, batch).abs().mean()
    answers = half.answer(QUESTIONS, DOCUMENTS, max_new_tokens=4, do_sample=False)
    assert [type(answer) for answer in answers] == [str] * 3
    scores = [result["score"] for result in half.rank(QUESTIONS[2], DOCUMENTS[2])]
    assert scores == sorted(scores, reverse=True)
    asked = [QUESTIONS[0]] * 2
    compressed = half.compress_documents(DOCUMENTS[0], asked)
    assert compressed.dtype == dtype
    route = half.generate_from_compressed_documents_and_questions(QUESTIONS[:1], compressed, max_new_tokens=4)
    assert route == half.answer(QUESTIONS[:1], DOCUMENTS[:1], max_new_tokens=4, do_sample=False)


def test_a_half_precision_model_learns(saved):
    folder, _ = saved
    model = ScaleDownModel.from_pretrained(folder, dtype=torch.bfloat16)
    model(**training_batch(model)).loss.backward()
    gradient = model.compressor.memory_embeddings.grad
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_sides_may_differ_in_precision(kind):
    """A compressor in 32 bits learns in front of a frozen generator in 16."""
    model = build_model(kind)
    model.generator.to(torch.bfloat16)
    batch = training_batch(model)
    output = model(**batch)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert model.compressor.memory_embeddings.grad.dtype == torch.float32
    assert isinstance(model.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=3), str)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"compressor": "cpu", "generator": "cpu"}, "auto"])
@torch.no_grad()
def test_a_device_map_is_followed(saved, device_map):
    folder, model = saved
    loaded = ScaleDownModel.from_pretrained(folder, device_map=device_map)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    batch = inference_batch(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    asked = {"max_new_tokens": 4, "do_sample": False}
    assert loaded.answer(QUESTIONS, DOCUMENTS, **asked) == model.answer(QUESTIONS, DOCUMENTS, **asked)


# -- initialization and modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_initialization_follows_the_seed_and_covers_every_parameter(kind):
    first, second, other = build_model(kind, seed=3), build_model(kind, seed=3), build_model(kind, seed=4)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        assert tensor.isfinite().all(), name
    compressor = first.compressor
    for parameter in (compressor.memory_embeddings, compressor.rerank_embedding):
        assert 0.1 < parameter.std() < 0.3
        assert abs(parameter.mean()) < 0.1
    assert torch.pdist(compressor.memory_embeddings).min() > 0.1
    assert not torch.equal(compressor.memory_embeddings, other.compressor.memory_embeddings)
    linears = [compressor.reranking_head] + ([] if kind == "n_layers" else [*compressor.projector[::2]])
    for linear in linears:
        assert 0.1 < linear.weight.std() < 0.3
        assert not linear.bias.any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_checkpoint_lacks_is_initialized(kind, tmp_path):
    """Memory that never was written would come back as whatever lay in memory before."""
    model = build_model(kind)
    lacking = ("memory_embeddings", "rerank_embedding", "reranking_head", "projector")
    state = {name: tensor for name, tensor in model.state_dict().items() if not any(part in name for part in lacking)}
    model.save_pretrained(tmp_path, state_dict=dict(state))
    loaded, report = ScaleDownModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(model.state_dict()) - set(state)
    for name in report["missing_keys"]:
        tensor = loaded.get_parameter(name)
        assert tensor.isfinite().all()
        assert not tensor.any() if name.endswith("bias") else 0.05 < tensor.std() < 0.4, name


def test_the_forward_pass_is_deterministic(any_model):
    batch = inference_batch(any_model)
    assert torch.equal(any_model(**batch).logits, any_model(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_reaches_both_sides_and_evaluation_mode_undoes_it(kind):
    model = build_model(kind)
    model.add_lora(r=4, lora_dropout=0.5)
    randomize_lora(model)
    batch = inference_batch(model)
    expected = model.eval()(**batch).logits
    model.train()
    assert model.compressor.backbone.training
    assert model.generator.training
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    assert torch.equal(model.eval()(**batch).logits, expected)


def test_a_loaded_model_is_in_evaluation_mode_with_the_generator_frozen(saved):
    folder, _ = saved
    model = ScaleDownModel.from_pretrained(folder)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.generator.parameters())
    assert all(parameter.requires_grad for parameter in model.compressor.parameters())


def test_a_copy_is_independent_and_equal(any_model):
    batch = inference_batch(any_model)
    other = copy.deepcopy(any_model)
    assert torch.equal(other(**batch).logits, any_model(**batch).logits)
    with torch.no_grad():
        other.compressor.memory_embeddings.zero_()
    assert any_model.compressor.memory_embeddings.any()


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_the_auto_classes_know_the_model(saved, auto_class):
    folder, model = saved
    assert type(auto_class.from_config(model.config)) is ScaleDownModel
    loaded = auto_class.from_pretrained(folder)
    assert type(loaded) is ScaleDownModel
    assert loaded.can_generate()
    batch = inference_batch(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert type(AutoConfig.from_pretrained(folder)) is type(loaded.config)


EXPECTED_KEYS = {
    "n_layers": set(),
    "modernbert": {"compressor.projector.0", "compressor.projector.2"},
    "llm": {"compressor.projector.0", "compressor.projector.2"},
}


def test_the_names_of_a_checkpoint_stay_as_they_are(any_model):
    """Renaming a module would make every published checkpoint unreadable."""
    names = set(any_model.state_dict())
    own = {name for name in names if not name.startswith(("compressor.backbone.", "generator."))}
    assert own == {
        "compressor.memory_embeddings",
        "compressor.rerank_embedding",
        "compressor.reranking_head.weight",
        "compressor.reranking_head.bias",
        *(f"{name}.{part}" for name in EXPECTED_KEYS[any_model.config.compressor_type] for part in ("weight", "bias")),
    }
    # Either side's names are those of its own architecture, so that its checkpoints can be read.
    for prefix, part in (("compressor.backbone.", any_model.compressor.backbone), ("generator.", any_model.generator)):
        assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == set(part.state_dict())


# -- embeddings -------------------------------------------------------------------------------------------------------


def test_embeddings_and_head_are_the_generators(any_model):
    assert any_model.get_input_embeddings() is any_model.generator.model.embed_tokens
    assert any_model.get_output_embeddings() is any_model.generator.lm_head
    assert any_model.get_decoder() is any_model.generator.model
    other = copy.deepcopy(any_model)
    embedding, head = torch.nn.Embedding(400, 32), torch.nn.Linear(32, 400, bias=False)
    other.set_input_embeddings(embedding)
    other.set_output_embeddings(head)
    assert other.generator.model.embed_tokens is embedding
    assert other.generator.lm_head is head
    assert other.compressor.backbone.get_input_embeddings() is not embedding


@pytest.mark.parametrize("generator", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_generators_vocabulary_can_grow(kind, generator, tmp_path):
    model = build_model(kind, generator=generator)
    batch = inference_batch(model)
    before = model(**batch)
    model.resize_token_embeddings(407)
    assert model.config.vocab_size == model.config.generator_config.vocab_size == 407
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (407, 32)
    # Only a compressor that copies the generator reads its vocabulary.
    own = 407 if kind == "n_layers" else 400
    assert model.compressor.backbone.get_input_embeddings().weight.shape[0] == own
    assert not any(parameter.requires_grad for parameter in model.generator.parameters())
    after = model(**batch)
    assert after.logits.shape[-1] == 407
    assert_close(kept(after.logits[..., :400], batch), kept(before.logits, batch))
    assert torch.equal(after.memory_embeddings, before.memory_embeddings)
    model.save_pretrained(tmp_path)
    assert torch.equal(ScaleDownModel.from_pretrained(tmp_path)(**batch).logits, after.logits)


@torch.no_grad()
def test_a_prompt_may_come_as_embeddings(any_model):
    batch = dict(any_model.processor(QUESTIONS))
    embeds = any_model.get_input_embeddings()(batch["input_ids"])
    output = any_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    assert torch.equal(output.logits, any_model(**batch).logits)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_tied_weights_stay_tied(name, tmp_path):
    model = build_model("n_layers", generator=name)
    model.save_pretrained(tmp_path)
    for one in (model, ScaleDownModel.from_pretrained(tmp_path)):
        assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert one.compressor.backbone.get_input_embeddings().weight is not one.get_input_embeddings().weight


# -- outputs ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_have_the_documented_shapes(any_model):
    batch = training_batch(any_model)
    output = any_model(**batch, output_hidden_states=True)
    num_chunks, length = len(batch["chunk_slots"]), batch["input_ids"].shape[1]
    assert isinstance(output, ModelOutput)
    assert output.loss.shape == output.generation_loss.shape == output.reranking_loss.shape == ()
    assert output.logits.shape == (3, length, 400)
    assert output.memory_embeddings.shape == (num_chunks, 4, 32)
    assert output.memory_mask.shape == (num_chunks, 4)
    assert output.reranking_scores.shape == (num_chunks,)
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, length, 32)] * 3
    assert output.attentions is None
    assert getattr(any_model(**batch, use_cache=False), CACHE_NAME) is None


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attentions_are_the_generators(kind):
    model = build_model(kind)
    model.set_attn_implementation("eager")
    batch = inference_batch(model)
    output = model(**batch, output_attentions=True)
    length = batch["input_ids"].shape[1]
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, length, length)] * 2
    sums = kept(output.attentions[0].sum(dim=-1).transpose(1, 2), batch)
    assert_close(sums, torch.ones_like(sums))


@torch.no_grad()
def test_a_tuple_holds_the_same_in_the_same_order(any_model):
    batch = training_batch(any_model)
    output = any_model(**batch)
    parts = any_model(**batch, return_dict=False)
    assert isinstance(parts, tuple)
    assert len(parts) == len(output.to_tuple()) == len([value for value in output.values() if value is not None])
    assert torch.equal(parts[0], output.loss)
    assert torch.equal(parts[list(output.keys()).index("logits")], output.logits)
    first = any_model(**inference_batch(any_model), return_dict=False)[0]
    assert torch.equal(first, any_model(**inference_batch(any_model)).logits)


def test_gradients_of_inner_states_can_be_retained(any_model):
    output = any_model(**training_batch(any_model), output_hidden_states=True)
    inner = [output.hidden_states[0], output.hidden_states[-1], output.memory_embeddings, output.reranking_scores]
    for tensor in inner:
        tensor.retain_grad()
    output.loss.backward()
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in inner)
    any_model.zero_grad(set_to_none=True)


def test_the_forward_pass_begins_with_input_ids_and_takes_all_the_processor_gives(any_model):
    names = list(inspect.signature(any_model.forward).parameters)
    assert names[:2] == ["input_ids", "attention_mask"]
    assert set(any_model.processor.model_input_names) <= set(names)
    assert any_model.main_input_name == "input_ids"


def test_a_batch_moves_to_a_device_and_keeps_its_integers(any_model):
    batch = any_model.processor(QUESTIONS, DOCUMENTS, ANSWERS, reranking_scores=SCORES).to("cpu", torch.bfloat16)
    assert batch["input_ids"].dtype == batch["chunk_slots"].dtype == torch.long
    assert batch["slot_mask"].dtype == torch.bool
    assert any_model(**only(batch, *list(batch))).loss.isfinite()
