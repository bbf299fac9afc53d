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
"""Slots that point at text: the compressor chooses windows of a chunk, the generator reads its embeddings of them."""

import torch
from torch import nn

# Width in which tokens and windows are compared.
POINTER_SIZE = 128
# Added to a probability in front of its logarithm, whose gradient then stays finite.
SMALLEST = 1e-6


class WindowPointer(nn.Module):
    """
    Weighs where each window of a chunk begins, by attention as in pointer networks (arXiv 1506.03134).

    Args:
        hidden_size (`int`): Width of the states.
        num_windows (`int`): Windows of a chunk.
    """

    def __init__(self, hidden_size: int, num_windows: int):
        super().__init__()
        self.num_windows = num_windows
        self.key = nn.Linear(hidden_size, POINTER_SIZE)
        self.query = nn.Linear(hidden_size, num_windows * POINTER_SIZE)

    def forward(self, states: torch.Tensor, summary: torch.Tensor, document_mask: torch.BoolTensor) -> torch.Tensor:
        """
        Weighs the tokens of chunks.

        Args:
            states (`torch.FloatTensor` of shape `(num_chunks, length, hidden)`): Hidden states.
            summary (`torch.FloatTensor` of shape `(num_chunks, hidden)`): The state that has seen all of a chunk.
            document_mask (`torch.BoolTensor` of shape `(num_chunks, length)`): True on the chunk's own tokens.

        Returns:
            `torch.FloatTensor` of shape `(num_chunks, num_windows, length)`: Weights in 32 bits; each window's add up
            to 1.
        """
        queries = self.query(summary).unflatten(-1, (self.num_windows, POINTER_SIZE))  # (num_chunks, windows, size)
        found = queries.float() @ self.key(states).float().transpose(1, 2)  # (num_chunks, num_windows, length)
        found = found / POINTER_SIZE**0.5
        return found.masked_fill(~document_mask.unsqueeze(1), torch.finfo(found.dtype).min).softmax(dim=-1)


def read_windows(
    weights: torch.Tensor, windows: torch.LongTensor, embeddings: nn.Module, pointed: torch.Tensor, num_slots: int
) -> torch.Tensor:
    """
    Fills slots with the text that the weights point at.

    Args:
        weights (`torch.FloatTensor` of shape `(num_chunks, num_windows, length)`): Where each window begins.
        windows (`torch.LongTensor` of shape `(num_chunks, length, window)`):
            The generator's token ids of the text from each token of the chunk on.
        embeddings (`nn.Module`): The generator's token embeddings, as they are in front of its first layer.
        pointed (`torch.FloatTensor` of shape `(num_chunks, num_windows, hidden)`):
            Normalised hidden state of where each window begins.
        num_slots (`int`): Slots of the chunk that has most.

    Returns:
        `torch.FloatTensor` of shape `(num_chunks, num_slots, embedding + hidden)`: A slot's text beside the state of
        its window, which is scaled to the length of the text's embedding.
    """
    size = windows.shape[-1]
    text = embeddings(windows).to(weights.device).flatten(2)  # (num_chunks, length, window * embedding)
    text = (weights.to(text.dtype) @ text).unflatten(-1, (size, -1)).flatten(1, 2)  # (num_chunks, slots, embedding)
    length = text.detach().float().square().mean(dim=-1, keepdim=True).sqrt().to(pointed.dtype)
    states = pointed.repeat_interleave(size, dim=1) * length  # (num_chunks, slots, hidden)
    return torch.cat([text.to(pointed.dtype), states], dim=-1)[:, :num_slots]


def pointer_loss(
    weights: torch.Tensor, labels: torch.BoolTensor, num_pointed_chunks: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Asks for a window that holds the answer: minus the logarithm of the probability that one of a chunk's windows does.

    Args:
        weights (`torch.FloatTensor` of shape `(num_chunks, num_windows, length)`): Where each window begins.
        labels (`torch.BoolTensor` of shape `(num_chunks, length)`): True where a window that begins there holds it.
        num_pointed_chunks (`int`, *optional*):
            Chunks to average over; those of this batch that have labels when left out. A trainer that accumulates
            gradients passes the number in all micro-batches.

    Returns:
        `torch.FloatTensor` of shape `()`; 0 when no chunk has labels.
    """
    pointed = labels.any(dim=1)  # (num_chunks,)
    if num_pointed_chunks is None:
        num_pointed_chunks = int(pointed.sum())
    found = (weights * labels.unsqueeze(1)).sum(dim=-1)  # (num_chunks, num_windows)
    found = 1 - (1 - found).clamp(min=0).prod(dim=1)  # (num_chunks,)
    losses = torch.where(pointed, -(found + SMALLEST).log(), 0.0)
    return losses.sum() / max(num_pointed_chunks, 1)
