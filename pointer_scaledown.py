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
    Weighs where a window of a chunk should begin, by attention as in pointer networks (arXiv 1506.03134).

    Args:
        hidden_size (`int`): Width of the states.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.key = nn.Linear(hidden_size, POINTER_SIZE)
        self.query = nn.Linear(hidden_size, POINTER_SIZE)

    def forward(self, states: torch.Tensor, summary: torch.Tensor, document_mask: torch.BoolTensor) -> torch.Tensor:
        """
        Weighs the tokens of chunks.

        Args:
            states (`torch.FloatTensor` of shape `(num_chunks, length, hidden)`): Hidden states.
            summary (`torch.FloatTensor` of shape `(num_chunks, hidden)`): The state that has seen all of a chunk.
            document_mask (`torch.BoolTensor` of shape `(num_chunks, length)`): True on the chunk's own tokens.

        Returns:
            `torch.FloatTensor` of shape `(num_chunks, length)`: Weights in 32 bits; a chunk's add up to 1.
        """
        query = self.query(summary).float().unsqueeze(-1)  # (num_chunks, size, 1)
        found = (self.key(states).float() @ query).squeeze(-1) / POINTER_SIZE**0.5  # (num_chunks, length)
        return found.masked_fill(~document_mask, torch.finfo(found.dtype).min).softmax(dim=-1)


@torch.no_grad()
def choose_windows(
    weights: torch.Tensor, document_mask: torch.BoolTensor, size: int, num_windows: int
) -> torch.LongTensor:
    """
    Chooses windows one after the other: of those that repeat the fewest tokens, the one of most weight.

    Args:
        weights (`torch.FloatTensor` of shape `(num_chunks, length)`): Where a window should begin.
        document_mask (`torch.BoolTensor` of shape `(num_chunks, length)`): True on the chunk's own tokens.
        size (`int`): Tokens of a window.
        num_windows (`int`): Windows of a chunk.

    Returns:
        `torch.LongTensor` of shape `(num_chunks, num_windows)`: Where each begins, the one of most weight first.
    """
    places = torch.arange(weights.shape[1], device=weights.device)
    last = torch.where(document_mask, places, 0).amax(dim=1, keepdim=True)  # (num_chunks, 1)
    places = torch.minimum(places, last - size + 1)  # (num_chunks, length): no window reaches beyond the chunk
    left = weights.masked_fill(~document_mask, -torch.inf)
    chosen = []
    for _ in range(num_windows):
        start = left.argmax(dim=1, keepdim=True)  # (num_chunks, 1)
        chosen.append(start)
        # No weight exceeds 1, so that a token in common counts for more than any weight.
        left = left - (size - (places - places.gather(1, start)).abs()).clamp(min=0)
    return torch.cat(chosen, dim=1)


class _Chosen(torch.autograd.Function):
    """What was chosen, with the gradient of a mixture by the weights; all there is to choose from is made for that."""

    @staticmethod
    def forward(ctx, weights, chosen, make_all):
        ctx.make_all = make_all
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx, gradient):
        of_weights = None
        if ctx.needs_input_grad[0]:
            with torch.no_grad():
                values = ctx.make_all().to(gradient)  # (num_chunks, length, window or 1, …)
            of_weights = torch.einsum("ckwe,clwe->cl", gradient, values).float()
        return of_weights, gradient, None


def read_windows(
    weights: torch.Tensor,
    starts: torch.LongTensor,
    windows: torch.LongTensor,
    embeddings: nn.Module,
    states: torch.Tensor,
    num_slots: int,
) -> torch.Tensor:
    """
    Fills slots with the text of the chosen windows.

    What is read is one text, not a mixture of several, which would be none. The answer's gradient reaches the weights
    as if texts were mixed by them (straight-through estimation, arXiv 1308.3432).

    Args:
        weights (`torch.FloatTensor` of shape `(num_chunks, length)`): Where a window should begin.
        starts (`torch.LongTensor` of shape `(num_chunks, num_windows)`): Where the chosen ones do.
        windows (`torch.LongTensor` of shape `(num_chunks, length, window)`):
            The generator's token ids of the text from each token of the chunk on.
        embeddings (`nn.Module`): The generator's token embeddings, as they are in front of its first layer.
        states (`torch.FloatTensor` of shape `(num_chunks, length, hidden)`): Normalized hidden states.
        num_slots (`int`): Slots of the chunk that has most.

    Returns:
        `torch.FloatTensor` of shape `(num_chunks, num_slots, embedding + hidden)`: A slot's text beside the state of
        where its window begins, which is scaled to the length of the text's embedding.
    """
    rows = torch.arange(len(starts), device=starts.device).unsqueeze(1)
    size = windows.shape[-1]
    text = embeddings(windows[rows, starts]).to(states)  # (num_chunks, num_windows, window, embedding)
    text = _Chosen.apply(weights, text, lambda: embeddings(windows))
    pointed = states[rows, starts].unsqueeze(2)  # (num_chunks, num_windows, 1, hidden)
    pointed = _Chosen.apply(weights, pointed, lambda: states.unsqueeze(2))
    length = text.detach().float().square().mean(dim=-1, keepdim=True).sqrt().to(states)
    pointed = (pointed * length).expand(-1, -1, size, -1)  # (num_chunks, num_windows, window, hidden)
    return torch.cat([text, pointed], dim=-1).flatten(1, 2)[:, :num_slots]


def pointer_loss(
    weights: torch.Tensor, labels: torch.BoolTensor, num_pointed_chunks: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Asks for a window that holds the answer: minus the logarithm of the weight where such windows begin.

    Args:
        weights (`torch.FloatTensor` of shape `(num_chunks, length)`): Where a window should begin.
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
    found = (weights * labels).sum(dim=-1)  # (num_chunks,)
    losses = torch.where(pointed, -(found + SMALLEST).log(), 0.0)
    return losses.sum() / max(num_pointed_chunks, 1)
