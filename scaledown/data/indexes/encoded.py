"""Search in passages on the disk, in memory that does not grow with their number.

| retriever | on the disk                                                          | search                          |
| --------- | -------------------------------------------------------------------- | ------------------------------- |
| `bm25`    | an index of bm25s, mapped; built in two passes over the passages     | one score per passage and query |
| `splade`  | sparse encodings in shards, by a `SparseEncoder`                     | shard by shard, the best kept   |
| `dense`   | encodings in shards, 16 bits each number, by a `SentenceTransformer` | shard by shard, the best kept   |

Every index is built in shards, and a kill costs at most the shard at work.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import bm25s
import datasets
import numpy as np
import scipy.sparse
import Stemmer
from tqdm.auto import tqdm
from transformers.utils import cached_file

from errors_scaledown import ScaleDownError

from ...common.devices import check_head, import_sentence_transformers, load_model, pick_dtype
from ...common.files import atomic_writer, write_json
from ..journal import blocks
from .pool import tokenize, top_indices

# Passages per shard: the work a kill can cost. Encoding them takes seconds on a GPU.
TOKENIZED_PER_SHARD = 16_384
ENCODED_PER_SHARD = 1_024


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


class BM25Index:
    """A BM25 index of bm25s, mapped from the disk; its scores equal those of `bm25s.BM25().index(...)`.

    Args:
        folder: Where the index is kept.
        passages: The data set it was built from, or is to be.
    """

    queries_per_block = 64

    def __init__(self, folder: str | os.PathLike, passages: datasets.Dataset):
        self.folder = Path(folder)
        self._passages = passages
        self._stemmer = Stemmer.Stemmer("english")
        if not (self.folder / "index").exists():
            self._build()
        self._index = bm25s.BM25.load(self.folder / "index", mmap=True, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> list[np.ndarray]:
        """See `Index.search`."""
        return [top_indices(self.scores(query), k) for query in queries]

    def matches(self, query: str) -> bool:
        """See `Index.matches`."""
        return bool(self._ids(query))

    def scores(self, query: str) -> np.ndarray:
        """Score every passage.

        Args:
            query: A question.

        Returns:
            float32, shape (number of passages,); 0 where no word is shared.
        """
        ids = self._ids(query)
        if not ids:
            return np.zeros(len(self._passages), dtype=np.float32)
        return self._index.get_scores_from_ids(ids)

    def _ids(self, query: str) -> list[int]:
        """The words of a question that the passages have."""
        stems = tokenize([query], self._stemmer)[0]
        return [self._index.vocab_dict[stem] for stem in stems if stem in self._index.vocab_dict]

    def _build(self) -> None:
        """Two passes: stems of the passages and their frequencies, then the scores into their places."""
        self.folder.mkdir(parents=True, exist_ok=True)
        vocabulary: dict[str, int] = {}
        shards = [self._tokenized_shard(number, rows, vocabulary) for number, rows in self._shards("Counting words")]
        frequencies = np.zeros(len(vocabulary), dtype=np.int64)
        for shard in shards:
            counts = _load_counts(shard, len(vocabulary))[0]
            frequencies += np.bincount(counts.indices, minlength=len(vocabulary))
        lengths = np.concatenate([np.load(shard)["lengths"] for shard in shards])
        partial = self.folder / "index.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        self._write_scores(partial, shards, frequencies, lengths)
        # The names and the form are those of BM25.save.
        model = bm25s.BM25()
        write_json(partial / "vocab.index.json", vocabulary, ensure_ascii=False)
        settings = {name: getattr(model, name) for name in ("k1", "b", "delta", "method", "idf_method", "dtype")}
        settings |= {"int_dtype": model.int_dtype, "num_docs": len(lengths), "backend": model.backend}
        write_json(partial / "params.index.json", {**settings, "version": bm25s.__version__})
        partial.rename(self.folder / "index")
        for shard in self.folder.glob("words-*"):
            shard.unlink()

    def _shards(self, description: str) -> Iterator[tuple[int, range]]:
        shards = list(blocks(len(self._passages), TOKENIZED_PER_SHARD))
        return enumerate(tqdm(shards, desc=description, unit="shard", disable=None))

    def _tokenized_shard(self, number: int, rows: range, vocabulary: dict[str, int]) -> Path:
        """Stems of a shard as numbers; words it is the first to hold join the vocabulary."""
        path = self.folder / f"words-{number:05d}.npz"
        new_words = self.folder / f"words-{number:05d}.json"
        if path.exists():
            for word in json.loads(new_words.read_text("utf-8")):
                vocabulary[word] = len(vocabulary)
            return path
        known = len(vocabulary)
        tokens = tokenize(self._passages[rows.start : rows.stop]["text"], self._stemmer)
        # A text without words has one empty stem.
        tokens = [[stem for stem in stems if stem] for stems in tokens]
        lengths = np.asarray([*map(len, tokens)], dtype=np.uint32)
        stream_of_ids = (vocabulary.setdefault(stem, len(vocabulary)) for stems in tokens for stem in stems)
        ids = np.fromiter(stream_of_ids, dtype=np.uint32, count=int(lengths.sum()))
        write_json(new_words, list(vocabulary)[known:], ensure_ascii=False)
        with atomic_writer(path, overwrite=True) as stream:
            np.savez(stream, ids=ids, lengths=lengths)
        return path

    def _write_scores(self, folder: Path, shards: list[Path], frequencies: np.ndarray, lengths: np.ndarray) -> None:
        """The score of every stem in every passage, sorted by stem: the matrix of bm25s, of Lucene's BM25."""
        model = bm25s.BM25()
        total, num_passages = int(frequencies.sum()), len(lengths)
        starts = np.zeros(len(frequencies) + 1, dtype=np.int64)
        np.cumsum(frequencies, out=starts[1:])
        # A corpus without a word has nothing to map.
        size = max(total, 1)
        data = np.lib.format.open_memmap(folder / "data.csc.index.npy", "w+", np.float32, (size,))
        indices = np.lib.format.open_memmap(folder / "indices.csc.index.npy", "w+", np.int32, (size,))
        np.save(folder / "indptr.csc.index.npy", starts)
        inverse = np.log(1 + (num_passages - frequencies + 0.5) / (frequencies + 0.5)).astype(np.float32)
        # A corpus without a word has no length to speak of.
        mean_length = max(lengths.mean(), 1.0 / num_passages)
        places = starts[:-1].copy()
        first = 0
        for shard in tqdm(shards, desc="Writing the index", unit="shard", disable=None):
            counts, shard_lengths = _load_counts(shard, len(frequencies))
            columns = counts.tocsc()
            relative = model.k1 * ((1 - model.b) + model.b * shard_lengths / mean_length)
            scores = inverse[np.repeat(np.arange(len(frequencies)), np.diff(columns.indptr))] * (
                columns.data / (relative[columns.indices] + columns.data)
            )
            per_stem = np.diff(columns.indptr)
            # The n-th passage of this shard with a stem goes n places behind those of the shards before.
            target = np.repeat(places - columns.indptr[:-1], per_stem) + np.arange(columns.nnz)
            data[target] = scores
            indices[target] = columns.indices + first
            places += per_stem
            first += len(shard_lengths)
        data.flush()
        indices.flush()


class EncodingIndex:
    """Encodings of passages in shards on the disk; a score is the dot product with the question's encoding.

    Args:
        folder: Where the encodings are kept.
        passages: The data set they were made from, or are to be.
        model_name_or_path: The encoder.
        revision: Branch, tag or commit of the encoder.
        dtype: One of `scaledown.common.devices.DTYPES`.
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
    if retriever == "bm25":
        return BM25Index(folder, passages)
    kind = {"splade": SpladeIndex, "dense": DenseIndex}[retriever]
    return kind(folder, passages, model_name_or_path, **settings)


def _load_counts(path: Path, num_stems: int) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """How often each stem occurs in each passage of a shard, and the passages' lengths."""
    with np.load(path) as shard:
        ids, lengths = shard["ids"], shard["lengths"].astype(np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    # Pairs of passage and stem that repeat are added up.
    counts = scipy.sparse.coo_matrix(
        (np.ones(len(ids), dtype=np.float32), (rows, ids.astype(np.int64))), shape=(len(lengths), num_stems)
    ).tocsr()
    return counts, lengths
