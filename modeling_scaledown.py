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

import contextlib
import copy
import difflib
import itertools
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

try:  # first, since it says which transformers is needed
    from .configuration_scaledown import WEIGHTS_FORMATS, ScaleDownConfig
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from configuration_scaledown import WEIGHTS_FORMATS, ScaleDownConfig

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchFeature,
    BitsAndBytesConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import (
    CONFIG_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    can_return_tuple,
    logging,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

try:
    from .answering_scaledown import AnswerOutput
    from .card_scaledown import CARD_NAME, CARD_TEMPLATE_NAME, HUB_NAME, is_rendered, read_card_fields, write_card
    from .compressor_scaledown import COMPRESSORS, CompressedDocuments, ScaleDownCompressor
    from .conversation_scaledown import Conversation, is_conversation, listed
    from .errors_scaledown import ScaleDownError
    from .gguf_scaledown import first_layers_of, gguf_files, read_config, split_gguf
    from .kinds_scaledown import check_compressor, check_generator, refuse_adapter, refuse_unknown
    from .processing_scaledown import PROCESSOR_FIELDS, ScaleDownProcessor
    from .reranking_scaledown import check_limits, document_scores, reranking_loss, select_chunks, slots_by_document
    from .shortcuts_scaledown import CACHE_NAME
    from .weights_scaledown import (
        absolute_name,
        bitsandbytes_config,
        changed_weights,
        check_fingerprint,
        checkpoint_index,
        execution_device,
        is_offloaded,
        is_slow_on_cpu,
        load_complete,
        load_first_layers,
        pin_revision,
        read_tensors,
        remove_stale_weights,
        spare_compressor,
        spare_compressor_if_possible,
        split_device_map,
        weight_samples,
        weights_fingerprint,
    )
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from answering_scaledown import AnswerOutput
    from card_scaledown import CARD_NAME, CARD_TEMPLATE_NAME, HUB_NAME, is_rendered, read_card_fields, write_card
    from compressor_scaledown import COMPRESSORS, CompressedDocuments, ScaleDownCompressor
    from conversation_scaledown import Conversation, is_conversation, listed
    from errors_scaledown import ScaleDownError
    from gguf_scaledown import first_layers_of, gguf_files, read_config, split_gguf
    from kinds_scaledown import check_compressor, check_generator, refuse_adapter, refuse_unknown
    from processing_scaledown import PROCESSOR_FIELDS, ScaleDownProcessor
    from reranking_scaledown import check_limits, document_scores, reranking_loss, select_chunks, slots_by_document
    from shortcuts_scaledown import CACHE_NAME
    from weights_scaledown import (
        absolute_name,
        bitsandbytes_config,
        changed_weights,
        check_fingerprint,
        checkpoint_index,
        execution_device,
        is_offloaded,
        is_slow_on_cpu,
        load_complete,
        load_first_layers,
        pin_revision,
        read_tensors,
        remove_stale_weights,
        spare_compressor,
        spare_compressor_if_possible,
        split_device_map,
        weight_samples,
        weights_fingerprint,
    )

logger = logging.get_logger(__name__)

IS_REMOTE_CODE = (__package__ or "").startswith("transformers_modules")
# What is nice to have and not worth an error.
QUIETLY = {"_raise_exceptions_for_gated_repo": False, "_raise_exceptions_for_connection_errors": False}
GENERATOR_ARGUMENTS = (
    "dtype",
    "torch_dtype",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_buffers",
    "attn_implementation",
)
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Chunks are compressed with others of like length. A pass ends where the next chunk is this much shorter than its
# longest, once the pass is large enough to keep the device busy: tokens on a CPU, and on an accelerator.
SIMILAR_LENGTH = 0.85
LARGE_PASS = {"cpu": 512}
LARGE_PASS_ELSEWHERE = 4096
# Larger passes take more memory, and beyond these no less time.
CHUNKS_PER_PASS = {"cpu": 16}
CHUNKS_PER_PASS_ELSEWHERE = 64
# Where `generate()` compiles the steps after the prompt when their cache is static.
COMPILING_DEVICES = ("cuda", "xpu")
# OSCAR, table 7.
DEFAULT_MAX_NEW_TOKENS = 128
LORA_DEFAULTS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"}
WITHOUT_GENERATOR = (
    "This model was loaded without its generator; it can compress and rank, not answer or have LoRA layers. Load it "
    "with the generator for that."
)
# The forms documents have among the arguments of `forward`: chunks to compress, or what was made of them before.
CHUNK_INPUTS = ("compressor_input_ids", "compressor_attention_mask", "chunk_slots", "compressor_document_mask")
COMPRESSED_INPUTS = ("memory_states", "rerank_states", "memory_embeddings", "memory_mask")


@dataclass
class ScaleDownOutput(CausalLMOutputWithPast):
    r"""
    Output of [`ScaleDownModel`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
            `generation_loss + reranking_loss_weight · reranking_loss`.
        generation_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Cross-entropy of the answer's tokens.
        reranking_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `reranking_labels` is given):
            Squared error of the reranking scores, summed over a question's documents, averaged over questions.
        logits (`torch.FloatTensor` of shape `(batch, kept_len, vocab_size)`):
            Next-token scores at the last `logits_to_keep` positions, or at all of them.
        past_key_values, from transformers 5.24 on cache (`Cache`, *optional*):
            The generator's key-value cache.
        memory_embeddings (`torch.FloatTensor` of shape `(num_chunks, slots, hidden_size)`, *optional*):
            Embeddings the slots were filled with.
        memory_mask (`torch.BoolTensor` of shape `(num_chunks, slots)`, *optional*):
            True where a chunk has a slot.
        reranking_scores (`torch.FloatTensor` of shape `(num_chunks,)`, *optional*):
            Relevance of each chunk to its query, higher is more relevant.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
            The generator's, when asked for.
    """

    generation_loss: torch.FloatTensor | None = None
    reranking_loss: torch.FloatTensor | None = None
    memory_embeddings: torch.FloatTensor | None = None
    memory_mask: torch.BoolTensor | None = None
    reranking_scores: torch.FloatTensor | None = None


class CompressionCache:
    r"""
    Bounded memory of compressed chunks, each with its question: what was used last stays.

    It belongs to weights that do not change: it is emptied when the model is put into training mode, and at the next
    use after weights were changed in place, loaded, or given another type or device. A change through `.data` leaves no
    trace in torch: call `clear` after one.

    Args:
        max_entries (`int`): Chunks to keep; one takes `slots · hidden_size` numbers on the model's device.
    """

    def __init__(self, max_entries: int):
        if max_entries < 1:
            raise ScaleDownError(f"max_entries={max_entries} must be at least 1.")
        self.max_entries = max_entries
        self.hits = self.misses = 0
        self._entries = OrderedDict()
        self._weights = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def hit_rate(self) -> float:
        """Share of the chunks asked for that were there."""
        return self.hits / max(self.hits + self.misses, 1)

    def belong_to(self, compressor: nn.Module):
        """Forgets all chunks unless the compressor has the weights it had at the last call."""
        # Whatever is written into a tensor raises its version; those of inference mode have none.
        weights = tuple(
            (tensor.data_ptr(), tensor.dtype, tensor.device, 0 if tensor.is_inference() else tensor._version)
            for tensor in itertools.chain(compressor.parameters(), compressor.buffers())
        )
        if self._weights is not None and weights != self._weights:
            self.clear()
        self._weights = weights

    def get(self, key: tuple) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Memory embeddings `(slots, hidden)` and score `()` of a chunk, or `None`; counts either."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        with contextlib.suppress(KeyError):  # another thread may just have dropped it
            self._entries.move_to_end(key)
        return found

    def put(self, key: tuple, memory: torch.Tensor, score: torch.Tensor | None):
        """Keeps a chunk, in the place of the one that was not used for longest."""
        self._entries[key] = (memory, score)
        self._entries.move_to_end(key)
        while len(self._entries) > self.max_entries:
            self._entries.popitem(last=False)

    def clear(self):
        """Forgets all chunks, and the counts."""
        self._entries.clear()
        self.hits = self.misses = 0


def pass_sizes(lengths: list[int], batch_size: int, large: int) -> list[int]:
    """
    Cuts chunks into passes of like length.

    Args:
        lengths (`list[int]`): Tokens of each chunk, longest first.
        batch_size (`int`): Chunks of a pass at most.
        large (`int`): Tokens from which on a pass may end before it is full.

    Returns:
        `list[int]`: Chunks of each pass.
    """
    sizes, longest = [], 0
    for length in lengths:
        full = not sizes or sizes[-1] == batch_size
        if full or (sizes[-1] * longest >= large and length < SIMILAR_LENGTH * longest):
            sizes.append(0)
            longest = length
        sizes[-1] += 1
    return sizes


class ScaleDownModel(PreTrainedModel, GenerationMixin):
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
                self._inject_lora(config.lora_config)
        self.loss_type = "ForCausalLM"
        self.card_fields = {}
        self.compression_cache = None
        self.compiles_decoding = False
        self._processor = None
        self._processor_arguments, self._processor_overrides = {}, {}
        self._generator_samples = None
        self.post_init()
        if not with_generator:
            self._keys_to_ignore_on_load_unexpected.add(r"^generator\.")
        if not with_backbone:
            self._keys_to_ignore_on_load_unexpected.add(r"^compressor\.backbone\.")
        self._freeze()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ScaleDownCompressor):
            for parameter in (module.memory_embeddings, module.rerank_embedding):
                if parameter is not None:
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)

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
        if self.config.compressor_type == "n_layers" and backbone is not None:
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

    # -- forward and generate ------------------------------------------------------------------------------------------

    def get_memory_embeddings(
        self,
        compressor_input_ids: torch.LongTensor,
        compressor_attention_mask: torch.LongTensor | None = None,
        chunk_slots: torch.LongTensor | None = None,
        compressor_document_mask: torch.BoolTensor | None = None,
        batch_size: int | None = None,
    ) -> CompressedDocuments:
        """
        Compresses tokenised chunks.

        Args:
            compressor_input_ids (`torch.LongTensor` of shape `(num_chunks, chunk_len)`): Query and chunk.
            compressor_attention_mask (`torch.LongTensor` of shape `(num_chunks, chunk_len)`, *optional*): 0 on padding.
            chunk_slots (`torch.LongTensor` of shape `(num_chunks,)`, *optional*):
                Memory embeddings of each chunk; `num_memory_tokens` for all when left out.
            compressor_document_mask (`torch.BoolTensor` of shape `(num_chunks, chunk_len)`, *optional*):
                True on the chunk's own tokens; needed with `slot_pooling="span_mean"`.
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
        limit = self.config.num_memory_tokens
        if chunk_slots is None:
            chunk_slots = compressor_input_ids.new_full((compressor_input_ids.shape[0],), limit)
        if chunk_slots.shape != compressor_input_ids.shape[:1] or chunk_slots.numel() == 0:
            raise ScaleDownError(
                f"chunk_slots has shape {tuple(chunk_slots.shape)} for {compressor_input_ids.shape[0]} chunks; pass "
                "one number per chunk, and at least one chunk."
            )
        if int(chunk_slots.max()) > limit or int(chunk_slots.min()) < 1:
            raise ScaleDownError(
                f"chunk_slots ranges from {int(chunk_slots.min())} to {int(chunk_slots.max())}; this model has 1 to "
                f"{limit} memory embeddings per chunk. Use a processor with num_memory_tokens={limit} or less."
            )
        chunks = (compressor_input_ids, compressor_attention_mask, chunk_slots, compressor_document_mask)
        if batch_size is not None:
            _check_batch_size(batch_size)
        if batch_size is None:
            return self.compressor(*chunks)
        return self._compress_by_length(chunks, batch_size)

    def _compress_by_length(self, chunks: tuple[torch.Tensor | None, ...], batch_size: int) -> CompressedDocuments:
        input_ids, attention_mask, chunk_slots, document_mask = chunks
        large = LARGE_PASS.get(self.device.type, LARGE_PASS_ELSEWHERE)
        parts, places = [], []
        for group, prefixes, left in self.compressor.read_prefixes(
            input_ids, attention_mask, document_mask, batch_size
        ):
            lengths, order = left[group].sum(dim=1).sort(descending=True, stable=True)
            for rows in order.split(pass_sizes(lengths.tolist(), batch_size, large)):
                places.append(group[rows])
                inputs = [
                    None if part is None else part[places[-1]].to(self.device)
                    for part in (input_ids, left, chunk_slots, document_mask)
                ]
                before = None if prefixes is None else prefixes.of(rows.to(self.device))
                parts.append(self.compressor(*inputs, prefixes=before))
        back = torch.cat(places).argsort().to(parts[0].memory_mask.device)
        longest = max(part.memory_mask.shape[1] for part in parts)
        pads = [longest - part.memory_mask.shape[1] for part in parts]
        memory = [nn.functional.pad(p.memory_embeddings, (0, 0, 0, n)) for p, n in zip(parts, pads, strict=True)]
        mask = [nn.functional.pad(part.memory_mask, (0, n)) for part, n in zip(parts, pads, strict=True)]
        scores = [part.reranking_scores for part in parts]
        return CompressedDocuments(
            memory_embeddings=torch.cat(memory)[back],
            memory_mask=torch.cat(mask)[back],
            reranking_scores=torch.cat(scores)[back] if scores[0] is not None else None,
        )

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
        chunk_to_document: torch.LongTensor | None = None,
        document_to_example: torch.LongTensor | None = None,
        memory_states: torch.FloatTensor | None = None,
        rerank_states: torch.FloatTensor | None = None,
        memory_embeddings: torch.FloatTensor | None = None,
        memory_mask: torch.BoolTensor | None = None,
        labels: torch.LongTensor | None = None,
        reranking_labels: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: object | None = None,
        cache: object | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_scored_examples: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ScaleDownOutput:
        r"""
        Compresses the documents, fills the slots of the prompt and runs the generator.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, prompt_len)`):
                The prompt; any id stands at a slot.
            attention_mask (`torch.LongTensor` of shape `(batch, prompt_len)`, *optional*):
                0 on padding, which may be on either side.
            slot_mask (`torch.BoolTensor` of shape `(batch, prompt_len)`, *optional*):
                True where a memory embedding goes; read row by row, the slots belong to the chunks in their order.
            compressor_input_ids, compressor_attention_mask, compressor_document_mask (`(num_chunks, chunk_len)`),
            chunk_slots (`(num_chunks,)`):
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
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                Compute logits at the last positions only, or, without labels, at those named; 0 computes all.
            num_items_in_batch, num_scored_examples (`int`, *optional*):
                Answer tokens and scored questions to average over, when a step is made of several micro-batches.
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
            chunk_slots=chunk_slots,
            memory_states=memory_states,
            rerank_states=rerank_states,
            memory_embeddings=memory_embeddings,
            memory_mask=memory_mask,
        )
        if inputs_embeds is None or documents.memory_embeddings is not None:
            inputs_embeds = self._embed_prompt(input_ids, slot_mask, documents, inputs_embeds)
        if position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]

        if use_cache is None and self.training:
            use_cache = False  # nothing is decoded, and checkpointed activations exclude a cache
        outputs = self.generator(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{CACHE_NAME: past_key_values if cache is None else cache},
            **kwargs,
        )
        loss, generation, reranking = None, None, None
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
        return ScaleDownOutput(
            loss=loss,
            # A copy, since the Trainer scales the loss in place, which may be this very tensor.
            generation_loss=generation.detach().clone() if generation is not None else None,
            reranking_loss=reranking,
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
                "tokens were added behind the processor's, add as many False."
            )
        if documents.memory_mask is not None:
            memory = memory[documents.memory_mask.to(memory.device)]
        memory = memory.reshape(-1, memory.shape[-1])  # (num_slots, hidden)
        # Granite scales all embeddings it is given, and slots hold them as they are after that.
        memory = memory / getattr(self.config.generator_config, "embedding_multiplier", 1.0)
        if memory.shape[0] != num_slots:
            raise ScaleDownError(
                f"The prompt has {num_slots} slots but the documents {memory.shape[0]} memory embeddings. Build both "
                "with one call of the processor, with the same compression_rate and num_memory_tokens."
            )
        return embeds.masked_scatter(slot_mask.to(embeds.device).unsqueeze(-1), memory.to(embeds.device, embeds.dtype))

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
        for name in ("chunk_to_document", "document_to_example"):
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
        settings = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        if not {"prompt_embeds", "inputs_embeds", "past_key_values", "cache"} & kwargs.keys() and slot_mask is None:
            self._refuse_plain_ids(settings)
        if _asked(kwargs, settings, "stop_strings") is not None and self._has_processor():
            kwargs.setdefault("tokenizer", self.processor.tokenizer)
        self._check_assistant(kwargs, settings)
        if self.compiles_decoding:
            kwargs = self._with_static_cache(kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _refuse_plain_ids(self, settings: GenerationConfig):
        """Ids of somebody else's making, such as a pipeline's, hold no documents and no prompt of this model."""
        if not getattr(settings, "is_assistant", False):
            raise ScaleDownError(
                "These token ids were not made by the model's processor, so that no document would be read: pipelines "
                "of transformers do so. Use model.answer(question, documents), or model.generate(**processor(question, "
                "documents)); model.generator.generate asks the language model alone."
            )

    def _check_assistant(self, kwargs: dict, settings: GenerationConfig):
        """Of what transformers offers for drafts of tokens, models and the prompt itself can be used."""
        assistant = kwargs.get("assistant_model")
        if assistant is not None and not isinstance(assistant, PreTrainedModel):
            raise ScaleDownError(
                f"assistant_model={assistant!r} must be a loaded model, such as "
                "AutoModelForCausalLM.from_pretrained(name)."
            )
        if _asked(kwargs, settings, "assistant_early_exit") is not None:
            raise ScaleDownError(
                "assistant_early_exit is not possible here: the layers are the generator's. Pass a small language "
                "model as assistant_model, or prompt_lookup_num_tokens."
            )

    def _get_candidate_generator(self, *args, **kwargs):
        """A plain language model that assists reads the ids of the prompt; documents are then in the target alone."""
        assistant = kwargs.get("assistant_model")
        if assistant is not None and assistant.config.model_type != self.config.model_type:
            kept = kwargs["model_kwargs"].items()
            kwargs["model_kwargs"] = {name: value for name, value in kept if name != "prompt_embeds"}
        return super()._get_candidate_generator(*args, **kwargs)

    def _with_static_cache(self, kwargs: dict) -> dict:
        """Arguments of `generate` with a static cache, unless they ask for what does not go with one."""
        settings = kwargs.get("generation_config") or self.generation_config
        assisted = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        names = (*assisted, "past_key_values", "cache", "cache_implementation")
        decided = any(_asked(kwargs, settings, name) is not None for name in names)
        if decided or _asked(kwargs, settings, "use_cache") is False:
            return kwargs
        return _with_setting(kwargs, "cache_implementation", "static")

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

    # -- plain text in, plain text out ---------------------------------------------------------------------------------

    @property
    def processor(self) -> ScaleDownProcessor:
        """
        The processor saved beside the weights, loaded at its first use, or the one that was assigned.

        Raises:
            ValueError: there is none, or one is assigned that allows more slots than the model has memory embeddings.
        """
        if self._processor is None:
            if not self.name_or_path:
                raise ScaleDownError(
                    "This model has no processor: it was built from a configuration. Assign one: model.processor = "
                    "ScaleDownProcessor.from_config(model.config, tokenizer)."
                )
            # Whoever let this very file run has trusted the repository; otherwise its tokenizer runs no code either.
            processor = ScaleDownProcessor.from_pretrained(
                self.name_or_path, trust_remote_code=IS_REMOTE_CODE, **self._processor_arguments
            )
            for name, value in self._processor_overrides.items():
                setattr(processor, name, value)
            self.processor = processor
        return self._processor

    @processor.setter
    def processor(self, processor: ScaleDownProcessor):
        if processor is not None and processor.num_memory_tokens > self.config.num_memory_tokens:
            raise ScaleDownError(
                f"The processor allows {processor.num_memory_tokens} slots per chunk, the model has "
                f"{self.config.num_memory_tokens} memory embeddings. Build it with ScaleDownProcessor.from_config."
            )
        if processor is not None:
            processor.check()
            self.config.prompt_date = processor.prompt_date or self.config.prompt_date
        self._processor = processor

    @torch.no_grad()
    def compress(
        self,
        questions: str | list[str],
        documents: list[str] | list[list[str]],
        compression_rate: int | None = None,
        num_memory_tokens: int | None = None,
        batch_size: int = 64,
    ) -> CompressedDocuments:
        """
        Compresses documents, each with its question in view.

        Args:
            questions (`str` or `list[str]`): One question, or one per list of documents.
            documents (`list[str]` or `list[list[str]]`): The documents.
            compression_rate, num_memory_tokens (`int`, *optional*): Overrides for this call.
            batch_size (`int`, defaults to 64): Chunks compressed at a time.

        Returns:
            `CompressedDocuments`: Chunks in the order of the documents.

        Raises:
            ValueError, TypeError: see `ScaleDownProcessor`; no documents at all.
        """
        questions, documents = self.processor.check_texts(questions, documents)
        return self._compress_texts(questions, documents, compression_rate, num_memory_tokens, batch_size)

    @torch.no_grad()
    def answer(
        self,
        questions: str | list[str],
        documents: list[str] | list[list[str]] | None = None,
        compression_rate: int | None = None,
        num_memory_tokens: int | None = None,
        return_reranking_scores: bool = False,
        batch_size: int = 16,
        min_reranking_score: float | None = None,
        max_documents: int | None = None,
        max_slots: int | None = None,
        system_prompt: str | None = None,
        **generation_kwargs,
    ) -> str | list[str] | AnswerOutput:
        """
        Answers questions from compressed documents.

        Args:
            questions (`str` or `list[str]`):
                One question, or several. A question may be a list of messages of `role` and `content`: the last is the
                question, earlier ones are shown to the generator, and a system message stands in place of the model's.
            documents (`list[str]` or `list[list[str]]`, *optional*):
                Its documents, or one list per question; none asks the generator alone.
            compression_rate, num_memory_tokens (`int`, *optional*): Overrides for this call.
            return_reranking_scores (`bool`, defaults to `False`):
                Also return the documents' relevance, from the same pass, which documents were read, and tokens.
            batch_size (`int`, defaults to 16): Questions answered at a time.
            min_reranking_score (`float`, *optional*):
                Leave out documents that score lower, before the generator reads them. With this and the next two, a
                question none of whose documents is left is asked without any.
            max_documents (`int`, *optional*): Keep so many of the best documents, in the order they were given.
            max_slots (`int`, *optional*):
                Keep the best documents that fit into so many memory embeddings; one that does not makes way to the
                next.
            system_prompt (`str`, *optional*): In place of the model's own, for this call.
            generation_kwargs: Passed on to `generate`; the length is that of `model.generation_config`, or 128 new
                tokens, unless one is given.

        Returns:
            `str` for one question, `list[str]` for a list; with `return_reranking_scores` an `AnswerOutput`, which is
            a pair of that and the scores, one per document, with fields for what else is known.

        Raises:
            ValueError, TypeError: see `ScaleDownProcessor`; a prompt that leaves no room for the answer.
        """
        given = listed(questions)
        single = isinstance(given, str) or is_conversation(given)
        questions, documents = self.processor.check_texts(given, documents)
        conversations = self.processor.conversations(given, system_prompt)
        limits = (min_reranking_score, max_documents, max_slots)
        check_limits(min_reranking_score, max_documents=max_documents, max_slots=max_slots)
        generation_kwargs, max_new_tokens = _with_length(generation_kwargs, self.generation_config)
        _check_batch_size(batch_size)
        columns = [[] for _ in range(5)]
        for start in range(0, len(questions), batch_size):
            part = slice(start, start + batch_size)
            batch, compressed, scores, read = self._fill_prompts(
                questions[part],
                documents[part],
                conversations[part],
                start,
                compression_rate,
                num_memory_tokens,
                limits,
                max_new_tokens,
                return_reranking_scores,
            )
            sequences = _sequences(self.generate(**batch, **compressed, **generation_kwargs))
            start_of_answers = batch["input_ids"].shape[1]
            answers = self.processor.decode_answers(sequences, start_of_answers)
            lengths = _answer_lengths(sequences[:, start_of_answers:], generation_kwargs, self.generation_config)
            per_question = len(answers) // len(scores)  # as many as sequences were asked for
            prompts = batch["attention_mask"].sum(dim=1).tolist()
            prompts = [length for length in prompts for _ in range(per_question)]
            for column, values in zip(columns, (answers, scores, read, prompts, lengths), strict=True):
                column += values
        if single:
            several = len(columns[0]) > 1
            columns = [column if several and len(column) > 1 else column[0] for column in columns]
        return AnswerOutput(*columns) if return_reranking_scores else columns[0]

    def _fill_prompts(
        self,
        questions: list[str],
        documents: list[list[str]],
        conversations: list[Conversation],
        first_question: int,
        compression_rate: int | None,
        num_memory_tokens: int | None,
        limits: tuple[float | int | None, ...],
        max_new_tokens: int | None,
        wants_scores: bool,
    ) -> tuple[BatchFeature, dict[str, torch.Tensor], list[list[float]], list[list[int]]]:
        """The prompts of some questions, what fills them, and of each question's documents scores and those read."""
        selects = any(limit is not None for limit in limits)
        if wants_scores or selects:
            self._require_reranking()
        chunks = self.processor.encode_documents(questions, documents, compression_rate, num_memory_tokens)
        slots = slots_by_document(chunks, documents)
        context = (conversations, max_new_tokens, first_question)
        if not selects:  # a prompt that is too long is told before the work
            batch = self._build_prompts(questions, slots, *context)
        read = [list(range(len(row))) for row in documents]
        compressed, scores = {}, [[] for _ in documents]
        if chunks:
            memory = self._compress_chunks(chunks, self.chunks_per_pass)
            compressed = {"memory_embeddings": memory.memory_embeddings, "memory_mask": memory.memory_mask}
            if wants_scores or selects:
                scores = self._scores_by_example(memory.reranking_scores, chunks, documents)
        if selects:
            slots, stays = select_chunks(scores, slots, chunks, *limits)
            if chunks:
                compressed["memory_mask"] = memory.memory_mask & stays.to(memory.memory_mask.device).unsqueeze(1)
                kept, places = set(chunks["chunk_to_document"][stays].tolist()), itertools.count()
                read = [[i for i in range(len(row)) if next(places) in kept] for row in documents]
            for i, (row, left) in enumerate(zip(documents, read, strict=True)):
                if row and not left:
                    logger.warning_once(
                        f"questions[{first_question + i}] is answered without documents: none of its {len(row)} is "
                        "left by min_reranking_score, max_documents and max_slots. return_reranking_scores=True "
                        "returns which documents were read."
                    )
            batch = self._build_prompts(questions, slots, *context)
        return batch, compressed, scores, read

    @torch.no_grad()
    def prompt_embeddings(
        self,
        questions: str | list[str],
        documents: list[str] | list[list[str]] | None = None,
        compression_rate: int | None = None,
        num_memory_tokens: int | None = None,
        min_reranking_score: float | None = None,
        max_documents: int | None = None,
        max_slots: int | None = None,
        system_prompt: str | None = None,
    ) -> tuple[torch.FloatTensor, torch.LongTensor]:
        """
        Builds the prompts that `answer` would give to the generator, for an engine that reads embeddings.

        Args:
            questions, documents, compression_rate, num_memory_tokens, min_reranking_score, max_documents, max_slots,
            system_prompt: As in `answer`.

        Returns:
            `tuple`: embeddings `(batch, prompt_len, hidden)`, slots filled, and their mask `(batch, prompt_len)`, 0 on
            padding, which is at the left.

        Raises:
            ValueError, TypeError: as in `answer`.
        """
        given = listed(questions)
        questions, documents = self.processor.check_texts(given, documents)
        conversations = self.processor.conversations(given, system_prompt)
        check_limits(min_reranking_score, max_documents=max_documents, max_slots=max_slots)
        limits = (min_reranking_score, max_documents, max_slots)
        batch, compressed, _, _ = self._fill_prompts(
            questions, documents, conversations, 0, compression_rate, num_memory_tokens, limits, 0, False
        )
        documents = CompressedDocuments(**compressed)
        return self._embed_prompt(batch["input_ids"], batch["slot_mask"], documents), batch["attention_mask"]

    @torch.no_grad()
    def rank(
        self,
        question: str,
        documents: list[str],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int = 64,
    ) -> list[dict]:
        """
        Ranks documents by relevance, in the return form of `sentence_transformers.CrossEncoder.rank`.

        Args:
            question (`str`): The question; of a list of messages, the last.
            documents (`list[str]`): Documents to rank; one of several chunks counts as its best chunk.
            top_k (`int`, *optional*): Return only the best.
            return_documents (`bool`, defaults to `False`): Add each document's text.
            batch_size (`int`, defaults to 64): Chunks scored at a time.

        Returns:
            `list[dict]`: `{"corpus_id": int, "score": float}` (and `"text"`), best first.

        Raises:
            ValueError, TypeError: see `ScaleDownProcessor`; the model was built without reranking.
        """
        self._require_reranking()
        if not isinstance(question, str) and not is_conversation(question):
            raise TypeError(f"question must be one string, got {type(question).__name__}; call rank once per question.")
        check_limits(top_k=top_k)
        questions, (documents,) = self.processor.check_texts(question, documents)
        if not documents:
            return []
        chunks = self._compress_texts(questions, [documents], None, None, batch_size)
        scores = document_scores(chunks.reranking_scores, chunks.chunk_to_document, len(documents)).tolist()
        ranking = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
        results = [{"corpus_id": i, "score": scores[i]} for i in ranking]
        if return_documents:
            results = [{**result, "text": documents[result["corpus_id"]]} for result in results]
        return results

    def generate_from_text(
        self, questions: list[str], documents: list[list[str]], max_new_tokens: int | None = None
    ) -> list[str]:
        """
        Answers questions; the name and the arguments of published OSCAR and PISCO models.

        Args:
            questions (`list[str]`): Questions.
            documents (`list[list[str]]`): One list of documents per question.
            max_new_tokens (`int`, *optional*): Longest answer, in tokens; as in `answer` when left out.

        Returns:
            `list[str]`: One answer per question, decoded greedily.
        """
        answers = self.answer(questions, documents, max_new_tokens=max_new_tokens, do_sample=False)
        return [answers] if isinstance(answers, str) else answers

    @torch.no_grad()
    def compress_documents(self, documents: list[str], questions: list[str] | None = None) -> torch.FloatTensor:
        """
        Compresses documents one by one; the name and the arguments of published OSCAR and PISCO models.

        Args:
            documents (`list[str]`): Documents.
            questions (`list[str]`, *optional*):
                The question of each document. Without, documents are compressed for no question in particular, which
                is not what the model was trained for.

        Returns:
            `torch.FloatTensor` of shape `(n_docs, slots, hidden)`: The chunks of a long document follow each other;
            documents with fewer slots than the longest end in rows of zeros.

        Raises:
            TypeError: documents or questions are not lists.
            ValueError: as many questions as documents are needed.
        """
        if isinstance(documents, str) or isinstance(questions, str):
            raise TypeError("documents and questions must be lists of strings, one question per document.")
        documents, questions = listed(documents), listed(questions)
        if questions is not None and len(questions) != len(documents):
            raise ScaleDownError(f"{len(documents)} documents but {len(questions)} questions; pass one question each.")
        if not documents:
            raise ScaleDownError("documents is empty; pass at least one document.")
        asked = questions if questions is not None else ["-"] * len(documents)
        self.processor.check_texts(asked, [[document] for document in documents])
        queries = questions if questions is not None else [""] * len(documents)
        chunks = self._compress_texts(queries, [[document] for document in documents], None, None, 64)
        rows = [
            chunks.memory_embeddings[chunks.chunk_to_document == i][chunks.memory_mask[chunks.chunk_to_document == i]]
            for i in range(len(documents))
        ]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (n_docs, slots, hidden)

    @torch.no_grad()
    def generate_from_compressed_documents_and_questions(
        self, questions: list[str], compressed_documents: torch.FloatTensor, max_new_tokens: int | None = None
    ) -> list[str]:
        """
        Answers from what `compress_documents` returned; name and arguments as in published OSCAR and PISCO models.

        Args:
            questions (`list[str]`): Questions.
            compressed_documents (`torch.FloatTensor` of shape `(n_docs, slots, hidden)`):
                The documents of all questions in a row, equally many for each.
            max_new_tokens (`int`, *optional*): Longest answer, in tokens; as in `answer` when left out.

        Returns:
            `list[str]`: One answer per question, decoded greedily.

        Raises:
            TypeError: questions is not a list.
            ValueError: the documents cannot be shared out equally, or have another width than the generator.
        """
        if isinstance(questions, str):
            raise TypeError("questions must be a list of strings.")
        questions = listed(questions)
        if questions:
            self.processor.check_texts(questions, None)
        memory = torch.as_tensor(compressed_documents)
        if memory.dim() != 3 or memory.shape[-1] != self.config.hidden_size:
            raise ScaleDownError(
                f"compressed_documents has shape {tuple(memory.shape)}, expected (n_docs, slots, "
                f"{self.config.hidden_size}) as compress_documents returns it."
            )
        if not questions or memory.shape[0] % len(questions) != 0:
            raise ScaleDownError(
                f"{memory.shape[0]} compressed documents cannot be shared out equally over {len(questions)} questions."
            )
        mask = memory.abs().sum(dim=-1) > 0  # (n_docs, slots)
        batch = self.processor.build_prompts(questions, mask.sum(dim=1).view(len(questions), -1).tolist())
        settings, max_new_tokens = _with_length(
            {"max_new_tokens": max_new_tokens, "do_sample": False}, self.generation_config
        )
        self._check_context(batch, max_new_tokens, 0)
        sequences = self.generate(
            **batch.to(self.device),
            memory_embeddings=memory.to(self.device),
            memory_mask=mask.to(self.device),
            **settings,
        )
        return self.processor.decode_answers(sequences, batch["input_ids"].shape[1])

    def _compress_texts(self, questions, documents, compression_rate, num_memory_tokens, batch_size):
        _check_batch_size(batch_size)
        batch = self.processor.encode_documents(questions, documents, compression_rate, num_memory_tokens)
        if not batch:
            raise ScaleDownError("documents is empty; there is nothing to compress.")
        compressed = self._compress_chunks(batch, batch_size)
        device = compressed.memory_embeddings.device
        compressed.chunk_to_document = batch["chunk_to_document"].to(device)
        compressed.document_to_example = batch["document_to_example"].to(device)
        return compressed

    def _compress_chunks(self, batch: dict[str, torch.Tensor], batch_size: int) -> CompressedDocuments:
        """Compresses chunks the processor made, but those in the cache."""
        cache = self.compression_cache
        if cache is None:
            return self.get_memory_embeddings(**{name: batch[name] for name in CHUNK_INPUTS}, batch_size=batch_size)
        cache.belong_to(self.compressor)
        # What the compressor reads, which part of it is the document, and the slots.
        rows = zip(
            batch["chunk_slots"].tolist(),
            batch["compressor_document_mask"].sum(dim=1).tolist(),
            batch["compressor_input_ids"],
            batch["compressor_attention_mask"].bool(),
            strict=True,
        )
        keys = [(slots, count, *ids[kept].tolist()) for slots, count, ids, kept in rows]
        entries = {key: cache.get(key) for key in keys}
        missing = [i for i, key in enumerate(keys) if entries[key] is None]
        if missing:
            chunks = {name: batch[name][missing] for name in CHUNK_INPUTS}
            new = self.get_memory_embeddings(**chunks, batch_size=batch_size)
            for row, i in enumerate(missing):
                memory = new.memory_embeddings[row, : keys[i][0]].clone()  # a part would keep the whole batch alive
                score = None if new.reranking_scores is None else new.reranking_scores[row].clone()
                entries[keys[i]] = (memory, score)
                cache.put(keys[i], memory, score)
        memories, scores = zip(*(entries[key] for key in keys), strict=True)
        memory = nn.utils.rnn.pad_sequence(memories, batch_first=True)  # (num_chunks, slots, hidden)
        slot_ids = torch.arange(memory.shape[1], device=memory.device)
        return CompressedDocuments(
            memory_embeddings=memory,
            memory_mask=slot_ids < batch["chunk_slots"].to(memory.device).unsqueeze(1),
            reranking_scores=None if scores[0] is None else torch.stack(scores),
        )

    @property
    def chunks_per_pass(self) -> int:
        """Chunks `answer` compresses at a time."""
        return CHUNKS_PER_PASS.get(self.device.type, CHUNKS_PER_PASS_ELSEWHERE)

    def _build_prompts(self, questions, slots, conversations, max_new_tokens, first_question: int):
        batch = self.processor.build_prompts(questions, slots, conversations=conversations)
        self._check_context(batch, max_new_tokens, first_question)
        return batch.to(self.device)

    def _scores_by_example(self, chunk_scores, batch, documents) -> list[list[float]]:
        count = batch["document_to_example"].shape[0]
        scores = iter(document_scores(chunk_scores, batch["chunk_to_document"], count).tolist())
        return [[next(scores) for _ in listed] for listed in documents]

    def _require_reranking(self):
        if not self.config.enable_reranking:
            raise ScaleDownError("This model was built with enable_reranking=False and has no reranking scores.")
        if self.config.reranking_trained is False:
            logger.warning_once(
                "The reranking head of this model has not learned: its scores order documents at random. Train it on "
                "records with `reranking_scores` or `positives`."
            )

    def _check_context(self, batch, max_new_tokens: int | None, first_question: int):
        limit = getattr(self.config.generator_config, "max_position_embeddings", None)
        if limit is None or max_new_tokens is None:
            return
        lengths = batch["attention_mask"].sum(dim=1)
        longest = int(lengths.argmax())
        if int(lengths[longest]) + max_new_tokens > limit:
            raise ScaleDownError(
                f"questions[{first_question + longest}] has a prompt of {int(lengths[longest])} tokens; with "
                f"max_new_tokens={max_new_tokens} that exceeds the generator's {limit} positions. Pass fewer "
                "documents, a higher compression_rate or a smaller max_new_tokens."
            )

    # -- LoRA ----------------------------------------------------------------------------------------------------------

    def add_lora(self, **lora_kwargs):
        """
        Adds trainable LoRA layers to the generator.

        Args:
            lora_kwargs: Arguments of `peft.LoraConfig` over the defaults r=16, lora_alpha=32, lora_dropout=0.1, all
                linear layers (OSCAR, table 7).

        Raises:
            ImportError: peft is not installed.
            ValueError: the generator has LoRA layers already, its own weights would be trained, it is offloaded, or
                there is none.
        """
        if self.generator is None:
            raise ScaleDownError(WITHOUT_GENERATOR)
        if self.config.lora_config is not None:
            raise ScaleDownError("The generator has LoRA layers already; call merge_lora() before adding new ones.")
        if is_offloaded(self.generator):
            raise ScaleDownError(
                "The generator is offloaded, and layers that learn must not be. Load it without offloading, quantised "
                "if it is too large: load_in_4bit=True."
            )
        if lora_kwargs.get("modules_to_save") or lora_kwargs.get("bias", "none") != "none":
            raise ScaleDownError(
                "modules_to_save and bias would train the generator's own weights, which stay frozen here; leave them "
                "out and name linear layers in target_modules."
            )
        settings = {**LORA_DEFAULTS, **lora_kwargs}
        for name, value in settings.items():
            if isinstance(value, set | frozenset):  # which JSON does not know
                settings[name] = sorted(value)
        self._inject_lora(settings)
        self.generator.train(self.generator.training)  # the new layers start in training mode
        self.config.lora_config = settings
        self._freeze()

    @torch.no_grad()
    def merge_lora(self):
        """
        Adds the LoRA weights into the generator's own, for inference at full speed; nothing is left of LoRA.

        Raises:
            ValueError: the generator is quantised, so that most of what LoRA learned would be rounded away, it is
                offloaded, or there is none.
        """
        if self.config.lora_config is None:
            return
        if self.generator is None:
            raise ScaleDownError(WITHOUT_GENERATOR)
        if self._is_quantized():
            raise ScaleDownError(
                "LoRA cannot be merged into a quantised generator without rounding away what it learned. Save the "
                'model with weights_format="delta", load that without load_in_4bit or load_in_8bit, and merge there.'
            )
        if is_offloaded(self.generator):
            raise ScaleDownError(
                "LoRA cannot be merged into a generator whose weights are offloaded: they are on no device between "
                "calls. Load the model without offloading, merge and save it, and load that with offloading."
            )
        for name, module in list(self.generator.named_modules()):
            if hasattr(module, "lora_A") and hasattr(module, "merge"):
                module.merge(safe_merge=True)
                parent, _, child = name.rpartition(".")
                setattr(self.generator.get_submodule(parent), child, module.get_base_layer())
        if hasattr(self.generator, "peft_config"):
            del self.generator.peft_config
        self.config.lora_config = None
        # From here on the generator is no longer the one of its repository.
        self.config.weights_format = "full"
        self.config.generator_fingerprint = None

    def optimize_for_inference(self, cache_entries: int | None = None, compile: bool = False) -> "ScaleDownModel":
        """
        Prepares the model for answering: LoRA merged, nothing trainable, and on demand more.

        Args:
            cache_entries (`int`, *optional*):
                Chunks whose compression is remembered with their question; `model.compression_cache.hit_rate` tells
                whether that pays.
            compile (`bool`, defaults to `False`):
                Write answers with a static cache, for which transformers compiles the steps after the prompt: a minute
                for each new number of questions at a time, then faster steps. Call it once the model is on its device;
                where device, architecture or quantisation cannot, a warning says so and nothing changes.

        Returns:
            `ScaleDownModel`: The model itself, in evaluation mode.
        """
        if self.generator is None:
            pass  # compresses and ranks
        elif self.config.lora_config is not None and (is_offloaded(self.generator) or self._is_quantized()):
            reason = "offloaded" if is_offloaded(self.generator) else "quantised"
            logger.warning(f"The generator is {reason}; its LoRA layers stay unmerged, and slower.")
        else:
            self.merge_lora()
        self.eval().requires_grad_(False)
        if cache_entries is not None:
            self.compression_cache = CompressionCache(cache_entries)
        self.compiles_decoding = compile and self._can_compile_decoding()
        return self

    def _is_quantized(self) -> bool:
        return getattr(self.generator, "hf_quantizer", None) is not None

    def _can_compile_decoding(self) -> bool:
        quantizer = getattr(self.generator, "hf_quantizer", None) or getattr(self, "hf_quantizer", None)
        places = {str(place) for place in getattr(self, "hf_device_map", {}).values()}
        reason = None
        if self.device.type not in COMPILING_DEVICES:
            reason = f"that works on {' and '.join(COMPILING_DEVICES)}, and the model is on {self.device.type}"
        elif self.generator is None:
            reason = "the model was loaded without its generator"
        elif not self.generator._can_compile_fullgraph:
            reason = f"{type(self.generator).__name__} does not go with a static cache"
        elif quantizer is not None and not quantizer.is_compileable:
            reason = "the generator's quantisation does not allow it"
        elif {"cpu", "disk"} & places or is_offloaded(self):
            reason = "parts of the model are offloaded"
        if reason is not None:
            logger.warning(f"Decoding is not compiled: {reason}.")
        return reason is None

    def _inject_lora(self, settings: dict):
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError(
                "LoRA layers in the generator need peft: pip install peft. (A model saved after merge_lora() does not.)"
            ) from error
        inject_adapter_in_model(LoraConfig(**settings), self.generator)
        for name, parameter in self.generator.named_parameters():
            if "lora_" in name:
                # PEFT initialised them; transformers' own initialisation would undo that the new layers start as 0.
                parameter._is_hf_initialized = True

    def _freeze(self):
        if self.generator is not None:
            for name, parameter in self.generator.named_parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_("lora_" in name)
        if self.compressor.backbone is None:  # what the backbone read is in the cached states already
            for parameter in (self.compressor.memory_embeddings, self.compressor.rerank_embedding):
                if parameter is not None:
                    parameter.requires_grad_(False)

    # -- building and loading ------------------------------------------------------------------------------------------

    @classmethod
    def from_backbones(
        cls,
        generator: str,
        compressor: str | None = None,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        compressor_revision: str | None = None,
        gguf_file: str | None = None,
        compressor_gguf_file: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        dtype: torch.dtype | str = "auto",
        torch_dtype: torch.dtype | str | None = None,
        quantization_config: QuantizationConfigMixin | dict | None = None,
        device_map: str | dict | None = None,
        max_memory: dict | None = None,
        offload_folder: str | None = None,
        offload_buffers: bool | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        with_generator: bool = True,
        with_backbone: bool = True,
        **config_kwargs,
    ) -> "ScaleDownModel":
        r"""
        Builds a model from pretrained backbones.

        Args:
            generator (`str`):
                Hub name or folder of a causal language model with safetensors weights, or the path of a GGUF file.
            compressor (`str`, *optional*):
                Hub name or folder of the compressor's backbone; left out for `compressor_type="n_layers"`, which
                reads the generator's first layers, and only the shards that hold them. Or the path of a GGUF file.
            config (`ScaleDownConfig`, *optional*): Settings; its backbone configurations are filled in.
            revision, compressor_revision (`str`, *optional*): Branch, tag or commit of either repository.
            gguf_file, compressor_gguf_file (`str`, *optional*):
                GGUF file to read in either folder or repository; its weights are unpacked.
            load_in_4bit, load_in_8bit (`bool`, defaults to `False`): Quantise the generator with bitsandbytes.
            dtype (`torch.dtype` or `str`, defaults to `"auto"`): Of the weights; `"auto"` keeps the checkpoint's.
            torch_dtype: Older name of `dtype`.
            quantization_config: As in `from_pretrained`, for the generator.
            device_map, max_memory, offload_folder, offload_buffers: As in `from_pretrained`, for the generator.
            attn_implementation, token, cache_dir, local_files_only: As in `from_pretrained`.
            trust_remote_code (`bool`, defaults to `False`):
                Let tokenizers run code of their repositories. Models are those of transformers.
            with_generator, with_backbone (`bool`, defaults to `True`):
                `False` loads only the other side, as either stage of two-stage training does.
            config_kwargs: Fields of `ScaleDownConfig`, when no `config` is given.

        Returns:
            `ScaleDownModel` in evaluation mode, with its processor, the generator frozen.

        Raises:
            ValueError: settings that contradict each other, or a repository without safetensors.
            ImportError: quantisation without bitsandbytes.

        Example:

        ```python
        >>> model = ScaleDownModel.from_backbones(
        ...     "mistralai/Mistral-7B-Instruct-v0.2",
        ...     revision="63a8b081895390a26e140280378bc85ec8bce07a",
        ...     num_compressor_layers=8,
        ... )  # doctest: +SKIP

        ```
        """
        generator, gguf_file = split_gguf(generator, gguf_file)
        if compressor is not None:
            compressor, compressor_gguf_file = split_gguf(compressor, compressor_gguf_file)
        if torch_dtype is not None and dtype != "auto":
            raise ScaleDownError(f"dtype={dtype} and torch_dtype={torch_dtype} are two names of one thing; pass dtype.")
        dtype = dtype if torch_dtype is None else torch_dtype
        quantization = bitsandbytes_config(load_in_4bit, load_in_8bit, dtype)
        if quantization_config is not None and quantization is not None:
            raise ScaleDownError("quantization_config and load_in_4bit or load_in_8bit exclude each other; choose one.")
        if quantization_config is not None:
            quantization = spare_compressor_if_possible(quantization_config)
        placing = {"max_memory": max_memory, "offload_folder": offload_folder, "offload_buffers": offload_buffers}
        placing = {name: value for name, value in placing.items() if value is not None}
        generator, compressor = absolute_name(generator), absolute_name(compressor)
        settings = cls._settings_for_backbones(compressor, config, config_kwargs)
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        generator_hub = pin_revision(generator, {**hub, "revision": revision, "gguf_file": gguf_file})
        compressor_hub = {}
        if compressor is not None:
            compressor_hub = {**hub, "revision": compressor_revision, "gguf_file": compressor_gguf_file}
            compressor_hub = pin_revision(compressor, compressor_hub)
        for name, where in ((generator, generator_hub), (compressor, compressor_hub)):
            if name is not None and where["gguf_file"] is None:
                place = {key: value for key, value in where.items() if key != "gguf_file"}
                refuse_adapter(name, place)
                refuse_unknown(name, place)
        config = cls._config_of_backbones(settings, generator, compressor, generator_hub, compressor_hub)
        config.reranking_trained = False

        loading = {"attn_implementation": attn_implementation} if attn_implementation is not None else {}
        language_model, backbone = None, None
        if with_generator:
            language_model = load_complete(
                AutoModelForCausalLM,
                generator,
                config=config.generator_config,
                device_map=device_map,
                quantization_config=quantization,
                dtype=dtype,
                **placing,
                **loading,
                **generator_hub,
            )
        # A checkpoint has one type, and "auto" gives every part of the model the one it will be loaded in.
        loading["dtype"] = language_model.dtype if dtype == "auto" and with_generator else dtype
        if with_backbone and compressor is None and gguf_file is not None:
            whole = language_model
            if whole is None:  # a GGUF file is read whole or not at all
                whole = load_complete(AutoModelForCausalLM, generator, **loading, **generator_hub)
            backbone = first_layers_of(whole, config.compressor_config)
        elif with_backbone and compressor is None:
            backbone = load_first_layers(generator, config, loading, hub=generator_hub)
        elif with_backbone:
            backbone = load_complete(
                AutoModel, compressor, config=config.compressor_config, **loading, **compressor_hub
            )
        model = cls(
            config,
            generator=language_model,
            backbone=backbone,
            with_generator=with_generator,
            with_backbone=with_backbone,
        )
        model._share_quantizer()
        model.remember_generator()
        model._fit_compressor(language_model, backbone)
        code = {"trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(generator, **code, **generator_hub)
        if with_generator:
            model.generation_config = _greedy(language_model.generation_config, tokenizer)
        model.processor = ScaleDownProcessor.from_config(
            config,
            tokenizer,
            AutoTokenizer.from_pretrained(compressor, **code, **compressor_hub) if compressor is not None else None,
        )
        return model.eval()

    @classmethod
    def _settings_for_backbones(
        cls, compressor: str | None, config: PreTrainedConfig | None, config_kwargs: dict
    ) -> dict:
        """Fields of the configuration to build, without those the backbones decide."""
        if config is not None and config_kwargs:
            raise ScaleDownError(f"Pass either config or its fields, not both: got {', '.join(sorted(config_kwargs))}.")
        unknown = sorted(config_kwargs.keys() - cls.config_class.__annotations__.keys())
        if unknown:
            near = difflib.get_close_matches(unknown[0], cls.config_class.__annotations__, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ScaleDownError(f"from_backbones has no argument {unknown[0]}{hint}")
        settings = config.to_dict() if config is not None else config_kwargs
        own = ("generator_config", "compressor_config", "auto_map", "_name_or_path", "quantization_config")
        settings = {name: value for name, value in settings.items() if name not in own}
        compressor_type = settings.get("compressor_type", "n_layers")
        if (compressor is None) != (compressor_type == "n_layers"):
            raise ScaleDownError(
                f"compressor={compressor!r} does not go with compressor_type={compressor_type!r}: n_layers copies the "
                "generator's own layers and takes no compressor, the other types need one."
            )
        return settings

    @classmethod
    def _config_of_backbones(
        cls, settings: dict, generator: str, compressor: str | None, generator_hub: dict, compressor_hub: dict
    ) -> PreTrainedConfig:
        """The configuration with those of the backbones, and where the generator comes from."""
        generator_config = read_config(generator, generator_hub)
        check_generator(generator, generator_config)
        generator_config = generator_config.get_text_config(decoder=True)
        compressor_config = None
        if compressor is not None:
            compressor_config = read_config(compressor, compressor_hub)
            check_compressor(compressor, compressor_config)
        config = cls.config_class(
            **{**settings, "generator_config": generator_config, "compressor_config": compressor_config}
        )
        if compressor is None and getattr(generator_config, "quantization_config", None) is not None:
            raise ScaleDownError(
                f'{generator!r} is quantised; compressor_type="n_layers" trains a copy of its first layers and needs '
                "them unquantised. Name the original checkpoint, and quantise it with load_in_4bit or load_in_8bit."
            )
        config.generator_name_or_path = generator
        config.generator_revision = generator_hub["revision"]
        config.generator_gguf_file = generator_hub["gguf_file"]
        config.generator_fingerprint = weights_fingerprint(generator, **generator_hub)
        return config

    def _fit_compressor(self, generator: PreTrainedModel | None, backbone: PreTrainedModel | None):
        """Gives the compressor's own weights the generator's device and the backbone's type, and a start."""
        if generator is not None:
            self.compressor.to(device=execution_device(generator))
        loaded = backbone if backbone is not None else generator
        for name, parameter in self.compressor.named_parameters():
            if loaded is not None and not name.startswith("backbone."):  # whose buffers stay in 32 bits
                parameter.data = parameter.data.to(loaded.dtype)
        if backbone is not None:
            self.compressor.initialize_from_vocabulary()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | None,
        *model_args,
        config: PreTrainedConfig | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        **kwargs,
    ):
        r"""
        Loads a model that was saved whole or as a delta; the call is the same.

        Args:
            pretrained_model_name_or_path (`str`): Hub name or folder.
            config (`ScaleDownConfig`, *optional*): In place of the saved one.
            load_in_4bit, load_in_8bit (`bool`, defaults to `False`):
                Quantise the generator with bitsandbytes; the compressor keeps its precision.
            model_args, kwargs:
                As in `PreTrainedModel.from_pretrained`. A `quantization_config` is applied to the generator alone.

        Returns:
            `ScaleDownModel` in evaluation mode, the generator frozen.

        Raises:
            ValueError: the generator's repository no longer holds the weights a delta was made for, the checkpoint does
                not hold the LoRA weights its configuration asks for, or a quantisation cannot leave the compressor out.
            ImportError: quantisation without bitsandbytes, or unmerged LoRA without peft.
        """
        _refuse_gguf(pretrained_model_name_or_path)
        # The processor and the card are read when they are needed, from wherever that is.
        pretrained_model_name_or_path = absolute_name(pretrained_model_name_or_path)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        given = kwargs if config is None else config.to_dict()
        overrides = {name: given[name] for name in PROCESSOR_FIELDS if name in given}
        kwargs.setdefault("use_safetensors", True)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["output_loading_info"] = True
        quantization = bitsandbytes_config(load_in_4bit, load_in_8bit, kwargs.get("dtype", kwargs.get("torch_dtype")))
        if quantization is not None:
            kwargs["quantization_config"] = quantization
        is_delta = False
        if pretrained_model_name_or_path is not None:
            hub = pin_revision(pretrained_model_name_or_path, hub)
            kwargs["revision"] = hub["revision"]
            refuse_adapter(pretrained_model_name_or_path, hub)
            is_delta = cls._is_delta(pretrained_model_name_or_path, config, hub)
            if config is not None:
                overrides = cls._leave_out_saved(overrides, pretrained_model_name_or_path, hub)
        later = _without_downloading_again(hub)
        if is_delta:
            model, info = cls._from_delta(pretrained_model_name_or_path, model_args, config, hub, kwargs)
        else:
            if kwargs.get("quantization_config") is not None:
                kwargs["quantization_config"] = spare_compressor(kwargs["quantization_config"])
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            if pretrained_model_name_or_path is not None and kwargs.get("variant") is None:
                model._check_lora(pretrained_model_name_or_path, later)
            model.remember_generator()
        model._processor_arguments, model._processor_overrides = later, overrides
        model._card_fields = None  # those of the card beside the weights
        model._share_quantizer()
        model._freeze()
        # transformers reads generation settings with all arguments, which would be saved and published among them.
        own = {*cls.config_class.__annotations__, "with_generator", "with_backbone"} - vars(GenerationConfig()).keys()
        for name in own & vars(model.generation_config).keys():
            delattr(model.generation_config, name)
        return (model, info) if wants_info else model

    @classmethod
    def _is_delta(cls, name_or_path: str, config: PreTrainedConfig | None, hub: dict) -> bool:
        saved = config.to_dict() if config is not None else cls.config_class.get_config_dict(name_or_path, **hub)[0]
        return saved.get("weights_format") == "delta"

    @classmethod
    def _leave_out_saved(cls, settings: dict, name_or_path: str, hub: dict) -> dict:
        """Settings of a configuration that differ from the saved one, which the Auto classes hand over unasked."""
        file = cached_file(name_or_path, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        if file is None:
            return settings
        saved = cls.config_class.from_json_file(file)
        return {name: value for name, value in settings.items() if value != getattr(saved, name)}

    @classmethod
    def _from_delta(cls, name_or_path, model_args, config, hub: dict, kwargs: dict):
        """Loads the compressor's side from here and the generator from its own repository."""
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(name_or_path, return_unused_kwargs=True, **kwargs)
            kwargs = {**hub, **kwargs}
        shared = {key: hub[key] for key in ("cache_dir", "local_files_only", "token") if key in hub}
        if str(config.generator_name_or_path).endswith(".gguf"):  # where the caller says that it is now
            config.generator_name_or_path, config.generator_gguf_file = split_gguf(config.generator_name_or_path, None)
        source = {**shared, "revision": config.generator_revision, "gguf_file": config.generator_gguf_file}
        config.generator_name_or_path = absolute_name(config.generator_name_or_path)
        with_generator = kwargs.pop("with_generator", True)
        if with_generator:
            check_fingerprint(name_or_path, config, source)
        generator_kwargs = {key: kwargs[key] for key in GENERATOR_ARGUMENTS if kwargs.get(key) is not None}
        if isinstance(kwargs.get("device_map"), dict):
            generator_kwargs["device_map"], kwargs["device_map"] = split_device_map(kwargs["device_map"])
        generator_kwargs["quantization_config"] = kwargs.pop("quantization_config", None)
        # A generator that is quantised in its own repository says nothing about the compressor.
        quantized = config.generator_config.__dict__.pop("quantization_config", None)
        model, info = super().from_pretrained(name_or_path, *model_args, config=config, with_generator=False, **kwargs)
        if quantized is not None:
            model.config.generator_config.quantization_config = config.generator_config.quantization_config = quantized
        if not with_generator:
            return model, info
        generator_kwargs.setdefault("dtype", model.dtype)
        model.generator = load_complete(
            AutoModelForCausalLM,
            config.generator_name_or_path,
            config=model.config.generator_config,
            **generator_kwargs,
            **source,
        )
        model.remember_generator()
        if model.config.lora_config is not None:
            model._load_lora(name_or_path, _without_downloading_again(hub))
        model.generator.eval()
        # What a generator passes on to the whole model when it is there from the start.
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return model, info

    def _load_lora(self, name_or_path: str, hub: dict):
        """Adds LoRA layers to a generator that was loaded without, and fills them."""
        self._inject_lora(self.config.lora_config)
        for name, tensor in read_tensors(name_or_path, self._check_lora(name_or_path, hub), hub).items():
            # Beside quantised layers PEFT makes 16-bit ones, which would round what was trained in 32.
            layer, _, own = name.rpartition(".")
            device = execution_device(self.get_submodule(name.split(".lora_")[0]))  # which may fetch its own weights
            setattr(self.get_submodule(layer), own, nn.Parameter(tensor.to(device, self.dtype)))

    def _check_lora(self, name_or_path: str, hub: dict) -> dict[str, str]:
        """Files of the LoRA weights; transformers does not report it when they are missing."""
        if self.config.lora_config is None or self.generator is None:
            return {}
        found = {name: file for name, file in checkpoint_index(name_or_path, **hub).items() if "lora_" in name}
        expected = {f"generator.{name}" for name, _ in self.generator.named_parameters() if "lora_" in name}
        if set(found) != expected:
            raise ScaleDownError(
                f"{name_or_path} holds {len(found)} LoRA tensors, lora_config asks for {len(expected)}. Restore the "
                "checkpoint's own lora_config; where it has none, call add_lora() after loading."
            )
        return found

    def _share_quantizer(self):
        """Quantisation concerns the whole model, which is saved, and the generator, which PEFT extends, alike."""
        source = self if getattr(self, "hf_quantizer", None) is not None else self.generator
        if self.generator is None or getattr(source, "hf_quantizer", None) is None:
            return
        for part in (self, self.generator):
            for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
                if hasattr(source, name):
                    setattr(part, name, getattr(source, name))
        for module in self.generator.modules():
            # bitsandbytes' kernel for these CPUs repacks weights at their first use and mixes up their scales at the
            # next save; without it they are slower and right.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        # Trainer refuses to train a model that is quantised all through; this one trains compressor and LoRA.
        self.is_quantized, self.generator.is_quantized = False, True
        settings = source.config.quantization_config
        copied = spare_compressor if isinstance(settings, BitsAndBytesConfig) else copy.deepcopy
        self.config.quantization_config = copied(settings)

    # -- saving --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        weights_format: str | None = None,
        **kwargs,
    ):
        r"""
        Saves weights, code, configuration, processor, tokenizers, generation settings and the rendered card.

        Args:
            save_directory (`str`): Folder to write; made when missing.
            is_main_process (`bool`, defaults to `True`): Whether this process writes what is not weights.
            state_dict (`dict`, *optional*): Weights gathered by a trainer.
            push_to_hub (`bool`, defaults to `False`): Also push, to `repo_id`.
            weights_format (`str`, *optional*):
                `"full"` or `"delta"` (without the generator's own weights); `config.weights_format` when left out.
            kwargs: As in `PreTrainedModel.save_pretrained` and `push_to_hub`.

        Raises:
            ValueError: a delta is asked for but the generator is not that of a known repository, or there is no
                generator.
        """
        hub_kwargs = {
            key: kwargs.pop(key)
            for key in ("repo_id", "private", "commit_message", "revision", "create_pr", "commit_description")
            if key in kwargs
        }
        previous = self.config.weights_format
        weights_format = weights_format or previous
        self._check_weights_format(weights_format)
        if weights_format == "delta" and kwargs.get("variant") is not None:
            raise ScaleDownError(
                f'variant={kwargs["variant"]!r} goes with weights_format="full"; a delta has one set of weights. Leave '
                'variant out, or save with weights_format="full".'
            )
        if weights_format == "delta" and Path(self.config.generator_name_or_path).is_dir():
            logger.warning_once(
                f"This delta reads its generator from {self.config.generator_name_or_path}, a folder of this machine, "
                "and says so in its config.json. Elsewhere, load it with generator_name_or_path=where it is."
            )
        # Of a delta it was just checked.
        if weights_format == "full" and (self._trainable_in_generator() or self._changed_in_generator()):
            self.config.generator_fingerprint = None  # no longer the generator of its repository
        module = "modeling_scaledown.ScaleDownModel"
        self.config.auto_map = {
            "AutoConfig": "configuration_scaledown.ScaleDownConfig",
            "AutoModel": module,
            "AutoModelForCausalLM": module,
            "AutoProcessor": "processing_scaledown.ScaleDownProcessor",
        }
        quantization = getattr(self.config, "quantization_config", None)
        if self._is_quantized():
            # transformers cannot undo how it read weights that were stored quantised.
            kwargs.setdefault("save_original_format", False)
        self.config.weights_format = weights_format
        # FSDP gives the model a class of its own, and so may users: the code beside the weights is this file's.
        wrapped_class = type(self)
        self.__class__ = next(c for c in wrapped_class.__mro__ if c.__module__ == __name__)
        if wrapped_class is not self.__class__ and not wrapped_class.__module__.startswith("torch."):
            logger.warning_once(
                f"Saved as a {self.__class__.__name__}, which is what it loads as: the code of "
                f"{wrapped_class.__name__} stays out."
            )
        try:
            if weights_format == "delta":
                names = self.state_dict() if state_dict is None else state_dict
                self._keys_to_ignore_on_save = {
                    name for name in names if name.startswith("generator.") and "lora_" not in name
                }
                self.config.__dict__.pop("quantization_config", None)  # what is saved is not quantised
            super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        finally:
            self.__class__ = wrapped_class
            self.config.weights_format = previous
            self._keys_to_ignore_on_save = set()
            if quantization is not None:
                self.config.quantization_config = quantization
        if not is_main_process:
            return
        if kwargs.get("variant") is None:
            remove_stale_weights(Path(save_directory))
        if self._has_processor():
            self.processor.save_pretrained(save_directory)
        else:
            logger.warning("The model has no processor, so none is saved beside it; assign model.processor first.")
        self._write_card(Path(save_directory), weights_format)
        if push_to_hub:
            hub_kwargs.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(**hub_kwargs, weights_format=weights_format, state_dict=state_dict, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_description: str | None = None,
        token: str | bool | None = None,
        **save_kwargs,
    ) -> str:
        r"""
        Pushes the folder `save_pretrained` writes, card included; a card written by somebody stays.

        Args:
            repo_id (`str`): Repository to push to; made when missing.
            private (`bool`, *optional*): Whether a new repository is private.
            commit_message, revision, create_pr, commit_description, token: As in `huggingface_hub`.
            save_kwargs: Arguments of `save_pretrained`, such as `weights_format`.

        Returns:
            `str`: Address of the commit.

        Raises:
            ValueError: as in `save_pretrained`.
            LocalEntryNotFoundError: the Hub does not answer whether there is a card.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        self.card_fields = {**self.card_fields, "repo_id": repo_id, "revision": revision}
        try:
            keep_card = not is_rendered(Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision)))
        except LocalEntryNotFoundError:  # the Hub did not answer, which does not say that there is no card
            raise
        except EntryNotFoundError:
            keep_card = False
        # Those of another sharding; a variant lies beside the others.
        replaced = [SAFE_WEIGHTS_NAME, "model-*-of-*.safetensors", SAFE_WEIGHTS_INDEX_NAME]
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_kwargs)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload ScaleDown model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=CARD_NAME if keep_card else None,
                delete_patterns=replaced if save_kwargs.get("variant") is None else None,
            )
        return commit

    @property
    def card_fields(self) -> dict:
        """What the card says besides the configuration: those the weights' own card was rendered from, or assigned."""
        if self._card_fields is None:
            readme = self._find_beside_weights(CARD_NAME, **QUIETLY) if self.name_or_path else None
            self._card_fields = read_card_fields(readme) if readme is not None else {}
        return self._card_fields

    @card_fields.setter
    def card_fields(self, fields: dict):
        self._card_fields = fields

    def _has_processor(self) -> bool:
        if self._processor is not None or not self.name_or_path:
            return self._processor is not None
        return self._find_beside_weights(PROCESSOR_NAME) is not None

    def _find_beside_weights(self, name: str, **kwargs) -> str | None:
        """File that was saved beside the weights this model was loaded from, if there is one."""
        return cached_file(
            self.name_or_path, name, _raise_exceptions_for_missing_entries=False, **self._processor_arguments, **kwargs
        )

    def _check_weights_format(self, weights_format: str):
        if weights_format not in WEIGHTS_FORMATS:
            raise ScaleDownError(
                f"weights_format={weights_format!r} is unknown; choose {' or '.join(WEIGHTS_FORMATS)}."
            )
        if self.generator is None or self.compressor.backbone is None:
            part = "generator" if self.generator is None else "compressor's backbone"
            raise ScaleDownError(f"This model was loaded without its {part}, so it cannot be saved; load it whole.")
        quantizer = getattr(self.generator, "hf_quantizer", None)
        if weights_format == "full":
            if quantizer is not None and not isinstance(quantizer.quantization_config, BitsAndBytesConfig):
                raise ScaleDownError(
                    "The generator is quantised in a way that is not saved with a model. If its own repository is, "
                    'save with weights_format="delta"; if it was quantised while loading, save the model without that.'
                )
            return
        if not self.config.generator_name_or_path or not self.config.generator_fingerprint:
            raise ScaleDownError(
                'weights_format="delta" needs a generator that is still the one of its repository: build the model '
                "with from_backbones and do not merge LoRA (train.py --merge_lora false or --weights_format delta), or "
                'save with weights_format="full".'
            )
        trainable = self._trainable_in_generator()
        if trainable:
            raise ScaleDownError(
                f'weights_format="delta" leaves out the generator\'s own weights, but {len(trainable)} of them are '
                f'trainable ({trainable[0]}, …). Save with weights_format="full".'
            )
        changed = self._changed_in_generator()
        if changed:
            raise ScaleDownError(
                f'weights_format="delta" leaves out the generator\'s own weights, but {len(changed)} of them are not '
                f"those of {self.config.generator_name_or_path!r} any more ({changed[0]}, …). Save with "
                'weights_format="full".'
            )

    def _trainable_in_generator(self) -> list[str]:
        """Names of the generator's own weights that training may have changed."""
        return [n for n, p in self.generator.named_parameters() if p.requires_grad and "lora_" not in n]

    def remember_generator(self):
        """Keeps a sum and a few values of every weight, so that a delta of a generator that was changed is noticed."""
        if self.generator is not None and self.config.generator_fingerprint is not None:
            self._generator_samples = weight_samples(self.generator)

    def _changed_in_generator(self) -> list[str]:
        if self._generator_samples is None:
            return []
        return changed_weights(self._generator_samples, self.generator)

    def _write_card(self, folder: Path, weights_format: str):
        """Renders model_card.md to README.md, beside a copy of the template."""
        template = Path(__file__).with_name(CARD_TEMPLATE_NAME)
        if not template.is_file():  # an installed package has it inside
            template = template.parent / "scaledown" / CARD_TEMPLATE_NAME
        if not template.is_file():
            found = self._find_beside_weights(CARD_TEMPLATE_NAME, **QUIETLY) if self.name_or_path else None
            if found is None:
                logger.warning(f"No {CARD_TEMPLATE_NAME} found beside the code or the weights; no card is written.")
                return
            template = Path(found)
        generator = self.config.generator_name_or_path
        on_hub = generator is not None and HUB_NAME.fullmatch(generator) is not None and not Path(generator).exists()
        facts = {
            "config": self.config,
            # A path of this machine is of no use to a reader, and nobody's business.
            "generator_name": (generator if on_hub else Path(generator).name) if generator else None,
            "generator_on_hub": on_hub,
            "num_parameters": self.num_parameters(),
            "num_compressor_parameters": sum(p.numel() for p in self.compressor.parameters()),
            "weights_format": weights_format,
        }
        write_card(folder, template, facts, self.card_fields)


def _greedy(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """A chat model's settings without its sampling: an answer from documents is not a matter of chance."""
    greedy = copy.deepcopy(generation_config)
    # A published generator's max_length is its context, not a wish for answers of that length.
    greedy.update(do_sample=False, temperature=None, top_p=None, top_k=None, max_length=None)
    # Answers are learned with the tokenizer's end token, which a configuration need not name.
    ends = greedy.eos_token_id if isinstance(greedy.eos_token_id, list) else [greedy.eos_token_id]
    greedy.eos_token_id = list(dict.fromkeys([*(end for end in ends if end is not None), tokenizer.eos_token_id]))
    if greedy.pad_token_id is None:
        pad_id = tokenizer.pad_token_id
        greedy.pad_token_id = tokenizer.eos_token_id if pad_id is None else pad_id
    return greedy


def _refuse_gguf(name_or_path: str | None):
    """A GGUF file holds a language model, and no ScaleDown model."""
    if name_or_path is None:
        return
    found = [] if (Path(name_or_path) / CONFIG_NAME).is_file() else gguf_files(name_or_path)
    if str(name_or_path).endswith(".gguf") or found:
        file = str(Path(name_or_path) / found[0]) if found else str(name_or_path)
        raise ScaleDownError(
            f"{file} is a language model in GGUF, not a ScaleDown model. To build one on top of it: "
            f"ScaleDownModel.from_backbones({file!r}); to train it: train.py --generator_name_or_path {file}."
        )


def _without_downloading_again(hub: dict) -> dict:
    """Where to read from once everything was downloaded anew, if that was asked for."""
    return {name: value for name, value in hub.items() if name != "force_download"}


def _asked(kwargs: dict, settings: GenerationConfig | None, name: str):
    """What the arguments of `generate` say of a setting, by themselves or in a configuration."""
    return kwargs.get(name, getattr(settings, name, None))


def _with_setting(kwargs: dict, name: str, value) -> dict:
    """Arguments of `generate` with a setting more, in their configuration where they have one."""
    if kwargs.get("generation_config") is None:
        return {**kwargs, name: value}
    settings = copy.deepcopy(kwargs["generation_config"])  # the caller keeps theirs
    setattr(settings, name, value)
    return {**kwargs, "generation_config": settings}


def _with_length(kwargs: dict, own: GenerationConfig) -> tuple[dict, int | None]:
    """Arguments of `generate` with a length, and how many new tokens they or the model allow, if they count those."""
    settings = kwargs.get("generation_config")
    max_new_tokens, max_length = (_asked(kwargs, settings, name) for name in ("max_new_tokens", "max_length"))
    if max_new_tokens is not None or max_length is not None:
        return kwargs, max_new_tokens
    if own.max_new_tokens is None and own.max_length is not None:
        return kwargs, None
    if own.max_new_tokens is not None:
        return _with_setting(kwargs, "max_new_tokens", own.max_new_tokens), own.max_new_tokens
    return _with_setting(kwargs, "max_new_tokens", DEFAULT_MAX_NEW_TOKENS), DEFAULT_MAX_NEW_TOKENS


def _answer_lengths(new: torch.LongTensor, kwargs: dict, own: GenerationConfig) -> list[int]:
    """Tokens in front of the first end token of each row `(num_sequences, new_tokens)`."""
    ends = _asked(kwargs, kwargs.get("generation_config"), "eos_token_id")
    ends = own.eos_token_id if ends is None else ends
    ends = torch.as_tensor([] if ends is None else ends, dtype=new.dtype, device=new.device)
    return torch.isin(new, ends).cumsum(dim=1).eq(0).sum(dim=1).tolist()


def _check_batch_size(batch_size: int):
    if batch_size < 1:
        raise ScaleDownError(f"batch_size={batch_size} must be at least 1.")


def _sequences(output) -> torch.LongTensor:
    """Token ids of what `generate()` returned, whichever form was asked for."""
    return output if isinstance(output, torch.Tensor) else output.sequences


if not IS_REMOTE_CODE:  # two models in one process may come with different code
    AutoModel.register(ScaleDownConfig, ScaleDownModel, exist_ok=True)
    AutoModelForCausalLM.register(ScaleDownConfig, ScaleDownModel, exist_ok=True)
ScaleDownModel.register_for_auto_class("AutoModel")

__all__ = ["AnswerOutput", "CompressedDocuments", "CompressionCache", "ScaleDownModel", "ScaleDownOutput"]
