import numpy as np
import pytest
import torch

from errors_scaledown import ScaleDownError
from scaledown.integrations.backend import open_backend
from scaledown.integrations.cross_encoder import ScaleDownCrossEncoder


def test_it_ranks_and_predicts_as_the_model_does(place, world_model, records):
    reranker, record = ScaleDownCrossEncoder(**place), records[0]
    expected = world_model.rank(record["query"], record["documents"])
    found = reranker.rank(record["query"], record["documents"], return_documents=True)
    assert [result["corpus_id"] for result in found] == [result["corpus_id"] for result in expected]
    assert [result["score"] for result in found] == pytest.approx([result["score"] for result in expected], abs=1e-4)
    assert found[0]["text"] == record["documents"][found[0]["corpus_id"]]
    assert len(reranker.rank(record["query"], record["documents"], top_k=1)) == 1

    pairs = [(one["query"], document) for one in records[:3] for document in one["documents"]]
    scores = reranker.predict(pairs)
    assert scores.shape == (len(pairs),) and scores.dtype == np.float32
    of_first = {result["corpus_id"]: result["score"] for result in expected}
    assert scores[:3].tolist() == pytest.approx([of_first[i] for i in range(3)], abs=1e-4)
    assert float(reranker.predict(pairs[0])) == pytest.approx(of_first[0], abs=1e-4)


def test_calls_with_the_options_of_a_cross_encoder_work(world_model, records, capfd):
    reranker, record = ScaleDownCrossEncoder(world_model), records[0]
    pairs = [(record["query"], document) for document in record["documents"]]
    expected = reranker.predict(pairs)
    found = reranker.predict(pairs, batch_size=2, show_progress_bar=True, convert_to_tensor=True)
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert "Questions: 100%" in capfd.readouterr().err
    listed = reranker.predict(pairs, show_progress_bar=False, convert_to_numpy=False)
    assert [float(one) for one in listed] == pytest.approx(expected.tolist())
    assert float(reranker.predict(pairs[1], convert_to_tensor=True)) == pytest.approx(float(expected[1]), abs=1e-5)
    best = reranker.rank(record["query"], record["documents"], batch_size=1, show_progress_bar=True)
    assert best[0]["corpus_id"] == int(expected.argmax())
    with pytest.raises(ScaleDownError, match="batch_size"):
        reranker.predict(pairs, batch_size=0)
    assert capfd.readouterr().err == ""


def test_what_is_wrong_is_told(service):
    with pytest.raises(ScaleDownError, match="give one of them"):
        ScaleDownCrossEncoder()
    with pytest.raises(ScaleDownError, match="give one of them"):
        ScaleDownCrossEncoder("folder", url="http://127.0.0.1:1")
    with pytest.raises(ScaleDownError, match="does not answer"):
        open_backend(url="http://127.0.0.1:9").rank("Who?", ["a"])
    with pytest.raises(ScaleDownError, match=r"status 400: query: String should have"):
        open_backend(url=f"{service.url}/v1/").rank("", ["a"])
    with pytest.raises(ScaleDownError, match=r"pairs\[1\] is 'b'"):
        ScaleDownCrossEncoder(url=service.url).predict([("a", "b"), "b"])
