"""BM25 over a pool of passages in memory; `index` holds what searches a corpus on the disk."""

from collections.abc import Collection, Sequence

import bm25s
import numpy as np
import Stemmer

from errors_scaledown import ScaleDownError

from .scoring import tokenize, top_indices


class BM25Retriever:
    """BM25 with English stop words and stemming; equal scores keep the order of the pool.

    The same passages and query give the same ranking in every process, whatever the hash seed.

    Args:
        passages: The pool, at least one text.

    Raises:
        ValueError: The pool is empty.
    """

    def __init__(self, passages: Sequence[str]):
        if not passages:
            raise ScaleDownError("BM25 got 0 passages, expected at least 1; check the source of the pool.")
        self.num_passages = len(passages)
        self._stemmer = Stemmer.Stemmer("english")
        tokens = tokenize(passages, self._stemmer)
        # With no word in the whole pool there is nothing to index: every score is zero.
        self._index = None
        if any(tokens):
            self._index = bm25s.BM25()
            self._index.index(tokens, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """Score every passage of the pool.

        Args:
            query: The question's text.

        Returns:
            BM25 scores, float32, shape (num_passages,); higher is better, 0 where no word is shared.
        """
        tokens = tokenize([query], self._stemmer)[0]
        if self._index is None or not tokens:
            return np.zeros(self.num_passages, dtype=np.float32)
        return self._index.get_scores(tokens)

    def retrieve(self, query: str, k: int, exclude: Collection[int] = ()) -> list[int]:
        """Find the passages that score highest.

        Args:
            query: The question's text.
            k: Number of passages wanted.
            exclude: Indices of passages to leave out.

        Returns:
            Indices into the pool, best first; fewer than `k` where the pool has no more.

        Raises:
            ValueError: `k` is negative.
        """
        if k < 0:
            raise ScaleDownError(f"k is {k}, expected 0 or more passages; pass a larger number.")
        excluded = set(exclude)
        ranked = top_indices(self.scores(query), k + len(excluded))
        return [int(index) for index in ranked if index not in excluded][:k]

    def rank(self, query: str, candidates: Sequence[int]) -> list[int]:
        """Order some passages of the pool by score.

        Args:
            query: The question's text.
            candidates: Indices into the pool.

        Returns:
            The same indices, best first; equal scores keep the given order.
        """
        indices = np.asarray(candidates, dtype=np.int64)
        order = np.argsort(-self.scores(query)[indices], kind="stable")
        return [int(index) for index in indices[order]]
