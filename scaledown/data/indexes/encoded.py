"""Search by encodings of passages: sparse (SPLADE) or dense, in shards on the disk, the best kept shard by shard."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import scipy.sparse
from tqdm.auto import tqdm
from transformers.utils import cached_file

from errors_scaledown import ScaleDownError

from ...common.devices import pick_dtype
from ...common.files import atomic_writer
from ...common.loading import check_head, import_sentence_transformers, load_model
from ..journal import blocks
from .scoring import top_indices

# Passages per shard: the work a kill can cost. Encoding them takes seconds on a GPU.
ENCODED_PER_SHARD = 1_024


class EncodingIndex:
    """Encodings of passages in shards on the disk; a score is the dot product with the question's encoding.

    Args:
        folder: Where the encodings are kept.
        passages: The data set they were made from, or are to be.
        model_name_or_path: The encoder.
        revision: Branch, tag or commit of the encoder.
        dtype: One of `scaledown.common.choices.DTYPES`.
        batch_size: Texts encoded at once.

    Raises:
        ImportError: sentence-transformers is missing.
        ValueError: The encoder cannot be loaded, or does not compare by dot product or cosine.
    """

    queries_per_block = 4_096
    suffix: str

    def __init__(
        self,
        folder: str | os.PathLike,
        passages: datasets.Dataset,
        model_name_or_path: str,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int = 64,
    ):
        self.folder = Path(folder)
        self.batch_size = batch_size
        self._passages = passages
        self._model = load_model(
            lambda: self._load(model_name_or_path, revision=revision, model_kwargs={"dtype": pick_dtype(dtype)}),
            model_name_or_path,
            "--retriever_name_or_path",
        )
        check_head(self._model, model_name_or_path, "--retriever_name_or_path", revision)
        if self._model.similarity_fn_name not in ("dot", "cosine"):
            raise ScaleDownError(
                f"--retriever_name_or_path names {model_name_or_path}, which compares by "
                f"{self._model.similarity_fn_name}; expected dot or cosine. Choose another encoder."
            )
        self._normalize = self._model.similarity_fn_name == "cosine"
        self._build()

    def search(self, queries: Sequence[str], k: int) -> list[np.ndarray]:
        """See `Index.search`."""
        encoded = self._encode(list(queries), is_query=True)
        k = min(k, len(self._passages))
        best = [np.empty(0, dtype=np.int64)] * len(queries)
        best_scores = [np.empty(0, dtype=np.float32)] * len(queries)
        # The k-th best score so far; most shards have nothing above it, so that most of the sorting is saved.
        least = np.full(len(queries), -np.inf, dtype=np.float32)
        for number, rows in enumerate(blocks(len(self._passages), ENCODED_PER_SHARD)):
            scores = self._scores(encoded, self._open(self._path(number)))
            for query in np.flatnonzero(scores.max(axis=1) > least):
                row = scores[query]
                found = top_indices(row, k)
                # What was found before comes first, so that equal scores keep the order of the passages.
                merged = np.concatenate([best_scores[query], row[found]])
                order = top_indices(merged, k)
                best[query] = np.concatenate([best[query], found + rows.start])[order]
                best_scores[query] = merged[order]
                if len(order) == k:
                    least[query] = merged[order[-1]]
        return best

    def matches(self, query: str) -> bool:
        """See `Index.matches`: an encoding is near to some passage, whatever its words."""
        return True

    def _build(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = list(blocks(len(self._passages), ENCODED_PER_SHARD))
        for number, rows in enumerate(tqdm(shards, desc="Encoding passages", unit="shard", disable=None)):
            path = self._path(number)
            if not path.exists():
                encoded = self._encode(self._passages[rows.start : rows.stop]["text"], is_query=False)
                with atomic_writer(path, overwrite=True) as stream:
                    self._save(stream, encoded)

    def _path(self, number: int) -> Path:
        return self.folder / f"encodings-{number:05d}.{self.suffix}"

    def _load(self, name: str, **settings: Any) -> Any:
        raise NotImplementedError

    def _encode(self, texts: list[str], is_query: bool) -> Any:
        raise NotImplementedError

    def _save(self, stream: Any, encoded: Any) -> None:
        raise NotImplementedError

    def _open(self, path: Path) -> Any:
        raise NotImplementedError

    def _scores(self, queries: Any, passages: Any) -> np.ndarray:
        """Scores, float32, shape (queries, passages)."""
        raise NotImplementedError


def _kind_of_encoder(name: str, revision: str | None) -> str | None:
    """What sentence-transformers saved a model as; None where it did not."""
    file = cached_file(
        name,
        "config_sentence_transformers.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if file is None else json.loads(Path(file).read_text("utf-8")).get("model_type")


class SpladeIndex(EncodingIndex):
    """Sparse encodings, by any `SparseEncoder`."""

    suffix = "npz"

    def _load(self, name: str, **settings: Any) -> Any:
        encoder = import_sentence_transformers().SparseEncoder(name, **settings)
        # Anything but a masked language model is made sparse by a layer of random weights, unless it was saved so.
        made = any(type(module).__name__ == "SparseAutoEncoder" for module in encoder.modules())
        if made and _kind_of_encoder(name, settings.get("revision")) != "SparseEncoder":
            raise ScaleDownError("it is no sparse encoder and no masked language model, of which one can be made")
        return encoder

    def _encode(self, texts: list[str], is_query: bool) -> scipy.sparse.csr_matrix:
        encode = self._model.encode_query if is_query else self._model.encode_document
        encoded = (
            encode(texts, batch_size=self.batch_size, show_progress_bar=False, save_to_cpu=True).float().coalesce()
        )
        rows, columns = encoded.indices().numpy()
        matrix = scipy.sparse.csr_matrix((encoded.values().numpy(), (rows, columns)), shape=tuple(encoded.shape))
        if self._normalize:
            norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1))).ravel()
            matrix = scipy.sparse.diags_array(1 / np.maximum(norms, 1e-12)).astype(np.float32) @ matrix
        return scipy.sparse.csr_matrix(matrix, dtype=np.float32)

    def _save(self, stream: Any, encoded: scipy.sparse.csr_matrix) -> None:
        scipy.sparse.save_npz(stream, encoded, compressed=False)

    def _open(self, path: Path) -> scipy.sparse.csr_matrix:
        return scipy.sparse.load_npz(path)

    def _scores(self, queries: scipy.sparse.csr_matrix, passages: scipy.sparse.csr_matrix) -> np.ndarray:
        return (queries @ passages.T.tocsr()).toarray()


class DenseIndex(EncodingIndex):
    """Dense encodings, by any `SentenceTransformer`."""

    suffix = "npy"

    def _load(self, name: str, **settings: Any) -> Any:
        return import_sentence_transformers().SentenceTransformer(name, **settings)

    def _encode(self, texts: list[str], is_query: bool) -> np.ndarray:
        encode = self._model.encode_query if is_query else self._model.encode_document
        encoded = encode(
            texts, batch_size=self.batch_size, show_progress_bar=False, normalize_embeddings=self._normalize
        )
        return np.asarray(encoded, dtype=np.float32)

    def _save(self, stream: Any, encoded: np.ndarray) -> None:
        np.save(stream, encoded.astype(np.float16), allow_pickle=False)

    def _open(self, path: Path) -> np.ndarray:
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def _scores(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        return queries @ passages.astype(np.float32).T
