"""Every family of language models that people run: as generator, and its first layers as compressor."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import compressor_scaledown
from scaledown import ScaleDownConfig, ScaleDownModel
from shortcuts_scaledown import CAUSAL_BACKBONES
from tiny import ANSWERS, DOCUMENTS, QUESTIONS, build_tokenizer
from tiny import SHAPE as TINY

ROOT = Path(__file__).parents[2]
SHAPE = {**TINY, "num_hidden_layers": 4}  # the first two are compared with all
HEADS = {**SHAPE, "head_dim": 8}
EXPERTS = {**SHAPE, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
CONVOLUTION = {"layer_types": ["conv", "full_attention"] * 2}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
STATE_SPACE = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
FAMILIES = {
    "llama": SHAPE,
    "mistral": HEADS,
    "ministral3": HEADS,
    "qwen3": HEADS,
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "num_experts": 4},
    "qwen3_next": {**EXPERTS, "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 16, **LINEAR},
    "qwen3_5_text": {**HEADS, **LINEAR},
    "gemma2": {**HEADS, "sliding_window": 16},
    "gemma3_text": {**HEADS, **SLIDING},
    "gemma4_text": {**HEADS, **SLIDING, "hidden_size_per_layer_input": 0},
    "llama4_text": {**HEADS, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt_oss": {**HEADS, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": SHAPE,
    "phimoe": {**SHAPE, "num_local_experts": 4},
    "granite": SHAPE,
    "granitemoe": {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "smollm3": SHAPE,
    "olmo2": SHAPE,
    "olmo3": {**SHAPE, **SLIDING},
    "mixtral": {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_5_moe_text": {
        **EXPERTS,
        "head_dim": 8,
        "num_experts": 4,
        "shared_expert_intermediate_size": 16,
        **LINEAR,
    },
    "granitemoeshared": {
        **SHAPE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
    },
    "granitemoehybrid": {
        **SHAPE,
        **STATE_SPACE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "olmo": SHAPE,
    "phi": SHAPE,
    "starcoder2": SHAPE,
    "nemotron": SHAPE,
    "stablelm": SHAPE,
    "qwen2": SHAPE,
    "gemma": HEADS,
    "deepseek_v3": {
        **EXPERTS,
        **LATENT,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
    },
    "glm4": HEADS,
    "glm4_moe": {**EXPERTS, "head_dim": 8, "n_routed_experts": 4},
    "ernie4_5": HEADS,
    "ernie4_5_moe": {**SHAPE, "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2},
    "cohere2": {**HEADS, **SLIDING},
    "exaone4": {**HEADS, **SLIDING},
    "seed_oss": HEADS,
    "dots1": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1},
    "hunyuan_v1_dense": HEADS,
    "apertus": SHAPE,
    "arcee": SHAPE,
    "bitnet": SHAPE,
    "helium": HEADS,
    "lfm2": {**SHAPE, **CONVOLUTION},
    "lfm2_moe": {**EXPERTS, **CONVOLUTION, "num_experts": 4, "num_dense_layers": 1},
    "recurrent_gemma": {
        **SHAPE,
        "lru_width": 32,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    "jamba": {**SHAPE, "mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 2, **JAMBA},
    "bamba": {**SHAPE, **STATE_SPACE, "attn_layer_indices": [1, 3]},
    "modernbert-decoder": {**SHAPE, "cls_token_id": 0, "sep_token_id": 1, "local_attention": 16},
}
NOT_IN_FOUR_BITS = ("modernbert-decoder",)
ALL = [name for name in FAMILIES if name in CONFIG_MAPPING]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=ALL)
def family(request, tmp_path_factory) -> tuple[torch.nn.Module, str]:
    """A tiny model of a family, and the folder it is saved in."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **FAMILIES[request.param])).eval()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model, str(folder)


@torch.no_grad()
def test_first_layers_give_the_states_of_the_whole_model(family):
    whole, folder = family
    model = ScaleDownModel.from_backbones(folder, num_compressor_layers=2)
    ids = torch.arange(10, 34).unsqueeze(0)
    expected = whole(input_ids=ids, output_hidden_states=True).hidden_states[2]
    found = model.compressor.backbone(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_neither_padding_nor_company_changes_slots_or_answers(family):
    model = ScaleDownModel.from_backbones(family[1], num_compressor_layers=2)
    whole = model.compress(QUESTIONS, DOCUMENTS)
    together = model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=5)
    for i, (question, documents) in enumerate(zip(QUESTIONS, DOCUMENTS, strict=True)):
        alone = model.compress(question, documents)
        rows = whole.chunk_to_document.new_tensor(
            [row for row, document in enumerate(whole.chunk_to_document) if whole.document_to_example[document] == i]
        )
        mask = whole.memory_mask[rows]
        torch.testing.assert_close(
            whole.memory_embeddings[rows][mask], alone.memory_embeddings[alone.memory_mask], rtol=1e-3, atol=1e-3
        )
        assert model.answer(question, documents, max_new_tokens=5) == together[i]


def test_lora_learns_and_a_delta_gives_the_same_logits(family, tmp_path):
    model = ScaleDownModel.from_backbones(family[1], num_compressor_layers=2)
    model.add_lora(r=2)
    batch = model.processor(QUESTIONS, DOCUMENTS, answers=ANSWERS)
    model.train()(**batch).loss.backward()
    learned = [p.grad for name, p in model.generator.named_parameters() if "lora_B" in name]
    assert sum(gradient.abs().sum() for gradient in learned if gradient is not None) > 0
    assert sum(p.grad.abs().sum() for p in model.compressor.backbone.parameters() if p.grad is not None) > 0
    with torch.no_grad():
        for name, parameter in model.generator.named_parameters():
            if "lora_" in name and parameter.grad is not None:  # Jamba computes past one of its layers
                parameter.normal_(std=0.1)
    model.eval().save_pretrained(tmp_path, weights_format="delta")
    loaded = ScaleDownModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        loaded.merge_lora()
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-3, atol=1e-3)
    assert not [name for name, _ in loaded.named_modules() if "lora" in name or "base_layer" in name]


def test_a_generator_in_four_bits_answers_and_has_lora_layers_that_learn(family):
    pytest.importorskip("bitsandbytes")
    if family[0].config.model_type in NOT_IN_FOUR_BITS:
        pytest.skip("the head, which shares the embeddings, goes by another name than those that are left out")
    model = ScaleDownModel.from_backbones(family[1], num_compressor_layers=2, load_in_4bit=True)
    plain = ScaleDownModel.from_backbones(family[1], num_compressor_layers=2)
    batch = model.processor(QUESTIONS, DOCUMENTS, answers=ANSWERS)
    with torch.no_grad():
        alike = torch.nn.functional.cosine_similarity(model(**batch).logits, plain(**batch).logits, dim=-1).mean()
    assert 0.5 < alike < 0.999  # rough weights of layers this narrow
    model.add_lora(r=2)
    model.train()(**batch).loss.backward()
    learned = [p.grad for name, p in model.generator.named_parameters() if "lora_B" in name]
    assert any(gradient.any() for gradient in learned if gradient is not None)
    assert len(model.eval().answer(QUESTIONS, DOCUMENTS, max_new_tokens=3)) == len(QUESTIONS)


@torch.no_grad()
def test_shortcuts_change_nothing(family, monkeypatch):
    monkeypatch.setitem(compressor_scaledown.MIN_SPARED_OPERATIONS, "cpu", 0)
    model = ScaleDownModel.from_backbones(family[1], num_compressor_layers=2)
    found = model.compress(QUESTIONS, DOCUMENTS)
    taken = model.compressor.prunes_last_layer
    assert all(model.compressor._shortcuts_hold.values())
    model.compressor.prunes_last_layer = model.compressor.shares_prefixes = False
    expected = model.compress(QUESTIONS, DOCUMENTS)
    torch.testing.assert_close(found.memory_embeddings, expected.memory_embeddings, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.reranking_scores, expected.reranking_scores, rtol=1e-4, atol=1e-4)
    assert taken == (family[0].config.model_type in CAUSAL_BACKBONES)


def test_the_table_of_families_says_what_is_true(tmp_path):
    """docs/models.md: what each family's compressor is spared."""
    rows = []
    for name in ALL:
        config = AutoConfig.for_model(name, **FAMILIES[name])
        compressor = ScaleDownModel(ScaleDownConfig(generator_config=config, num_compressor_layers=2)).compressor
        marks = ["yes" if does else "–" for does in (compressor.prunes_last_layer, compressor.shares_prefixes)]
        rows.append(f"| {name} | {' | '.join(marks)} |")
    missing = set(rows) - set((ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines())
    assert not missing, "\n".join(rows)


def test_lora_that_would_not_be_saved_as_it_was_trained_is_refused():
    shape = {
        **SHAPE,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "layers_block_type": ["mamba", "hybrid"] * 2,
    }
    config = AutoConfig.for_model("zamba2", **shape)
    model = ScaleDownModel(ScaleDownConfig(generator_config=config, num_compressor_layers=2))
    with pytest.raises(ValueError, match="zamba2 shares weights between layers"):
        model.add_lora(r=2)


@pytest.mark.parametrize("name", ["nanochat", "mamba2", "gemma3n_text", "minimax"])
def test_what_cannot_serve_is_refused_with_the_reason(name):
    reasons = {
        "nanochat": "llm",
        "mamba2": "no keys and values",
        "gemma3n_text": "looks tokens up again",
        "minimax": "a cache of its own kind",
    }
    with pytest.raises(ValueError, match=reasons[name]):
        ScaleDownModel(ScaleDownConfig(generator_config=AutoConfig.for_model(name), num_compressor_layers=2))
