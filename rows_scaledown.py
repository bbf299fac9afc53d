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
"""The compressor's rows: token ids of question and document, framed and cut."""

import itertools
import math

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

try:
    from .errors_scaledown import ScaleDownError
    from .text_scaledown import control_ids, encode_as_text, encode_filled, first_special_ids, tokenize, warn_of_unknown
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError
    from text_scaledown import control_ids, encode_as_text, encode_filled, first_special_ids, tokenize, warn_of_unknown

logger = logging.get_logger(__name__)

# Token ids of a row, and where the document's own begin and end.
Row = tuple[list[int], int, int]


class CompressorRowsMixin:
    """How a `ScaleDownProcessor` makes the compressor's rows."""

    def compressor_rows(self, questions: list[str], documents: list[list[str]]) -> list[list[list[Row]]]:
        """
        Makes the rows of documents.

        Args:
            questions (`list[str]`): One per list of documents; an empty string for none.
            documents (`list[list[str]]`): Non-empty texts.

        Returns:
            `list[list[list[Row]]]`: For each question and document, the rows of its chunks.

        Raises:
            ScaleDownError: a document without a single token, or a row without room for it.
        """
        tokenizer, limit = self.compressor_tokenizer, self.compressor_max_length
        texts = [document for row in documents for document in row]
        encoded = encode_as_text(tokenizer, [*questions, *texts])
        warn_of_unknown(tokenizer, [*questions, *texts], encoded)
        asked, found = encoded[: len(questions)], iter(encoded[len(questions) :])
        own = [[next(found) for _ in row] for row in documents]
        for i, row in enumerate(own):
            for j, ids in enumerate(row):
                if not ids:
                    raise ScaleDownError(
                        f"documents[{i}][{j}] has no token in the compressor's vocabulary; leave it out."
                    )
        if self.compressor_prompt is not None:
            return self._rows_of_prompt(questions, documents)
        prefix, middle, suffix = self._compressor_frame()
        rows = []
        for i, row in enumerate(own):
            query = self._cut_query(asked[i])
            start = prefix + (query + middle if query else [])
            rows.append([])
            for j, ids in enumerate(row):
                if limit is None:
                    chunks = _split_evenly(ids, self.chunk_length)
                else:
                    room = limit - len(start) - len(suffix)
                    _check_cut(f"documents[{i}][{j}]", len(ids), room, limit)
                    chunks = [ids[:room]]
                rows[-1].append([(start + chunk + suffix, len(start), len(start) + len(chunk)) for chunk in chunks])
        return rows

    def _rows_of_prompt(self, questions: list[str], documents: list[list[str]]) -> list[list[list[Row]]]:
        """Rows whose question and document are tokenized as one, with `compressor_prompt` around them."""
        tokenizer, limit = self.compressor_tokenizer, self.compressor_max_length
        before, after = self.compressor_prompt.split("{document}")
        pieces = [*before.split("{question}"), after]
        reads_question = len(pieces) == 3
        control = control_ids(tokenizer)
        frame = tokenize(tokenizer, "".join(pieces), add_special_tokens=False)["input_ids"]
        adds = control.isdisjoint(frame)
        texts = [
            [question, document] if reads_question else [document]
            for question, row in zip(questions, documents, strict=True)
            for document in row
        ]
        heads = [[question, ""] if reads_question else [""] for question in questions]
        encoded = iter(encode_filled(tokenizer, pieces, texts, add_special_tokens=adds))
        heads = encode_filled(tokenizer, pieces, heads, add_special_tokens=adds)
        rows = []
        for i, (row, head) in enumerate(zip(documents, heads, strict=True)):
            rows.append([])
            for j in range(len(row)):
                ids = next(encoded)
                start = _common(head, ids)
                end = len(ids)
                while end > start and ids[end - 1] in control:
                    end -= 1
                # The tokenizer keeps its own special tokens when it cuts, and knows nothing of spelled ones.
                suffix = ids[end:] if adds else []
                room = limit - start - len(suffix)
                _check_cut(f"documents[{i}][{j}]", end - start, room, limit)
                if len(ids) > limit:
                    ids = ids[: limit - len(suffix)] + suffix
                    end = min(end, limit - len(suffix))
                rows[-1].append([(ids, start, end)])
        return rows

    def _compressor_frame(self) -> tuple[list[int], list[int], list[int]]:
        """Ids before the query, between query and chunk, and after the chunk, as the backbone was pretrained."""
        tokenizer = self.compressor_tokenizer
        if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
            return pair_frame(tokenizer)
        return first_special_ids(tokenizer), tokenize(tokenizer, "\n", add_special_tokens=False)["input_ids"], []

    def _cut_query(self, ids: list[int]) -> list[int]:
        if len(ids) > self.max_query_length:
            logger.warning_once(
                f"A question has more than max_query_length={self.max_query_length} tokens: the compressor sees its "
                "first part, the generator all of it."
            )
        return ids[: self.max_query_length]


def pair_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Special ids before, between and after two texts, as a tokenizer puts them."""
    pair = tokenize(tokenizer, "a", "b", return_special_tokens_mask=True)
    ids, is_special = pair["input_ids"], pair["special_tokens_mask"]
    first, last = is_special.index(0), len(ids) - 1 - is_special[::-1].index(0)
    gap = [i for i in range(first, last) if is_special[i]]
    return ids[:first], [ids[i] for i in gap], ids[last + 1 :]


def _check_cut(name: str, length: int, room: int, limit: int):
    """Says that a document is cut, and refuses one of which nothing would be left."""
    if room < 1:
        raise ScaleDownError(
            f"{name} has no room in the compressor's row of compressor_max_length={limit} tokens, which the question "
            "fills. Shorten the question."
        )
    if length > room:
        logger.warning_once(
            f"{name} has {length} tokens, and {room} fit beside the question into a row of compressor_max_length="
            f"{limit}: the rest is not read. Split such documents."
        )


def _common(first: list[int], second: list[int]) -> int:
    """How many ids two lists begin with in common."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in pairs)


def _split_evenly(ids: list[int], chunk_length: int) -> list[list[int]]:
    """The fewest chunks of at most `chunk_length` ids, of equal length, so that none is a leftover of a few tokens."""
    count = math.ceil(len(ids) / chunk_length)
    bounds = [round(k * len(ids) / count) for k in range(count + 1)]
    return [ids[start:end] for start, end in itertools.pairwise(bounds)]
