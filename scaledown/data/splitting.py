"""Cut long texts into passages of at most so many tokens."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from errors_scaledown import ScaleDownError

from ..common.text import is_blank

# A rule of thumb for English: where no tokenizer is named, 128 tokens are counted as 96 words.
WORDS_PER_TOKEN = 0.75
# Texts are cut again where a passage came out too long, each time into shorter ones.
MAX_CUTS = 5
# Some scripts have no blanks between words: Thai, Lao, Burmese, Khmer, kana, and Chinese, of which a tokenizer makes
# about one token a character. Anything else longer than 20 characters, more than nearly all words of any language, is
# an address or code, of more tokens than one word.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]{{1,20}}")
Span = tuple[int, int]


class PassageSplitter:
    """Cuts texts into passages of about equal length, so that none is a leftover of a few words.

    Passages begin and end at words, unless a single word is longer than a passage. A title stands before each passage
    of its text, `title: passage`, and counts.

    Args:
        tokenizer: Counts the tokens, and must be a fast one; without it, a token is counted as 3/4 of a word. Where
            words stand without blanks, as in Chinese, a character counts as a word.
        length: Tokens of a passage at most.
        overlap: Tokens at the end of a passage that the next one repeats, at most.

    Raises:
        ValueError: The numbers are out of range, or the tokenizer is a slow one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, length: int = 128, overlap: int = 0):
        if length < 8:
            raise ScaleDownError(f"passage_length is {length}, expected at least 8 tokens; raise --passage_length.")
        if not 0 <= overlap <= length // 2:
            raise ScaleDownError(
                f"passage_overlap is {overlap}, expected 0 to {length // 2}, half a passage; adapt --passage_overlap."
            )
        if tokenizer is not None and not tokenizer.is_fast:
            raise ScaleDownError(
                f"{tokenizer.name_or_path} has a slow tokenizer, which cannot say where its tokens stand in the text. "
                f"Name another --tokenizer_name_or_path, or none to count words."
            )
        self.tokenizer = tokenizer
        self.length = length
        self.overlap = overlap

    def __call__(self, title: str, text: str) -> list[str]:
        """Cut one text.

        Args:
            title: Its title, or nothing.
            text: The text.

        Returns:
            Passages; none for a text without words.
        """
        return self.split_many([(title, text)])[0]

    def split_many(self, texts: Sequence[tuple[str, str]]) -> list[list[str]]:
        """Cut many texts at once, which is faster.

        Args:
            texts: Pairs of a title, perhaps empty, and a text.

        Returns:
            The passages of each.
        """
        if not texts:
            return []
        leads = [f"{title.strip()}: " if title.strip() else "" for title, _ in texts]
        bodies = [text for _, text in texts]
        spans = self._spans(leads + bodies)
        lead_spans, body_spans = spans[: len(texts)], spans[len(texts) :]
        passages: list[list[str]] = [[]] * len(texts)
        # Room for the first word of a passage, which may take one token more than after a space.
        lengths = dict.fromkeys(range(len(texts)), self.length - (self.tokenizer is not None))
        for attempt in range(MAX_CUTS):
            for index, length in lengths.items():
                num_lead, num_body = len(lead_spans[index]), len(body_spans[index])
                if attempt == 0 and num_lead + num_body <= self.length:
                    length = self.length  # the whole text is one passage
                cut = self._cut(bodies[index], body_spans[index], length, num_lead)
                passages[index] = [leads[index] + passage for passage in cut]
            if self.tokenizer is None:
                break
            excess = self._excess(passages, lengths)
            lengths = {index: max(lengths[index] - tokens, 1) for index, tokens in excess.items()}
            if not lengths:
                break
        return passages

    def _excess(self, passages: list[list[str]], indices: Iterable[int]) -> dict[int, int]:
        """How many tokens too long the longest passage of a text is, for texts that have such."""
        indices = [index for index in indices if passages[index]]
        texts = [passage for index in indices for passage in passages[index]]
        if not texts:
            return {}
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        counts = map(len, encoded["input_ids"])
        longest = {index: max(next(counts) for _ in passages[index]) for index in indices}
        return {index: length - self.length for index, length in longest.items() if length > self.length}

    def _spans(self, texts: list[str]) -> list[list[Span]]:
        """The place of each token, or word, in its text."""
        if self.tokenizer is None:
            return [[match.span() for match in WORD.finditer(text)] for text in texts]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return [[span for span in spans if span[1] > span[0]] for spans in encoded["offset_mapping"]]

    def _cut(self, text: str, spans: list[Span], length: int, num_lead: int) -> list[str]:
        scale = 1.0 if self.tokenizer is not None else WORDS_PER_TOKEN
        length = max(int(length * scale), 1)
        # A title that is half a passage long must leave room for the text.
        length = max(length - num_lead, length // 2, 1)
        overlap = min(int(self.overlap * scale), length // 2)
        passages = []
        start = 0
        while start < len(spans):
            remaining = len(spans) - start
            count = max(math.ceil((remaining - overlap) / (length - overlap)), 1)
            end = start + math.ceil((remaining - overlap) / count) + overlap if count > 1 else len(spans)
            word = end
            while word > start + overlap and not _begins_word(text, spans, word):
                word -= 1
            # A single word longer than a passage is cut, and so is a sentence without blanks.
            end = word if word > start + overlap else end
            passage = text[spans[start][0] : spans[end - 1][1]].strip()
            if not is_blank(passage):
                passages.append(passage)
            if end == len(spans):
                break
            start = end - overlap
            while start < end and not _begins_word(text, spans, start):
                start += 1
        return passages


def _begins_word(text: str, spans: list[Span], index: int) -> bool:
    """Whether a token is the first of a word; the end of the text counts as one."""
    if index in (0, len(spans)):
        return True
    start = spans[index][0]
    # Several tokens may share a character of many bytes.
    return (text[start].isspace() or text[start - 1].isspace()) and start >= spans[index - 1][1]


def merge_lines(lines: Iterable[str], limit: int = 20_000) -> Iterator[str]:
    """Join consecutive lines into longer texts, so that short ones do not become passages of their own.

    Args:
        lines: Lines; a blank one ends a text.
        limit: Characters after which a text ends, so that a file without blank lines needs little memory.

    Returns:
        An iterator over texts.
    """
    merged: list[str] = []
    size = 0
    for line in lines:
        line = line.strip()
        if line:
            merged.append(line)
            size += len(line)
        if merged and (not line or size >= limit):
            yield "\n".join(merged)
            merged, size = [], 0
    if merged:
        yield "\n".join(merged)
