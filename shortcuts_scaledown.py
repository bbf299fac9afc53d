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
"""What the compressor saves: a last layer that computes few positions, and questions read once for all their chunks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

try:
    from .families_scaledown import truncated_config
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from families_scaledown import truncated_config

logger = logging.get_logger(__name__)

# Argument and output of every model; transformers 5.24 renamed it.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
# Backbones whose last layer can attend to all positions and compute few, by where their layers are.
CAUSAL_BACKBONES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("qwen3_moe", "phimoe", "granite", "granitemoe", "dots1", "seed_oss", "arcee", "bitnet"),
)
PRUNABLE_LAYERS = {
    **dict.fromkeys(CAUSAL_BACKBONES, "layers"),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), "encoder.layer"),
}
CHECKED_ATTENTIONS = ("sdpa", "eager")
# In 32 bits results differ by rounding, about 1e-6.
MAX_DIFFERENCE = 1e-3


@dataclass
class SharedPrefixes:
    """
    What a causal backbone keeps of the tokens in front of chunks: a question and its frame, read once for all of its
    chunks.

    Args:
        keys_and_values (`list[tuple[torch.Tensor, torch.Tensor]]`):
            Of each layer, each `(num_prefixes, heads, prefix_len, head_dim)`.
        mask (`torch.BoolTensor` of shape `(num_prefixes, prefix_len)`): False on padding, which is at the left.
        of_chunk (`torch.LongTensor` of shape `(num_chunks,)`): Which prefix a chunk begins with.
    """

    keys_and_values: list[tuple[torch.Tensor, torch.Tensor]]
    mask: torch.BoolTensor
    of_chunk: torch.LongTensor

    @property
    def lengths(self) -> torch.LongTensor:
        """Tokens in front of each chunk `(num_chunks,)`."""
        return self.mask.sum(dim=1)[self.of_chunk]

    def of(self, chunks: torch.LongTensor) -> "SharedPrefixes":
        """The prefixes of some of the chunks."""
        return replace(self, of_chunk=self.of_chunk[chunks])

    def backbone_inputs(self, attention_mask: torch.BoolTensor) -> dict:
        """Arguments with which a backbone continues after the prefixes, given what to read there."""
        rows, cache = self.of_chunk, DynamicCache()
        for layer, (keys, values) in enumerate(self.keys_and_values):
            here = rows.to(keys.device)
            cache.update(keys[here], values[here], layer)
        mask = self.mask[rows]  # (num_chunks, prefix_len)
        places = torch.arange(attention_mask.shape[1], device=mask.device)
        return {
            "attention_mask": torch.cat([mask, attention_mask], dim=1).long(),  # (num_chunks, prefix_len + total_len)
            "position_ids": mask.sum(dim=1, keepdim=True) + places,
            CACHE_NAME: cache,
            "use_cache": True,
        }


@torch.no_grad()
def read_prefixes(
    backbone: PreTrainedModel, embeds: torch.Tensor, mask: torch.BoolTensor, of_chunk: torch.LongTensor
) -> SharedPrefixes:
    """
    Reads what stands in front of chunks.

    Args:
        backbone (`PreTrainedModel`): A causal backbone.
        embeds (`torch.FloatTensor` of shape `(num_prefixes, prefix_len, hidden)`): Embeddings, padded at the left.
        mask (`torch.BoolTensor` of shape `(num_prefixes, prefix_len)`): False on padding.
        of_chunk (`torch.LongTensor` of shape `(num_chunks,)`): Which prefix a chunk begins with.

    Returns:
        `SharedPrefixes`: What the chunks continue.
    """
    cache = DynamicCache()
    with _uncompiled():
        backbone(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
            use_cache=True,
            **{CACHE_NAME: cache},
        )
    return SharedPrefixes([(layer.keys, layer.values) for layer in cache.layers], mask, of_chunk)


def states_at(
    backbone: PreTrainedModel,
    read: torch.LongTensor,
    embeds: torch.Tensor,
    attention_mask: torch.BoolTensor,
    prefixes: SharedPrefixes | None = None,
    prunes: bool = False,
    positions: torch.LongTensor | None = None,
) -> torch.Tensor:
    """
    Computes a backbone's states at some positions.

    Args:
        backbone (`PreTrainedModel`): A decoder or an encoder.
        read (`torch.LongTensor` of shape `(num_chunks, num_read)`): The positions.
        embeds (`torch.FloatTensor` of shape `(num_chunks, total_len, hidden)`): Embeddings, padded at the right.
        attention_mask (`torch.BoolTensor` of shape `(num_chunks, total_len)`): False on padding.
        prefixes (`SharedPrefixes`, *optional*): What stands in front of the chunks.
        prunes (`bool`, defaults to `False`):
            Whether the last layer computes no other positions; `prepare_last_layer` must have been called.
        positions (`torch.LongTensor` of shape `(num_chunks, total_len)`, *optional*):
            Where they are not those of the embeddings' indices.

    Returns:
        `torch.FloatTensor` of shape `(num_chunks, num_read, hidden)`.
    """
    inputs = {"attention_mask": attention_mask.long(), "use_cache": False}
    if prefixes is not None:
        inputs = prefixes.backbone_inputs(attention_mask)
    if positions is not None:
        inputs["position_ids"] = positions
    if prunes and read.shape[1] < embeds.shape[1]:
        inputs["read_positions"] = read
    with nullcontext() if prefixes is None else _uncompiled():
        states = backbone(inputs_embeds=embeds, **inputs).last_hidden_state
    if states.shape[1] == read.shape[1] < embeds.shape[1]:
        return states
    return states.gather(1, read.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


class _Uncompiled:
    """
    Layers that are compiled one by one run as they are: for a growing cache each would be compiled anew.

    How torch treats them is of the whole process: the first thread that enters changes it, and the last one that leaves
    puts it back. Each by itself would put back what it found, which may be the change of another.
    """

    def __init__(self):
        self._lock, self._inside, self._change = threading.Lock(), 0, None

    def __enter__(self):
        with self._lock:
            if self._inside == 0:
                self._change = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def __exit__(self, *error):
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._change.__exit__(*error)


_UNCOMPILED = _Uncompiled()


def _uncompiled() -> AbstractContextManager:
    """`_UNCOMPILED`, but for what is being compiled as a whole, where a change is not possible."""
    return nullcontext() if torch.compiler.is_compiling() else _UNCOMPILED


def can_share_prefixes(backbone: PreTrainedModel) -> bool:
    """Whether a backbone that `prepare_last_layer` knows sees backwards only, as some embedding models do not."""
    config = backbone.config
    if config.model_type not in CAUSAL_BACKBONES or not getattr(config, "is_causal", True):
        return False
    attention = getattr(backbone.get_submodule(PRUNABLE_LAYERS[config.model_type])[-1], "self_attn", None)
    return getattr(attention, "is_causal", False)


@torch.compiler.disable
def shortcuts_hold(backbone: PreTrainedModel) -> bool:
    """
    Checks on a small random model of the same class that the shortcuts change no result.

    They reach into layers of transformers, which a release may change; then a model becomes slower, not wrong.

    Args:
        backbone (`PreTrainedModel`): One that `prepare_last_layer` has prepared.

    Returns:
        `bool`: Whether all results are the same; a warning says so where they are not.
    """
    try:
        # In a thread of its own no mode of the caller applies: autocast, inference mode, counting of operations.
        with ThreadPoolExecutor(max_workers=1) as pool:
            difference = pool.submit(_largest_difference, type(backbone), backbone.config).result()
        reason = None if difference < MAX_DIFFERENCE else f"their results differ by {difference:.1g}"
    except Exception as error:  # whatever a new release raises, the plain way is left
        reason = f"they end in {type(error).__name__}: {error}"
    if reason is not None:
        logger.warning_once(
            f"The compressor takes no shortcuts through {type(backbone).__name__} of transformers "
            f"{transformers.__version__}: {reason}. Results are right, and slower."
        )
    return reason is None


@torch.no_grad()
def _largest_difference(backbone_class: type, config: PreTrainedConfig) -> float:
    """Largest difference between the states of a small model with shortcuts and without."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed accelerators too, and nobody undo it
        model = _small_model(backbone_class, config)
        first, chunks = (torch.randn(2, length, model.config.hidden_size) for length in (3, 5))
        read = torch.tensor([[1, 3], [0, 2]])
        whole = torch.ones(2, 5, dtype=torch.bool)
        padded = whole.clone()
        padded[0, 4] = False
        pairs = []
        for mask in (whole, padded):
            pairs.append([states_at(model, read, chunks, mask, prunes=prunes) for prunes in (True, False)])
        if can_share_prefixes(model):
            before, of_chunk = torch.tensor([[False, True, True], [True, True, True]]), torch.tensor([1, 0])
            mask = torch.cat([before[of_chunk], padded], dim=1)
            states = model(
                inputs_embeds=torch.cat([first[of_chunk], chunks], dim=1),
                attention_mask=mask.long(),
                position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state[:, 3:]
            expected = states.gather(1, read.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
            prefixes = read_prefixes(model, first, before, of_chunk)
            for prunes in (True, False):
                pairs.append([states_at(model, read, chunks, padded, prefixes, prunes), expected])
        return max(float((few - every).abs().max()) for few, every in pairs)


def _small_model(backbone_class: type, config: PreTrainedConfig) -> PreTrainedModel:
    """Two narrow layers of the same kind, whose weights are large enough for attention to matter."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    small = truncated_config(config, min(2, config.num_hidden_layers))
    small.__dict__.pop("quantization_config", None)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 2 * head_dim, "intermediate_size": 16}
    if getattr(config, "num_key_value_heads", None) == config.num_attention_heads:
        sizes["num_key_value_heads"] = 2
    for name, value in {**sizes, "vocab_size": 8, "pad_token_id": 0}.items():
        if hasattr(config, name):
            setattr(small, name, value)
    if small._attn_implementation not in CHECKED_ATTENTIONS:
        small._attn_implementation = "sdpa"  # others know no CPU, and prune nothing
    model = backbone_class(small).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    prepare_last_layer(model)
    return model


def prepare_last_layer(backbone: PreTrainedModel) -> bool:
    """
    Lets the last layer of a backbone compute the positions named in the call's `read_positions`, and no others.

    All earlier layers and the keys and values of the last one need every position; its queries, its attention's output
    and its feed-forward part do not, which saves almost all of one layer, and changes no result and no gradient.

    Args:
        backbone (`PreTrainedModel`): A decoder or an encoder.

    Returns:
        `bool`: Whether the architecture is one of those in `PRUNABLE_LAYERS`; others are left as they are.
    """
    name = PRUNABLE_LAYERS.get(backbone.config.model_type)
    if name is None or not type(backbone).__module__.startswith("transformers.models."):
        return False
    try:
        layers = backbone.get_submodule(name)
    except AttributeError:  # another release of transformers has them elsewhere
        return False
    layers[-1].register_forward_pre_hook(_read_few, with_kwargs=True)
    return True


def _read_few(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a last layer; where it cannot be sure of the result, the whole layer is computed."""
    read = kwargs.pop("read_positions", None)
    if read is None:
        return args, kwargs
    states, *others = args
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention.self
    mask = kwargs.get("attention_mask", others[0] if others else None)
    cache = kwargs.get(CACHE_NAME)
    is_causal = attention.is_causal and getattr(attention.config, "is_causal", True)
    if (
        (layer.training and layer.gradient_checkpointing)  # takes away what stands in for a cache
        or attention.config._attn_implementation not in CHECKED_ATTENTIONS
        or not (cache is None or isinstance(cache, DynamicCache))
        or not (mask is None or mask.dim() == 4)
    ):
        return args, kwargs
    read = read.to(states.device)
    few = read.unsqueeze(-1)  # (num_chunks, num_read, 1)
    before = 0 if cache is None else cache.get_seq_length(attention.layer_idx)
    if mask is None and is_causal:
        places = torch.arange(before + states.shape[1], device=states.device)
        unseen = places > before + few  # (num_chunks, num_read, before + total_len)
        mask = states.new_zeros(unseen.shape).masked_fill(unseen, torch.finfo(states.dtype).min).unsqueeze(1)
    elif mask is not None and mask.shape[2] > 1:
        mask = mask.expand(len(read), -1, -1, -1)
        mask = mask.gather(2, few.unsqueeze(1).expand(-1, mask.shape[1], -1, mask.shape[3]))
    positions = kwargs.get("position_embeddings")
    read_before = None if before == 0 else cache.layers[attention.layer_idx]
    kwargs[CACHE_NAME] = _AllKeys(layer, attention, states, positions, read_before)
    if positions is not None:
        kwargs["position_embeddings"] = tuple(
            part.expand(len(read), -1, -1).gather(1, few.expand(-1, -1, part.shape[-1])) for part in positions
        )
    if "attention_mask" in kwargs:
        kwargs["attention_mask"] = mask
    else:
        others[0] = mask
    return (states.gather(1, few.expand(-1, -1, states.shape[-1])), *others), kwargs


class _AllKeys:
    """In the place of a cache: an attention that was given few positions gets the keys and values of all."""

    def __init__(
        self,
        layer: nn.Module,
        attention: nn.Module,
        states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        read_before: object | None,
    ):
        self._layer, self._attention = layer, attention
        self._states, self._position_embeddings = states, position_embeddings
        self._read_before = read_before

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(num_chunks, heads, kv_len, head_dim)` of all positions, whatever those of the few are."""
        states = self._states.to(keys.device)
        if self._position_embeddings is None:
            return tuple(
                part(states).unflatten(-1, (-1, keys.shape[-1])).transpose(1, 2)
                for part in (self._attention.key, self._attention.value)
            )
        states = self._layer.input_layernorm(states)
        keys, values = (
            part(states).unflatten(-1, (-1, keys.shape[-1]))
            for part in (self._attention.k_proj, self._attention.v_proj)
        )
        if hasattr(self._attention, "k_norm"):
            keys = self._attention.k_norm(keys)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        cos, sin = (part.to(keys.device) for part in self._position_embeddings)
        left, right = keys.chunk(2, dim=-1)
        keys = keys * cos.unsqueeze(1) + torch.cat([-right, left], dim=-1) * sin.unsqueeze(1)
        if self._read_before is not None:
            keys = torch.cat([self._read_before.keys, keys], dim=2)
            values = torch.cat([self._read_before.values, values], dim=2)
        return keys, values
