"""Cut texts into passages of so many tokens."""

from transformers import PreTrainedTokenizerBase


def split_into_passages(text: str, tokenizer: PreTrainedTokenizerBase, length: int, overlap: int = 0) -> list[str]:
    """Cut a text into passages, between words wherever there is a word's end within reach.

    Args:
        text: Any text.
        tokenizer: Whose tokens count; it must tell where in the text they stand, as all fast tokenizers do.
        length: Tokens per passage at most.
        overlap: Tokens a passage repeats of the one before, at most.

    Returns:
        The passages in their order, without white space around them; none for a text without tokens.

    Raises:
        ValueError: A length below 1, an overlap that leaves nothing new, or a tokenizer without offsets.
    """
    if length < 1 or not 0 <= overlap < length:
        raise ValueError(f"length is {length} and overlap {overlap}; expected 0 <= overlap < length.")
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not tell where its tokens stand; use a fast tokenizer.")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    begins_word = [i == 0 or text[at].isspace() or text[at - 1].isspace() for i, at in enumerate(starts)]
    passages, first = [], 0
    while first < len(starts):
        end = _back_to_word(begins_word, min(first + length, len(starts)), first)
        stop = starts[end] if end < len(starts) else len(text)
        passages.append(text[starts[first] : stop].strip())
        first = end if end == len(starts) else max(_back_to_word(begins_word, end - overlap, first), first + 1)
    return [passage for passage in passages if passage]


def _back_to_word(begins_word: list[bool], position: int, lowest: int) -> int:
    """The last beginning of a word at or before `position` and past `lowest`; `position` where there is none."""
    if position >= len(begins_word):
        return position
    return next((i for i in range(position, lowest, -1) if begins_word[i]), position)
