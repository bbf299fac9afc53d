"""Models of published shapes, for benchmarks without weights and without a network."""

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from configuration_scaledown import ScaleDownConfig
from errors_scaledown import ScaleDownError
from families_scaledown import language_model_config
from gguf_scaledown import read_config, split_gguf

from .shapes import SHAPES


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
        name, gguf_file = split_gguf(name, None)
        return language_model_config(read_config(name, {"gguf_file": gguf_file}))
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
