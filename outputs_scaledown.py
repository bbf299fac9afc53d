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
"""What the compressor and the model return."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class CompressedDocuments(ModelOutput):
    r"""
    What the compressor makes of documents.

    Args:
        memory_embeddings (`torch.FloatTensor` of shape `(num_chunks, slots, hidden_size)`):
            Embeddings in the generator's input space; rows past a chunk's own slots are zero.
        memory_mask (`torch.BoolTensor` of shape `(num_chunks, slots)`):
            True where a chunk has a slot.
        reranking_scores (`torch.FloatTensor` of shape `(num_chunks,)`, *optional*):
            Relevance of each chunk to its query, higher is more relevant; `None` without reranking.
        chunk_to_document (`torch.LongTensor` of shape `(num_chunks,)`, *optional*):
            Document each chunk is a part of, counted over the whole batch.
        document_to_example (`torch.LongTensor` of shape `(num_documents,)`, *optional*):
            Question each document belongs to.
        pointer_weights (`torch.FloatTensor` of shape `(num_chunks, chunk_len)`, *optional*):
            Where a window should begin, with `slot_pooling="pointer"`, if chunks are compressed in one pass.
    """

    memory_embeddings: torch.FloatTensor | None = None
    memory_mask: torch.BoolTensor | None = None
    reranking_scores: torch.FloatTensor | None = None
    chunk_to_document: torch.LongTensor | None = None
    document_to_example: torch.LongTensor | None = None
    pointer_weights: torch.FloatTensor | None = None

    def by_document(self) -> list[torch.FloatTensor]:
        """Memory embeddings `(slots, hidden_size)` of each document, those of a long one's chunks in a row."""
        num_documents = self.document_to_example.shape[0]
        slots = self.memory_mask.sum(dim=1)  # (num_chunks,)
        slots = slots.new_zeros(num_documents).index_add(0, self.chunk_to_document, slots)  # (num_documents,)
        return list(self.memory_embeddings[self.memory_mask].split(slots.tolist()))


@dataclass
class ScaleDownOutput(CausalLMOutputWithPast):
    r"""
    Output of [`ScaleDownModel`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
            `generation_loss + reranking_loss_weight · reranking_loss + pointer_loss_weight · pointer_loss`.
        generation_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Cross-entropy of the answer's tokens.
        reranking_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `reranking_labels` is given):
            Squared error of the reranking scores, summed over a question's documents, averaged over questions.
        pointer_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `pointer_labels` is given):
            Minus the logarithm of the probability that a window holds the answer, averaged over chunks that do.
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
    pointer_loss: torch.FloatTensor | None = None
    memory_embeddings: torch.FloatTensor | None = None
    memory_mask: torch.BoolTensor | None = None
    reranking_scores: torch.FloatTensor | None = None
