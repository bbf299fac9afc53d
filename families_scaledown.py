# Copyright 2026 The ScaleDown authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Which families of models can serve, and what their configurations say."""

import copy

from transformers import PreTrainedConfig
from transformers.utils import logging

try:
    from .errors_scaledown import ScaleDownError
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError

# Their first position is the one after the padding token's id.
POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet")
# They multiply the embeddings of ids, and take those they are given as they are.
SCALED_BY_ID = ("falcon_h1",)
# All that they remember is one state, which transformers passes on by a name of its own.
WITHOUT_KEYS_AND_VALUES = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")

# Their cache is of a kind of its own, which `generate()` does not make for prompts of embeddings.
WITH_CACHE_OF_THEIR_OWN = ("minimax",)
# Layers share weights, and a saved adapter gives other results than the one that was trained.
WITHOUT_LORA = ("zamba", "zamba2")
# They cannot compress, and why.
UNFIT_COMPRESSORS = {
    "convbert": "reads padding as text",
    "squeezebert": "takes no embeddings in the place of ids",
    "funnel": "shortens what it reads",
}
# Layers of these kinds see a state that fades, or the nearest tokens.
FADING = {"linear_attention", "conv", "mamba", "mamba2", "recurrent"}
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}

logger = logging.get_logger(__name__)


def check_families(generator: PreTrainedConfig, compressor: PreTrainedConfig):
    """
    Refuses models that cannot serve.

    Args:
        generator (`PreTrainedConfig`): Of the generator.
        compressor (`PreTrainedConfig`): Of the compressor's backbone.

    Raises:
        ScaleDownError: one of the two cannot serve, and why.
    """
    if generator.model_type in WITHOUT_KEYS_AND_VALUES:
        raise ScaleDownError(
            f"{generator.model_type} has no keys and values to generate from; choose a generator with "
            "attention in some of its layers, such as a Jamba or Bamba model."
        )
    if generator.model_type in WITH_CACHE_OF_THEIR_OWN:
        raise ScaleDownError(
            f"{generator.model_type} generates with a cache of its own kind, which prompts of slots cannot begin; "
            "choose another generator, such as MiniMax-M2."
        )
    for name, backbone in (("generator_config", generator), ("compressor_config", compressor)):
        if getattr(backbone, "is_encoder_decoder", False):
            raise ScaleDownError(
                f"{name}: {backbone.model_type} has an encoder and a decoder, and ScaleDown reads states of one "
                "stack; choose a causal language model, or an encoder as the compressor."
            )
        if getattr(backbone, "hidden_size", None) is None:
            raise ScaleDownError(
                f"{name} of model_type={backbone.model_type!r} has no hidden_size of its own: it is made of "
                "several models. Name a checkpoint that holds its language model alone."
            )
        looked_up = getattr(backbone, "vocab_size_per_layer_input", None) is not None
        if looked_up and getattr(backbone, "hidden_size_per_layer_input", 0):
            raise ScaleDownError(
                f"{name}: {backbone.model_type} looks tokens up again in every layer, which slots cannot serve; choose "
                "a model without hidden_size_per_layer_input."
            )
        if backbone.model_type in SCALED_BY_ID:
            raise ScaleDownError(
                f"{name}: {backbone.model_type} scales embeddings only where it looks them up itself, and reads "
                "slots, which it does not, unscaled; choose another model."
            )
    if compressor.model_type in UNFIT_COMPRESSORS:
        raise ScaleDownError(
            f"compressor_config: {compressor.model_type} {UNFIT_COMPRESSORS[compressor.model_type]}; choose another "
            "encoder, such as ModernBERT or DeBERTa."
        )
    width = embedding_width(generator)
    if width != generator.hidden_size:
        raise ScaleDownError(
            f"generator_config: {generator.model_type} reads embeddings of {width} numbers and has "
            f"hidden states of {generator.hidden_size}; slots need both alike."
        )


def language_model_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """
    Takes the language model's configuration out of that of a model that reads images or sound too.

    Args:
        config (`PreTrainedConfig`): Of either.

    Returns:
        `PreTrainedConfig`: The language model's; `config` itself where that is all there is.
    """
    is_whole = getattr(config, "is_encoder_decoder", False)
    return config if is_whole else config.get_text_config(decoder=True)


def num_positions(config: PreTrainedConfig) -> int | None:
    """Tokens that a backbone reads at most; `None` where nothing limits them."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and config.model_type in POSITIONS_AFTER_PADDING:
        limit -= config.pad_token_id + 1
    return limit


def warn_of_short_sight(config: PreTrainedConfig, num_tokens: int):
    """
    Warns where no layer of a compressor reads all of its input at once.

    Args:
        config (`PreTrainedConfig`): Of the compressor's backbone, cut to the layers that it has.
        num_tokens (`int`): Tokens that it reads at once.
    """
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not kinds:
        return
    windows = [getattr(config, WINDOWS[kind], None) if kind in WINDOWS else None for kind in kinds]
    if all(kind in FADING or (window or num_tokens) < num_tokens for kind, window in zip(kinds, windows, strict=True)):
        logger.warning(
            f"None of the {len(kinds)} layers that compress ({', '.join(sorted(set(kinds)))}) sees all of its "
            f"{num_tokens} tokens at once: slots may lose what stands far before them. Choose a model "
            "with full attention, or more layers of it (num_compressor_layers)."
        )


def embedding_width(config: PreTrainedConfig) -> int:
    """Width of the embeddings a backbone reads, which ALBERT, ELECTRA and some others widen afterwards."""
    for name in ("embedding_size", "word_embed_proj_dim", "input_embedding_size"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return config.hidden_size


def embedding_scale(config: PreTrainedConfig) -> float:
    """What a model multiplies the embeddings it is given with, before its first layer."""
    if config.model_type == "recurrent_gemma" or (config.model_type == "afmoe" and config.mup_enabled):
        return config.hidden_size**0.5
    return getattr(config, "embedding_multiplier", None) or 1.0  # Granite and others


def truncated_config(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """
    Copies a causal language model's configuration, cut to its first layers.

    Args:
        config (`PreTrainedConfig`): Configuration of the whole model.
        num_layers (`int`): Layers to keep.

    Returns:
        `PreTrainedConfig`: The same architecture, `num_layers` deep.

    Raises:
        ValueError: the model has fewer layers than asked for.
    """
    depth = config.num_hidden_layers
    if num_layers > depth:
        raise ScaleDownError(
            f"num_compressor_layers={num_layers} exceeds the generator's {depth} layers; choose at most {depth}."
        )
    truncated = copy.deepcopy(config)
    # Per-layer lists (`layer_types`, `mlp_layer_types`, `no_rope_layers`, …) must stay as long as the model is deep.
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == depth and name != "architectures":
            setattr(truncated, name, value[:num_layers])
    truncated.num_hidden_layers = num_layers
    shared = getattr(config, "num_kv_shared_layers", 0)  # the last ones, which read keys and values of earlier layers
    if shared:
        truncated.num_kv_shared_layers = max(shared - (depth - num_layers), 0)
    return truncated


__all__ = [
    "WITHOUT_LORA",
    "check_families",
    "embedding_scale",
    "embedding_width",
    "language_model_config",
    "num_positions",
    "truncated_config",
    "warn_of_short_sight",
]
