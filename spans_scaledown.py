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
"""Slots as means over spans of a chunk's own tokens, plain or weighted."""

import torch
from torch import nn
from transformers import initialization as init


class EmbeddingProjector(nn.Linear):
    """Reads token embeddings beside hidden states; an untrained one passes the embeddings on, and no state."""

    def reset_parameters(self):
        """Starts with the embeddings as they are."""
        init.eye_(self.weight)


class SpanAttention(nn.Module):
    """
    Weighted means over spans of a chunk: a learned query asks each token how much of its slot it is to fill.

    Args:
        hidden_size (`int`): Width of the states.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self):
        """Starts with all tokens alike."""
        init.zeros_(self.query)

    @staticmethod
    def normalize(states: torch.Tensor) -> torch.Tensor:
        """Raw states of a layer grow with depth, and a few dimensions outgrow all others."""
        return nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6)

    def forward(
        self,
        states: torch.Tensor,
        embeds: torch.Tensor,
        document_mask: torch.BoolTensor,
        chunk_slots: torch.LongTensor,
        num_slots: int,
    ) -> torch.Tensor:
        """
        Fills slots.

        Args:
            states (`torch.FloatTensor` of shape `(num_chunks, length, hidden)`): Normalized hidden states.
            embeds (`torch.FloatTensor` of shape `(num_chunks, length, embedding)`): Token embeddings.
            document_mask, chunk_slots, num_slots: As in `span_members`.

        Returns:
            `torch.FloatTensor` of shape `(num_chunks, num_slots, embedding + hidden)`; zeros past a chunk's own slots.
        """
        member = span_members(document_mask, chunk_slots, num_slots)  # (num_chunks, num_slots, length)
        asked = (states.float() * self.query.float()).sum(dim=-1).unsqueeze(1)  # (num_chunks, 1, length)
        asked = asked.masked_fill(~member, torch.finfo(torch.float32).min)  # (num_chunks, num_slots, length)
        weights = asked.softmax(dim=-1) * member  # rows without a member become zeros
        # As long as the embeddings beside them, so that the projector's first steps are small ones.
        scaled = states * embeds.float().square().mean(dim=-1, keepdim=True).sqrt().to(states.dtype)
        return weights.to(states.dtype) @ torch.cat([embeds.to(states.dtype), scaled], dim=-1)


def span_members(document_mask: torch.BoolTensor, chunk_slots: torch.LongTensor, num_slots: int) -> torch.BoolTensor:
    """
    Divides a chunk's own tokens into as many spans of equal length as the chunk has slots.

    Args:
        document_mask (`torch.BoolTensor` of shape `(num_chunks, length)`): True on the chunk's own tokens.
        chunk_slots (`torch.LongTensor` of shape `(num_chunks,)`): Slots of each chunk.
        num_slots (`int`): Slots of the chunk that has most.

    Returns:
        `torch.BoolTensor` of shape `(num_chunks, num_slots, length)`: Which tokens are a slot's.
    """
    document_mask = document_mask.bool()
    rank = document_mask.long().cumsum(dim=1) - 1  # (num_chunks, length)
    span = rank * chunk_slots.unsqueeze(1) // document_mask.sum(dim=1, keepdim=True).clamp(min=1)
    slot_ids = torch.arange(num_slots, device=span.device).view(1, -1, 1)
    return (span.unsqueeze(1) == slot_ids) & document_mask.unsqueeze(1)


def mean_over_spans(
    states: torch.Tensor, document_mask: torch.BoolTensor, chunk_slots: torch.LongTensor, num_slots: int
) -> torch.Tensor:
    """
    Averages the states of a chunk's tokens over as many spans of equal length as the chunk has slots.

    Args:
        states (`torch.FloatTensor` of shape `(num_chunks, length, hidden)`): Hidden states.
        document_mask, chunk_slots, num_slots: As in `span_members`.

    Returns:
        `torch.FloatTensor` of shape `(num_chunks, num_slots, hidden)`; zeros past a chunk's own slots.
    """
    member = span_members(document_mask, chunk_slots, num_slots)  # (num_chunks, num_slots, length)
    weights = member.float() / member.sum(dim=-1, keepdim=True).clamp(min=1)
    return weights.to(states.dtype) @ states  # (num_chunks, num_slots, hidden)
