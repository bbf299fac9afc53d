"""Compressors of every kind whose last layer is pruned, and of those whose is not."""

import torch
from transformers import RobertaConfig, XLMRobertaConfig

from scaledown import ScaleDownConfig, ScaleDownModel, ScaleDownProcessor
from tiny import ENCODER_SHAPE, GENERATORS, build_config, build_model, build_tokenizer

DECODERS = [name for name in GENERATORS if name != "phi3"]  # of one matrix for queries, keys and values
NO_SDPA = ("gemma2", "sdpa")
ROBERTAS = {"roberta": RobertaConfig, "xlm-roberta": XLMRobertaConfig}
PRUNED = [
    *(("n_layers", name) for name in DECODERS),
    ("modernbert", "bert"),
    *(("modernbert", name) for name in ROBERTAS),
    ("llm", None),
]
CASES = [(*case, attention) for case in PRUNED for attention in ("sdpa", "eager") if (case[1], attention) != NO_SDPA]
WHOLE = [("n_layers", "phi3"), ("n_layers", "gpt2"), ("modernbert", "modernbert"), ("modernbert", "deberta")]


def build(kind: str, name: str | None, attention: str | None = None) -> ScaleDownModel:
    if name in ROBERTAS:
        config = build_config("modernbert").to_dict()
        encoder = ROBERTAS[name](**{**ENCODER_SHAPE, "max_position_embeddings": 520})
        config = ScaleDownConfig.from_dict({**config, "compressor_config": encoder.to_dict()})
        torch.manual_seed(0)
        model = ScaleDownModel(config).eval()
        model.processor = ScaleDownProcessor.from_config(config, build_tokenizer(), build_tokenizer(pair=True))
    else:
        names = {"generator": name, "num_layers": 4} if kind == "n_layers" else {"compressor": name}
        model = build_model(kind, **names)
    if attention is not None:
        model.compressor.backbone.set_attn_implementation(attention)
    return model
