"""The generator in 4 or 8 bits: what is quantized and what never is, through training, saving and loading."""

import json

import pytest
import torch
from combinations import combinations
from transformers import (
    AqlmConfig,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Trainer,
    TrainingArguments,
)

import quantization_scaledown
from folders import assert_same_outputs, from_backbones, load_silently, outputs, save_encoder, save_generator
from scaledown import ScaleDownModel
from scaledown.evaluation.arguments import EvaluationArguments
from scaledown.evaluation.contestants import load_contestants
from tiny import ANSWERS, DOCUMENTS, QUESTIONS, build_tokenizer, randomize_lora
from tiny import SHAPE as TINY

# Blocks of 64 values share a scale, so layers must not be smaller than that.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return save_generator(tmp_path_factory.mktemp("generator"), **SHAPE)


@pytest.fixture(scope="module", params=[4, 8])
def bits(request):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64) if request.param == 4 else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    try:
        layer.to("cpu")(torch.randn(2, 64))
    except Exception as error:
        pytest.skip(f"bitsandbytes cannot compute on this CPU: {error}")
    return request.param


def with_bits(names, *values, fast):
    """Combinations with the number of bits, which the fixture `bits` takes."""
    return pytest.mark.parametrize(("bits", *names), combinations((4, 8), *values, fast=fast), indirect=["bits"])


def quantized(bits):
    return {f"load_in_{bits}bit": True}


def built(generator, bits=None, lora=False, encoder=None, **kwargs):
    torch.manual_seed(0)
    model = from_backbones((generator, encoder), **(quantized(bits) if bits else {}), **kwargs)
    if lora:
        model.add_lora(r=2, lora_dropout=0.0)
        torch.manual_seed(1)
        randomize_lora(model)
    return model


def assert_quantized(model, bits):
    """All linear layers of the generator but its head, and nothing else."""
    kind = "Linear4bit" if bits == 4 else "Linear8bitLt"
    names = {name for name, module in model.named_modules() if type(module).__name__ == kind}
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("generator.model.") and "lora_" not in name
    }
    assert len(linear) == 14
    assert {name.removesuffix(".base_layer") for name in names} == {n.removesuffix(".base_layer") for n in linear}
    for name, parameter in model.named_parameters():
        if name.startswith("compressor.") or "lora_" in name:
            assert parameter.is_floating_point() and parameter.requires_grad, name
        else:
            assert not parameter.requires_grad, name


# -- without bitsandbytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_without_bitsandbytes_the_error_says_what_to_install(bits, generator, tmp_path, monkeypatch):
    built(generator).save_pretrained(tmp_path)
    monkeypatch.setattr(quantization_scaledown, "is_bitsandbytes_available", lambda: False)
    message = rf"load_in_{bits}bit needs bitsandbytes: pip install bitsandbytes"
    with pytest.raises(ImportError, match=message):
        built(generator, bits)
    with pytest.raises(ImportError, match=message):
        ScaleDownModel.from_pretrained(tmp_path, **quantized(bits))


def test_four_and_eight_bits_exclude_each_other(generator):
    with pytest.raises(ValueError, match="exclude each other"):
        from_backbones((generator, None), load_in_4bit=True, load_in_8bit=True)


# -- with bitsandbytes -------------------------------------------------------------------------------------------------


@with_bits(["compressor"], ("n_layers", "modernbert"), fast=[(4, "modernbert"), (8, "n_layers")])
def test_from_backbones(compressor, bits, generator, tmp_path):
    encoder = save_encoder(tmp_path) if compressor == "modernbert" else None
    model, whole = built(generator, bits, encoder=encoder), built(generator, encoder=encoder)
    assert_quantized(model, bits)
    own, expected = model.compressor.state_dict(), whole.compressor.state_dict()
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    # The right weights at the right places: what a layer does to the unit vectors is its matrix.
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        exact = whole.generator.get_submodule(name).weight
        with torch.no_grad():
            rounded = model.generator.get_submodule(name)(torch.eye(exact.shape[1])).T
        error = (rounded - exact).norm() / exact.norm()
        assert 0 < error < (0.15 if bits == 4 else 0.02)
    answers = model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=3, do_sample=False)
    assert all(isinstance(answer, str) for answer in answers)
    assert torch.isfinite(outputs(model)["logits"]).all()
    assert model.rank(QUESTIONS[2], DOCUMENTS[2]) == whole.rank(QUESTIONS[2], DOCUMENTS[2])


@with_bits(["weights_format", "lora"], ("full", "delta"), (False, True), fast=[(4, "delta", True), (8, "full", False)])
def test_from_pretrained(weights_format, lora, bits, generator, tmp_path):
    whole = built(generator, lora=lora)
    whole.save_pretrained(tmp_path, weights_format=weights_format)
    model = load_silently(tmp_path, **quantized(bits))
    assert_quantized(model, bits)
    state, expected = model.state_dict(), whole.state_dict()
    for name in expected:
        if name.startswith("compressor.") or "lora_" in name:
            assert torch.equal(state[name].float(), expected[name]), name
    if not lora:
        assert_same_outputs(model, outputs(built(generator, bits)))
    assert isinstance(model.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=3), str)


def test_other_quantizations_leave_the_compressor_out_too():
    settings = FineGrainedFP8Config(modules_to_not_convert=["o_proj"])
    spared = quantization_scaledown.spare_compressor(settings).modules_to_not_convert
    assert {"o_proj", "compressor", "lm_head"} < set(spared)
    assert settings.modules_to_not_convert == ["o_proj"]


def test_a_name_is_no_quantization(tmp_path):
    with pytest.raises(ValueError, match="quantization_config='4bit' must be settings of a quantization"):
        ScaleDownModel.from_backbones("org/name", quantization_config="4bit")


def test_a_quantization_that_cannot_leave_the_compressor_out_is_refused(generator, tmp_path):
    built(generator).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AqlmConfig cannot leave the compressor out"):
        ScaleDownModel.from_pretrained(tmp_path, quantization_config=AqlmConfig())


@with_bits(
    ["weights_format", "as_dictionary"], ("full", "delta"), (False, True), fast=[(4, "full", True), (8, "delta", False)]
)
def test_settings_of_a_users_own_concern_the_generator_alone(weights_format, as_dictionary, bits, generator, tmp_path):
    built(generator).save_pretrained(tmp_path, weights_format=weights_format)
    settings = BitsAndBytesConfig(**quantized(bits), bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["o_proj"])
    before = settings.to_dict()
    model = load_silently(tmp_path, quantization_config=before.copy() if as_dictionary else settings)
    kinds = {
        name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    left_whole = {name for name, kind in kinds.items() if kind == "Linear" and name.startswith("generator.model.")}
    assert left_whole == {f"generator.model.layers.{layer}.self_attn.o_proj" for layer in range(2)}
    assert {kind for name, kind in kinds.items() if name.startswith("compressor.")} == {"Linear", "RerankingHead"}
    assert isinstance(model.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=3), str)
    assert settings.to_dict() == before


def train(model, steps=8):
    """Losses of a few steps on one batch."""
    model.train()
    batch = model.processor(QUESTIONS, DOCUMENTS, ANSWERS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


@with_bits(["source"], ("from_backbones", "full", "delta"), fast=[(4, "from_backbones"), (8, "delta")])
def test_lora_trains_on_a_quantized_generator(source, bits, generator, tmp_path):
    if source == "from_backbones":
        model = built(generator, bits)
    else:
        built(generator).save_pretrained(tmp_path, weights_format=source)
        model = load_silently(tmp_path, **quantized(bits))
    model.add_lora(r=2, lora_dropout=0.0)
    assert_quantized(model, bits)
    Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path / "trainer"), report_to=[]))  # takes it
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0] - 0.5, losses
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert not torch.equal(before[name], parameter), name
        if name.startswith("generator.") and "lora_" not in name:
            assert torch.equal(before[name], parameter), name


@with_bits(
    ["source", "lora"],
    ("from_backbones", "full", "delta"),
    (False, True),
    fast=[(4, "from_backbones", True), (8, "delta", False)],
)
def test_a_quantized_model_is_saved_as_it_is(source, lora, bits, generator, tmp_path):
    if source == "from_backbones":
        model = built(generator, bits, lora=lora)
    else:
        built(generator, lora=lora).save_pretrained(tmp_path / "whole", weights_format=source)
        model = load_silently(tmp_path / "whole", **quantized(bits))
    expected = outputs(model)

    # A delta leaves the generator in its repository, so it says nothing of bits: who loads it chooses.
    model.save_pretrained(tmp_path / "delta", weights_format="delta")
    assert "quantization_config" not in json.loads((tmp_path / "delta" / "config.json").read_text())
    unquantized = load_silently(tmp_path / "delta")
    assert not any("bit" in type(module).__name__ for module in unquantized.modules())
    delta = load_silently(tmp_path / "delta", **quantized(bits))
    assert_quantized(delta, bits)

    model.save_pretrained(tmp_path / "full", weights_format="full")
    full = load_silently(tmp_path / "full")
    assert_quantized(full, bits)
    full.save_pretrained(tmp_path / "again", weights_format="full")  # what was read in few bits is saved once more
    again = load_silently(tmp_path / "again")
    assert_quantized(again, bits)
    for loaded in (delta, full, again):
        state = loaded.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name].to(tensor.dtype), tensor), name
        found = outputs(loaded)
        assert torch.equal(found["memory_embeddings"], expected["memory_embeddings"])
        if not lora:  # PEFT computes in other steps around layers that were quantized after it had wrapped them
            assert torch.equal(found["logits"], expected["logits"])


def test_a_model_stored_in_few_bits_is_evaluated_as_it_is(bits, generator, tmp_path):
    built(generator, bits, lora=True).save_pretrained(tmp_path)
    arguments = EvaluationArguments(model=str(tmp_path), data="unread.jsonl", baselines="full_text")
    found = load_contestants(arguments, torch.device("cpu"))
    assert found.model.config.lora_config is not None and found.adapters_off
    assert found.generator is found.model.generator
    assert_quantized(found.model, bits)


def test_lora_is_not_merged_into_a_quantized_generator(bits, generator, tmp_path):
    model = built(generator, bits, lora=True)
    with pytest.raises(ValueError, match="without rounding away what it learned"):
        model.merge_lora()
    model.save_pretrained(tmp_path, weights_format="delta")
    whole = load_silently(tmp_path)  # what the message advises
    whole.merge_lora()
    assert whole.config.lora_config is None


@with_bits(["weights_format"], ("full", "delta"), fast=[(4, "delta"), (8, "full")])
def test_a_generator_that_is_quantized_in_its_repository(weights_format, bits, generator, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(**quantized(bits))
    small = AutoModelForCausalLM.from_pretrained(generator, quantization_config=settings)
    small.save_pretrained(tmp_path / "generator")
    build_tokenizer().save_pretrained(tmp_path / "generator")
    model = built(tmp_path / "generator", encoder=save_encoder(tmp_path / "encoder"), lora=True)
    assert_quantized(model, bits)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "saved", weights_format=weights_format)
    loaded = load_silently(tmp_path / "saved")
    assert_quantized(loaded, bits)
    assert torch.allclose(outputs(loaded)["logits"], expected["logits"], atol=0.5)
    assert torch.equal(outputs(loaded)["memory_embeddings"], expected["memory_embeddings"])


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_four_bits_are_multiplied_in_the_type_asked_for(name, generator, tmp_path):
    pytest.importorskip("bitsandbytes")
    built(generator).save_pretrained(tmp_path)
    model = ScaleDownModel.from_pretrained(tmp_path, load_in_4bit=True, **{name: torch.float16})
    assert model.config.quantization_config.bnb_4bit_compute_dtype == torch.float16


def test_backbones_are_quantized_by_a_configuration_too(generator, bits, tmp_path):
    config = BitsAndBytesConfig(**quantized(bits))
    model = from_backbones((generator, None), quantization_config=config)
    assert_quantized(model, bits)
    model.save_pretrained(tmp_path)
    assert_quantized(ScaleDownModel.from_pretrained(tmp_path), bits)
    with pytest.raises(ValueError, match="exclude each other"):
        from_backbones((generator, None), quantization_config=config, **quantized(bits))


def test_experts_that_keep_their_size_are_pointed_out(tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = AutoConfig.for_model("qwen3_moe", **{**TINY, **SHAPE, **experts})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    ScaleDownModel.from_backbones(str(tmp_path), num_compressor_layers=1, load_in_4bit=True)
    assert "experts of qwen3_moe, most of its weights, are none: they keep their size" in caplog.text
