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
"""`generate()` over compressed documents, and the settings that answers are written with."""

import copy

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.utils import logging

try:
    from .compression_scaledown import CompressionCache
    from .compressor_scaledown import CHUNK_INPUTS, COMPRESSED_INPUTS
    from .errors_scaledown import ScaleDownError
    from .quantization_scaledown import is_quantized
    from .shortcuts_scaledown import CACHE_NAME
    from .text_scaledown import padding_id
    from .weights_scaledown import is_offloaded
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from compression_scaledown import CompressionCache
    from compressor_scaledown import CHUNK_INPUTS, COMPRESSED_INPUTS
    from errors_scaledown import ScaleDownError
    from quantization_scaledown import is_quantized
    from shortcuts_scaledown import CACHE_NAME
    from text_scaledown import padding_id
    from weights_scaledown import is_offloaded

logger = logging.get_logger(__name__)

# Where `generate()` compiles the steps after the prompt when their cache is static.
COMPILING_DEVICES = ("cuda", "xpu")
# OSCAR, table 7.
DEFAULT_MAX_NEW_TOKENS = 128


class ScaleDownGenerationMixin(GenerationMixin):
    """transformers' `generate()` over compressed documents."""

    def optimize_for_inference(
        self, cache_entries: int | None = None, compile: bool = False
    ) -> "ScaleDownGenerationMixin":
        """
        Prepares the model for answering: LoRA merged, nothing trainable, and on demand more.

        Args:
            cache_entries (`int`, *optional*):
                Chunks whose compression is remembered with their question; `model.compression_cache.hit_rate` shows
                whether that pays.
            compile (`bool`, defaults to `False`):
                Compile the compressor's layers, and write answers with a static cache, for which transformers compiles
                the steps after the prompt: each new batch size compiles for about a minute, then both are faster. Call
                it once the model is on its device; where device, architecture or quantization cannot, a warning says
                so and nothing changes.

        Returns:
            `ScaleDownModel`: The model itself, in evaluation mode.
        """
        if self.generator is None:
            pass  # compresses and ranks
        elif self.config.lora_config is not None and (is_offloaded(self.generator) or is_quantized(self.generator)):
            reason = "offloaded" if is_offloaded(self.generator) else "quantized"
            logger.warning(f"The generator is {reason}; its LoRA layers stay unmerged, and slower.")
        else:
            self.merge_lora()
        self.eval().requires_grad_(False)
        if cache_entries is not None:
            self.compression_cache = CompressionCache(cache_entries)
        self.compiles_decoding = compile and can_compile_decoding(self)
        if self.compressor.backbone is not None:
            on_device = self.device.type in COMPILING_DEVICES and not is_offloaded(self)
            self.compressor.compile_layers(compile and on_device)
        return self

    def generate(self, inputs: torch.LongTensor | None = None, *args, **kwargs):
        r"""
        transformers' own `generate()` on compressed documents, which are compressed once, whatever is decoded.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, prompt_len)`, *optional*): Same as `input_ids`.
            args, kwargs: What the processor returned, and every argument `GenerationMixin.generate` knows.

        Returns:
            What `GenerationMixin.generate` returns; sequences start with the prompt.

        Raises:
            ValueError: there is no generator, or the prompt has another number of slots than the documents.
        """
        slot_mask = kwargs.pop("slot_mask", None)
        given = {name: kwargs.pop(name, None) for name in (*CHUNK_INPUTS, *COMPRESSED_INPUTS)}
        for name in ("chunk_to_document", "document_to_example", "pointer_labels"):
            kwargs.pop(name, None)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        has_prompt = input_ids is not None or embeds is not None
        if has_prompt and any(value is not None for value in (slot_mask, *given.values())):
            # Passes by length differ in number between processes, which those that share out a model must not.
            together = torch.distributed.is_available() and torch.distributed.is_initialized()
            with torch.no_grad():
                documents = self._compress_inputs(**given, batch_size=None if together else self.chunks_per_pass)
                filled = self._embed_prompt(input_ids, slot_mask, documents, embeds)
            if embeds is not None:
                kwargs["inputs_embeds"] = filled
            else:
                # A mask longer than the ids: the beginning of the prompt is in the cache already.
                mask = kwargs.get("attention_mask")
                read = 0 if mask is None else max(mask.shape[1] - input_ids.shape[1], 0)
                kwargs["prompt_embeds"] = nn.functional.pad(filled, (0, 0, read, 0))
                if mask is None and slot_mask is not None and not {"past_key_values", "cache"} & kwargs.keys():
                    kwargs["attention_mask"] = _mask_of_ids(input_ids, slot_mask, self.generation_config)
        settings = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        if not {"prompt_embeds", "inputs_embeds", "past_key_values", "cache"} & kwargs.keys() and slot_mask is None:
            _refuse_plain_ids(settings)
        if asked(kwargs, settings, "stop_strings") is not None and self._has_processor():
            kwargs.setdefault("tokenizer", self.processor.tokenizer)
        _check_assistant(kwargs, settings)
        if self.compiles_decoding:
            kwargs = _with_static_cache(kwargs, self.generation_config)
        return super().generate(inputs, *args, **kwargs)

    def _get_logits_processor(self, generation_config, input_ids_seq_length: int | None = None, *args, **kwargs):
        """Lets a repetition penalty count the answer's tokens alone, where the configuration says so."""
        found = super()._get_logits_processor(generation_config, input_ids_seq_length, *args, **kwargs)
        for processor in found:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor) and not self.config.penalize_prompt:
                processor.prompt_ignore_length = input_ids_seq_length
        return found

    def _get_candidate_generator(self, *args, **kwargs):
        """Slots are of no use to a plain language model that assists, or a narrower one: it reads the prompt's ids."""
        assistant = kwargs.get("assistant_model")
        if assistant is not None and (
            assistant.config.model_type != self.config.model_type
            or assistant.config.hidden_size != self.config.hidden_size
        ):
            kept = kwargs["model_kwargs"].items()
            kwargs["model_kwargs"] = {name: value for name, value in kept if name != "prompt_embeds"}
        return super()._get_candidate_generator(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: object | None = None,
        cache: object | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict:
        """
        Hands the filled prompt to the forward pass wherever a step reads a part of the prompt.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): The sequences so far.
            past_key_values or cache (`Cache`, *optional*): What was already read.
            prompt_embeds (`torch.FloatTensor` of shape `(batch, prompt_len, hidden)`, *optional*): The filled prompt.
            inputs_embeds, is_first_iteration, kwargs: As in transformers.

        Returns:
            `dict`: Arguments of `forward`.
        """
        cache = past_key_values if cache is None else cache
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        start = 0 if cache is None else int(cache.get_seq_length())
        if prompt_embeds is None or start >= prompt_embeds.shape[1]:
            return model_inputs
        ids = model_inputs["input_ids"]
        embeds = prompt_embeds[:, start : start + ids.shape[1]].to(ids.device)
        if embeds.shape[1] < ids.shape[1]:  # without a cache, every step reads prompt and new tokens
            new = self.get_input_embeddings()(ids[:, embeds.shape[1] :])
            embeds = torch.cat([embeds, new], dim=1)  # (batch, length, hidden)
        model_inputs["input_ids"], model_inputs["inputs_embeds"] = None, embeds
        return model_inputs


def _mask_of_ids(
    input_ids: torch.LongTensor, slot_mask: torch.BoolTensor, settings: GenerationConfig
) -> torch.LongTensor:
    """The mask that transformers would infer from padding's id, which may stand at slots too."""
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if settings.pad_token_id is None or settings.pad_token_id in ends:
        return torch.ones_like(input_ids)
    return ((input_ids != settings.pad_token_id) | slot_mask.to(input_ids.device)).long()


def _refuse_plain_ids(settings: GenerationConfig):
    """Ids of somebody else's making, such as a pipeline's, hold no documents and no prompt of this model."""
    if not getattr(settings, "is_assistant", False):
        raise ScaleDownError(
            "These token ids were not made by the model's processor, so that no document would be read: pipelines "
            "of transformers do so. Use model.answer(question, documents), or model.generate(**processor(question, "
            "documents)); model.generator.generate asks the language model alone."
        )


def _check_assistant(kwargs: dict, settings: GenerationConfig):
    """Of what transformers offers for drafts of tokens, models and the prompt itself can be used."""
    assistant = kwargs.get("assistant_model")
    if assistant is not None and not isinstance(assistant, PreTrainedModel):
        raise ScaleDownError(
            f"assistant_model={assistant!r} must be a loaded model, such as AutoModelForCausalLM.from_pretrained(name)."
        )
    if asked(kwargs, settings, "assistant_early_exit") is not None:
        raise ScaleDownError(
            "assistant_early_exit is not possible here: the layers are the generator's. Pass a small language "
            "model as assistant_model, or prompt_lookup_num_tokens."
        )


def _with_static_cache(kwargs: dict, own: GenerationConfig) -> dict:
    """Arguments of `generate` with a static cache, unless they ask for what does not go with one."""
    settings = kwargs.get("generation_config") or own
    assisted = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
    names = (*assisted, "past_key_values", "cache", "cache_implementation")
    decided = any(asked(kwargs, settings, name) is not None for name in names)
    if decided or asked(kwargs, settings, "use_cache") is False:
        return kwargs
    return _with_setting(kwargs, "cache_implementation", "static")


def can_compile_decoding(model: PreTrainedModel) -> bool:
    """
    Finds out whether the steps after the prompt can be compiled; where they cannot, a warning says why.

    Args:
        model (`ScaleDownModel`): The model, on its device.

    Returns:
        `bool`: Whether transformers compiles them once the cache is static.
    """
    quantizer = getattr(model.generator, "hf_quantizer", None) or getattr(model, "hf_quantizer", None)
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    reason = None
    if model.device.type not in COMPILING_DEVICES:
        reason = f"that works on {' and '.join(COMPILING_DEVICES)}, and the model is on {model.device.type}"
    elif model.generator is None:
        reason = "the model was loaded without its generator"
    elif not model.generator._can_compile_fullgraph:
        reason = f"{type(model.generator).__name__} does not go with a static cache"
    elif quantizer is not None and not quantizer.is_compileable:
        reason = "the generator's quantization does not allow it"
    elif {"cpu", "disk"} & places or is_offloaded(model):
        reason = "parts of the model are offloaded"
    if reason is not None:
        logger.warning(f"Decoding is not compiled: {reason}.")
    return reason is None


def greedy_settings(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """A chat model's settings without its sampling: an answer from documents is not a matter of chance."""
    greedy = copy.deepcopy(generation_config)
    # A published generator's max_length is its context, not a wish for answers of that length.
    greedy.update(do_sample=False, temperature=None, top_p=None, top_k=None, max_length=None)
    # Answers are learned with the tokenizer's end token, which a configuration need not name.
    ends = greedy.eos_token_id if isinstance(greedy.eos_token_id, list) else [greedy.eos_token_id]
    greedy.eos_token_id = list(dict.fromkeys([*(end for end in ends if end is not None), tokenizer.eos_token_id]))
    if greedy.pad_token_id is None:
        greedy.pad_token_id = padding_id(tokenizer)
    return greedy


def asked(kwargs: dict, settings: GenerationConfig | None, name: str):
    """What the arguments of `generate` say of a setting, by themselves or in a configuration."""
    return kwargs.get(name, getattr(settings, name, None))


def _with_setting(kwargs: dict, name: str, value) -> dict:
    """Arguments of `generate` with a setting more, in their configuration where they have one."""
    if kwargs.get("generation_config") is None:
        return {**kwargs, name: value}
    settings = copy.deepcopy(kwargs["generation_config"])  # the caller keeps theirs
    setattr(settings, name, value)
    return {**kwargs, "generation_config": settings}


def with_length(kwargs: dict, own: GenerationConfig) -> tuple[dict, int | None]:
    """Arguments of `generate` with a length, and how many new tokens they or the model allow, if they count those."""
    settings = kwargs.get("generation_config")
    max_new_tokens, max_length = (asked(kwargs, settings, name) for name in ("max_new_tokens", "max_length"))
    if max_new_tokens is not None or max_length is not None:
        return kwargs, max_new_tokens
    if own.max_new_tokens is None and own.max_length is not None:
        return kwargs, None
    if own.max_new_tokens is not None:
        return _with_setting(kwargs, "max_new_tokens", own.max_new_tokens), own.max_new_tokens
    return _with_setting(kwargs, "max_new_tokens", DEFAULT_MAX_NEW_TOKENS), DEFAULT_MAX_NEW_TOKENS


def answer_lengths(new: torch.LongTensor, kwargs: dict, own: GenerationConfig) -> list[int]:
    """Tokens in front of the first end token, or of the padding, of each row `(num_sequences, new_tokens)`."""

    def tokens(name: str) -> torch.LongTensor:
        ids = asked(kwargs, kwargs.get("generation_config"), name)
        ids = getattr(own, name) if ids is None else ids
        return torch.as_tensor([] if ids is None else ids, dtype=new.dtype, device=new.device)

    within = torch.isin(new, tokens("eos_token_id")).cumsum(dim=1).eq(0)
    # A stop string ends a row without an end token; up to the longest answer beside it there is padding.
    text = torch.isin(new, tokens("pad_token_id")).logical_not().flip(1).cumsum(dim=1).gt(0).flip(1)
    return (within & text).sum(dim=1).tolist()
