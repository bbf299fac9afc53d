"""The language model inside a model that reads images too serves as generator and as compressor."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from scaledown import ScaleDownConfig, ScaleDownModel
from tiny import DOCUMENTS, QUESTIONS, SHAPE, build_tokenizer

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {**SHAPE, "num_hidden_layers": 4, "head_dim": 8}
EXPERTS = {
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
}
WRAPPERS = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **TEXT, "sliding_window": 16},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": {"model_type": "pixtral", **VISION},
    },
    "llama4": {
        "text_config": {"model_type": "llama4_text", **TEXT, **EXPERTS},
        "vision_config": {
            "model_type": "llama4_vision_model",
            **VISION,
            **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 16),
        },
    },
    "gemma4": {"text_config": {"model_type": "gemma4_text", **TEXT, "hidden_size_per_layer_input": 0}},
}
KNOWN = [name for name in WRAPPERS if name in CONFIG_MAPPING]


@pytest.fixture(scope="module", params=KNOWN)
def wrapper(request, tmp_path_factory):
    """A model that reads images too, and the folder it is saved in."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **WRAPPERS[request.param])
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model, folder


def states_of(whole: torch.nn.Module, ids: torch.Tensor):
    """What the model makes of text; all of Llama 4 wants images in transformers 5.24, its language model does not."""
    model = whole.language_model if whole.config.model_type == "llama4" else whole
    return model(input_ids=ids, output_hidden_states=True)


@torch.no_grad()
def test_its_language_model_generates_and_its_first_layers_compress(wrapper):
    whole, folder = wrapper
    model = ScaleDownModel.from_backbones(str(folder), num_compressor_layers=2)
    ids = torch.arange(10, 30).unsqueeze(0)
    expected = states_of(whole, ids)
    torch.testing.assert_close(model.generator(input_ids=ids).logits, expected.logits, rtol=1e-4, atol=1e-4)
    states = model.compressor.backbone(input_ids=ids).last_hidden_state
    torch.testing.assert_close(states, expected.hidden_states[2], rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in model.named_parameters() if "vision" in name]


@torch.no_grad()
def test_its_language_model_compresses_whole(wrapper):
    whole, folder = wrapper
    model = ScaleDownModel.from_backbones(str(folder), str(folder), compressor_type="llm", projector_hidden_size=8)
    ids = torch.arange(10, 30).unsqueeze(0)
    states = model.compressor.backbone(input_ids=ids).last_hidden_state
    expected = states_of(whole, ids).hidden_states[-1]
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_delta_finds_its_language_model_again(wrapper, tmp_path):
    model = ScaleDownModel.from_backbones(str(wrapper[1]), num_compressor_layers=2)
    model.save_pretrained(tmp_path, weights_format="delta")
    loaded = ScaleDownModel.from_pretrained(tmp_path)
    batch = model.processor(QUESTIONS, DOCUMENTS)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_its_configuration_is_unwrapped(wrapper):
    config = ScaleDownConfig(generator_config=wrapper[0].config, num_compressor_layers=2)
    assert config.generator_config.model_type == wrapper[0].config.get_text_config().model_type
    again = ScaleDownConfig(generator_config=wrapper[0].config.to_dict(), num_compressor_layers=2)
    assert again.generator_config.to_dict() == config.generator_config.to_dict()
