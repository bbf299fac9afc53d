"""Save, load, save again: whole models and deltas, bit for bit."""

import copy
import json
import logging
import os
import re
import shutil

import pytest
import torch
from combinations import combinations
from huggingface_hub import ModelCard
from jinja2 import UndefinedError
from jinja2.sandbox import SecurityError
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from card_scaledown import _plain_config, write_card
from folders import (
    CODE,
    assert_same_outputs,
    files,
    from_backbones,
    load_silently,
    outputs,
    save_backbones,
    save_generator,
    silence,
)
from scaledown import ScaleDownModel, ScaleDownProcessor
from tiny import (
    ANSWERS,
    DOCUMENTS,
    ENCODERS,
    GENERATORS,
    QUESTIONS,
    SHAPE,
    build_model,
    build_tokenizer,
    randomize_lora,
)

KINDS = ("n_layers", "modernbert", "llm")
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
SAVED = (
    CODE
    | TOKENIZER
    | {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    | {"README.md", "model_card.md"}
)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return save_backbones(tmp_path_factory.mktemp("backbones"))


def prepared(model, lora):
    """The model with unmerged, merged or no LoRA layers that have an effect."""
    if lora != "none":
        model.add_lora(r=4, lora_alpha=8)
        randomize_lora(model)
    if lora == "merged":
        model.merge_lora()
    return model


def tensor_names(folder, name="model.safetensors"):
    with safe_open(folder / name, framework="pt") as file:
        return set(file.keys())


def flip(folder, name, file="model.safetensors"):
    """Changes one tensor of a checkpoint."""
    tensors = load_file(folder / file)
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / file, metadata={"format": "pt"})


# -- whole models ------------------------------------------------------------------------------------------------------


LORA = ("none", "unmerged", "merged")
ROUND_TRIPS = [*(("n_layers", lora) for lora in LORA), ("modernbert", "unmerged"), ("llm", "none")]


@pytest.mark.parametrize(("kind", "lora"), combinations(KINDS, LORA, fast=ROUND_TRIPS))
def test_full_round_trip(kind, lora, tmp_path):
    model = prepared(build_model(kind), lora)
    expected = outputs(model)
    model.save_pretrained(tmp_path)

    loaded = load_silently(tmp_path)
    assert_same_outputs(loaded, expected)
    assert tensor_names(tmp_path) == set(model.state_dict()) == set(loaded.state_dict())
    assert not loaded.training
    assert (loaded.config.lora_config is None) == (lora != "unmerged")
    assert any("lora_" in name for name in tensor_names(tmp_path)) == (lora == "unmerged")
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad == (not name.startswith("generator.") or "lora_" in name), name


@pytest.mark.parametrize("generator", sorted(set(GENERATORS) - {"llama"}))
def test_full_round_trip_of_every_generator(generator, tmp_path):
    """Among them gemma, whose embeddings are multiplied by a buffer that is in no checkpoint."""
    model = build_model(generator=generator)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    assert_same_outputs(load_silently(tmp_path), expected)


@pytest.mark.parametrize("encoder", sorted(set(ENCODERS) - {"modernbert"}))
def test_full_round_trip_of_every_encoder(encoder, tmp_path):
    model = build_model("modernbert", compressor=encoder)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    assert_same_outputs(load_silently(tmp_path), expected)


def test_lora_layers_of_a_model_in_evaluation_mode_drop_nothing():
    model = build_model()
    model.add_lora(r=4, lora_dropout=0.5)
    randomize_lora(model)
    assert_same_outputs(model, outputs(model))


@pytest.mark.parametrize(
    ("generator", "lora"),
    combinations(("llama", "gemma"), LORA, fast=[("llama", "none"), ("llama", "merged"), ("gemma", "unmerged")]),
)
def test_tied_embeddings_are_saved_once_and_tied_again(generator, lora, tmp_path):
    backbones = (save_generator(tmp_path / "generator", generator, tie_word_embeddings=True), None)
    assert "lm_head.weight" not in tensor_names(tmp_path / "generator")
    model = prepared(from_backbones(backbones), lora)
    expected = outputs(model)
    for weights_format in ("full",) if lora == "merged" else ("full", "delta"):
        folder = tmp_path / weights_format
        model.save_pretrained(folder, weights_format=weights_format)
        assert "generator.lm_head.weight" not in tensor_names(folder)
        loaded = load_silently(folder)
        assert_same_outputs(loaded, expected)
        head, embeddings = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
        assert head.data_ptr() == embeddings.data_ptr()
        assert loaded.all_tied_weights_keys == model.all_tied_weights_keys != {}
        for again in {"full", weights_format}:
            loaded.save_pretrained(tmp_path / "again", weights_format=again)
            assert tensor_names(tmp_path / "again") == tensor_names(tmp_path / again)
            assert_same_outputs(load_silently(tmp_path / "again"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_saved_model(kind, tmp_path):
    build_model(kind).save_pretrained(tmp_path)
    pair = TOKENIZER - {"chat_template.jinja"} if kind == "modernbert" else TOKENIZER
    assert files(tmp_path) == SAVED | {f"compressor_tokenizer/{name}" for name in pair}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_scaledown.ScaleDownConfig",
        "AutoModel": "modeling_scaledown.ScaleDownModel",
        "AutoModelForCausalLM": "modeling_scaledown.ScaleDownModel",
        "AutoProcessor": "processing_scaledown.ScaleDownProcessor",
    }


def test_shards(tmp_path):
    model = build_model("modernbert", lora=True)
    randomize_lora(model)
    expected = outputs(model)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "model.safetensors.index.json").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_outputs(load_silently(tmp_path), expected)


@pytest.mark.parametrize("sizes", [("5GB", "60KB"), ("60KB", "5GB"), ("40KB", "60KB"), ("5GB", "5GB")])
def test_saving_twice_into_one_folder_leaves_the_second(sizes, tmp_path):
    """Whichever way either was sharded: transformers would load a stale model.safetensors in place of new shards."""
    model = build_model()
    model.save_pretrained(tmp_path, max_shard_size=sizes[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    expected = outputs(model)
    model.save_pretrained(tmp_path, max_shard_size=sizes[1])
    assert_same_outputs(load_silently(tmp_path), expected)
    fresh = tmp_path.with_name(tmp_path.name + "-fresh")
    model.save_pretrained(fresh, max_shard_size=sizes[1])
    assert files(tmp_path) == files(fresh)


@pytest.mark.parametrize("weights_format", ["full", "delta"])
def test_a_loaded_model_saves_the_same_again(weights_format, backbones, tmp_path):
    model = prepared(from_backbones(backbones["modernbert"], weights_format=weights_format), "unmerged")
    model.save_pretrained(tmp_path / "first")
    loaded = load_silently(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert files(tmp_path / "first") == files(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert_same_outputs(load_silently(tmp_path / "second"), outputs(model))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    for config in configs:  # transformers notes there where each backbone was loaded from
        for part in ("generator_config", "compressor_config"):
            config[part].pop("_name_or_path", None), config[part].pop("dtype", None)
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    combinations(
        KINDS,
        (torch.bfloat16, torch.float16),
        fast=[("n_layers", torch.bfloat16), ("modernbert", torch.float16), ("llm", torch.bfloat16)],
    ),
)
def test_half_precision_round_trip(kind, dtype, backbones, tmp_path):
    model = from_backbones(backbones[kind], dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    loaded = load_silently(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_same_outputs(loaded, expected)
    wide = load_silently(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}


def test_half_precision_delta(backbones, tmp_path):
    model = prepared(from_backbones(backbones["n_layers"], dtype=torch.bfloat16), "unmerged")
    expected = outputs(model)
    model.save_pretrained(tmp_path, weights_format="delta")
    loaded = load_silently(tmp_path)
    assert loaded.generator.dtype == torch.bfloat16
    assert_same_outputs(loaded, expected)


@pytest.mark.parametrize(
    ("device_map", "weights_format"),
    combinations(({"": "cpu"}, "auto"), ("full", "delta"), fast=[({"": "cpu"}, "full"), ("auto", "delta")]),
)
def test_device_map(device_map, weights_format, backbones, tmp_path):
    pytest.importorskip("accelerate")
    model = prepared(from_backbones(backbones["llm"]), "unmerged")
    expected = outputs(model)
    model.save_pretrained(tmp_path, weights_format=weights_format)
    loaded = load_silently(tmp_path, device_map=device_map)
    assert_same_outputs(loaded, expected)
    built = from_backbones(backbones["llm"], device_map=device_map)
    assert {parameter.device.type for parameter in built.parameters()} == {"cpu"}
    assert torch.isfinite(outputs(built)["logits"]).all()


@pytest.mark.parametrize("weights_format", ["full", "delta"])
def test_device_map_by_part(weights_format, backbones, tmp_path):
    pytest.importorskip("accelerate")
    model = prepared(from_backbones(backbones["llm"]), "unmerged")
    expected = outputs(model)
    model.save_pretrained(tmp_path, weights_format=weights_format)
    parts = {"compressor": "cpu", "generator.model": "cpu", "generator.lm_head": "cpu"}
    assert_same_outputs(load_silently(tmp_path, device_map=parts), expected)


@pytest.mark.parametrize(
    ("whole", "dtype"),
    combinations((True, False), (torch.float32, torch.bfloat16), fast=[(True, torch.float32), (False, torch.bfloat16)]),
)
def test_a_delta_stores_no_embeddings_that_are_still_the_generators(whole, dtype, backbones, tmp_path):
    model = prepared(from_backbones(backbones["n_layers"], dtype=dtype), "unmerged")
    model.save_pretrained(tmp_path / "delta", weights_format="delta")
    saved = load_file(tmp_path / "delta" / "model.safetensors")
    assert not any("embed_tokens" in name for name in saved)
    assert any(name.startswith("compressor.backbone.layers.0.") for name in saved)
    loaded = load_silently(tmp_path / "delta", with_generator=whole)
    expected = model.compress(QUESTIONS, DOCUMENTS)
    assert torch.equal(loaded.compress(QUESTIONS, DOCUMENTS).memory_embeddings, expected.memory_embeddings)
    with torch.no_grad():
        model.compressor.backbone.get_input_embeddings().weight[5] += 1
    model.save_pretrained(tmp_path / "learned", weights_format="delta")
    assert "compressor.backbone.embed_tokens.weight" in load_file(tmp_path / "learned" / "model.safetensors")


@pytest.mark.parametrize("weights_format", ["full", "delta"])
def test_attention_implementation_reaches_both_sides(weights_format, backbones, tmp_path):
    from_backbones(backbones["n_layers"]).save_pretrained(tmp_path, weights_format=weights_format)
    loaded = load_silently(tmp_path, attn_implementation="eager")
    for part in (loaded.compressor.backbone, loaded.generator):
        assert part.config._attn_implementation == "eager"


@pytest.mark.parametrize("weights_format", ["full", "delta"])
def test_a_compressor_alone_is_loaded_without_the_generator(weights_format, backbones, tmp_path):
    generator = shutil.copytree(backbones["n_layers"][0], tmp_path / "generator")
    model = prepared(from_backbones((generator, None)), "unmerged")
    with torch.no_grad():  # embeddings that have learned are the compressor's own
        model.compressor.backbone.get_input_embeddings().weight[5] += 1
    model.save_pretrained(tmp_path / "model", weights_format=weights_format)
    os.remove(generator / "model.safetensors")
    loaded = load_silently(tmp_path / "model", with_generator=False)
    assert loaded.generator is None
    expected = model.compress(QUESTIONS, DOCUMENTS)
    assert torch.equal(loaded.compress(QUESTIONS, DOCUMENTS).memory_embeddings, expected.memory_embeddings)
    loaded.optimize_for_inference(cache_entries=8)
    assert loaded.rank(QUESTIONS[0], DOCUMENTS[0]) == model.rank(QUESTIONS[0], DOCUMENTS[0])
    for change in (loaded.add_lora, loaded.merge_lora):
        with pytest.raises(ValueError, match="loaded without its generator"):
            change()
    with pytest.raises(ValueError, match="without its generator, so it cannot be saved"):
        loaded.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_pickled_weights_are_not_read(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ScaleDownModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["added", "removed", "rank"])
def test_lora_weights_that_do_not_match_the_configuration_are_an_error(change, tmp_path):
    """transformers says nothing of LoRA weights that are missing, and leaves their memory as it finds it."""
    model = build_model(lora=change != "added")
    model.save_pretrained(tmp_path)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    if change == "removed":
        tensors = load_file(tmp_path / "model.safetensors")
        lost = next(name for name in tensors if "lora_B" in name)
        save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    if change == "rank":
        settings["r"] = 5
    with pytest.raises((ValueError, RuntimeError), match=r"LoRA tensors|mismatch"):
        ScaleDownModel.from_pretrained(tmp_path, lora_config=settings)


# -- deltas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lora"), combinations(KINDS, LORA[:2], fast=[r for r in ROUND_TRIPS if r[1] != "merged"])
)
def test_delta_round_trip(kind, lora, backbones, tmp_path):
    model = prepared(from_backbones(backbones[kind]), lora)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "delta", weights_format="delta")
    model.save_pretrained(tmp_path / "full", weights_format="full")
    assert model.config.weights_format == "full"  # saving changes nothing about the model

    names = tensor_names(tmp_path / "delta")
    own = {name for name in model.state_dict() if name.startswith("compressor.") or "lora_" in name}
    still_the_generators = {"compressor.backbone.embed_tokens.weight"} if kind == "n_layers" else set()
    assert names == own - still_the_generators
    assert files(tmp_path / "delta") == files(tmp_path / "full")
    assert json.loads((tmp_path / "delta" / "config.json").read_text())["weights_format"] == "delta"
    delta, full = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("delta", "full"))
    generator = (backbones[kind][0] / "model.safetensors").stat().st_size
    assert delta < full - 0.95 * generator

    loaded = load_silently(tmp_path / "delta")
    assert_same_outputs(loaded, expected)
    assert loaded.config.weights_format == "delta"
    assert not loaded.training and not loaded.generator.training
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad == (not name.startswith("generator.") or "lora_" in name), name


@pytest.mark.parametrize(
    "generator", combinations(sorted(set(GENERATORS) - {"llama"}), fast=[("gemma",), ("gemma3",), ("phi3",)])
)
def test_delta_of_every_generator(generator, tmp_path):
    model = from_backbones((save_generator(tmp_path / "generator", generator), None))
    expected = outputs(model)
    model.save_pretrained(tmp_path / "delta", weights_format="delta")
    assert_same_outputs(load_silently(tmp_path / "delta"), expected)


def test_a_delta_becomes_a_whole_model(backbones, tmp_path):
    model = prepared(from_backbones(backbones["n_layers"], weights_format="delta"), "unmerged")
    model.save_pretrained(tmp_path / "delta")
    loaded = load_silently(tmp_path / "delta")
    expected = outputs(loaded)
    loaded.save_pretrained(tmp_path / "full", weights_format="full")
    assert loaded.config.weights_format == "delta"
    assert_same_outputs(load_silently(tmp_path / "full"), expected)
    loaded.merge_lora()
    expected = outputs(loaded)
    loaded.save_pretrained(tmp_path / "merged")
    merged = load_silently(tmp_path / "merged")
    assert merged.config.weights_format == "full"
    assert_same_outputs(merged, expected)


def test_a_delta_from_shards_onto_shards(tmp_path):
    generator = save_generator(tmp_path / "generator", shards="60KB")
    model = prepared(from_backbones((generator, None)), "unmerged")
    expected = outputs(model)
    model.save_pretrained(tmp_path / "delta", weights_format="delta", max_shard_size="30KB")
    assert (tmp_path / "delta" / "model.safetensors.index.json").is_file()
    assert_same_outputs(load_silently(tmp_path / "delta"), expected)


def test_a_delta_notices_that_the_generator_changed(backbones, tmp_path):
    generator = shutil.copytree(backbones["n_layers"][0], tmp_path / "generator")
    from_backbones((generator, None)).save_pretrained(tmp_path / "delta", weights_format="delta")
    load_silently(tmp_path / "delta")
    flip(generator, "model.layers.1.input_layernorm.weight")
    with pytest.raises(ValueError, match=r"delta on top of .*generator.*weights found there are others.*Restore"):
        ScaleDownModel.from_pretrained(tmp_path / "delta")


def test_a_delta_notices_lora_weights_that_are_missing(backbones, tmp_path):
    prepared(from_backbones(backbones["n_layers"]), "unmerged").save_pretrained(tmp_path, weights_format="delta")
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if "lora_B" in name)
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"holds 27 LoRA tensors, lora_config asks for 28"):
        ScaleDownModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("reason", ["unknown", "merged", "trainable", "nonsense"])
def test_delta_refuses(reason, backbones, tmp_path):
    weights_format, message = "delta", "still the one of its repository"
    model = build_model() if reason == "unknown" else from_backbones(backbones["n_layers"])
    if reason == "merged":
        prepared(model, "merged")
    if reason == "trainable":
        model.get_input_embeddings().weight.requires_grad_(True)
        message = r"1 of them are trainable \(model.embed_tokens.weight"
    if reason == "nonsense":
        weights_format, message = "quarter", "weights_format='quarter' is unknown"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "saved", weights_format=weights_format)
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved")  # a refusal leaves the model as it was
    assert load_silently(tmp_path / "saved").config.weights_format == "full"


def test_delta_refuses_a_generator_that_was_changed_before_it_was_saved_whole(backbones, tmp_path):
    model = from_backbones(backbones["n_layers"])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path / "whole")
    loaded = load_silently(tmp_path / "whole")
    with pytest.raises(ValueError, match="still the one of its repository"):
        loaded.save_pretrained(tmp_path / "delta", weights_format="delta")


def test_delta_refuses_a_generator_that_was_changed_after_it_was_loaded_whole(backbones, tmp_path):
    from_backbones(backbones["n_layers"]).save_pretrained(tmp_path / "whole")
    loaded = load_silently(tmp_path / "whole")
    loaded.save_pretrained(tmp_path / "delta", weights_format="delta")
    with torch.no_grad():
        loaded.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"are not those of .* any more \(model.embed_tokens.weight"):
        loaded.save_pretrained(tmp_path / "delta", weights_format="delta")


CHANGES = {
    "scaled": lambda weight: weight.mul_(1.008),
    "one value": lambda weight: weight[5, 7].add_(1e-3),
    "rows exchanged": lambda weight: weight.copy_(weight.flip(0)),
    # Columns 1 and 2 of two rows, between the values that are kept.
    "two values exchanged": lambda weight: weight.__setitem__(([5, 9], [1, 2]), weight[[9, 5], [2, 1]]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_refuses_the_smallest_change(change, dtype, backbones, tmp_path):
    model = from_backbones(backbones["n_layers"], dtype=dtype)
    weight = model.generator.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        CHANGES[change](weight)
    with pytest.raises(ValueError, match=r"1 of them are not those of .* any more \(model.layers.1.mlp.up_proj.weight"):
        model.save_pretrained(tmp_path, weights_format="delta")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_delta_takes_a_generator_in_another_type(dtype, backbones, tmp_path):
    model = from_backbones(backbones["n_layers"]).to(dtype)
    model.save_pretrained(tmp_path, weights_format="delta")
    loaded = load_silently(tmp_path).generator.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.generator.state_dict().items())


def test_a_delta_whose_generator_moved_is_told_where_it_is(backbones, tmp_path, caplog):
    generator = shutil.copytree(backbones["n_layers"][0], tmp_path / "generator")
    model = from_backbones((generator, None))
    logger = logging.getLogger("checkpoint_scaledown")
    logger.addHandler(caplog.handler)
    model.save_pretrained(tmp_path / "delta", weights_format="delta")
    logger.removeHandler(caplog.handler)
    assert f"reads its generator from {generator}" in caplog.text
    moved = generator.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{generator}, which is not there.*generator_name_or_path="):
        ScaleDownModel.from_pretrained(tmp_path / "delta")
    for load in (ScaleDownModel, AutoModel):
        for given in (str(moved), moved):
            found = load.from_pretrained(tmp_path / "delta", generator_name_or_path=given)
            assert_same_outputs(found, outputs(model))
            assert found.config.generator_name_or_path == str(moved)


def test_delta_has_no_variants(backbones, tmp_path):
    with pytest.raises(ValueError, match="variant='fp16' goes with weights_format=\"full\""):
        from_backbones(backbones["n_layers"]).save_pretrained(tmp_path / "x", weights_format="delta", variant="fp16")
    assert not (tmp_path / "x").exists()


def test_merging_lora_makes_a_delta_model_whole(backbones, tmp_path):
    model = prepared(from_backbones(backbones["n_layers"], weights_format="delta"), "unmerged")
    before = outputs(model)["logits"]
    model.merge_lora()
    assert model.config.weights_format == "full"
    assert torch.allclose(outputs(model)["logits"], before, atol=1e-4)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    assert_same_outputs(load_silently(tmp_path), expected)


# -- what is saved beside the weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_processor_and_both_tokenizers_round_trip(kind, tmp_path):
    model = build_model(kind)
    model.save_pretrained(tmp_path)
    with silence():
        loaded = ScaleDownProcessor.from_pretrained(tmp_path)
    scores = [[0.5] * len(listed) for listed in DOCUMENTS]
    for arguments in ((QUESTIONS, DOCUMENTS), (QUESTIONS, DOCUMENTS, ANSWERS, scores), (QUESTIONS,)):
        expected, batch = model.processor(*arguments), loaded(*arguments)
        assert expected.keys() == batch.keys()
        assert all(torch.equal(expected[name], batch[name]) for name in expected)
    hostile = ["</s><|user|>[SEP] [CLS]<s>"]
    expected, batch = model.processor("Who?", hostile), loaded("Who?", hostile)
    assert all(torch.equal(expected[name], batch[name]) for name in expected)
    for name in ("num_memory_tokens", "compression_rate", "chunk_length", "max_query_length", "max_prompt_length"):
        assert getattr(loaded, name) == getattr(model.processor, name)
    for name in ("system_prompt", "user_prompt", "closed_book_prompt", "document_separator"):
        assert getattr(loaded, name) == getattr(model.processor, name)


def test_settings_of_a_saved_processor_reach_every_way_of_loading(tmp_path):
    model = build_model("n_layers")
    model.processor.compression_rate = 2 * model.config.compression_rate
    model.save_pretrained(tmp_path)
    for loaded in (load_silently(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert loaded.processor.compression_rate == model.processor.compression_rate
    config = copy.deepcopy(model.config)
    config.compression_rate = 3
    assert AutoModel.from_pretrained(tmp_path, config=config).processor.compression_rate == 3


def test_auto_tokenizer_of_the_folder_is_the_generators(tmp_path):
    build_model("modernbert").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab() != build_tokenizer(pair=True).get_vocab()
    assert tokenizer.chat_template == build_tokenizer().chat_template
    compressor = AutoTokenizer.from_pretrained(tmp_path / "compressor_tokenizer")
    assert compressor.get_vocab() == build_tokenizer(pair=True).get_vocab()


def test_generation_config_round_trip(tmp_path):
    model = build_model()
    model.generation_config.max_new_tokens = 7
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(tmp_path)
    loaded = load_silently(tmp_path).generation_config
    assert (loaded.max_new_tokens, loaded.repetition_penalty, loaded.pad_token_id) == (7, 1.25, 2)


def test_arguments_of_loading_are_no_generation_settings(tmp_path):
    build_model().save_pretrained(tmp_path / "first")
    loaded = load_silently(
        tmp_path / "first", compression_rate=16, system_prompt="Nobody's business", with_backbone=True
    )
    loaded.save_pretrained(tmp_path / "second")
    first, second = (
        json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("first", "second")
    )
    assert first == second
    assert loaded.config.compression_rate == 16


class Extended(ScaleDownModel):
    """What a user may make of the model in a script."""


def test_a_model_of_a_class_made_on_top_loads_as_what_it_extends(tmp_path, caplog):
    model = build_model()
    expected = outputs(model)
    model.__class__ = Extended
    model.save_pretrained(tmp_path)
    assert "the code of Extended stays out" in caplog.text
    assert type(model) is Extended
    assert files(tmp_path) >= CODE
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert_same_outputs(loaded, expected)


def test_a_model_without_a_processor_is_saved_with_a_warning_every_time(tmp_path, caplog):
    model = build_model()
    model.processor = None
    for name in ("first", "second"):
        caplog.clear()
        model.save_pretrained(tmp_path / name)
        assert "no processor" in caplog.text
        assert not (tmp_path / name / "processor_config.json").exists()
        model = load_silently(tmp_path / name)
    with pytest.raises((OSError, ValueError)):
        model.processor  # noqa: B018


def test_a_model_whose_folder_is_gone_says_so_before_anything_is_written(tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    model, other = (ScaleDownModel.from_pretrained(tmp_path / "model") for _ in range(2))
    processor = model.processor
    shutil.rmtree(tmp_path / "model")
    message = r"folder .*model, which this model was loaded from, is not there any more.*model.processor ="
    with pytest.raises(ValueError, match=message):
        other.answer(QUESTIONS, DOCUMENTS)
    with pytest.raises(ValueError, match=message):
        other.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    other.processor = processor
    for number, whole in enumerate((model, other)):  # the card that lay beside the weights is no reason to fail
        whole.save_pretrained(tmp_path / str(number))
        assert_same_outputs(load_silently(tmp_path / str(number)), outputs(model))


def test_a_subfolder_beside_a_gguf_file(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path / "sub")
    (tmp_path / "generator.gguf").write_bytes(b"GGUF")
    assert_same_outputs(ScaleDownModel.from_pretrained(tmp_path, subfolder="sub"), outputs(model))


def test_other_processes_write_no_more_than_they_should(tmp_path):
    build_model().save_pretrained(tmp_path, is_main_process=False)
    assert files(tmp_path) == set()


def test_a_state_dict_given_is_the_one_saved(backbones, tmp_path):
    """A trainer gathers the weights of a model it has spread over devices."""
    model = prepared(from_backbones(backbones["n_layers"]), "unmerged")
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    for weights_format in ("delta", "full"):
        model.save_pretrained(tmp_path, weights_format=weights_format, state_dict=dict(gathered))
        saved = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(saved[name], gathered[name]) for name in saved)
    assert saved.keys() == gathered.keys()


# -- the card ----------------------------------------------------------------------------------------------------------

CARD_FIELDS = {
    "repo_id": "me/tiny-scaledown",
    "revision": "0123abc",
    "license": "mit",
    "language": ["en", "fr"],
    "datasets": ["me/questions"],
    "training": {
        "data": "train.jsonl",
        "num_examples": 12345,
        "hardware": "CPU",
        "settings": {"learning_rate": 1e-4, "prompt": "a | b\nc"},
        "metrics": {"train_loss": 1.23456789},
        "versions": {"torch": "2.13.0"},
    },
    "evaluation": [{"data": "nq", "accuracy": 0.5}, {"data": "popqa", "accuracy": 0.25}],
}


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)


def test_card_says_what_is_known(tmp_path):
    model = build_model("modernbert", lora=True)
    compressor = sum(parameter.numel() for parameter in model.compressor.parameters())
    model.card_fields = copy.deepcopy(CARD_FIELDS)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["language"] == ["en", "fr"] and data["datasets"] == ["me/questions"]
    assert data["library_name"] == "transformers" and "context-compression" in data["tags"]
    assert "base_model" not in data
    assert 'from_pretrained(\n    "me/tiny-scaledown",' in card.text and 'revision="0123abc"' in card.text
    for line in (
        "<!-- rendered from model_card.md -->",
        "# tiny-scaledown",
        "| Chunk length | 32 tokens; longer documents become several chunks |",
        "| Compression rate | one embedding per 8 tokens |",
        "| Embeddings per chunk | at most 4, read at memory tokens after the chunk |",
        "| Weights format | full |",
        "| LoRA | rank 4, not merged |",
        f"| Parameters | {model.num_parameters():,}, of which compressor {compressor:,} |",
        "Data: `train.jsonl`, 12,345 examples; made from me/questions. Trained on: CPU.",
        "| learning_rate | 0.0001 |",
        "| prompt | a \\| b⏎c |",
        "| train_loss | 1.23457 |",
        "| torch | 2.13.0 |",
        "- Tested languages: en, fr. Others may fail silently.",
    ):
        assert line in card.text.splitlines(), line
    assert "| popqa | 0.25 |" in card.text
    assert "not recorded" not in card.text.split("## Training")[1]
    assert "2504.07109" in card.text and "Clinchant" in card.text
    assert not re.search(r"\{\{|\{%|None|Undefined", card.text)


def test_card_of_a_folder_without_code_loads_by_the_package(tmp_path, capsys):
    model = build_model("modernbert", slot_pooling="pointer", max_documents=2)
    model.config.reranking_trained = True
    model.card_fields = {"without_code": True, "attribution": "Learned from a file."}
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    for line in (
        "The method is OSCAR ([arXiv 2504.07109](https://arxiv.org/abs/2504.07109)), with slots that point at text.",
        "Learned from a file.",
    ):
        assert line in card.text.splitlines(), line
    assert "| Documents read | the 2 best of a question by score, unless" in card.text
    (snippet,) = snippets(card)
    assert snippet.startswith("from scaledown import ScaleDownModel\n")
    exec(snippet.replace("path/to/this/folder", str(tmp_path)), {})
    assert "corpus_id" in capsys.readouterr().out


def test_card_says_what_is_not_known(tmp_path):
    build_model(enable_reranking=False).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert not {"license", "language", "datasets", "base_model"} & card.data.to_dict().keys()
    assert "Training data and recipe are not recorded." in card.text
    assert "No evaluation results are recorded" in card.text
    assert "No licence is recorded for the weights" in card.text
    assert ".rank(" not in card.text and "Reranking scores" not in card.text
    assert not re.search(r"\{\{|\{%|None|Undefined", card.text)


@pytest.mark.parametrize(
    ("kind", "weights_format"),
    combinations(KINDS, ("full", "delta"), fast=[("n_layers", "full"), ("modernbert", "delta"), ("llm", "full")]),
)
def test_snippet_of_the_card_runs(kind, weights_format, backbones, tmp_path, capsys):
    model = from_backbones(backbones[kind])
    model.config.reranking_trained = True
    model.card_fields = {"repo_id": "me/tiny-scaledown", "revision": "0123abc"}
    model.save_pretrained(tmp_path, weights_format=weights_format)
    card = ModelCard.load(tmp_path / "README.md")
    assert f"| Weights format | {weights_format} |" in card.text
    assert ("These weights are a delta" in card.text) == (weights_format == "delta")
    assert str(backbones[kind][0].parent) not in card.text  # paths of this machine
    (snippet,) = snippets(card)
    assert 'revision="0123abc"' in snippet and "trust_remote_code=True" in snippet
    exec(snippet.replace("me/tiny-scaledown", str(tmp_path)), {})
    assert "corpus_id" in capsys.readouterr().out


def test_base_model_of_the_card_is_the_generators_repository(tmp_path):
    model = build_model()
    model.config.generator_name_or_path = "someone/some-model"
    model.config.generator_revision = "abc123"
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/some-model"
    assert "| Generator revision | `abc123` |" in card.text


def test_a_card_written_by_somebody_is_never_overwritten(tmp_path, caplog):
    (tmp_path / "README.md").write_text("# Mine\n")
    model = build_model()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert "left as it is" in caplog.text


def test_a_template_reaches_nothing_but_its_fields(tmp_path):
    template = tmp_path / "model_card.md"
    template.write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(SecurityError, match="unsafe"):
        write_card(tmp_path, template, {"generator_name": None, "generator_on_hub": False}, {})
    assert not (tmp_path / "README.md").exists()


def test_a_template_cannot_call_what_the_configuration_can(tmp_path):
    template = tmp_path / "model_card.md"
    config = _plain_config(build_model(lora=True).config)
    facts = {"config": config, "generator_name": None, "generator_on_hub": False}
    known = "{{ config.chunk_length }} {{ config.lora_config.get('r') }} {{ config.generator_config.hidden_size }}"
    unknown = "{{ config.generator_config.unknown }}{{ config.unknown }}"
    template.write_text(f"---\n{{{{ card_data }}}}\n---\n{known}|{unknown}|", encoding="utf-8")
    write_card(tmp_path, template, facts, {})
    assert "32 4 32||" in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").unlink()
    for call in ("config", "config.generator_config"):
        template.write_text("{{ " + call + ".to_json_file('" + str(tmp_path / "stolen") + "') }}", encoding="utf-8")
        with pytest.raises(UndefinedError):
            write_card(tmp_path, template, facts, {})
    assert not (tmp_path / "stolen").exists()


@pytest.mark.parametrize("damage", ["bytes", "comment", "results"])
def test_a_damaged_card_costs_no_model(damage, tmp_path, caplog):
    model = build_model()
    results = [{"task_type": "rag"}, "none", 1]
    model.card_fields = {"license": "mit", **({"eval_results": results} if damage == "results" else {})}
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    if damage == "results":
        assert "goes without 'none' of eval_results" in caplog.text
    else:
        old, new = (b"license", b"\xff") if damage == "bytes" else (b'{"license"', b'{"license')
        card.write_bytes(card.read_bytes().replace(old, new))
    loaded = ScaleDownModel.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert "<!-- rendered from model_card.md -->" in card.read_text(encoding="utf-8")
    if damage == "comment":
        assert loaded.card_fields == {} and f"The comment card_fields of {card} is no JSON" in caplog.text


def test_a_rendered_card_is_rendered_again(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    loaded = load_silently(tmp_path)
    loaded.card_fields = {"repo_id": "me/second-time"}
    loaded.save_pretrained(tmp_path)
    assert "# second-time" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("weights_format", ["full", "delta"])
def test_lora_on_experts_that_transformers_saves_by_other_names(weights_format, tmp_path):
    config = AutoConfig.for_model("mixtral", **SHAPE, num_local_experts=2, num_experts_per_tok=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "generator")
    build_tokenizer().save_pretrained(tmp_path / "generator")
    model = ScaleDownModel.from_backbones(str(tmp_path / "generator"), num_compressor_layers=1)
    model.add_lora(r=2)
    randomize_lora(model).save_pretrained(tmp_path / "saved", weights_format=weights_format)
    assert_same_outputs(ScaleDownModel.from_pretrained(tmp_path / "saved"), outputs(model.eval()))


@pytest.mark.parametrize("way", ["injected", "second", "get_peft_model", "whole"])
def test_lora_that_a_saved_model_would_not_find_again_is_refused(way, tmp_path):
    settings = LoraConfig(r=2, target_modules=["q_proj"])
    model = build_model("n_layers", lora=way == "second")
    if way == "get_peft_model":
        model.generator = get_peft_model(model.generator, settings)
    elif way == "whole":
        get_peft_model(model, settings)
    else:
        inject_adapter_in_model(settings, model.generator, "other")  # as add_adapter() of transformers does
    with pytest.raises(ValueError, match=r"is of a layer that add_lora\(\) did not make"):
        model.save_pretrained(tmp_path)
