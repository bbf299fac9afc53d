import numpy as np
import pytest

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


def test_what_is_wrong_is_told(service):
    with pytest.raises(ScaleDownError, match="give one of them"):
        ScaleDownCrossEncoder()
    with pytest.raises(ScaleDownError, match="give one of them"):
        ScaleDownCrossEncoder("folder", url="http://127.0.0.1:1")
    with pytest.raises(ScaleDownError, match="does not answer"):
        open_backend(url="http://127.0.0.1:9").rank("Who?", ["a"])
    with pytest.raises(ScaleDownError, match=r"status 400: documents\[0\]: String should have"):
        open_backend(url=f"{service.url}/v1/").rank("Who?", [""])
    with pytest.raises(ScaleDownError, match=r"pairs\[1\] is 'b'"):
        ScaleDownCrossEncoder(url=service.url).predict([("a", "b"), "b"])
