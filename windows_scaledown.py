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
"""Windows of text in the generator's tokens, one from each token of a chunk on."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

try:
    from .errors_scaledown import ScaleDownError
    from .text_scaledown import AS_TEXT, tokenize, without_control_tokens
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError
    from text_scaledown import AS_TEXT, tokenize, without_control_tokens


def token_spans(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
    """
    Encodes texts, and says which characters each token stands for.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer.
        texts (`Sequence[str]`): Untrusted texts.

    Returns:
        `list[tuple[list[int], numpy.ndarray]]`: Of each text the ids of `encode_as_text`, and first and last character
        `(num_tokens, 2)`. Where a text spells special tokens, its tokens are taken to be of one length.

    Raises:
        ScaleDownError: the tokenizer keeps no account of characters.
    """
    if not tokenizer.is_fast:
        raise ScaleDownError(
            f"{tokenizer.name_or_path} is a {type(tokenizer).__name__}, which does not say which characters a token "
            'stands for, as slot_pooling="pointer" needs. Use its fast tokenizer, or choose another slot_pooling.'
        )
    encoded = tokenize(tokenizer, list(texts), return_offsets_mapping=True, **AS_TEXT)
    as_text = without_control_tokens(tokenizer, texts, encoded["input_ids"])
    found = []
    for text, ids, given, offsets in zip(texts, as_text, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if ids != given:
            bounds = np.linspace(0, len(text), len(ids) + 1).astype(int)
            offsets = np.stack([bounds[:-1], bounds[1:]], axis=1)
        found.append((ids, np.array(offsets, dtype=np.int64).reshape(-1, 2)))
    return found


def windows_of_chunk(
    pieces: np.ndarray, ids: Sequence[int], spans: np.ndarray, size: int, num_slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    Finds the windows of a chunk.

    Args:
        pieces (`numpy.ndarray` of shape `(num_tokens, 2)`): Characters of the chunk's own tokens.
        ids (`Sequence[int]`): The generator's token ids of the whole document.
        spans (`numpy.ndarray` of shape `(num_ids, 2)`): Their characters.
        size (`int`): Tokens of a window.
        num_slots (`int`): Slots of the chunk; where they are fewer, the first tokens of a window fill them.

    Returns:
        `tuple`: ids `(num_tokens, size)` of the window from each token on, and the first and last character of what of
        it fills slots. None reaches beyond the chunk; where that is shorter than a window, its last id is repeated.
    """
    filled = min(size, num_slots)
    found = _tokens_at(spans, pieces[:, 0])  # (num_tokens,)
    first = found[0]
    last = max(int(np.searchsorted(spans[:, 0], pieces[-1, 1], side="left")) - 1, first)
    starts = found.clip(first, max(last - filled + 1, first))
    places = (starts[:, None] + np.arange(size)).clip(max=last)  # (num_tokens, size)
    return np.asarray(ids)[places], np.stack([spans[places[:, 0], 0], spans[places[:, filled - 1], 1]], axis=1)


def _tokens_at(spans: np.ndarray, characters: np.ndarray) -> np.ndarray:
    """The tokens that hold characters, or the next ones where these stand between two."""
    tokens = (np.searchsorted(spans[:, 0], characters, side="right") - 1).clip(min=0)
    return (tokens + (spans[tokens, 1] <= characters)).clip(max=len(spans) - 1)


def holds_evidence(text: str, evidence: Sequence[str], characters: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """
    Tells which windows of a chunk hold a text.

    Args:
        text (`str`): The whole document.
        evidence (`Sequence[str]`): Texts to find in it, as words, in upper or lower case.
        characters (`numpy.ndarray` of shape `(num_tokens, 2)`): First and last character of each window.
        pieces (`numpy.ndarray` of shape `(num_tokens, 2)`): Characters of the chunk's own tokens.

    Returns:
        `numpy.ndarray` of shape `(num_tokens,)`: True where a window holds one of the texts, or begins with one that
        is longer than a window.
    """
    held = np.zeros(len(characters), dtype=bool)
    for words in {words.strip() for words in evidence} - {""}:
        for match in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE):
            start, end = match.span()
            inside = (characters[:, 0] <= start) & (end <= characters[:, 1])
            if not inside.any() and pieces[0, 0] <= start < pieces[-1, 1]:
                inside = (characters[:, 0] <= start) & (start < characters[:, 1])
                inside &= characters[:, 0] == characters[inside, 0].max(initial=-1)
            held |= inside
    return held


def encode_windows(
    processor,
    documents: Sequence[str],
    document_mask: torch.BoolTensor,
    chunk_slots: Sequence[int],
    chunk_to_document: Sequence[int],
    evidence: Sequence[Sequence[str]] | None,
) -> dict[str, torch.Tensor]:
    """
    Encodes the windows of chunks.

    Args:
        processor (`ScaleDownProcessor`): With a `pointer_window`.
        documents (`Sequence[str]`): Full texts.
        document_mask (`torch.BoolTensor` of shape `(num_chunks, chunk_len)`): True on the chunks' own tokens.
        chunk_slots (`Sequence[int]`): Slots of each chunk, without a separator's.
        chunk_to_document (`Sequence[int]`): Document of each chunk, ascending.
        evidence (`Sequence[Sequence[str]]`, *optional*): Texts to point at in each document.

    Returns:
        `dict[str, torch.Tensor]`: `compressor_windows` and, with evidence, `pointer_labels`, as of the processor.

    Raises:
        ScaleDownError: a tokenizer keeps no account of characters; evidence of another number of documents.
    """
    if evidence is not None and len(evidence) != len(documents):
        raise ScaleDownError(f"evidence is of {len(evidence)} documents, not of {len(documents)}; pass one list each.")
    own = token_spans(processor.compressor_tokenizer, documents)
    generators = token_spans(processor.tokenizer, documents)
    windows = np.zeros((*document_mask.shape, processor.pointer_window), dtype=np.int64)
    labels = np.zeros(document_mask.shape, dtype=bool)
    read = [0] * len(documents)  # tokens of each document that earlier chunks have
    chunks = zip(document_mask.numpy(), chunk_slots, chunk_to_document, strict=True)
    for chunk, (mask, slots, document) in enumerate(chunks):
        pieces = own[document][1][read[document] : read[document] + mask.sum()]
        read[document] += len(pieces)
        ids, spans = generators[document]
        windows[chunk, mask], characters = windows_of_chunk(pieces, ids, spans, processor.pointer_window, slots)
        if evidence is not None:
            labels[chunk, mask] = holds_evidence(documents[document], evidence[document], characters, pieces)
    encoded = {"compressor_windows": torch.from_numpy(windows)}
    return encoded if evidence is None else {**encoded, "pointer_labels": torch.from_numpy(labels)}
