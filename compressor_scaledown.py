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
"""The compressor of ScaleDown: query and chunk in, memory embeddings and a relevance score out."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

try:
    from .errors_scaledown import ScaleDownError
    from .families_scaledown import embedding_scale, embedding_width
    from .outputs_scaledown import CompressedDocuments
    from .pointer_scaledown import WindowPointer, choose_windows, read_windows
    from .shortcuts_scaledown import (
        SharedPrefixes,
        can_share_prefixes,
        prepare_last_layer,
        read_prefixes,
        shortcuts_hold,
        states_at,
    )
    from .spans_scaledown import EmbeddingProjector, SpanAttention, mean_over_spans
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError
    from families_scaledown import embedding_scale, embedding_width
    from outputs_scaledown import CompressedDocuments
    from pointer_scaledown import WindowPointer, choose_windows, read_windows
    from shortcuts_scaledown import (
        SharedPrefixes,
        can_share_prefixes,
        prepare_last_layer,
        read_prefixes,
        shortcuts_hold,
        states_at,
    )
    from spans_scaledown import EmbeddingProjector, SpanAttention, mean_over_spans

# Decoder stacks of transformers name their final norm one of these.
FINAL_NORM_NAMES = (
    *("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f", "norm_f", "layer_norm"),
    "embedding_norm",  # of LFM2, which comes after the layers, in spite of its name
)
# Their final norm is also what they begin with.
NORMALIZED_AT_BOTH_ENDS = ("nanochat",)
# The forms documents have among the arguments of `forward`: chunks to compress, or what was made of them before.
CHUNK_INPUTS = (
    *("compressor_input_ids", "compressor_attention_mask", "chunk_slots", "compressor_document_mask"),
    "compressor_windows",
)
COMPRESSED_INPUTS = ("memory_states", "rerank_states", "memory_embeddings", "memory_mask")
# Where the state to score is that of a token, not of a further embedding after the row.
READ_AT_OWN_TOKENS = ("span_mean", "pointer")
# A question is read once for all its chunks where that saves at least this share of the tokens.
MIN_SHARED_PREFIX = 0.04
# It takes a pass of its own, which must cost less than it saves: operations that a layer is spared, at least.
MIN_SPARED_OPERATIONS = {"cpu": 1e8}
MIN_SPARED_OPERATIONS_ELSEWHERE = 2e11


class RerankingHead(nn.Linear):
    """A dense layer to one score, in 32 bits: 16 have too few digits to tell close documents apart."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """
        Scores chunks.

        Args:
            states (`torch.FloatTensor` of shape `(num_chunks, hidden)`): Hidden states at the reranking position.

        Returns:
            `torch.FloatTensor` of shape `(num_chunks, 1)`, as of any linear layer, which LoRA may be put around.
        """
        return (states.float() * self.weight.float()).sum(dim=-1, keepdim=True) + self.bias.float()


class ScaleDownCompressor(nn.Module):
    r"""
    Token ids of query and chunk in; hidden states at the memory positions and the reranking position out.

    The input of the backbone is `[query] [chunk] MEM_1 … MEM_l RR` (OSCAR, arXiv 2504.07109). MEM and RR are
    parameters of this module, not rows of a vocabulary. Slots over spans of the chunk's own tokens (`slot_pooling`)
    need no MEM. A further kind of backbone is a subclass that overrides `prepare_backbone`, `has_projector` or
    `keeps_final_norm`, entered in `COMPRESSORS` and in the configuration's `COMPRESSOR_TYPES`.

    Args:
        config (`ScaleDownConfig`): The model's configuration.
        backbone (`PreTrainedModel`, *optional*): Built from `config.compressor_config` when left out.
        with_backbone (`bool`, defaults to `True`):
            `False` leaves the backbone out: what follows it can be trained on cached states.
    """

    # Unless the configuration says otherwise.
    has_projector = True
    keeps_final_norm = True
    # A causal backbone has read everything at its last token, an encoder was pretrained to sum up at its first.
    rerank_at_first_token = False

    def __init__(self, config: PreTrainedConfig, backbone: PreTrainedModel | None = None, with_backbone: bool = True):
        super().__init__()
        if backbone is None and with_backbone:
            backbone = AutoModel.from_config(config.compressor_config)
        self.backbone = self.prepare_backbone(backbone) if backbone is not None else None
        keeps_norm = self.keeps_final_norm if config.keep_final_norm is None else config.keep_final_norm
        if self.backbone is not None and not keeps_norm:
            remove_final_norm(self.backbone)
        # The last layer computes only what is read; turned off, it computes every position, to the same result.
        self.prunes_last_layer = self.backbone is not None and prepare_last_layer(self.backbone)
        self.shares_prefixes = (
            self.prunes_last_layer and config.slot_pooling == "memory_tokens" and can_share_prefixes(self.backbone)
        )
        self._shortcuts_hold = {}
        # Positions count padding up to here; `None` where they do not.
        self.padded_length = config.compressor_max_length if config.compressor_padding_side is not None else None
        self.pads_left = config.compressor_padding_side == "left"
        width = config.compressor_config.hidden_size
        self.separator_embedding = None
        if config.learned_separator:
            self.separator_embedding = nn.Parameter(torch.zeros(config.generator_config.hidden_size))
        self.memory_embeddings, self.rerank_embedding = None, None
        self.scores_relevance = config.enable_reranking
        read = embedding_width(config.compressor_config)
        if config.slot_pooling == "memory_tokens":
            self.memory_embeddings = nn.Parameter(torch.zeros(config.num_memory_tokens, read))
        if config.slot_pooling not in READ_AT_OWN_TOKENS and config.enable_reranking:
            self.rerank_embedding = nn.Parameter(torch.zeros(read))
        self.span_attention = SpanAttention(width) if config.slot_pooling == "span_attention" else None
        self.pointer = None
        if config.slot_pooling == "pointer":
            self.pointer = WindowPointer(width)
        self.reranking_head = RerankingHead(width, 1) if config.enable_reranking else None
        self.projector = None
        if self.span_attention is not None or self.pointer is not None:
            self.projector = EmbeddingProjector(
                config.memory_state_size, config.generator_config.hidden_size, bias=False
            )
        elif self.has_projector if config.use_projector is None else config.use_projector:
            self.projector = nn.Sequential(
                nn.Linear(width, config.projector_hidden_size),
                nn.ReLU(),
                nn.Linear(config.projector_hidden_size, config.generator_config.hidden_size),
            )

    def prepare_backbone(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """Takes off what compression never reads: a pooler or a projection of sentence embeddings."""
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None
        if getattr(backbone, "embedding_projection", None) is not None:
            backbone.embedding_projection = nn.Identity()
        return backbone

    def compile_layers(self, compiles: bool):
        """
        Compiles the backbone's layers one by one, or no longer: few kernels instead of many, for small batches.

        Args:
            compiles (`bool`): Whether they are compiled from now on, each shape at its first use.
        """
        layers = [module for module in self.backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
        # The last layer has a hook of its own where it computes few positions.
        for layer in layers[: -1 if self.prunes_last_layer else None]:
            layer._compiled_call_impl = None
            if compiles:
                layer.compile(dynamic=True)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        chunk_slots: torch.LongTensor,
        document_mask: torch.BoolTensor | None = None,
        windows: torch.LongTensor | None = None,
        prefixes: SharedPrefixes | None = None,
        embeddings: nn.Module | None = None,
    ) -> CompressedDocuments:
        """
        Compresses chunks.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_chunks, chunk_len)`): Query and chunk, padded on any side.
            attention_mask (`torch.LongTensor` of shape `(num_chunks, chunk_len)`): 0 on padding.
            chunk_slots (`torch.LongTensor` of shape `(num_chunks,)`): Memory embeddings of each chunk.
            document_mask (`torch.BoolTensor` of shape `(num_chunks, chunk_len)`, *optional*):
                True on the chunk's own tokens; needed unless `slot_pooling` is `"memory_tokens"`.
            windows (`torch.LongTensor` of shape `(num_chunks, chunk_len, window)`, *optional*):
                The generator's ids of the text from each token on; needed if `slot_pooling` is `"pointer"`.
            prefixes (`SharedPrefixes`, *optional*):
                What stands before the tokens that `attention_mask` lets be read, from `read_prefixes`.
            embeddings (`nn.Module`, *optional*): The generator's token embeddings, needed with `windows`.

        Returns:
            `CompressedDocuments`: Embeddings, mask and, with reranking, scores.
        """
        chunks = (input_ids, attention_mask, chunk_slots, document_mask, windows)
        *states, weights = self._read(*chunks, prefixes, embeddings)
        documents = self.project(*states)
        documents.pointer_weights = weights
        return documents

    def read_prefixes(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        document_mask: torch.BoolTensor | None,
        batch_size: int,
    ) -> Iterator[tuple[torch.LongTensor, SharedPrefixes | None, torch.BoolTensor]]:
        """
        Reads what stands before the chunks' own tokens once for all chunks that have it in common.

        In a causal backbone nothing in front of a chunk depends on it, so that the result is the same.

        Args:
            input_ids, attention_mask, document_mask: As in `forward`.
            batch_size (`int`): Prefixes read at once, and kept until the next ones are asked for.

        Yields:
            `tuple`: Indices of some of the chunks, their prefixes, and a mask `(num_chunks, chunk_len)` of what is left
            to read. All chunks at once, and no prefixes, where the backbone cannot go on from a cache or too little
            would be saved.
        """
        kept = attention_mask.bool()
        if self._can_share_prefixes() and document_mask is not None:
            prefix = kept & (document_mask.long().cumsum(dim=1) == 0)  # (num_chunks, chunk_len)
            rows = [tuple(itertools.compress(*row)) for row in zip(input_ids.tolist(), prefix.tolist(), strict=True)]
            different = sorted(set(rows), key=lambda row: (len(row), row))
            groups = [different[start : start + batch_size] for start in range(0, len(different), batch_size)]
            saved = sum(map(len, rows)) - sum(len(group) * len(group[-1]) for group in groups)
            if different[0] and self._pays_to_share(saved, int(kept.sum())):
                for group in groups:
                    number = {row: i for i, row in enumerate(group)}
                    chunks = [i for i, row in enumerate(rows) if row in number]
                    prefixes = self._read_prefixes(group, [number[rows[i]] for i in chunks])
                    yield torch.tensor(chunks, device=kept.device), prefixes, kept & ~prefix
                return
        yield torch.arange(len(kept), device=kept.device), None, kept

    def _may_take_shortcuts(self) -> bool:
        """Whether shortcuts through the backbone's layers change nothing, which is checked at their first use."""
        attention = self.backbone.config._attn_implementation
        if attention not in self._shortcuts_hold:
            self._shortcuts_hold[attention] = shortcuts_hold(self.backbone)
        return self._shortcuts_hold[attention]

    def _pays_to_share(self, saved: int, read: int) -> bool:
        """Whether reading questions once spares enough of the tokens to read."""
        layer = self.backbone.layers[0]
        device = next(layer.parameters()).device.type
        operations = 2 * saved * sum(parameter.numel() for parameter in layer.parameters())
        least = MIN_SPARED_OPERATIONS.get(device, MIN_SPARED_OPERATIONS_ELSEWHERE)
        return saved >= MIN_SHARED_PREFIX * read and operations >= least

    def _can_share_prefixes(self) -> bool:
        if not self.shares_prefixes or torch.is_grad_enabled() or not self._may_take_shortcuts():
            return False
        if self.padded_length is not None and self.pads_left:  # where a prefix begins depends on the chunk
            return False
        if self.memory_embeddings.is_meta:  # offloaded, and fetched for `forward` only
            return False
        last = self.backbone.layers[-1]
        return not (last.training and last.gradient_checkpointing)  # transformers takes caches away from those

    def _read_prefixes(self, prefixes: list[tuple[int, ...]], of_chunk: list[int]) -> SharedPrefixes:
        device, longest = self.memory_embeddings.device, max(map(len, prefixes))
        pads = [longest - len(prefix) for prefix in prefixes]
        ids = [[0] * pad + list(prefix) for pad, prefix in zip(pads, prefixes, strict=True)]
        ids = torch.tensor(ids, device=device)  # (num_prefixes, prefix_len)
        mask = torch.arange(longest, device=device) >= torch.tensor(pads, device=device).unsqueeze(1)
        embeds = self.backbone.get_input_embeddings()(ids)
        return read_prefixes(self.backbone, embeds, mask, torch.tensor(of_chunk, device=device))

    def project(
        self, memory_states: torch.Tensor, memory_mask: torch.BoolTensor, rerank_states: torch.Tensor | None
    ) -> CompressedDocuments:
        """
        Takes the backbone's states into the generator's space and to scores; all that two-stage training learns here.

        Args:
            memory_states (`torch.FloatTensor` of shape `(num_chunks, slots, hidden)`): States of the slots.
            memory_mask (`torch.BoolTensor` of shape `(num_chunks, slots)`): True where a chunk has a slot.
            rerank_states (`torch.FloatTensor` of shape `(num_chunks, hidden)`, *optional*): States to score.

        Returns:
            `CompressedDocuments`: Embeddings, mask and, with reranking, scores.
        """
        memory = memory_states
        if self.projector is not None:
            memory = self.projector(memory)  # (num_chunks, slots, generator_hidden)
        memory = memory.masked_fill(~memory_mask.unsqueeze(-1), 0.0)
        if self.separator_embedding is not None:
            last = torch.arange(memory.shape[1], device=memory.device) == memory_mask.sum(dim=1, keepdim=True) - 1
            memory = torch.where(last.unsqueeze(-1), self.separator_embedding.to(memory.dtype), memory)
        scores = None
        if self.reranking_head is not None and rerank_states is not None:
            scores = self.reranking_head(rerank_states).squeeze(-1)  # (num_chunks,)
        return CompressedDocuments(memory_embeddings=memory, memory_mask=memory_mask, reranking_scores=scores)

    def hidden_states(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        chunk_slots: torch.LongTensor,
        document_mask: torch.BoolTensor | None = None,
        windows: torch.LongTensor | None = None,
        prefixes: SharedPrefixes | None = None,
        embeddings: nn.Module | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Runs the backbone and reads the states of the slots and the one to score.

        Args:
            input_ids, attention_mask, chunk_slots, document_mask, windows, prefixes, embeddings: As in `forward`.

        Returns:
            `tuple`: memory states `(num_chunks, slots, hidden)`, their mask `(num_chunks, slots)`, and reranking
            states `(num_chunks, hidden)` or `None`. The state of a separator's slot means nothing.

        Raises:
            ValueError: there is no backbone, or no `document_mask` or `windows` where they are needed.
        """
        chunks = (input_ids, attention_mask, chunk_slots, document_mask, windows)
        return self._read(*chunks, prefixes, embeddings)[:3]

    def _read(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        chunk_slots: torch.LongTensor,
        document_mask: torch.BoolTensor | None,
        windows: torch.LongTensor | None,
        prefixes: SharedPrefixes | None,
        embeddings: nn.Module | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`hidden_states`, and where a window should begin `(num_chunks, chunk_len)`."""
        if self.backbone is None:
            raise ScaleDownError(
                "This model was loaded without its compressor's backbone; it reads cached states only."
            )
        if self.memory_embeddings is None and document_mask is None:
            raise ScaleDownError(
                "Slots over spans of a chunk need compressor_document_mask; pass all that the processor returned."
            )
        if self.pointer is not None and windows is None:
            raise ScaleDownError("Slots that point at text need compressor_windows; pass all the processor returned.")
        if self.pointer is not None and embeddings is None:
            raise ScaleDownError(
                "Slots that point at text are made of the generator's token embeddings, and nothing here has those: "
                'compress with the whole model. Two-stage training does not go with slot_pooling="pointer".'
            )
        num_chunks, weights = input_ids.shape[0], None
        separators = int(self.separator_embedding is not None)
        chunk_slots = chunk_slots - separators
        num_slots = int(chunk_slots.max())
        embeds = self.backbone.get_input_embeddings()(input_ids)  # (num_chunks, chunk_len, hidden)
        slot_ids = torch.arange(num_slots, device=input_ids.device)
        memory_mask = slot_ids < chunk_slots.unsqueeze(1)  # (num_chunks, slots)
        parts, masks = [embeds], [attention_mask.bool()]
        if self.memory_embeddings is not None:
            memory = self.memory_embeddings[:num_slots].to(embeds.dtype)
            parts.append(memory.expand(num_chunks, -1, -1))
            masks.append(memory_mask)
        if self.rerank_embedding is not None:
            parts.append(self.rerank_embedding.to(embeds.dtype).expand(num_chunks, 1, -1))
            masks.append(torch.ones(num_chunks, 1, dtype=torch.bool, device=input_ids.device))
        source, keep = torch.cat(parts, dim=1), torch.cat(masks, dim=1)  # (num_chunks, chunk_len + slots + 1, …)

        # Every backbone counts positions, and some measure distances, by index: what is kept moves together at the
        # left, so that neither padding nor unused slots shift anything.
        total = keep.sum(dim=1)
        order = (~keep).long().argsort(dim=1, stable=True)[:, : int(total.max())]  # (num_chunks, total_len)
        embeds = source.gather(1, order.unsqueeze(-1).expand(-1, -1, source.shape[-1]))
        keep = keep.gather(1, order)  # (num_chunks, total_len)
        if self.memory_embeddings is not None:
            first = attention_mask.long().sum(dim=1, keepdim=True)  # (num_chunks, 1)
            read = (first + slot_ids).clamp(max=embeds.shape[1] - 1)  # (num_chunks, slots)
            if self.scores_relevance:
                read = torch.cat([read, total.unsqueeze(1) - 1], dim=1)  # (num_chunks, slots + 1)
            prunes = self.prunes_last_layer and self._may_take_shortcuts()
            positions = self._padded_positions(first, embeds.shape[1], prefixes)
            states = states_at(self.backbone, read, embeds, keep, prefixes, prunes, positions)
            memory, rerank = states[:, :num_slots], states[:, -1] if self.scores_relevance else None
        else:
            document_mask = nn.functional.pad(document_mask, (0, source.shape[1] - document_mask.shape[1]))
            states = self.backbone(inputs_embeds=embeds, attention_mask=keep.long(), use_cache=False).last_hidden_state
            spans = document_mask.gather(1, order), chunk_slots, num_slots
            if self.span_attention is not None:
                states = SpanAttention.normalize(states)
            position = torch.zeros_like(total) if self.rerank_at_first_token else total - 1
            summary = states[torch.arange(num_chunks, device=states.device), position]  # (num_chunks, hidden)
            rerank = summary if self.scores_relevance else None
            if self.span_attention is not None:
                embeds = embeds * embedding_scale(self.backbone.config)
                memory = self.span_attention(states, embeds, *spans)  # (num_chunks, slots, 2 * hidden)
            elif self.pointer is not None:
                states = SpanAttention.normalize(states)
                moved = self.pointer(states, summary, spans[0])  # (num_chunks, total_len)
                # Nothing stands after a row here, so that its tokens are all there is to move, and to move back.
                size = windows.shape[-1]
                windows = windows.gather(1, order.unsqueeze(-1).expand(-1, -1, size))
                starts = choose_windows(moved, spans[0], size, math.ceil(num_slots / size))
                memory = read_windows(moved, starts, windows, embeddings, states, num_slots)
                weights = moved.new_zeros(input_ids.shape).scatter(1, order, moved)  # (num_chunks, chunk_len)
            else:
                memory = mean_over_spans(states, *spans)
        if separators:
            memory = nn.functional.pad(memory, (0, 0, 0, 1))
            memory_mask = nn.functional.pad(memory_mask, (1, 0), value=True)  # one more of each chunk
        return memory, memory_mask, rerank, weights

    def _padded_positions(
        self, first: torch.LongTensor, length: int, prefixes: SharedPrefixes | None
    ) -> torch.LongTensor | None:
        """Positions `(num_chunks, length)` that count padding, with so many tokens `(num_chunks, 1)` before MEM."""
        if self.padded_length is None:
            return None
        places = torch.arange(length, device=first.device)
        gap = self.padded_length - first  # (num_chunks, 1)
        if self.pads_left:
            return gap + places
        before = 0 if prefixes is None else prefixes.lengths.unsqueeze(1)
        return before + places + torch.where(places < first, 0, gap - before)

    @torch.no_grad()
    def initialize_from_vocabulary(self):
        """Draws memory and reranking embeddings from the distribution of the backbone's token embeddings."""
        embedding = self.backbone.get_input_embeddings()
        count = min(embedding.weight.shape[0], 4096)
        ids = torch.linspace(0, embedding.weight.shape[0] - 1, count, device=embedding.weight.device).long()
        rows = embedding(ids).float()  # (count, hidden)
        parameters = [self.memory_embeddings, self.rerank_embedding]
        if self.projector is None:  # its space is the generator's
            parameters.append(self.separator_embedding)
        for parameter in parameters:
            if parameter is not None:
                noise = torch.randn(parameter.shape, device=rows.device)
                parameter.copy_(rows.mean(dim=0) + rows.std(dim=0) * noise)


class NLayersCompressor(ScaleDownCompressor):
    """Own copy of the generator's first layers; its raw hidden states already live in the generator's space."""

    has_projector = False
    keeps_final_norm = False  # the method reads the raw hidden state of layer N (OSCAR, arXiv 2504.07109)


class EncoderCompressor(ScaleDownCompressor):
    """Any bidirectional encoder; query and chunk arrive framed as a pair, all of one token type."""

    rerank_at_first_token = True


class LLMCompressor(ScaleDownCompressor):
    """Any small causal language model without its head."""


COMPRESSORS = {"n_layers": NLayersCompressor, "modernbert": EncoderCompressor, "llm": LLMCompressor}


def remove_final_norm(backbone: PreTrainedModel):
    """
    Takes off a backbone's final norm.

    Args:
        backbone (`PreTrainedModel`): A stack of layers.

    Raises:
        ScaleDownError: it has no final norm under a known name, or begins with it.
    """
    kind = getattr(getattr(backbone, "config", None), "model_type", None)
    if kind in NORMALIZED_AT_BOTH_ENDS:
        raise ScaleDownError(
            f"{kind} normalizes its embeddings with its final norm, which a compressor made "
            'of its first layers would go without; use compressor_type="llm" with this architecture.'
        )
    for name in FINAL_NORM_NAMES:
        if isinstance(getattr(backbone, name, None), nn.Module):
            setattr(backbone, name, nn.Identity())
            return
    raise ScaleDownError(
        f"{type(backbone).__name__} has no final norm under any of the names {', '.join(FINAL_NORM_NAMES)}; "
        'use compressor_type="llm" with this architecture.'
    )


def own_tokens(chunk_slots: torch.LongTensor, config: PreTrainedConfig) -> torch.LongTensor:
    """
    Counts the embeddings that the compressor reads beside the tokens of question and chunk.

    Args:
        chunk_slots (`torch.LongTensor` of shape `(num_chunks,)`): Slots of each chunk.
        config (`ScaleDownConfig`): The model's configuration.

    Returns:
        `torch.LongTensor` of shape `(num_chunks,)`.
    """
    memory = chunk_slots - int(config.learned_separator)
    memory = memory if config.slot_pooling == "memory_tokens" else torch.zeros_like(chunk_slots)
    return memory + int(config.enable_reranking and config.slot_pooling not in READ_AT_OWN_TOKENS)
