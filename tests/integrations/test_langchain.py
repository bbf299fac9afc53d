import asyncio
from functools import reduce

import pytest

pytest.importorskip("langchain_core", reason="make test-integrations installs it")
pytest.importorskip("langchain_classic")
pytest.importorskip("langchain_community")

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough

from errors_scaledown import ScaleDownError
from scaledown.integrations.langchain import ScaleDownAnswerer, ScaleDownReranker


@pytest.fixture(scope="module")
def retriever(passages):
    """LangChain's interface over BM25."""
    from scaledown.data.indexes.pool import BM25Retriever

    index = BM25Retriever(passages)

    class Retriever(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            found = index.retrieve(query, 5)
            return [Document(passages[i], id=f"p{i}", metadata={"place": int(i)}) for i in found]

    return Retriever()


def test_a_retriever_reranked_and_an_answer_from_it(place, retriever, world_model, records):
    reranked = ContextualCompressionRetriever(
        base_compressor=ScaleDownReranker(top_n=3, **place), base_retriever=retriever
    )
    chain = {"question": RunnablePassthrough(), "documents": reranked} | ScaleDownAnswerer(max_new_tokens=8, **place)
    for record in records[:3]:
        documents = reranked.invoke(record["query"])
        scores = [document.metadata["relevance_score"] for document in documents]
        assert scores == sorted(scores, reverse=True) and len(scores) == 3
        assert "place" in documents[0].metadata
        found = chain.invoke(record["query"])
        texts = [document.page_content for document in documents]
        assert found["answer"] == world_model.answer(record["query"], texts, max_new_tokens=8)
        assert [source["id"] for source in found["sources"]] == [document.id for document in documents]
        assert [source["score"] for source in found["sources"]] == pytest.approx(scores, abs=1e-3)
        assert all(source["read"] for source in found["sources"])


def test_batches_streams_and_async_give_the_same(place, records):
    answerer = ScaleDownAnswerer(max_documents=2, max_new_tokens=8, **place)
    asked = [{"question": record["query"], "documents": record["documents"]} for record in records[:4]]
    expected = [answerer.invoke(one) for one in asked]
    assert [len(found["documents"]) for found in expected] == [2] * 4
    assert _rounded(answerer.batch(asked)) == _rounded(expected)
    assert _rounded([reduce(lambda a, b: a + b, answerer.stream(one)) for one in asked]) == _rounded(expected)

    async def later():
        pieces = [piece async for piece in answerer.astream(asked[0])]
        return [await answerer.ainvoke(asked[0]), *await answerer.abatch(asked)], reduce(lambda a, b: a + b, pieces)

    found, streamed = asyncio.run(later())
    assert _rounded(found) == _rounded([expected[0], *expected])
    assert _rounded([streamed]) == _rounded(expected[:1])
    mixed = answerer.batch([asked[0], {"question": " ", "documents": ["a"]}], return_exceptions=True)
    assert mixed[0]["answer"] == expected[0]["answer"] and isinstance(mixed[1], ScaleDownError)


def _rounded(found: list[dict]) -> list[dict]:
    """Answers without the digits in which batches differ."""
    return [
        {**one, "sources": [{**source, "score": round(source["score"], 3)} for source in one["sources"]]}
        for one in found
    ]


def test_a_stream_without_a_word_has_an_answer_too(world_model, records, monkeypatch):
    """A model may end its answer at once; the sum of the pieces is that of `invoke` all the same."""
    ends = world_model.generation_config.eos_token_id
    settings = {"begin_suppress_tokens": [i for i in range(world_model.config.vocab_size) if i not in ends]}
    generate = world_model.generate
    monkeypatch.setattr(world_model, "generate", lambda *args, **more: generate(*args, **more, **settings))
    answerer, asked = ScaleDownAnswerer(world_model), {"question": "Who?", "documents": records[0]["documents"]}
    assert answerer.invoke(asked)["answer"] == ""
    assert _rounded([reduce(lambda a, b: a + b, answerer.stream(asked))]) == _rounded([answerer.invoke(asked)])


def test_the_services_key_is_not_written_out():
    """Components stand in logs and traces."""
    component = ScaleDownReranker(url="http://127.0.0.1:8000", api_key="SECRET")
    assert "SECRET" not in f"{component!r} {component} {component.model_dump()}"


def test_wrong_input_is_told(world_model):
    with pytest.raises(ScaleDownError, match="do not join them"):
        ScaleDownAnswerer(world_model).invoke({"question": "Who?", "documents": "A heron.\n\nA walrus."})
    with pytest.raises(ScaleDownError, match="expected a dictionary with `question` and `documents`"):
        ScaleDownAnswerer(world_model).invoke("Who?")
    with pytest.raises(ValueError, match="top_n is 0"):
        ScaleDownReranker(model=world_model, top_n=0)
