"""Texts: whether anything in them can be seen or written, and how they are cut for a message."""

import json
import unicodedata
from typing import Any

# White space, controls, invisible format characters, private use, and marks without a letter to stand on: of these
# alone a tokenizer may leave nothing.
BLANK_CATEGORIES = {"Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Mn", "Mc", "Me"}


def is_blank(text: str) -> bool:
    """Whether a text has no character that can be seen, so that a tokenizer may find no token in it."""
    return all(unicodedata.category(character) in BLANK_CATEGORIES for character in text)


def half_of_a_pair(text: str) -> str | None:
    """The first half of a surrogate pair that stands alone in a text, as JSON spells it; None where there is none.

    JSON can spell one; such a text can be neither written nor tokenized.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def shorten(value: Any, limit: int = 120) -> str:
    """Cut a value for a message.

    Args:
        value: A text, or anything that JSON can hold.
        limit: Characters at most.

    Returns:
        The value, or its beginning.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
