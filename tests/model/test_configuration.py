"""Settings: what is refused and how, what survives JSON, and that the defaults are the paper's."""

import functools
import inspect
import json

import pytest
from transformers import AutoConfig, LlamaConfig, RobertaConfig

import settings_scaledown
from families_scaledown import truncated_config
from lora_scaledown import LORA_DEFAULTS
from scaledown import ScaleDownConfig, ScaleDownModel, ScaleDownProcessor
from tiny import ENCODERS, GENERATORS, build_config, build_model

KINDS = ["n_layers", "modernbert", "llm"]

REFUSED = [
    ("compressor_type", "pca", "'pca' is unknown; choose one of n_layers, modernbert, llm"),
    ("weights_format", "pickle", "'pickle' is unknown; choose one of full, delta"),
    ("num_compressor_layers", 0, "must be a whole number of at least 1"),
    ("num_compressor_layers", 3, "exceeds the generator's 2 layers; choose at most 2"),
    ("num_memory_tokens", 0, "must be a whole number of at least 1"),
    ("num_memory_tokens", 33, "exceeds chunk_length=32.*Lower num_memory_tokens or raise chunk_length"),
    ("compression_rate", 0, "must be a whole number of at least 1"),
    ("compression_rate", -16, "must be a whole number of at least 1"),
    ("compression_rate", 16.0, "must be a whole number of at least 1"),
    ("compression_rate", True, "must be a whole number of at least 1"),
    ("compression_rate", "16", "must be a whole number of at least 1"),
    ("compression_rate", 33, "exceeds chunk_length=32.*Lower compression_rate or raise chunk_length"),
    ("chunk_length", 0, "must be a whole number of at least 1"),
    ("chunk_length", 500, r"= 533 exceeds the compressor's 512 positions\. Lower max_query_length or chunk_length"),
    ("max_query_length", None, "must be a whole number of at least 1"),
    ("projector_hidden_size", 0, "must be a whole number of at least 1"),
    ("reranking_loss_weight", -0.05, "must be a number of at least 0; 0 switches the reranking loss off"),
    ("reranking_loss_weight", float("nan"), "must be a number of at least 0"),
    ("reranking_loss_weight", float("inf"), "must be a number of at least 0"),
    ("reranking_loss_weight", "0.05", "must be a number of at least 0"),
    ("initializer_range", -0.02, "must be a number of at least 0"),
    ("enable_reranking", "no", "must be True or False"),
    ("max_documents", 0, "must be a whole number of at least 1, or None for all"),
    ("max_documents", 1.5, "must be a whole number of at least 1, or None for all"),
    ("lora_config", 16, "must be a dictionary of peft.LoraConfig arguments"),
    ("system_prompt", None, "must be a string"),
    ("document_separator", None, "must be a string"),
    ("user_prompt", None, "must be a string"),
    ("user_prompt", "Question: {question}", r"must contain \{documents\} exactly once"),
    ("user_prompt", "{documents} {question} {question}", r"must contain \{question\} exactly once"),
    ("user_prompt", "{question} {documents}", r"must name \{documents\} before \{question\}"),
    ("closed_book_prompt", "Answer.", r"must contain \{question\} exactly once"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_a_wrong_value_is_refused_with_its_name_and_the_remedy(name, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_config(**{"compressor_type": "n_layers", name: value})
    assert f"{name}={value}" in str(caught.value) or f"{name}={value!r}" in str(caught.value)


def test_documents_are_chosen_by_a_model_that_ranks():
    with pytest.raises(ValueError, match="max_documents=1 chooses documents by their reranking scores"):
        build_config(compressor_type="n_layers", max_documents=1, enable_reranking=False)


@pytest.mark.parametrize("kind", ["modernbert", "llm"])
def test_a_compressor_of_its_own_needs_a_configuration(kind):
    with pytest.raises(ValueError, match=f"'{kind}' needs a compressor_config.*from_backbones"):
        ScaleDownConfig(generator_config=LlamaConfig(), compressor_type=kind)


@pytest.mark.parametrize("name", ["generator_config", "compressor_config"])
def test_a_sub_configuration_of_an_unknown_kind_is_refused(name):
    settings = {"generator_config": LlamaConfig(), "compressor_type": "llm", "compressor_config": LlamaConfig()}
    with pytest.raises(ValueError, match=f"{name} must be .* got str"):
        ScaleDownConfig(**{**settings, name: "meta-llama/Llama-3.2-1B"})
    with pytest.raises(ValueError, match=f"{name} has model_type='gpt-9'"):
        ScaleDownConfig(**{**settings, name: {"model_type": "gpt-9"}})


def test_defaults_are_the_papers():
    config = ScaleDownConfig(generator_config=LlamaConfig())
    assert config.compressor_type == "n_layers"
    assert config.num_compressor_layers == config.compressor_config.num_hidden_layers == 8
    # 16×: eight embeddings for a document of 128 tokens.
    assert (config.chunk_length, config.compression_rate, config.num_memory_tokens) == (128, 16, 8)
    assert config.enable_reranking
    assert config.reranking_loss_weight == 0.05
    assert config.projector_hidden_size == 8096
    assert config.system_prompt == (
        "You are a helpful assistant. Your task is to extract relevant information from provided documents and to "
        "answer questions as briefly as possible."
    )
    assert config.user_prompt == "Background:\n{documents}\n\nQuestion: {question}"
    assert LORA_DEFAULTS == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"}
    assert inspect.signature(ScaleDownProcessor.__call__).parameters["max_answer_length"].default == 128


@pytest.mark.parametrize("kind", KINDS)
def test_json_brings_back_every_value(kind, tmp_path):
    config = build_config(
        kind, compression_rate=4, lora_config={"r": 4}, system_prompt="Ünï {x}", enable_reranking=False
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert written["model_type"] == "scaledown"
    assert written["generator_config"]["model_type"] == "llama"
    loaded = ScaleDownConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.compressor_config) is type(config.compressor_config)
    assert ScaleDownConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert type(AutoConfig.from_pretrained(tmp_path)) is ScaleDownConfig


def test_a_saved_file_is_checked_as_well(tmp_path):
    build_config("n_layers").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**written, "compression_rate": 0}))
    with pytest.raises(ValueError, match="compression_rate=0 must be"):
        ScaleDownConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_truncated_configuration_is_consistent(generator):
    whole = GENERATORS[generator](num_hidden_layers=4)
    config = build_config("n_layers", generator=generator, num_layers=4, num_compressor_layers=3)
    cut = config.compressor_config
    assert cut.num_hidden_layers == 3
    layer_types = getattr(whole, "layer_types", None)
    if layer_types is not None:
        assert cut.layer_types == layer_types[:3]
        assert len(whole.layer_types) == 4
    differing = {name for name, value in whole.to_dict().items() if cut.to_dict().get(name) != value}
    assert differing <= {"num_hidden_layers", "layer_types"}


def test_only_per_layer_lists_are_cut():
    config = GENERATORS["gemma2"]()
    config.eos_token_id = [1, 5]
    config.architectures = ["A", "B", "C", "D"]
    cut = truncated_config(config, 2)
    assert cut.layer_types == ["sliding_attention", "full_attention"]
    assert cut.eos_token_id == [1, 5]
    assert cut.architectures == ["A", "B", "C", "D"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_any_encoder_keeps_its_own_depth(encoder):
    config = build_config("modernbert", compressor=encoder, num_compressor_layers=1)
    assert config.compressor_config.num_hidden_layers == 2


def test_two_configurations_share_nothing():
    generator = GENERATORS["llama"]()
    config = ScaleDownConfig(generator_config=generator, num_compressor_layers=2)
    generator.vocab_size = 7
    ScaleDownConfig(generator_config=config.generator_config, num_compressor_layers=2).generator_config.vocab_size = 9
    assert (config.generator_config.vocab_size, config.compressor_config.vocab_size) == (400, 400)


def test_generation_reads_the_generators_side():
    config = build_config("llm")
    assert config.get_text_config(decoder=True) is config.generator_config
    assert (config.vocab_size, config.hidden_size) == (400, 32)
    assert config.compressor_config.hidden_size == 24


def test_wrong_values_are_refused_before_there_is_a_generator():
    with pytest.raises(ValueError, match="compressor_type='foo' is unknown"):
        ScaleDownConfig(compressor_type="foo")


def test_roberta_begins_to_count_positions_after_its_padding():
    settings = {"max_query_length": 24, "chunk_length": 32, "num_memory_tokens": 4}  # and 5 special tokens: 65
    shape = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 24}
    for positions, fits in ((66, False), (67, True)):
        encoder = RobertaConfig(**shape, vocab_size=400, pad_token_id=1, max_position_embeddings=positions)
        make = functools.partial(
            ScaleDownConfig,
            generator_config=LlamaConfig(),
            compressor_type="modernbert",
            compression_rate=8,
            compressor_config=encoder,
        )
        if fits:
            make(**settings)
        else:
            with pytest.raises(ValueError, match="= 65 exceeds the compressor's 64 positions"):
                make(**settings)


@pytest.mark.parametrize("side", ["generator_config", "compressor_config"])
@pytest.mark.parametrize(
    ("model_type", "message"),
    [("falcon_h1", "scales embeddings only where it looks them up"), ("bark", "has no hidden_size of its own")],
)
def test_backbones_that_cannot_read_slots_are_refused(side, model_type, message):
    configs = {"generator_config": GENERATORS["llama"](), "compressor_config": GENERATORS["llama"]()}
    configs[side] = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"{side}.*{message}"):
        ScaleDownConfig(**configs, compressor_type="llm")


def test_a_generator_that_looks_tokens_up_in_every_layer_is_refused():
    with pytest.raises(ValueError, match="which slots cannot serve"):
        ScaleDownConfig(generator_config=AutoConfig.for_model("gemma3n_text"))


@pytest.mark.parametrize(
    ("given", "rate", "slots"),
    [
        ({}, 16, 8),
        ({"compression_rate": 2}, 2, 64),
        ({"compression_rate": 4, "chunk_length": 100}, 4, 25),
        ({"chunk_length": 32}, 16, 2),
        ({"chunk_length": 8}, 8, 1),
        ({"num_memory_tokens": 4}, 32, 4),
        ({"num_memory_tokens": 32, "compression_rate": 16}, 16, 32),  # room for lower rates
    ],
)
def test_rate_and_slots_follow_from_each_other(given, rate, slots, tokenizer):
    settings = (
        ScaleDownConfig(**given),
        ScaleDownConfig.from_dict({}, **given),
        ScaleDownProcessor(tokenizer, **given),
        ScaleDownConfig.from_dict(ScaleDownConfig(**given).to_dict()),
    )
    for each in settings:
        assert (each.compression_rate, each.num_memory_tokens) == (rate, slots)


def test_a_rate_that_the_slots_do_not_allow_is_told(monkeypatch):
    warnings = []
    monkeypatch.setattr(settings_scaledown.logger, "warning_once", warnings.append)
    ScaleDownConfig(compression_rate=2)
    assert warnings == []
    ScaleDownConfig(compression_rate=2, num_memory_tokens=8)
    assert "asks for 64 slots" in warnings[0]
    assert "compressed 16×" in warnings[0]


WRONG = {
    "max_query_length": 0,
    "slot_pooling": "nope",
    "user_prompt": "{question}",
    "compression_rate": 99,
    "reranking_loss_weight": -1,
    "num_compressor_layers": 9,
    "weights_format": "half",
    "enable_reranking": "yes",
    "system_prompt": 3,
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_are_checked_wherever_they_enter(name, saved):
    wrong = {name: WRONG[name]}
    with pytest.raises(ValueError, match=name) as told:
        build_config("n_layers", **wrong)
    for load in (ScaleDownConfig.from_pretrained, AutoConfig.from_pretrained, ScaleDownModel.from_pretrained):
        with pytest.raises(ValueError) as error:
            load(saved, **wrong)
        assert str(error.value) == str(told.value)
    if name == "num_compressor_layers":  # a backbone is given its depth when the configuration is made
        return
    config = build_config("n_layers")
    setattr(config, name, WRONG[name])
    with pytest.raises(ValueError, match=name):
        ScaleDownModel(config)
    if hasattr(ScaleDownProcessor.from_pretrained(saved), name):
        with pytest.raises(ValueError, match=name):
            ScaleDownProcessor.from_pretrained(saved, **wrong)
        model = ScaleDownModel.from_pretrained(saved)
        setattr(model.processor, name, WRONG[name])
        with pytest.raises(ValueError, match=name):
            model.processor = model.processor


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build_model("n_layers").save_pretrained(folder)
    return folder


def test_settings_overridden_at_load_count(saved):
    config = ScaleDownConfig.from_pretrained(saved, num_compressor_layers=1, max_query_length=20)
    assert (config.compressor_config.num_hidden_layers, config.max_query_length) == (1, 20)
    config, unused = ScaleDownConfig.from_pretrained(saved, max_query_length=20, return_unused_kwargs=True, other=1)
    assert (config.max_query_length, unused) == (20, {"other": 1})
