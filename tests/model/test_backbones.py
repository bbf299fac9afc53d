"""Building models from pretrained backbones: what is copied, what is left alone, and what it costs."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.models.auto import tokenization_auto

import compressor_scaledown
from folders import (
    SETTINGS,
    assert_same_outputs,
    from_backbones,
    load_silently,
    outputs,
    save_backbones,
    save_encoder,
    save_generator,
    silence,
)
from scaledown import ScaleDownConfig, ScaleDownModel
from tiny import ANSWERS, DOCUMENTS, ENCODERS, GENERATORS, QUESTIONS, SHAPE, build_model, build_tokenizer
from weights_scaledown import weights_fingerprint

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("n_layers", "modernbert", "llm")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return save_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def generator(backbones):
    return backbones["n_layers"][0]


def build(generator, compressor=None, **kwargs):
    """from_backbones, as in the documentation."""
    kwargs = kwargs if "config" in kwargs else {**SETTINGS, **kwargs}
    return ScaleDownModel.from_backbones(str(generator), compressor and str(compressor), **kwargs)


# -- what the model is made of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_ready_to_use_and_to_train(kind, backbones):
    generator, _ = backbones[kind]
    model = from_backbones(backbones[kind])
    assert not model.training
    assert model.config.compressor_type == kind
    assert model.config.generator_name_or_path == str(generator)
    assert model.config.generator_revision is None  # a folder has none
    assert model.config.generator_fingerprint == weights_fingerprint(str(generator))
    assert model.processor.tokenizer.get_vocab() == build_tokenizer().get_vocab()
    pair = kind == "modernbert"
    assert model.processor.compressor_tokenizer.get_vocab() == build_tokenizer(pair=pair).get_vocab()
    assert model.processor.max_prompt_length == 512 and model.processor.num_memory_tokens == 4
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith("compressor."), name
    assert all(isinstance(answer, str) for answer in model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=3))
    loss = model(**model.processor(QUESTIONS, DOCUMENTS, ANSWERS)).loss
    assert torch.isfinite(loss)


@pytest.mark.parametrize("kind", KINDS)
def test_backbones_hold_the_weights_of_their_checkpoints(kind, backbones):
    """Bit for bit: initializing what is new touches nothing that was loaded."""
    generator, compressor = backbones[kind]
    model = from_backbones(backbones[kind], lora_config={"r": 2, "target_modules": "all-linear"})
    model.merge_lora()
    checkpoint = load_file(generator / "model.safetensors")
    state = model.generator.state_dict()
    assert state.keys() == checkpoint.keys()
    assert all(torch.equal(state[name], checkpoint[name]) for name in checkpoint)
    if compressor is not None:
        checkpoint = load_file(compressor / "model.safetensors")
        checkpoint = {
            name.removeprefix("model."): t for name, t in checkpoint.items() if not name.startswith("lm_head")
        }
        state = model.compressor.backbone.state_dict()
        assert state.keys() == checkpoint.keys()
        assert all(torch.equal(state[name], checkpoint[name]) for name in checkpoint)


@pytest.mark.parametrize("kind", sorted(GENERATORS))
def test_n_layers_is_a_copy_of_the_first_layers(kind, tmp_path):
    generator = save_generator(tmp_path, kind, shards="60KB", num_hidden_layers=4)
    with silence():
        model = build(generator, num_compressor_layers=3)
    own = model.compressor.backbone.state_dict()
    first = {
        name: tensor
        for name, tensor in model.generator.model.state_dict().items()
        if name != "norm.weight" and not name.startswith("layers.3.")
    }
    assert own.keys() == first.keys() and any(name.startswith("layers.2.") for name in own)
    for name, tensor in own.items():
        assert torch.equal(tensor, first[name]), name
        assert tensor.data_ptr() != first[name].data_ptr(), f"{name} is shared with the generator"
    assert isinstance(model.compressor.backbone.norm, torch.nn.Identity)
    assert model.compressor.projector is None


def test_n_layers_copies_the_norm_after_the_embeddings(tmp_path):
    shape = {**SHAPE, "cls_token_id": 0, "sep_token_id": 1, "num_hidden_layers": 3}
    generator = AutoModelForCausalLM.from_config(AutoConfig.for_model("modernbert-decoder", **shape))
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if "norm" in name:  # which would be ones
                parameter.normal_()
    generator.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with silence():
        own = build(tmp_path, num_compressor_layers=2).compressor.backbone
    theirs = generator.model.state_dict()
    assert isinstance(own.final_norm, torch.nn.Identity) and "embeddings.norm.weight" in own.state_dict()
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_n_layers_gives_the_raw_hidden_state_of_layer_n(generator):
    model = build(generator)
    ids = torch.arange(10, 30).unsqueeze(0)
    with torch.no_grad():
        raw = model.generator.model(ids, output_hidden_states=True).hidden_states[SETTINGS["num_compressor_layers"]]
        own = model.compressor.backbone(inputs_embeds=model.compressor.backbone.get_input_embeddings()(ids))
    assert torch.allclose(own.last_hidden_state, raw, atol=1e-5)


def test_training_the_compressor_leaves_the_generator_alone(generator):
    model = build(generator)
    before = {name: tensor.clone() for name, tensor in model.generator.state_dict().items()}
    with torch.no_grad():
        for parameter in model.compressor.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.generator.state_dict().items())


@pytest.mark.parametrize("compressor_type", ["n_layers", "modernbert"])
@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma2", "gemma3"])
def test_memory_embeddings_have_the_scale_of_token_embeddings(kind, compressor_type, tmp_path):
    """What the backbone's first layer sees, so for gemma after the multiplication by √hidden."""
    generator = save_generator(tmp_path / "generator", kind)
    encoder = save_encoder(tmp_path / "encoder") if compressor_type == "modernbert" else None
    model = build(generator, encoder, compressor_type=compressor_type, num_memory_tokens=32)
    compressor = model.compressor
    tokens = compressor.backbone.get_input_embeddings()(torch.arange(400))
    memory = compressor.memory_embeddings
    assert memory.shape[0] == 32 and compressor.rerank_embedding is not None
    assert 0.8 < (memory.std() / tokens.std()).item() < 1.25
    assert (memory.mean() - tokens.mean()).abs() < 4 * tokens.std() / math.sqrt(memory.numel())
    assert 0.5 < (compressor.rerank_embedding.std() / tokens.std()).item() < 2
    if kind.startswith("gemma") and encoder is None:
        weight = compressor.backbone.get_input_embeddings().weight
        assert memory.std() > 4 * weight.std()  # √32 ≈ 5.7
    rows = memory.detach()
    assert (torch.cdist(rows, rows) + torch.eye(32) * 1e6).min() > 0, "two memory embeddings are the same"


def test_new_weights_depend_on_the_seed_alone(generator):
    torch.manual_seed(5)
    first = build(generator)
    torch.manual_seed(5)
    assert_same_outputs(build(generator), outputs(first))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_has_one_type_and_buffers_stay_precise(kind, dtype, backbones, tmp_path):
    generator, compressor = backbones[kind]
    if dtype == "auto":  # a generator in 16 bits and a compressor in 32: what is saved has one type
        generator = save_generator(tmp_path, dtype=torch.bfloat16)
    model = from_backbones((generator, compressor), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:
            assert buffer.dtype == torch.float32, f"{name} was rounded with the weights"
    model.save_pretrained(tmp_path / "saved")
    assert_same_outputs(load_silently(tmp_path / "saved"), outputs(model))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_implementation_reaches_both_sides(kind, backbones):
    model = from_backbones(backbones[kind], attn_implementation="eager")
    assert model.compressor.backbone.config._attn_implementation == "eager"
    assert model.generator.config._attn_implementation == "eager"


def test_a_pooler_is_taken_off(tmp_path):
    generator, encoder = save_generator(tmp_path / "generator"), save_encoder(tmp_path / "encoder", "bert")
    assert any("pooler" in name for name in load_file(encoder / "model.safetensors"))
    model = build(generator, encoder, compressor_type="modernbert")
    assert not any("pooler" in name for name in model.state_dict())


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_as_fields_or_as_a_configuration(generator, backbones):
    by_fields = build(generator, num_memory_tokens=3, chunk_length=24)
    config = ScaleDownConfig(**{**SETTINGS, "num_memory_tokens": 3, "chunk_length": 24})
    before = config.to_dict()
    by_config = build(generator, config=config)
    assert by_config.config.to_dict() == by_fields.config.to_dict()
    assert config.to_dict() == before, "the configuration given was changed"
    encoder = backbones["modernbert"][1]
    config = ScaleDownConfig(compressor_type="modernbert", **SETTINGS)
    assert build(generator, encoder, config=config).config.compressor_config.model_type == "modernbert"


def test_the_configuration_of_another_model_is_only_a_source_of_settings(generator, tmp_path):
    other = build_model(num_memory_tokens=2)
    other.save_pretrained(tmp_path)
    model = build(generator, config=load_silently(tmp_path).config)
    assert model.config.num_memory_tokens == 2
    assert model.config.generator_name_or_path == str(generator)
    assert model.config.name_or_path == "", "it would look for its processor there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compressor": "encoder"}, r"does not go with compressor_type='n_layers'"),
        ({"compressor_type": "modernbert"}, r"compressor=None does not go with compressor_type='modernbert'"),
        ({"compressor_type": "llm"}, r"compressor=None does not go with compressor_type='llm'"),
        ({"compressor": "encoder", "compressor_type": "transformer"}, r"'transformer' is unknown"),
        ({"num_compressor_layers": 3}, r"num_compressor_layers=3 exceeds the generator's 2 layers"),
        ({"chunk_length": 500}, r"exceeds the compressor's\s+512 positions"),
    ],
)
def test_settings_that_contradict_each_other(arguments, message, generator, backbones):
    arguments = {name: backbones["modernbert"][1] if value == "encoder" else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        build(generator, **arguments)


def test_configuration_and_fields_at_once(generator):
    with pytest.raises(ValueError, match=r"either config or its fields, not both: got chunk_length, num_memory_tokens"):
        ScaleDownModel.from_backbones(str(generator), config=ScaleDownConfig(), num_memory_tokens=2, chunk_length=32)


def test_a_model_needs_a_generator_configuration():
    with pytest.raises(ValueError, match=r"no generator_config.*from_backbones"):
        ScaleDownModel(ScaleDownConfig())


def test_only_safetensors_are_read(tmp_path, backbones):
    generator, encoder = save_generator(tmp_path / "generator"), save_encoder(tmp_path / "encoder")
    for folder in (generator, encoder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        os.remove(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"generator' has neither model.safetensors nor .*safetensors only; convert"):
        build(generator)
    with pytest.raises(ValueError, match=r"encoder' has neither model.safetensors nor .*safetensors only; convert"):
        build(backbones["n_layers"][0], encoder, compressor_type="modernbert")


def test_n_layers_refuses_a_quantized_generator(tmp_path):
    generator = save_generator(tmp_path)
    config = json.loads((generator / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (generator / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is quantized; .* needs\s+them unquantized. Name the original checkpoint"):
        build(generator)


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_generator_with_missing_weights_is_an_error(lost, tmp_path):
    """transformers warns and fills in random ones."""
    generator = save_generator(tmp_path)
    tensors = load_file(generator / "model.safetensors")
    del tensors[lost]
    save_file(tensors, generator / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 weights of the model .*{lost}"):
        build(generator)


def test_an_architecture_without_a_known_final_norm_is_refused(generator, monkeypatch):
    monkeypatch.setattr(compressor_scaledown, "FINAL_NORM_NAMES", ("end_norm",))
    with pytest.raises(ValueError, match=r'LlamaModel has no final norm .* use compressor_type="llm"'):
        build_model()


# -- fingerprint -------------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_weights_not_of_the_files(tmp_path):
    folders = [save_generator(tmp_path / shards, shards=shards) for shards in ("5GB", "60KB", "30KB")]
    assert len(list(folders[2].glob("model-*"))) > len(list(folders[1].glob("model-*"))) > 1
    assert len({weights_fingerprint(str(folder)) for folder in folders}) == 1


def test_fingerprint_sees_every_tensor(tmp_path):
    generator = save_generator(tmp_path)
    tensors = load_file(generator / "model.safetensors")

    def fingerprint(changed):
        save_file(changed, generator / "model.safetensors", {"format": "pt"})
        return weights_fingerprint(str(generator))

    found = {fingerprint(tensors)}
    for name, tensor in tensors.items():
        found.add(fingerprint({**tensors, name: tensor * 1.001}))
    found.add(fingerprint({**tensors, "lm_head.weight": tensors["lm_head.weight"].bfloat16()}))
    found.add(fingerprint({**tensors, "lm_head.weight": tensors["lm_head.weight"].T.contiguous()}))
    found.add(fingerprint({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}))
    found.add(fingerprint({name.replace("lm_head", "head"): tensor for name, tensor in tensors.items()}))
    assert len(found) == 1 + len(tensors) + 4
    zeros = (torch.zeros(4, 2), torch.zeros(2, 4), torch.zeros(4, 4).half(), torch.zeros(4, 4).bfloat16())
    assert len({fingerprint({"zeros": tensor}) for tensor in zeros}) == 4  # the same bytes


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path):
    generator = save_generator(tmp_path, shards="60KB")
    sharded = weights_fingerprint(str(generator))
    tensors = {k: v for path in generator.glob("model-*.safetensors") for k, v in load_file(path).items()}
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, generator / "model.safetensors", {"format": "pt"})
    assert weights_fingerprint(str(generator)) != sharded
    model = build(generator)
    assert torch.equal(model.generator.lm_head.weight, tensors["lm_head.weight"] + 1)
    assert torch.equal(model.compressor.backbone.embed_tokens.weight, tensors["model.embed_tokens.weight"] + 1)


# -- names of weights --------------------------------------------------------------------------------------------------

LLAMA_LAYER = {
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
}
LLAMA_GENERATOR = {
    "generator.model.embed_tokens.weight",
    "generator.model.norm.weight",
    "generator.lm_head.weight",
    *(f"generator.model.layers.{i}.{name}" for i in range(2) for name in LLAMA_LAYER),
}
HEADS = {
    "compressor.memory_embeddings",
    "compressor.rerank_embedding",
    "compressor.reranking_head.weight",
    "compressor.reranking_head.bias",
}
PROJECTOR = {f"compressor.projector.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
WEIGHTS = {
    "n_layers": LLAMA_GENERATOR
    | HEADS
    | {"compressor.backbone.embed_tokens.weight"}
    | {f"compressor.backbone.layers.0.{name}" for name in LLAMA_LAYER},
    "modernbert": LLAMA_GENERATOR
    | HEADS
    | PROJECTOR
    | {
        "compressor.backbone.embeddings.tok_embeddings.weight",
        "compressor.backbone.embeddings.norm.weight",
        "compressor.backbone.final_norm.weight",
        "compressor.backbone.layers.1.attn_norm.weight",
        *(
            f"compressor.backbone.layers.{i}.{name}.weight"
            for i in range(2)
            for name in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo", "mlp_norm")
        ),
    },
    "llm": LLAMA_GENERATOR
    | HEADS
    | PROJECTOR
    | {"compressor.backbone.embed_tokens.weight", "compressor.backbone.norm.weight"}
    | {f"compressor.backbone.layers.{i}.{name}" for i in range(2) for name in LLAMA_LAYER},
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_weights_stay(kind):
    """Checkpoints out there are read by these names."""
    assert build_model(kind).state_dict().keys() == WEIGHTS[kind]


def test_names_of_weights_without_reranking_and_with_lora():
    without = build_model(enable_reranking=False).state_dict().keys()
    assert without == WEIGHTS["n_layers"] - (HEADS - {"compressor.memory_embeddings"})
    names = build_model(lora=True).state_dict().keys()
    linear = {name for name in WEIGHTS["n_layers"] if name.startswith("generator.") and "_proj" in name}
    expected = WEIGHTS["n_layers"] - linear
    for name in linear:
        stem = name.removesuffix("weight")
        expected |= {f"{stem}base_layer.weight", f"{stem}lora_A.default.weight", f"{stem}lora_B.default.weight"}
    assert names == expected


# -- cost --------------------------------------------------------------------------------------------------------------


def write_llama_checkpoint(
    folder: Path, hidden: int = 2048, layers: int = 16, vocab: int = 32_000, layers_per_shard: int = 2
) -> int:
    """A Llama-shaped bf16 checkpoint of random weights, written without building the model; returns its bytes."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=vocab,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    config.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    wide, narrow = (4 * hidden, hidden), (hidden // 4, hidden)
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": wide}
    shapes |= {"self_attn.k_proj": narrow, "self_attn.v_proj": narrow, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    shards = [{"model.embed_tokens.weight": (vocab, hidden)}]
    for start in range(0, layers, layers_per_shard):
        block = range(start, start + layers_per_shard)
        shards.append({f"model.layers.{i}.{name}.weight": shape for i in block for name, shape in shapes.items()})
    shards.append({"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)})
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: torch.randn(shape).mul_(0.02).bfloat16() for key, shape in shard.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(2 * tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


# Sampled, since mapped files count in the resident size too but cost nothing that cannot be taken back.
MEASURE = """
import json, resource, sys, threading, time

sys.path[:0] = [sys.argv[1]]
import safetensors, torch
import backbones_scaledown, weights_scaledown
from scaledown import ScaleDownModel


def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


opened, now = [], [None]
safe_open = weights_scaledown.safe_open


def counted(path, *args, **kwargs):
    opened.append((now[0], str(path).rsplit("/")[-1]))
    return safe_open(path, *args, **kwargs)


weights_scaledown.safe_open = counted
first_layers = backbones_scaledown.load_first_layers


def phase(*args, **kwargs):
    now[0] = "compressor"
    try:
        return first_layers(*args, **kwargs)
    finally:
        now[0] = None


backbones_scaledown.load_first_layers = phase

start, peak, done = anonymous(), [0], threading.Event()


def sample():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)


thread = threading.Thread(target=sample, daemon=True)
thread.start()
model = ScaleDownModel.from_backbones(sys.argv[2], **json.loads(sys.argv[3]))
done.set()
thread.join()


def size(part):
    return sum(p.numel() * p.element_size() for p in part.parameters())


print(json.dumps({
    "generator": size(model.generator),
    "compressor": size(model.compressor),
    "before": start,
    "peak_anonymous": peak[0],
    "peak_resident": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    "compressor_shards": sorted({name for when, name in opened if when == "compressor"}),
}))
"""


def measure_from_backbones(folder: Path, **settings) -> dict:
    """Peak memory of `ScaleDownModel.from_backbones` in a process of its own, in bytes."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(ROOT), str(folder), json.dumps(settings)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
def test_building_costs_one_generator_and_one_compressor(tmp_path):
    """A billion parameters: no second generator in memory at any time, and only the shards of five layers read."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc")
    checkpoint = write_llama_checkpoint(tmp_path)
    for dtype, times in (("auto", 1), ("float32", 2)):
        found = measure_from_backbones(tmp_path, num_compressor_layers=5, dtype=dtype)
        sizes = {name: f"{value / 2**20:,.0f} MiB" for name, value in found.items() if isinstance(value, int)}
        print(f"dtype={dtype}: checkpoint {checkpoint / 2**20:,.0f} MiB, {sizes}, {found['compressor_shards']}")
        assert found["generator"] == times * checkpoint > times * 1.9 * 2**30
        # As they are, weights stay mapped from their files and cost nothing but what new weights take.
        needed = 0 if dtype == "auto" else found["generator"] + found["compressor"]
        assert found["peak_anonymous"] - found["before"] < needed + 0.25 * found["generator"]
        assert found["compressor_shards"] == [f"model-{i:05d}-of-00010.safetensors" for i in (1, 2, 3, 4)]


def test_encoders_of_every_kind_load(tmp_path, generator):
    for kind in sorted(set(ENCODERS) - {"modernbert"}):
        model = build(generator, save_encoder(tmp_path / kind, kind), compressor_type="modernbert")
        assert torch.isfinite(outputs(model)["logits"]).all()


def test_answers_are_decoded_greedily_whatever_the_chat_model_does(tmp_path):
    generator = save_generator(tmp_path / "generator")
    settings = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[1, 6])
    settings.save_pretrained(generator)
    model = build(generator)
    assert model.generation_config.do_sample is False
    assert model.generation_config.temperature is None
    assert model.generation_config.eos_token_id == [1, 6]
    assert model.generation_config.pad_token_id == model.processor.tokenizer.pad_token_id


# -- what is easily got wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [None, 5, [5, 7]])
def test_generation_ends_at_the_end_token_that_answers_are_learned_with(named, tmp_path):
    folder = save_generator(tmp_path)
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": named}), encoding="utf-8")
    model = from_backbones((folder, None))
    ends = model.generation_config.eos_token_id
    assert model.processor.tokenizer.eos_token_id in ends
    assert set(ends) >= set(named if isinstance(named, list) else [named] if named else [])


def test_a_misspelt_setting_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no argument num_memory_token; did you mean num_memory_tokens"):
        from_backbones((save_generator(tmp_path), None), num_memory_token=2)


@pytest.mark.parametrize("change", ["value", "shape"])
def test_a_delta_of_a_changed_generator_is_refused(change, tmp_path):
    model = from_backbones((save_generator(tmp_path / "generator"), None))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "rounded", weights_format="delta")
    if change == "value":
        model.generator.model.norm.weight.data.add_(1.0)
    else:
        model.resize_token_embeddings(410)
    with pytest.raises(ValueError, match=r"are not those of .* any more"):
        model.save_pretrained(tmp_path / "delta", weights_format="delta")


@pytest.mark.parametrize("setting", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_lora_does_not_train_the_generators_own_weights(setting):
    with pytest.raises(ValueError, match="stay frozen here"):
        build_model().add_lora(**setting)


def test_settings_of_lora_that_cannot_be_saved_are_refused_before_training():
    model = build_model()
    with pytest.raises(ValueError, match=r"LoRA setting layers_pattern=.* cannot be saved"):
        model.add_lora(layers_pattern=object())
    assert model.config.lora_config is None
    model.add_lora(r=2, layers_to_transform=range(1), target_modules=("q_proj",))
    assert model.config.lora_config["layers_to_transform"] == [0]
    assert json.loads(model.config.to_json_string())["lora_config"]["target_modules"] == ["q_proj"]


def test_a_set_of_modules_can_be_saved(tmp_path):
    model = from_backbones((save_generator(tmp_path / "generator"), None))
    model.add_lora(target_modules={"v_proj", "q_proj"})
    model.save_pretrained(tmp_path / "saved")
    assert load_silently(tmp_path / "saved").config.lora_config["target_modules"] == ["q_proj", "v_proj"]


def test_paths_stay_right_when_the_working_directory_changes(tmp_path, monkeypatch):
    save_generator(tmp_path / "here" / "generator")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = ScaleDownModel.from_backbones("generator", **SETTINGS)
    model.save_pretrained("delta", weights_format="delta")
    loaded = ScaleDownModel.from_pretrained("delta")
    monkeypatch.chdir(tmp_path / "there")
    assert isinstance(loaded.answer(QUESTIONS[0], DOCUMENTS[0], max_new_tokens=2), str)
    loaded.save_pretrained("again", weights_format="delta")
    assert ScaleDownModel.from_pretrained("again").processor.compression_rate == 8


@pytest.mark.parametrize("by", ["field", "config"])
def test_settings_given_at_loading_reach_the_processor(by, tmp_path):
    from_backbones((save_generator(tmp_path / "generator"), None)).save_pretrained(tmp_path / "saved")
    if by == "field":
        model = ScaleDownModel.from_pretrained(tmp_path / "saved", compression_rate=32, system_prompt="Hallo.")
    else:
        config = ScaleDownConfig.from_pretrained(tmp_path / "saved", compression_rate=32, system_prompt="Hallo.")
        model = ScaleDownModel.from_pretrained(tmp_path / "saved", config=config)
    assert model.processor.compression_rate == model.config.compression_rate == 32
    assert model.processor.system_prompt == "Hallo."


SCALING = {
    "granite": {"embedding_multiplier": 12.0},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
    "afmoe": {"mup_enabled": True, "num_dense_layers": 2, "head_dim": 8},
}


@pytest.mark.parametrize("pooling", ["memory_tokens", "span_attention"])
@pytest.mark.parametrize("kind", SCALING)
def test_slots_of_a_generator_that_scales_embeddings_are_not_scaled_twice(kind, pooling, tmp_path):
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **SHAPE, **SCALING[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model = from_backbones((tmp_path, None), slot_pooling=pooling, compression_rate=1, num_memory_tokens=32)
    batch = model.processor(QUESTIONS[:1], DOCUMENTS[:1])
    seen = []
    model.generator.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        out = model(**batch)
        slots = seen[0][batch["slot_mask"]]
        torch.testing.assert_close(slots, out.memory_embeddings[out.memory_mask], rtol=1e-3, atol=1e-5)
        if pooling == "span_attention":  # untrained, and at one token per slot, it reads as text does
            model.generator(input_ids=batch["compressor_input_ids"])
            text = seen[1][batch["compressor_document_mask"]]
            torch.testing.assert_close(slots, text, rtol=1e-3, atol=1e-5)


def test_a_tokenizer_of_mistral_common_is_not_taken(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("Some kwargs in ['gguf_file', '_from_auto'] are not supported")

    # As where mistral-common is installed and the repository has its file.
    stub = type("MistralCommonBackend", (), {"from_pretrained": refuse})
    find = tokenization_auto.tokenizer_class_from_name
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    monkeypatch.setattr(
        tokenization_auto, "_use_mistral_format", lambda *a, mistral_format, **k: mistral_format is None
    )
    monkeypatch.setattr(
        tokenization_auto,
        "tokenizer_class_from_name",
        lambda name: stub if name == "MistralCommonBackend" else find(name),
    )
    model = from_backbones((save_generator(tmp_path, "mistral"), None))
    assert model.processor.tokenizer.eos_token == "</s>"
