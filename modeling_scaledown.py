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
"""ScaleDown model: a query-dependent compressor in front of a causal language model (OSCAR, arXiv 2504.07109)."""

import re

try:  # first, since it says which transformers is needed
    from .configuration_scaledown import IS_REMOTE_CODE, ScaleDownConfig
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from configuration_scaledown import IS_REMOTE_CODE, ScaleDownConfig

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

try:
    from .answering_scaledown import AnsweringMixin, AnswerOutput
    from .backbones_scaledown import BackbonesMixin
    from .checkpoint_scaledown import CheckpointMixin
    from .compression_scaledown import CompressionCache, check_batch_size, chunks_per_pass, compress_by_length
    from .compressor_scaledown import COMPRESSORS, ScaleDownCompressor
    from .embeddings_scaledown import compressor_embeddings_name
    from .errors_scaledown import WITHOUT_GENERATOR, ScaleDownError
    from .families_scaledown import embedding_scale
    from .generation_scaledown import ScaleDownGenerationMixin
    from .lora_scaledown import LoraMixin, freeze, inject_lora
    from .outputs_scaledown import CompressedDocuments, ScaleDownOutput
    from .pointer_scaledown import pointer_loss
    from .reranking_scaledown import document_scores, reranking_loss
    from .shortcuts_scaledown import CACHE_NAME
    from .spans_scaledown import EmbeddingProjector, SpanAttention
    from .weights_scaledown import execution_device, is_slow_on_cpu
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from answering_scaledown import AnsweringMixin, AnswerOutput
    from backbones_scaledown import BackbonesMixin
    from checkpoint_scaledown import CheckpointMixin
    from compression_scaledown import CompressionCache, check_batch_size, chunks_per_pass, compress_by_length
    from compressor_scaledown import COMPRESSORS, ScaleDownCompressor
    from embeddings_scaledown import compressor_embeddings_name
    from errors_scaledown import WITHOUT_GENERATOR, ScaleDownError
    from families_scaledown import embedding_scale
    from generation_scaledown import ScaleDownGenerationMixin
    from lora_scaledown import LoraMixin, freeze, inject_lora
    from outputs_scaledown import CompressedDocuments, ScaleDownOutput
    from pointer_scaledown import pointer_loss
    from reranking_scaledown import document_scores, reranking_loss
    from shortcuts_scaledown import CACHE_NAME
    from spans_scaledown import EmbeddingProjector, SpanAttention
    from weights_scaledown import execution_device, is_slow_on_cpu

logger = logging.get_logger(__name__)


class ScaleDownModel(
    AnsweringMixin, BackbonesMixin, CheckpointMixin, LoraMixin, ScaleDownGenerationMixin, PreTrainedModel
):
    r"""
    A compressor that turns documents into memory embeddings, and a causal language model that reads those instead.

    Args:
        config (`ScaleDownConfig`):
            Must hold `generator_config`.
        generator (`PreTrainedModel`, *optional*):
            A causal language model to use as it is; built from the configuration when left out.
        backbone (`PreTrainedModel`, *optional*):
            A compressor backbone to use as it is; built from the configuration when left out.
        with_generator, with_backbone (`bool`, defaults to `True`):
            `False` leaves out the generator, or the compressor's backbone: each stage of two-stage training needs one
            of them only.

    Example:

    ```python
    >>> from scaledown import ScaleDownModel

    >>> model = ScaleDownModel.from_pretrained(folder)
    >>> answer = model.answer("Who wrote Ivanhoe?", ["Ivanhoe is a novel by Walter Scott."], max_new_tokens=8)
    >>> isinstance(answer, str)
    True

    ```
    """

    config_class = ScaleDownConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def __init__(
        self,
        config: PreTrainedConfig,
        generator: PreTrainedModel | None = None,
        backbone: PreTrainedModel | None = None,
        with_generator: bool = True,
        with_backbone: bool = True,
    ):
        if getattr(config, "generator_config", None) is None:
            raise ScaleDownError(
                "The configuration has no generator_config. Pass one to ScaleDownConfig, or build the model with "
                "ScaleDownModel.from_backbones(generator)."
            )
        config.check()  # fields may have been assigned since it was made
        super().__init__(config)
        self.compressor = COMPRESSORS[config.compressor_type](config, backbone, with_backbone)
        self.generator = None
        if with_generator:
            self.generator = (
                AutoModelForCausalLM.from_config(config.generator_config) if generator is None else generator
            )
            if config.lora_config is not None:
                inject_lora(self.generator, config.lora_config)
        self.loss_type = "ForCausalLM"
        self.card_fields = {}
        self.compression_cache = None
        self.compiles_decoding = False
        self._processor = None
        self._hub_arguments, self._processor_overrides = {}, {}
        self._generator_samples = None
        self.post_init()
        if not with_generator:
            self._keys_to_ignore_on_load_unexpected.add(r"^generator\.")
            if config.weights_format == "delta" and config.compressor_type == "n_layers" and with_backbone:
                # Where a delta has none, they are the generator's.
                name = re.escape(compressor_embeddings_name(self))
                self._keys_to_ignore_on_load_missing.add(f"^{name}$")
        if not with_backbone:
            self._keys_to_ignore_on_load_unexpected.add(r"^compressor\.backbone\.")
        freeze(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ScaleDownCompressor):
            for parameter in (module.memory_embeddings, module.rerank_embedding, module.separator_embedding):
                if parameter is not None:
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, EmbeddingProjector | SpanAttention):
            module.reset_parameters()

    def train(self, mode: bool = True) -> "ScaleDownModel":
        """Sets training or evaluation mode, as everywhere in torch; training empties the cache of compressions."""
        if mode and self.compression_cache is not None:
            self.compression_cache.clear()
        return super().train(mode)

    @property
    def device(self) -> torch.device:
        """Where inputs are read: the device of the parameters, or where those of an offloaded model are fetched to."""
        return execution_device(self)

    def get_input_embeddings(self) -> nn.Module:
        """The generator's token embeddings."""
        return self.generator.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        """Replaces the generator's token embeddings."""
        self.generator.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The generator's head."""
        return self.generator.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        """Replaces the generator's head."""
        self.generator.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The generator without its head."""
        return self.generator.get_decoder()

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """
        Resizes the generator's vocabulary, and that of a compressor that reads with the generator's tokenizer.

        Args:
            args, kwargs: As in transformers.

        Returns:
            `nn.Module`: The generator's token embeddings.
        """
        old = self.config.vocab_size
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        backbone = self.compressor.backbone
        # A vocabulary of its own stays.
        if self.config.compressor_type == "n_layers" and backbone is not None and backbone.config.vocab_size == old:
            own = backbone.resize_token_embeddings(*args, **kwargs)
            with torch.no_grad():  # the new tokens are the generator's
                own.weight[old:] = embeddings.weight[old : own.weight.shape[0]].to(own.weight.device, own.weight.dtype)
            self.config.compressor_config.vocab_size = own.weight.shape[0]
        return embeddings

    def _warn_of_slow_type(self):
        if self.device.type == "cpu" and is_slow_on_cpu(self.dtype):
            logger.warning_once(
                f"The model is in {str(self.dtype).removeprefix('torch.')} on a CPU without instructions for it, which "
                "makes it several times slower than in 32 bits: load it with dtype=torch.float32 or call float()."
            )

    @property
    def chunks_per_pass(self) -> int:
        """Chunks that `answer` and `generate` compress at a time on the model's device."""
        return chunks_per_pass(self.device)

    def get_memory_embeddings(
        self,
        compressor_input_ids: torch.LongTensor,
        compressor_attention_mask: torch.LongTensor | None = None,
        chunk_slots: torch.LongTensor | None = None,
        compressor_document_mask: torch.BoolTensor | None = None,
        compressor_windows: torch.LongTensor | None = None,
        batch_size: int | None = None,
    ) -> CompressedDocuments:
        """
        Compresses tokenized chunks.

        Args:
            compressor_input_ids (`torch.LongTensor` of shape `(num_chunks, chunk_len)`): Query and chunk.
            compressor_attention_mask (`torch.LongTensor` of shape `(num_chunks, chunk_len)`, *optional*): 0 on padding.
            chunk_slots (`torch.LongTensor` of shape `(num_chunks,)`, *optional*):
                Slots of each chunk, a separator's included; as many as it can have when left out.
            compressor_document_mask (`torch.BoolTensor` of shape `(num_chunks, chunk_len)`, *optional*):
                True on the chunk's own tokens; needed unless `slot_pooling` is `"memory_tokens"`.
            compressor_windows (`torch.LongTensor` of shape `(num_chunks, chunk_len, window)`, *optional*):
                The generator's ids of the text from each token on; needed if `slot_pooling` is `"pointer"`.
            batch_size (`int`, *optional*):
                Chunks compressed at a time, each with others of like length, so that little of the work is padding;
                all at once when left out. A question in front of several chunks is then read once, where the backbone
                is causal.

        Returns:
            `CompressedDocuments`: Chunks in the order given.

        Raises:
            ValueError: no chunk at all, or one that asks for more slots than the model has, or for none.
        """
        self._warn_of_slow_type()
        if compressor_attention_mask is None:
            compressor_attention_mask = torch.ones_like(compressor_input_ids)
        separators = int(self.config.learned_separator)
        limit = self.config.num_memory_tokens + separators
        if chunk_slots is None:
            chunk_slots = compressor_input_ids.new_full((compressor_input_ids.shape[0],), limit)
        if chunk_slots.shape != compressor_input_ids.shape[:1] or chunk_slots.numel() == 0:
            raise ScaleDownError(
                f"chunk_slots has shape {tuple(chunk_slots.shape)} for {compressor_input_ids.shape[0]} chunks; pass "
                "one number per chunk, and at least one chunk."
            )
        if int(chunk_slots.max()) > limit or int(chunk_slots.min()) < 1 + separators:
            raise ScaleDownError(
                f"chunk_slots ranges from {int(chunk_slots.min())} to {int(chunk_slots.max())}; this model has "
                f"{1 + separators} to {limit} memory embeddings per chunk{', its separator included' * separators}. "
                f"Use a processor with num_memory_tokens={limit - separators} or less."
            )
        row = (compressor_input_ids, compressor_attention_mask, chunk_slots)
        chunks = (*row, compressor_document_mask, compressor_windows)
        embeddings = None if compressor_windows is None else self._embed_text
        if batch_size is not None:
            check_batch_size(batch_size)
        if batch_size is None:
            return self.compressor(*chunks, embeddings=embeddings)
        return compress_by_length(self.compressor, self.device, chunks, batch_size, embeddings)

    def _embed_text(self, ids: torch.LongTensor) -> torch.FloatTensor:
        """The generator's embeddings of tokens as they are in front of its first layer."""
        if self.generator is None:
            raise ScaleDownError(WITHOUT_GENERATOR)
        return self.get_input_embeddings()(ids) * embedding_scale(self.config.generator_config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        slot_mask: torch.BoolTensor | None = None,
        compressor_input_ids: torch.LongTensor | None = None,
        compressor_attention_mask: torch.LongTensor | None = None,
        chunk_slots: torch.LongTensor | None = None,
        compressor_document_mask: torch.BoolTensor | None = None,
        compressor_windows: torch.LongTensor | None = None,
        chunk_to_document: torch.LongTensor | None = None,
        document_to_example: torch.LongTensor | None = None,
        memory_states: torch.FloatTensor | None = None,
        rerank_states: torch.FloatTensor | None = None,
        memory_embeddings: torch.FloatTensor | None = None,
        memory_mask: torch.BoolTensor | None = None,
        labels: torch.LongTensor | None = None,
        reranking_labels: torch.FloatTensor | None = None,
        pointer_labels: torch.BoolTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: object | None = None,
        cache: object | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_scored_examples: torch.Tensor | int | None = None,
        num_pointed_chunks: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ScaleDownOutput:
        r"""
        Compresses the documents, fills the slots of the prompt and runs the generator.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, prompt_len)`):
                The prompt; any id stands at a slot. Without one, documents are compressed and nothing is generated.
            attention_mask (`torch.LongTensor` of shape `(batch, prompt_len)`, *optional*):
                0 on padding, which may be on either side.
            slot_mask (`torch.BoolTensor` of shape `(batch, prompt_len)`, *optional*):
                True where a memory embedding goes; read row by row, the slots belong to the chunks in their order.
            compressor_input_ids, compressor_attention_mask, compressor_document_mask (`(num_chunks, chunk_len)`),
            chunk_slots (`(num_chunks,)`), compressor_windows (`(num_chunks, chunk_len, window)`):
                The documents' chunks, as the processor builds them.
            chunk_to_document (`(num_chunks,)`), document_to_example (`(num_documents,)`):
                Whose part each chunk and document is; needed with `reranking_labels`.
            memory_states (`(num_chunks, slots, compressor_hidden)`), rerank_states (`(num_chunks, compressor_hidden)`):
                What the compressor's backbone made of the chunks, in place of the compressor's inputs.
            memory_embeddings (`(num_chunks, slots, hidden)`):
                Already compressed chunks, in place of either.
            memory_mask (`(num_chunks, slots)`):
                True where a chunk of `memory_states` or `memory_embeddings` has a slot.
            labels (`torch.LongTensor` of shape `(batch, prompt_len)`, *optional*):
                Tokens to learn, -100 elsewhere; shifted inside, as everywhere in transformers.
            reranking_labels (`torch.FloatTensor` of shape `(num_documents,)`, *optional*):
                Teacher scores, NaN where there is none.
            pointer_labels (`torch.BoolTensor` of shape `(num_chunks, chunk_len)`, *optional*):
                True where a window holds what is to be pointed at.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                Compute logits at the last positions only, or, without labels, at those named; 0 computes all.
            num_items_in_batch, num_scored_examples, num_pointed_chunks (`int`, *optional*):
                Answer tokens, scored questions and chunks with labels to average over, when a step is made of several
                micro-batches.
            past_key_values or cache (`Cache`, *optional*):
                What the generator has read; transformers 5.24 gave it the second name.

        Returns:
            `ScaleDownOutput`.

        Raises:
            ValueError: slots and memory embeddings, or documents and teacher scores, do not match in number; labels
                with positions to keep.
        """
        if labels is not None and isinstance(logits_to_keep, torch.Tensor):
            raise ScaleDownError(
                "labels need logits at the positions in front of them; pass logits_to_keep as a number."
            )
        self._warn_of_slow_type()
        documents = self._compress_inputs(
            compressor_input_ids=compressor_input_ids,
            compressor_attention_mask=compressor_attention_mask,
            compressor_document_mask=compressor_document_mask,
            compressor_windows=compressor_windows,
            chunk_slots=chunk_slots,
            memory_states=memory_states,
            rerank_states=rerank_states,
            memory_embeddings=memory_embeddings,
            memory_mask=memory_mask,
        )
        prompted = input_ids is not None or inputs_embeds is not None or labels is not None
        if prompted and (inputs_embeds is None or documents.memory_embeddings is not None):
            inputs_embeds = self._embed_prompt(input_ids, slot_mask, documents, inputs_embeds)
        if prompted and position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]

        if use_cache is None and self.training:
            use_cache = False  # nothing is decoded, and checkpointed activations exclude a cache
        outputs = CausalLMOutputWithPast()  # what the compressor alone learns needs no generator
        if prompted:
            outputs = self.generator(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **{CACHE_NAME: past_key_values if cache is None else cache},
                **kwargs,
            )
        loss, generation, reranking, pointing = None, None, None, None
        if labels is not None:
            kept = labels[:, -outputs.logits.shape[1] :]  # (batch, kept_len)
            generation = self.loss_function(
                logits=outputs.logits,
                labels=kept,
                vocab_size=outputs.logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
            loss = generation
        if reranking_labels is not None and documents.reranking_scores is not None:
            if chunk_to_document is None or document_to_example is None:
                raise ScaleDownError(
                    "reranking_labels need chunk_to_document and document_to_example; pass all that the processor "
                    "returned."
                )
            if reranking_labels.shape != document_to_example.shape:
                raise ScaleDownError(
                    f"reranking_labels has shape {tuple(reranking_labels.shape)} for {document_to_example.shape[0]} "
                    "documents; pass one score per document, NaN where there is none."
                )
            scores = document_scores(documents.reranking_scores, chunk_to_document, document_to_example.shape[0])
            reranking = reranking_loss(scores, reranking_labels, document_to_example, num_scored_examples)
            if self.config.reranking_loss_weight > 0:
                if self.training and not self.config.reranking_trained:
                    self.config.reranking_trained = True
                weighted = self.config.reranking_loss_weight * reranking
                loss = weighted if loss is None else loss + weighted
            reranking = reranking.detach()
        if pointer_labels is not None and documents.pointer_weights is not None:
            pointing = pointer_loss(documents.pointer_weights, pointer_labels, num_pointed_chunks)
            if self.config.pointer_loss_weight > 0:
                weighted = self.config.pointer_loss_weight * pointing
                loss = weighted if loss is None else loss + weighted
            pointing = pointing.detach()
        return ScaleDownOutput(
            loss=loss,
            # A copy, since the Trainer scales the loss in place, which may be this very tensor.
            generation_loss=generation.detach().clone() if generation is not None else None,
            reranking_loss=reranking,
            pointer_loss=pointing,
            logits=outputs.logits,
            memory_embeddings=documents.memory_embeddings,
            memory_mask=documents.memory_mask,
            reranking_scores=documents.reranking_scores,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _compress_inputs(
        self,
        memory_states=None,
        rerank_states=None,
        memory_embeddings=None,
        memory_mask=None,
        batch_size: int | None = None,
        **chunks,
    ) -> CompressedDocuments:
        """Memory embeddings from whichever form the documents have in the arguments of `forward`."""
        forms = {**chunks, "memory_states": memory_states, "memory_embeddings": memory_embeddings}
        named = [n for n in ("compressor_input_ids", "memory_states", "memory_embeddings") if forms[n] is not None]
        if len(named) > 1:
            raise ScaleDownError(f"The documents are given twice, as {' and as '.join(named)}; pass one of them.")
        if chunks["compressor_input_ids"] is not None:
            return self.get_memory_embeddings(**chunks, batch_size=batch_size)
        if memory_states is None:
            return CompressedDocuments(memory_embeddings=memory_embeddings, memory_mask=memory_mask)
        dtype = next(self.compressor.parameters(), memory_states).dtype
        if memory_mask is None:
            memory_mask = torch.ones(memory_states.shape[:2], dtype=torch.bool, device=memory_states.device)
        return self.compressor.project(memory_states.to(dtype), memory_mask, rerank_states)

    def _embed_prompt(
        self,
        input_ids: torch.LongTensor | None,
        slot_mask: torch.BoolTensor | None,
        documents: CompressedDocuments,
        embeds: torch.FloatTensor | None = None,
    ) -> torch.FloatTensor:
        """Embeddings of the prompt `(batch, prompt_len, hidden)`, those given or of the ids, slots filled."""
        if self.generator is None:
            raise ScaleDownError(WITHOUT_GENERATOR)
        if embeds is None:
            embeds = self.get_input_embeddings()(input_ids)  # (batch, prompt_len, hidden)
        num_slots = 0 if slot_mask is None else int(slot_mask.sum())
        memory = documents.memory_embeddings
        if memory is None:
            if num_slots > 0:
                raise ScaleDownError(
                    f"slot_mask marks {num_slots} slots but there is nothing to fill them with: pass "
                    "compressor_input_ids or memory_embeddings."
                )
            return embeds
        if slot_mask is not None and slot_mask.shape != embeds.shape[:2]:
            raise ScaleDownError(
                f"slot_mask has shape {tuple(slot_mask.shape)} for a prompt of shape {tuple(embeds.shape[:2])}; where "
                "tokens were added after the processor's, add as many False."
            )
        if documents.memory_mask is not None:
            memory = memory[documents.memory_mask.to(memory.device)]
        memory = memory.reshape(-1, memory.shape[-1])  # (num_slots, hidden)
        # Slots hold embeddings as they are in front of the first layer.
        memory = memory / embedding_scale(self.config.generator_config)
        if memory.shape[0] != num_slots:
            raise ScaleDownError(
                f"The prompt has {num_slots} slots but the documents {memory.shape[0]} memory embeddings. Build both "
                "with one call of the processor, with the same compression_rate and num_memory_tokens."
            )
        return embeds.masked_scatter(slot_mask.to(embeds.device).unsqueeze(-1), memory.to(embeds.device, embeds.dtype))


if not IS_REMOTE_CODE:
    AutoModel.register(ScaleDownConfig, ScaleDownModel, exist_ok=True)
    AutoModelForCausalLM.register(ScaleDownConfig, ScaleDownModel, exist_ok=True)
ScaleDownModel.register_for_auto_class("AutoModel")

__all__ = ["AnswerOutput", "CompressedDocuments", "CompressionCache", "ScaleDownModel", "ScaleDownOutput"]
