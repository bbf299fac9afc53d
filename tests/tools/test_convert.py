"""Published checkpoints become ScaleDown models with the same outputs; what cannot is refused."""

import pytest

from published import Variant, assert_same, build, converted, read_here
from scaledown.tools.convert import source

TRIMMED = {"compr_model_name": "mistral_trimmed", "compr_n_layers": 2}
SEPARATE = {"compr_use_mlp": True}
VARIANTS = {
    "trimmed": Variant(TRIMMED, expected={"compressor_type": "n_layers", "use_projector": False}),
    "trimmed padded right": Variant(
        TRIMMED, decoder="qwen2", padding_side="right", expected={"compressor_padding_side": "right"}
    ),
    "trimmed with projector": Variant({**TRIMMED, "compr_use_mlp": True}, expected={"use_projector": True}),
    "trimmed with LoRA": Variant({**TRIMMED, "lora_compressor": True, "lora_r_compressor": 3}),
    "trimmed with norm": Variant({**TRIMMED, "compr_rms_norm": True}, expected={"keep_final_norm": True}),
    "trimmed, another base": Variant(
        {**TRIMMED, "compr_use_mlp": True}, compressor="other", expected={"compressor_type": "llm"}
    ),
    "trimmed without question": Variant(TRIMMED, with_questions=False),
    "trimmed without separator": Variant({**TRIMMED, "sep": False}, expected={"learned_separator": False}),
    "llama": Variant(SEPARATE, compressor="llama", expected={"compressor_type": "llm"}),
    "llama with LoRA": Variant({**SEPARATE, "lora_compressor": True}, compressor="llama"),
    "bert": Variant(SEPARATE, compressor="bert", expected={"compressor_padding_side": "left"}),
    "bert without question": Variant(SEPARATE, compressor="bert", with_questions=False),
    "modernbert": Variant(SEPARATE, compressor="modernbert", expected={"compressor_type": "modernbert"}),
    "decoder": Variant({"training_form": "both_separately"}, with_questions=False),
    "decoder with question": Variant({"training_form": "both_separately"}),
    "decoder, one adapter": Variant({"different_mem_tokens": False}, with_questions=False),
    "trimmed with penalty": Variant(TRIMMED, generation={"repetition_penalty": 1.6}),
    "decoder, unigram": Variant({}, tokenizer="unigram", max_length=110),
    "trimmed, unigram": Variant(TRIMMED, tokenizer="unigram", max_length=110),
    "trimmed, split": Variant(TRIMMED, tokenizer="split"),
    "decoder, split": Variant({}, tokenizer="split"),
    "decoder, whole": Variant({"lora": False}, with_questions=False),
    "trimmed, whole": Variant({**TRIMMED, "compr_use_mlp": True, "lora": False}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_are_those_of_the_published_class(name, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "read_pickles", read_here)
    variant = VARIANTS[name]
    reference = build(tmp_path, variant)
    model = converted(tmp_path, variant)
    for field, value in variant.expected.items():
        assert getattr(model.config, field) == value
    assert_same(model, reference, variant)
