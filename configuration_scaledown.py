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
"""ScaleDown model configuration."""

import copy
import math
import os

try:
    from transformers import AutoConfig, PreTrainedConfig
except ImportError as error:
    from transformers import __version__

    raise ImportError(
        f"ScaleDown needs transformers 5.17 or newer, and this is {__version__}: pip install --upgrade transformers."
    ) from error
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

try:
    from .errors_scaledown import ScaleDownError
    from .families_scaledown import (
        POSITIONS_AFTER_PADDING,
        check_families,
        embedding_width,
        language_model_config,
        num_positions,
        truncated_config,
    )
    from .settings_scaledown import (
        PADDING_SIDES,
        check_compressor_input,
        check_prompts,
        check_sizes,
        fill_compression_settings,
    )
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError
    from families_scaledown import (
        POSITIONS_AFTER_PADDING,
        check_families,
        embedding_width,
        language_model_config,
        num_positions,
        truncated_config,
    )
    from settings_scaledown import (
        PADDING_SIDES,
        check_compressor_input,
        check_prompts,
        check_sizes,
        fill_compression_settings,
    )

# Two models in one process may come with different code, so that remote code registers nothing.
IS_REMOTE_CODE = (__package__ or "").startswith("transformers_modules")
COMPRESSOR_TYPES = ("n_layers", "modernbert", "llm")
WEIGHTS_FORMATS = ("full", "delta")
SLOT_POOLINGS = ("memory_tokens", "span_mean", "span_attention", "pointer")
DEFAULT_POINTER_WINDOW = 8

# The prompt of OSCAR (arXiv 2504.07109).
DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful assistant. Your task is to extract relevant information from provided documents and to answer "
    "questions as briefly as possible."
)
DEFAULT_USER_PROMPT = "Background:\n{documents}\n\nQuestion: {question}"
DEFAULT_CLOSED_BOOK_PROMPT = "Question: {question}"


class ScaleDownConfig(PreTrainedConfig):
    r"""
    Configuration of a [`ScaleDownModel`]: a query-dependent compressor in front of a causal language model.

    Args:
        generator_config (`PreTrainedConfig` or `dict`):
            Configuration of the causal language model that answers. Required.
        compressor_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the compressor's backbone. Left out for `compressor_type="n_layers"`, where it is the
            generator's configuration cut to `num_compressor_layers` layers.
        compressor_type (`str`, defaults to `"n_layers"`):
            `"n_layers"` (own copy of the generator's first layers), `"modernbert"` (any bidirectional encoder) or
            `"llm"` (any small causal language model).
        num_compressor_layers (`int`, defaults to 8):
            Depth of an `n_layers` compressor (OSCAR, table 1: 5 and 8 layers; gains plateau at 8 to 10). The other
            compressors use the depth their own configuration states.
        num_memory_tokens (`int`, *optional*):
            Memory embeddings a chunk can have at most; what `chunk_length` and `compression_rate` ask for when left
            out: 8.
        compression_rate (`int`, *optional*):
            Document tokens one memory embedding stands for; when left out, what a full chunk with
            `num_memory_tokens` has, or 16: a chunk of `n` tokens becomes
            `min(ceil(n / compression_rate), num_memory_tokens)` slots.
        slot_pooling (`str`, defaults to `"memory_tokens"`):
            `"memory_tokens"`: a slot is the hidden state at a memory embedding after the chunk, as in OSCAR.
            `"span_mean"`: it is the mean of the hidden states over the slot's share of the chunk's own tokens, and the
            reranking state is the first token's (encoders) or the last's; for a backbone that never saw memory
            embeddings and stays frozen, as in two-stage training.
            `"span_attention"` (`n_layers` only): a weighted mean over the same share, of each token's embedding beside
            its normalized hidden state, read by a linear projector. An untrained model weighs all tokens alike and
            passes their embeddings on, so that at one token per slot it starts as the generator that reads text.
            `"pointer"`: the compressor points at windows of the chunk, and their slots start as the generator's own
            embeddings of the text there. The loss of an answer alone teaches this slowly; `evidence` shows where to
            point.
        pointer_window (`int`, *optional*):
            Slots of a window with `slot_pooling="pointer"`, at most 8 when left out; a chunk has as many windows as
            fill its slots.
        pointer_loss_weight (`float`, defaults to 1.0):
            Weight of the loss that asks for a window with the answer.
        chunk_length (`int`, defaults to 128):
            Document tokens per chunk, in tokens of the compressor's tokenizer. Longer documents become several chunks.
        max_query_length (`int`, defaults to 128):
            Query tokens shown to the compressor beside a chunk. The generator always reads the whole question.
        reranking_trained (`bool`, *optional*):
            Whether the reranking head has learned; `None` where that is not known. Training sets it.
        compressor_prompt (`str`, *optional*):
            The compressor's row as a text with `{document}` and, in front of it, `{question}`, tokenized as one; no
            question is read without the latter. The tokenizer adds its special tokens unless the text spells some. Left
            out, question and chunk are tokenized apart, in the frame the backbone was pretrained with.
        compressor_max_length (`int`, *optional*):
            Tokens of a row in front of the memory embeddings. A document is one chunk then, and what exceeds the row is
            cut off. Left out, question and chunk have lengths of their own, and long documents become several chunks.
        compressor_padding_side (`str`, *optional*):
            `"left"` or `"right"`: positions count padding there, up to `compressor_max_length` and in front of the
            memory embeddings. Left out, nothing counts padding.
        fixed_slots (`bool`, defaults to `False`):
            Whether a chunk has `num_memory_tokens` slots however short it is.
        learned_separator (`bool`, defaults to `False`):
            Whether a learned embedding follows each document's memory embeddings, in a slot of its own.
        tokenize_jointly (`bool`, defaults to `False`):
            Whether the generator's question is tokenized in one with the prompt around it, so that a token may reach
            over its ends.
        penalize_prompt (`bool`, defaults to `True`):
            Whether a repetition penalty, where generation has one, counts the prompt's tokens beside the answer's.
        keep_final_norm (`bool`, *optional*):
            Whether slots are read after the compressor's final norm; left out, after it in all types but `n_layers`.
        use_projector (`bool`, *optional*):
            Whether the compressor has a projector; left out, all types but `n_layers` have one.
        enable_reranking (`bool`, defaults to `True`):
            Whether the compressor also scores every chunk's relevance.
        max_documents (`int`, *optional*):
            Documents of a question that the generator reads, the best by their scores, where a call to `answer` names
            no other number; all when left out.
        reranking_loss_weight (`float`, defaults to 0.05):
            λ in `generation loss + λ · reranking loss` (OSCAR, arXiv 2504.07109).
        projector_hidden_size (`int`, defaults to 8096):
            Width of the Linear–ReLU–Linear projector of `modernbert` and `llm`, as in OSCAR; `n_layers` has none.
        system_prompt, user_prompt, closed_book_prompt (`str`):
            Parts of the prompt. `user_prompt` holds `{documents}` and `{question}`, `closed_book_prompt` (used for a
            question without documents) holds `{question}`.
        document_separator (`str`, defaults to `"\n"`):
            Text between two documents' slots.
        chat_template_kwargs (`dict`, *optional*):
            Further variables of the generator's chat template, such as `{"enable_thinking": False}`.
        prompt_date (`str`, *optional*):
            Date a chat template shows as today's, such as `"2026-11-27"`, so that prompts stay those of training. The
            processor sets it when it is made, if the template asks for a date.
        lora_config (`dict`, *optional*):
            Keyword arguments of `peft.LoraConfig` for the LoRA layers in the generator; `None` when it has none.
        weights_format (`str`, defaults to `"full"`):
            `"full"`: the checkpoint holds every weight. `"delta"`: the generator's own weights are read from
            `generator_name_or_path` at `generator_revision` and checked against `generator_fingerprint`.
        generator_name_or_path, generator_revision, generator_gguf_file, generator_fingerprint (`str`, *optional*):
            Where the generator's weights came from; filled in by [`ScaleDownModel.from_backbones`].
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of freshly initialized projector, head and memory embeddings.

    Raises:
        ValueError: a value is outside its range, or values contradict each other. The message names the value, the
            limit and the remedy.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from scaledown import ScaleDownConfig

    >>> config = ScaleDownConfig(generator_config=LlamaConfig(num_hidden_layers=16), num_compressor_layers=5)
    >>> config.compressor_config.num_hidden_layers
    5

    ```
    """

    model_type = "scaledown"
    sub_configs = {"generator_config": AutoConfig, "compressor_config": AutoConfig}

    generator_config: dict | PreTrainedConfig | None = None
    compressor_config: dict | PreTrainedConfig | None = None
    compressor_type: str = "n_layers"
    num_compressor_layers: int = 8
    num_memory_tokens: int | None = None
    compression_rate: int | None = None
    slot_pooling: str = "memory_tokens"
    pointer_window: int | None = None
    pointer_loss_weight: float = 1.0
    chunk_length: int = 128
    max_query_length: int = 128
    compressor_prompt: str | None = None
    compressor_max_length: int | None = None
    compressor_padding_side: str | None = None
    fixed_slots: bool = False
    learned_separator: bool = False
    tokenize_jointly: bool = False
    penalize_prompt: bool = True
    keep_final_norm: bool | None = None
    use_projector: bool | None = None
    enable_reranking: bool = True
    reranking_trained: bool | None = None
    max_documents: int | None = None
    reranking_loss_weight: float = 0.05
    projector_hidden_size: int = 8096
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    user_prompt: str = DEFAULT_USER_PROMPT
    closed_book_prompt: str = DEFAULT_CLOSED_BOOK_PROMPT
    document_separator: str = "\n"
    chat_template_kwargs: dict | None = None
    prompt_date: str | None = None
    lora_config: dict | None = None
    weights_format: str = "full"
    generator_name_or_path: str | None = None
    generator_revision: str | None = None
    generator_gguf_file: str | None = None
    generator_fingerprint: str | None = None
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As everywhere in transformers; fields among the arguments are checked like those of the constructor."""
        # A folder may be a `Path`, which JSON does not know.
        kwargs = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in kwargs.items()}
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ScaleDownError(
                f"This is a {kind} model, not a ScaleDown model. To build one on top of it, name it as the generator: "
                "ScaleDownModel.from_backbones (train.py --generator_name_or_path)."
            )
        own = cls.__annotations__.keys() & kwargs.keys() - cls.sub_configs.keys()
        return super().from_dict({**config_dict, **{name: kwargs.pop(name) for name in own}}, **kwargs)

    def __post_init__(self, **kwargs):
        # `PreTrainedConfig()` without arguments is called by transformers to find the values that differ from the
        # defaults, so a missing generator is an error of the model's constructor, not of this one.
        fill_compression_settings(self)
        if self.slot_pooling == "pointer" and self.pointer_window is None:
            slots = self.num_memory_tokens
            self.pointer_window = min(DEFAULT_POINTER_WINDOW, slots) if isinstance(slots, int) else None
        self._validate_sizes()
        if self.generator_config is not None:
            self.generator_config = _as_config(self.generator_config, "generator_config")
            saved = self.compressor_config
            if self.compressor_type == "n_layers":
                # Not read again as it was saved: Gemma 4, for one, would make another kind of its last layer.
                self.compressor_config = truncated_config(self.generator_config, self.num_compressor_layers)
                size = saved.get("vocab_size") if isinstance(saved, dict) else getattr(saved, "vocab_size", None)
                if size is not None:  # the vocabulary may have been resized alone
                    self.compressor_config.vocab_size = size
            elif saved is not None:
                self.compressor_config = _as_config(saved, "compressor_config")
            self._validate_backbones()
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """The generator's configuration: it decides vocabulary, cache and context length of `generate()`."""
        return self if self.generator_config is None else self.generator_config

    @property
    def vocab_size(self) -> int:
        """Size of the generator's vocabulary, which ScaleDown leaves as it is."""
        return self.generator_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the generator, and so of a memory embedding."""
        return self.generator_config.hidden_size

    @property
    def memory_state_size(self) -> int:
        """Width of a slot's state before the projector, as two-stage training caches it."""
        hidden_size = self.compressor_config.hidden_size
        if self.slot_pooling == "pointer":
            return self.hidden_size + hidden_size
        return hidden_size + embedding_width(self.compressor_config) * (self.slot_pooling == "span_attention")

    def check(self):
        """
        Checks the settings as they are now.

        Raises:
            ScaleDownError: as at construction.
        """
        self._validate_sizes()
        if self.generator_config is not None:
            self._validate_backbones()

    def _validate_sizes(self):
        if self.compressor_type not in COMPRESSOR_TYPES:
            raise ScaleDownError(
                f"compressor_type={self.compressor_type!r} is unknown; choose one of {', '.join(COMPRESSOR_TYPES)}."
            )
        if self.weights_format not in WEIGHTS_FORMATS:
            raise ScaleDownError(
                f"weights_format={self.weights_format!r} is unknown; choose one of {', '.join(WEIGHTS_FORMATS)}."
            )
        if self.slot_pooling not in SLOT_POOLINGS:
            raise ScaleDownError(
                f"slot_pooling={self.slot_pooling!r} is unknown; choose one of {', '.join(SLOT_POOLINGS)}."
            )
        if self.slot_pooling == "span_attention" and self.compressor_type != "n_layers":
            raise ScaleDownError(
                f'slot_pooling="span_attention" needs compressor_type="n_layers", whose token embeddings are the '
                f"generator's; with {self.compressor_type!r} choose memory_tokens or span_mean."
            )
        if self.pointer_window is not None and self.slot_pooling != "pointer":
            raise ScaleDownError(
                f'pointer_window={self.pointer_window!r} is a setting of slot_pooling="pointer", not of '
                f"{self.slot_pooling!r}; leave one of them out."
            )
        check_sizes(self, ("num_compressor_layers", "projector_hidden_size"))
        for name in ("reranking_loss_weight", "pointer_loss_weight", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                remedy = "; 0 switches the reranking loss off" if name == "reranking_loss_weight" else ""
                raise ScaleDownError(f"{name}={value!r} must be a number of at least 0{remedy}.")
        for name in ("enable_reranking", "penalize_prompt"):
            if not isinstance(getattr(self, name), bool):
                raise ScaleDownError(f"{name}={getattr(self, name)!r} must be True or False.")
        for name in ("keep_final_norm", "use_projector", "reranking_trained"):
            if getattr(self, name) not in (None, True, False):
                raise ScaleDownError(f"{name}={getattr(self, name)!r} must be True, False or None.")
        side = self.compressor_padding_side
        if side is not None and side not in PADDING_SIDES:
            raise ScaleDownError(f"compressor_padding_side={side!r} must be {' or '.join(PADDING_SIDES)}, or None.")
        if side is not None and (self.compressor_max_length is None or self.slot_pooling != "memory_tokens"):
            raise ScaleDownError(
                f"compressor_padding_side={side!r} counts positions up to memory embeddings behind the row; set "
                'compressor_max_length, and slot_pooling="memory_tokens".'
            )
        best = self.max_documents
        if best is not None and (isinstance(best, bool) or not isinstance(best, int) or best < 1):
            raise ScaleDownError(f"max_documents={best!r} must be a whole number of at least 1, or None for all.")
        if best is not None and not self.enable_reranking:
            raise ScaleDownError(
                f"max_documents={best} chooses documents by their reranking scores, and "
                "enable_reranking=False leaves these out; choose one of the two."
            )
        if self.lora_config is not None and not isinstance(self.lora_config, dict):
            raise ScaleDownError(
                f"lora_config={self.lora_config!r} must be a dictionary of peft.LoraConfig arguments, or None."
            )
        check_compressor_input(self)
        check_prompts(self)

    def _validate_backbones(self):
        if self.compressor_config is None:
            raise ScaleDownError(
                f"compressor_type={self.compressor_type!r} needs a compressor_config; pass one, or use "
                "ScaleDownModel.from_backbones(generator, compressor), which fills it in."
            )
        check_families(self.generator_config, self.compressor_config)
        width = self.generator_config.hidden_size
        if self.use_projector is False and self.memory_state_size != width:
            raise ScaleDownError(
                f"use_projector=False needs a compressor as wide as the generator: it has states of "
                f"{self.memory_state_size} numbers, and the generator embeddings of {width}. Leave use_projector out."
            )
        kind = self.compressor_config.model_type
        if self.compressor_padding_side is not None and kind in POSITIONS_AFTER_PADDING:
            raise ScaleDownError(f"{kind} counts no padding; leave compressor_padding_side out.")
        limit = num_positions(self.compressor_config)
        # Up to 4 tokens frame query and chunk (as in RoBERTa), one more asks for the reranking score.
        parts, special = ("max_query_length", "chunk_length", "num_memory_tokens"), 5
        if self.compressor_max_length is not None:
            parts, special = ("compressor_max_length", "num_memory_tokens"), 1
        needed = sum(getattr(self, name) for name in parts) + special
        if limit is not None and needed > limit:
            named = " + ".join(f"{name}={getattr(self, name)}" for name in parts)
            raise ScaleDownError(
                f"{named} + {special} special tokens = {needed} exceeds the compressor's {limit} positions. Lower "
                f"{' or '.join(parts[:-1])}."
            )


def _as_config(config: dict | PreTrainedConfig, name: str) -> PreTrainedConfig:
    """A sub-config from its JSON form, or a copy of the object given, so that no two models share one."""
    if isinstance(config, PreTrainedConfig):
        return language_model_config(copy.deepcopy(config))
    if not isinstance(config, dict):
        raise ScaleDownError(
            f"{name} must be a transformers configuration or its dictionary, got {type(config).__name__}."
        )
    config = dict(config)
    model_type = config.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ScaleDownError(
            f"{name} has model_type={model_type!r}, which this version of transformers does not know; upgrade it, or "
            "name a model_type it has."
        )
    return language_model_config(CONFIG_MAPPING[model_type](**config))


if not IS_REMOTE_CODE:
    AutoConfig.register("scaledown", ScaleDownConfig, exist_ok=True)
ScaleDownConfig.register_for_auto_class()

__all__ = ["ScaleDownConfig"]
