"""Search on the disk: the same passages as an exact search in memory finds, from whole or interrupted builds."""

import bm25s
import datasets
import numpy as np
import pytest
import Stemmer
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from tiny_teachers import save_dense, save_splade

from scaledown.common.choices import RETRIEVERS
from scaledown.data.indexes import bm25, encoded
from scaledown.data.indexes.bm25 import BM25Index
from scaledown.data.indexes.encoded import DenseIndex, SpladeIndex
from scaledown.data.indexes.index import open_index
from scaledown.data.indexes.scoring import tokenize, top_indices
from tiny import DOCUMENTS, QUESTIONS

TEXTS = [text for listed in DOCUMENTS for text in listed] + ["!", "", "Herons are long-legged birds."]
TEXTS += [f"Passage {index} about herons, novels {'and cranes ' * (index % 4)}." for index in range(40)]
PASSAGES = datasets.Dataset.from_dict({"text": TEXTS})


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(bm25, "TOKENIZED_PER_SHARD", 7)
    monkeypatch.setattr(encoded, "ENCODED_PER_SHARD", 7)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    return {"splade": save_splade(folder / "splade"), "dense": save_dense(folder / "dense"), "bm25": ""}


def reference_scores(retriever: str, model: str) -> np.ndarray:
    """Scores of every passage for every question, all at once."""
    if retriever == "bm25":
        stemmer = Stemmer.Stemmer("english")
        index = bm25s.BM25()
        index.index([[stem for stem in stems if stem] for stems in tokenize(TEXTS, stemmer)], show_progress=False)
        return np.stack([index.get_scores(stems) for stems in tokenize(QUESTIONS, stemmer)])
    if retriever == "splade":
        encoder = SparseEncoder(model)
        queries, passages = encoder.encode_query(QUESTIONS).to_dense(), encoder.encode_document(TEXTS).to_dense()
        return (queries @ passages.T).numpy()
    encoder = SentenceTransformer(model)
    passages = encoder.encode_document(TEXTS, normalize_embeddings=True).astype(np.float16).astype(np.float32)
    return encoder.encode_query(QUESTIONS, normalize_embeddings=True) @ passages.T


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_search_over_shards_finds_what_a_search_over_all_finds(tmp_path, models, retriever):
    index = open_index(retriever, tmp_path / "i", PASSAGES, models[retriever])
    expected = reference_scores(retriever, models[retriever])
    for k in (1, 5, 30, 99):
        for found, scores in zip(index.search(QUESTIONS, k), expected, strict=True):
            assert len(found) == len(set(found.tolist())) == min(k, len(TEXTS))
            # The sums of both are taken in another order.
            assert np.all(np.diff(scores[found]) <= 1e-5 * np.abs(scores).max())
            np.testing.assert_allclose(scores[found], np.sort(scores)[::-1][:k], rtol=1e-4, atol=1e-6)
    # Opened again, nothing is encoded, and the answers are the same.
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    again = open_index(retriever, tmp_path / "i", PASSAGES, models[retriever])
    for a, b in zip(index.search(QUESTIONS, 9), again.search(QUESTIONS, 9), strict=True):
        np.testing.assert_array_equal(a, b)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))


def test_the_bm25_index_is_that_of_bm25s_and_mapped(tmp_path):
    index = BM25Index(tmp_path, PASSAGES)
    expected = reference_scores("bm25", "")
    for question, scores in zip(QUESTIONS, expected, strict=True):
        np.testing.assert_array_equal(index.scores(question), scores)
    assert isinstance(index._index.scores["data"], np.memmap)
    assert not list(tmp_path.glob("words-*"))
    np.testing.assert_array_equal(index.scores("unheard !"), np.zeros(len(TEXTS)))


def test_bm25_over_passages_without_words(tmp_path):
    index = BM25Index(tmp_path, datasets.Dataset.from_dict({"text": ["!", "?"]}))
    assert [found.tolist() for found in index.search(["dog"], 5)] == [[0, 1]]


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_an_interrupted_build_goes_on_and_ends_the_same(tmp_path, models, retriever, monkeypatch):
    open_index(retriever, tmp_path / "whole", PASSAGES, models[retriever])
    kind = {"bm25": BM25Index, "splade": SpladeIndex, "dense": DenseIndex}[retriever]
    method = "_tokenized_shard" if retriever == "bm25" else "_encode"
    original, calls = getattr(kind, method), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(kind, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_index(retriever, tmp_path / "cut", PASSAGES, models[retriever])
    open_index(retriever, tmp_path / "cut", PASSAGES, models[retriever])
    if retriever != "bm25":
        assert len(calls) == 1 + -(-len(TEXTS) // 7), "a shard was encoded twice"
    files = sorted(path for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert files
    for path in files:
        assert (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_equal_scores_keep_the_order_of_the_passages():
    scores = np.array([1, 3, 2, 3, 2, 2, 0], dtype=np.float32)
    assert [top_indices(scores, k).tolist() for k in (0, 1, 3, 4, 99)] == [
        [],
        [1],
        [1, 3, 2],
        [1, 3, 2, 4],
        [1, 3, 2, 4, 5, 0, 6],
    ]


def test_an_encoder_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--retriever_name_or_path names .*nowhere, which cannot be loaded"):
        open_index("dense", tmp_path, PASSAGES, str(tmp_path / "nowhere"))


def test_an_encoder_that_compares_otherwise_is_refused(tmp_path, models):
    encoder = SentenceTransformer(models["dense"], similarity_fn_name="euclidean")
    encoder.save(str(tmp_path / "euclidean"))
    with pytest.raises(ValueError, match="compares by euclidean; expected dot or cosine"):
        open_index("dense", tmp_path / "i", PASSAGES, str(tmp_path / "euclidean"))
