"""What all retrievers share: the words of a text, and the highest of many scores."""

from collections.abc import Sequence

import bm25s
import numpy as np
import Stemmer


def tokenize(texts: Sequence[str], stemmer: Stemmer.Stemmer) -> list[list[str]]:
    """Stems of the words of texts, English stop words left out.

    Args:
        texts: Texts.
        stemmer: Stems words.

    Returns:
        A list of stems for each text.
    """
    return bm25s.tokenize(list(texts), stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)


def top_indices(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the highest scores; of equal scores those that come first.

    Args:
        scores: Scores, shape (n,).
        k: Number of indices wanted.

    Returns:
        Indices, highest score first, shape (min(k, n),).
    """
    k = min(k, len(scores))
    if k == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > threshold)
    # A tie at the edge is broken by order too.
    ties = np.flatnonzero(scores == threshold)[: k - len(above)]
    return np.concatenate([above[np.argsort(-scores[above], kind="stable")], ties])
