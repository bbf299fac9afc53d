"""Shapes of published models, for benchmarks without weights and without a network.

The values are those of the models' own config.json; only what decides a shape is here.
"""

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from configuration_scaledown import ScaleDownConfig
from errors_scaledown import ScaleDownError

SHAPES = {
    # mistralai/Mistral-7B-Instruct-v0.2
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    # mistralai/Mistral-Small-24B-Instruct-2501
    "mistral-24b": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    # meta-llama/Llama-3.2-1B-Instruct
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    # Qwen/Qwen2-7B-Instruct
    "qwen2-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
    },
    # Qwen/Qwen2.5-0.5B-Instruct
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    # answerdotai/ModernBERT-base
    "modernbert-base": {
        "model_type": "modernbert",
        "vocab_size": 50368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "max_position_embeddings": 8192,
    },
    # sentence-transformers/all-MiniLM-L6-v2
    "minilm-l6": {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
    },
}


def load_shape(name: str) -> PreTrainedConfig:
    """Find a model's configuration.

    Args:
        name: A key of `SHAPES`, a folder, or a name on the Hub.

    Returns:
        Its configuration.

    Raises:
        ValueError: There is no such model.
    """
    if name in SHAPES:
        shape = dict(SHAPES[name])
        return CONFIG_MAPPING[shape.pop("model_type")](**shape)
    try:
        return AutoConfig.from_pretrained(name).get_text_config(decoder=True)
    except OSError as error:
        raise ScaleDownError(
            f"{name!r} is none of the shapes known here ({', '.join(SHAPES)}), and no folder or model on the Hub has "
            f"that name ({error})."
        ) from error


def build_config(
    generator: str,
    compressor: str,
    chunk_length: int = 128,
    query_length: int = 0,
    compression_rate: int = 16,
) -> ScaleDownConfig:
    """Describe a ScaleDown model of published shapes.

    Args:
        generator: Name of the generator.
        compressor: A number of the generator's layers, such as `5`, or the name of a compressor.
        chunk_length: Document tokens the compressor reads at once.
        query_length: Question tokens the compressor reads beside them.
        compression_rate: Document tokens per slot.

    Returns:
        The model's configuration.

    Raises:
        ValueError: There is no such model, or it cannot read as much.
    """
    settings = {
        "generator_config": load_shape(generator),
        "chunk_length": chunk_length,
        "max_query_length": max(query_length, 1),
        "compression_rate": compression_rate,
        "num_memory_tokens": -(-chunk_length // compression_rate),
    }
    if compressor.isdigit():
        return ScaleDownConfig(**settings, compressor_type="n_layers", num_compressor_layers=int(compressor))
    backbone = load_shape(compressor)
    kind = "modernbert" if backbone.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "llm"
    return ScaleDownConfig(**settings, compressor_type=kind, compressor_config=backbone)


def label(contestant: str) -> str:
    """A contestant's name as it is shown."""
    return f"{contestant} layers" if contestant.isdigit() else contestant
