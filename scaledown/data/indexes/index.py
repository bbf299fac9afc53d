"""Search in passages on the disk, in memory that does not grow with their number.

| retriever | on the disk                                                          | search                          |
| --------- | -------------------------------------------------------------------- | ------------------------------- |
| `bm25`    | an index of bm25s, mapped; built in two passes over the passages     | one score per passage and query |
| `splade`  | sparse encodings in shards, by a `SparseEncoder`                     | shard by shard, the best kept   |
| `dense`   | encodings in shards, 16 bits each number, by a `SentenceTransformer` | shard by shard, the best kept   |

Every index is built in shards, and a kill costs at most the shard at work.
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import datasets
import numpy as np


class Index(Protocol):
    """Finds passages by the text of a question."""

    # Queries answered by one call of `search`; more of them share one reading of the encodings.
    queries_per_block: int

    def search(self, queries: Sequence[str], k: int) -> list[np.ndarray]:
        """Find passages.

        Args:
            queries: Questions.
            k: Passages wanted for each.

        Returns:
            For each question indices into the passages, best first; equal scores keep the order of the passages.
        """

    def matches(self, query: str) -> bool:
        """Whether a question has anything to be found by; if not, `search` finds the first passages."""


def open_index(
    retriever: str, folder: str | os.PathLike, passages: datasets.Dataset, model_name_or_path: str, **settings: Any
) -> Index:
    """Open an index, building what is missing.

    Args:
        retriever: One of `RETRIEVERS`.
        folder: Where it is kept.
        passages: The passages it finds.
        model_name_or_path: The encoder of `splade` and `dense`.
        **settings: More of `EncodingIndex`.

    Returns:
        The index.
    """
    # Imported here: whoever searches no corpus needs none of the packages.
    if retriever == "bm25":
        from .bm25 import BM25Index

        return BM25Index(folder, passages)
    from .encoded import DenseIndex, SpladeIndex

    kind = {"splade": SpladeIndex, "dense": DenseIndex}[retriever]
    return kind(folder, passages, model_name_or_path, **settings)
