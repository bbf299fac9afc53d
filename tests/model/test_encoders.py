"""Every family of encoders and embedding models that people run, as a compressor."""

import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from folders import ROOT, save_generator
from scaledown import ScaleDownConfig, ScaleDownModel
from tiny import ANSWERS, DOCUMENTS, ENCODER_SHAPE, GENERATORS, QUESTIONS, SHAPE, build_tokenizer

DEBERTA = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
HEADS = {**SHAPE, "head_dim": 8}
ENCODERS = {
    "albert": {**ENCODER_SHAPE, "embedding_size": 16},
    "bert": ENCODER_SHAPE,
    "camembert": ENCODER_SHAPE,
    "deberta": {**ENCODER_SHAPE, **DEBERTA},
    "deberta-v2": {**ENCODER_SHAPE, **DEBERTA, "position_buckets": 16, "share_att_key": True},
    "distilbert": {**ENCODER_SHAPE, "dim": 24, "hidden_dim": 32, "n_layers": 2, "n_heads": 4},
    "electra": ENCODER_SHAPE,
    "embedding_gemma2_text": {**HEADS, "embedding_dim": 48, "hidden_size_per_layer_input": 8},
    "eurobert": SHAPE,
    "gemma3_text": {**HEADS, "use_bidirectional_attention": True},  # EmbeddingGemma
    "jina_embeddings_v3": ENCODER_SHAPE,
    "megatron-bert": ENCODER_SHAPE,
    "modernbert": {**ENCODER_SHAPE, "local_attention": 32},
    "mpnet": ENCODER_SHAPE,
    "nomic_bert": ENCODER_SHAPE,
    "rembert": {**ENCODER_SHAPE, "input_embedding_size": 16},
    "roberta": ENCODER_SHAPE,
    "xlm-roberta": ENCODER_SHAPE,
}
# Embedding models that read from left to right, or once did.
DECODERS = {"modernbert-decoder": ENCODER_SHAPE, "qwen3": HEADS, "qwen3 both ways": {**HEADS, "is_causal": False}}
CASES = [("modernbert", name) for name in ENCODERS] + [("llm", name) for name in DECODERS]
CASES = [case for case in CASES if case[1].split()[0] in CONFIG_MAPPING]


def built(kind: str, name: str, generator, folder, **settings) -> ScaleDownModel:
    """A model whose compressor is of a family, from folders."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0], **{**ENCODERS, **DECODERS}[name])
    AutoModel.from_config(config).save_pretrained(folder)
    build_tokenizer(pair=kind == "modernbert").save_pretrained(folder)
    return ScaleDownModel.from_backbones(
        str(generator), str(folder), compressor_type=kind, projector_hidden_size=32, initializer_range=0.2, **settings
    )


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return save_generator(tmp_path_factory.mktemp("generator"))


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["memory_tokens", "span_mean"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_encoder_compresses_learns_and_is_saved(kind, name, pooling, generator, tmp_path):
    model = built(kind, name, generator, tmp_path / "encoder", slot_pooling=pooling)
    batch = model.processor(QUESTIONS, DOCUMENTS, answers=ANSWERS)
    with torch.no_grad():
        expected = model(**batch).logits
        together = model.compress(QUESTIONS, DOCUMENTS).by_document()
        alone = [
            slots
            for question, documents in zip(QUESTIONS, DOCUMENTS, strict=True)
            for slots in model.compress(question, documents).by_document()
        ]
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)

    model.train()(**batch).loss.backward()
    missing = {
        name
        for name, parameter in model.compressor.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    }
    # Nothing says here which documents are relevant.
    assert missing <= {"reranking_head.weight", "reranking_head.bias", "rerank_embedding"}, missing
    model.eval().save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        loaded = ScaleDownModel.from_pretrained(tmp_path / "saved")(**batch).logits
    torch.testing.assert_close(loaded, expected)


def test_the_table_of_encoders_names_those_that_are_tested():
    """docs/models.md."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith('| `"modernbert"`'))
    assert {name.split()[0] for name in row.split("|")[2].split(",")} == ENCODERS.keys()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("convbert", "reads padding"), ("squeezebert", "takes no embeddings"), ("funnel", "shortens")],
)
def test_an_encoder_that_cannot_compress_is_refused(name, reason):
    with pytest.raises(ValueError, match=f"{name} {reason}.*choose another encoder"):
        ScaleDownConfig(
            generator_config=GENERATORS["llama"](),
            compressor_config=AutoConfig.for_model(name),
            compressor_type="modernbert",
        )


@pytest.mark.parametrize(
    ("kinds", "window", "warns"),
    [
        (["sliding_attention", "sliding_attention", "full_attention", "full_attention"], 16, True),
        (["sliding_attention", "full_attention", "sliding_attention", "full_attention"], 16, False),
        (["sliding_attention", "sliding_attention", "full_attention", "full_attention"], 512, False),
    ],
)
def test_layers_that_see_only_what_is_near_are_pointed_out(kinds, window, warns, tmp_path, caplog):
    save_generator(tmp_path, "gemma3", num_hidden_layers=4, layer_types=kinds, sliding_window=window)
    ScaleDownModel.from_backbones(str(tmp_path), num_compressor_layers=2, chunk_length=32, max_query_length=16)
    assert ("sees all of its" in caplog.text) == warns


def test_an_embedding_model_that_reads_both_ways_takes_no_wrong_shortcut(generator, tmp_path):
    model = built("llm", "qwen3 both ways", generator, tmp_path)
    found = model.compress(QUESTIONS, DOCUMENTS)
    assert all(model.compressor._shortcuts_hold.values())  # the check at first use turns a wrong one off
    assert not model.compressor.shares_prefixes
    model.compressor.prunes_last_layer = False
    torch.testing.assert_close(found.memory_embeddings, model.compress(QUESTIONS, DOCUMENTS).memory_embeddings)
