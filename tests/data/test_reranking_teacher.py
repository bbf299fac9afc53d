"""The reranking teacher: raw scores, in the order of the documents, whatever the batch."""

import datasets
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny_teachers import save_dense, save_reranker, save_splade
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from scaledown import ScaleDownError
from scaledown.data.indexes.encoded import DenseIndex, SpladeIndex
from scaledown.data.teachers.answers import LocalTeacher
from scaledown.data.teachers.scores import RerankingTeacher
from tiny import DOCUMENTS, QUESTIONS, SHAPE, build_tokenizer

RECORDS = [{"query": q, "documents": d} for q, d in zip(QUESTIONS, DOCUMENTS, strict=True)]
RECORDS.insert(1, {"query": "Closed book?", "documents": []})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return save_reranker(tmp_path_factory.mktemp("reranker"))


def test_scores_are_the_raw_outputs_of_the_model(folder):
    scores = RerankingTeacher(folder).score(RECORDS)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert [len(row) for row in scores] == [2, 0, 1, 3]
    with torch.inference_mode():
        for record, row in zip(RECORDS, scores, strict=True):
            for document, score in zip(record["documents"], row, strict=True):
                inputs = tokenizer(record["query"], document, return_tensors="pt", truncation=True, max_length=512)
                assert model.eval()(**inputs).logits.item() == pytest.approx(score, abs=1e-5)
    # No sigmoid, behind which all scores lie between 0 and 1.
    assert any(score < 0 for row in scores for score in row)


def test_the_batch_does_not_matter_and_long_pairs_are_cut(folder):
    records = [*RECORDS, {"query": "q", "documents": ["heron " * 2000]}]
    one, many = (RerankingTeacher(folder, batch_size=size).score(records) for size in (1, 64))
    for a, b in zip(one, many, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    short = RerankingTeacher(folder, max_length=16).score(RECORDS)
    assert short[0] != pytest.approx(one[0], abs=1e-3)


def test_models_that_do_not_fit_are_refused(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match="has 3 outputs; expected one"):
        RerankingTeacher(save_reranker(tmp_path / "three", num_labels=3))
    with pytest.raises(ValueError, match=r"--reranker names .*nowhere, which cannot be loaded"):
        RerankingTeacher(str(tmp_path / "nowhere"))
    teacher = RerankingTeacher(folder)
    monkeypatch.setattr(teacher._model, "predict", lambda pairs, **_: torch.full((len(pairs),), torch.nan))
    with pytest.raises(ValueError, match="gave the score nan to the pair"):
        teacher.score(RECORDS)


def test_a_model_of_another_kind_is_refused_wherever_a_head_is_needed(tmp_path):
    dense, passages = save_dense(tmp_path / "dense"), datasets.Dataset.from_dict({"text": ["One.", "Two."]})
    SentenceTransformer(dense).save(str(tmp_path / "encoder"))  # as sentence-transformers shares one
    for name in (dense, str(tmp_path / "encoder")):
        with pytest.raises(
            ScaleDownError, match=r"--reranker names .*, which lacks 2 weights .*\(classifier.bias, …\)"
        ):
            RerankingTeacher(name)
        with pytest.raises(ScaleDownError, match=r"--retriever_name_or_path names .*: it is no sparse encoder"):
            SpladeIndex(tmp_path / "index", passages, name)
    splade = save_splade(tmp_path / "splade")
    DenseIndex(tmp_path / "other", passages, splade)  # without a pooler, which nothing reads
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, "tie_word_embeddings": False})).model
    model.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ScaleDownError, match=r"--teacher names .*base, which lacks 1 weights .*lm_head"):
        LocalTeacher(str(tmp_path / "base"))
