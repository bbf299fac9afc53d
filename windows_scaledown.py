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


# Scripts whose words white space does not set apart from what stands beside them, particles for example: Thai to
# Myanmar, Khmer, Hangul, kana, and Chinese characters.
UNSPACED = (
    "\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u318f\u31f0-\u9fff\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
)
# A letter or digit of any other script.
SPACED = rf"[^\W{UNSPACED}]"


def token_spans(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """
    Encodes texts, and says which characters each token stands for.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer.
        texts (`Sequence[str]`): Untrusted texts.

    Returns:
        `list[tuple[numpy.ndarray, numpy.ndarray]]`: Of each text the ids of `encode_as_text` `(num_tokens,)`, and first
        and last character `(num_tokens, 2)`. Where a text spells special tokens, its tokens are taken to be of one
        length.

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
        # Columns that are contiguous: numpy copies others whenever it searches them.
        offsets = np.array(offsets, dtype=np.int64, order="F").reshape(-1, 2, order="A")
        found.append((np.array(ids, dtype=np.int64), offsets))
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
        `tuple`: ids `(num_tokens, size)` of the window from each token on, and the first and last character
        `(num_tokens, 2)` of what of it fills slots. None reaches beyond the chunk; where that is shorter than a window,
        its last id is repeated.
    """
    filled = min(size, num_slots)
    found = _tokens_at(spans, pieces[:, 0])  # (num_tokens,)
    first = found[0]
    last = max(int(np.searchsorted(spans[:, 0], pieces[-1, 1], side="left")) - 1, first)
    starts = found.clip(first, max(last - filled + 1, first))
    places = (starts[:, None] + np.arange(size)).clip(max=last)  # (num_tokens, size)
    # Of a character that several tokens spell, a window that lacks one of them holds nothing.
    before, after = places[:, 0] - 1, places[:, filled - 1] + 1
    begin = np.maximum(spans[places[:, 0], 0], np.where(before >= 0, spans[before, 1], 0))
    after = np.where(after < len(spans), spans[after.clip(max=len(spans) - 1), 0], spans[-1, 1])
    end = np.minimum(spans[places[:, filled - 1], 1], after)
    return np.asarray(ids)[places], np.stack([begin, end], axis=1)


def _tokens_at(spans: np.ndarray, characters: np.ndarray) -> np.ndarray:
    """The first tokens that hold characters, or the next ones where these stand between two."""
    return np.searchsorted(spans[:, 1], characters, side="right").clip(max=len(spans) - 1)


def evidence_by_document(
    evidence: Sequence[Sequence[Sequence[str]]], documents: Sequence[Sequence[str]]
) -> list[Sequence[str]]:
    """
    Checks texts to point at.

    Args:
        evidence (`Sequence[Sequence[Sequence[str]]]`): Texts for each document of each question.
        documents (`Sequence[Sequence[str]]`): The documents of each question.

    Returns:
        `list[Sequence[str]]`: The texts for each document, in the order of all.

    Raises:
        ScaleDownError: another number of questions or documents, or something that is no list of texts.
    """
    if len(evidence) != len(documents):
        raise ScaleDownError(f"{len(documents)} questions but {len(evidence)} lists of evidence; pass one each.")
    for i, (row, texts) in enumerate(zip(evidence, documents, strict=True)):
        if len(row) != len(texts):
            raise ScaleDownError(
                f"evidence[{i}] has {len(row)} lists of texts for {len(texts)} documents; pass one each, an empty one "
                "for a document to point at nothing in."
            )
        for j, words in enumerate(row):
            if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
                raise ScaleDownError(f"evidence[{i}][{j}] is {words!r}, expected a list of texts.")
    return [words for row in evidence for words in row]


def find_evidence(text: str, evidence: Sequence[str]) -> np.ndarray:
    """
    Finds texts in a document.

    Args:
        text (`str`): The whole document.
        evidence (`Sequence[str]`): Texts to find in it, as words, in upper or lower case, with any white space.

    Returns:
        `numpy.ndarray` of shape `(num_found, 2)`: First and last character of each place, in their order.
    """
    found = set()
    for words in {r"\s+".join(map(re.escape, words.split())) for words in evidence} - {""}:
        # Words of other scripts end where no letter goes on.
        pattern = rf"(?:(?<!{SPACED})|(?=[{UNSPACED}])){words}(?:(?!{SPACED})|(?<=[{UNSPACED}]))"
        found.update(match.span() for match in re.finditer(pattern, text, re.IGNORECASE))
    return np.array(sorted(found), dtype=np.int64).reshape(-1, 2)


def holds_evidence(found: np.ndarray, characters: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """
    Tells which windows of a chunk hold what was found in its document.

    Args:
        found (`numpy.ndarray` of shape `(num_found, 2)`): What `find_evidence` returned.
        characters (`numpy.ndarray` of shape `(num_tokens, 2)`): First and last character of each window.
        pieces (`numpy.ndarray` of shape `(num_tokens, 2)`): Characters of the chunk's own tokens.

    Returns:
        `numpy.ndarray` of shape `(num_tokens,)`: True where a window holds one of the texts whole, or begins with one
        that no window of the chunk where it begins can hold.
    """
    first, last = np.searchsorted(found[:, 0], [characters[0, 0], max(pieces[-1, 1], characters[-1, 1])])
    starts, ends = found[first:last].T  # of what may be in this chunk
    inside = (characters[:, :1] <= starts) & (ends <= characters[:, 1:])  # (num_tokens, num_found)
    for i in np.flatnonzero(~inside.any(axis=0) & (pieces[0, 0] <= starts) & (starts < pieces[-1, 1])):
        begins = (characters[:, 0] <= starts[i]) & (starts[i] < characters[:, 1])
        inside[:, i] = begins & (characters[:, 0] == characters[begins, 0].max(initial=-1))
    return inside.any(axis=1)


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
        ScaleDownError: a tokenizer keeps no account of characters.
    """
    own = token_spans(processor.compressor_tokenizer, documents)
    generators = token_spans(processor.tokenizer, documents)
    windows = np.zeros((*document_mask.shape, processor.pointer_window), dtype=np.int64)
    labels = np.zeros(document_mask.shape, dtype=bool)
    found = [] if evidence is None else list(map(find_evidence, documents, evidence))
    read = [0] * len(documents)  # tokens of each document that earlier chunks have
    chunks = zip(document_mask.numpy(), chunk_slots, chunk_to_document, strict=True)
    for chunk, (mask, slots, document) in enumerate(chunks):
        pieces = own[document][1][read[document] : read[document] + mask.sum()]
        read[document] += len(pieces)
        ids, spans = generators[document]
        windows[chunk, mask], characters = windows_of_chunk(pieces, ids, spans, processor.pointer_window, slots)
        if evidence is not None:
            labels[chunk, mask] = holds_evidence(found[document], characters, pieces)
    encoded = {"compressor_windows": torch.from_numpy(windows)}
    return encoded if evidence is None else {**encoded, "pointer_labels": torch.from_numpy(labels)}
