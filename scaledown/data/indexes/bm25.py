"""BM25 over passages on the disk: an index of bm25s, mapped, and built in memory that does not grow with them."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import bm25s
import datasets
import numpy as np
import scipy.sparse
import Stemmer
from tqdm.auto import tqdm

from ...common.files import atomic_writer, write_json
from ..journal import blocks
from .scoring import tokenize, top_indices

# Passages per shard: the work a kill can cost.
TOKENIZED_PER_SHARD = 16_384


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
            # The n-th passage of this shard with a stem goes n places after those of the earlier shards.
            target = np.repeat(places - columns.indptr[:-1], per_stem) + np.arange(columns.nnz)
            data[target] = scores
            indices[target] = columns.indices + first
            places += per_stem
            first += len(shard_lengths)
        data.flush()
        indices.flush()


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
