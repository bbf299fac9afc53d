import asyncio

import pytest

pytest.importorskip("llama_index.core", reason="make test-integrations installs it")
pytest.importorskip("llama_index.retrievers.bm25")

from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.retrievers.bm25 import BM25Retriever

from errors_scaledown import ScaleDownError
from scaledown.integrations.llama_index import ScaleDownRerank, ScaleDownSynthesizer


@pytest.fixture(scope="module")
def retriever(passages):
    nodes = [TextNode(text=text, id_=f"n{place}") for place, text in enumerate(passages)]
    return BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=5)


def test_a_query_engine_reranks_and_answers(place, retriever, world_model, records):
    engine = RetrieverQueryEngine(
        retriever,
        response_synthesizer=ScaleDownSynthesizer(max_new_tokens=8, **place),
        node_postprocessors=[ScaleDownRerank(top_n=3, **place)],
    )
    for record in records[:3]:
        response = engine.query(record["query"])
        texts = [node.node.text for node in response.source_nodes]
        assert len(texts) == 3
        assert response.response == world_model.answer(record["query"], texts, max_new_tokens=8)
        sources = response.metadata["sources"]
        assert [source["id"] for source in sources] == [node.node.node_id for node in response.source_nodes]
        scores = [node.score for node in response.source_nodes]
        assert scores == sorted(scores, reverse=True)
        assert [source["score"] for source in sources] == pytest.approx(scores, abs=1e-3)
        assert asyncio.run(engine.aquery(record["query"])).response == response.response


def test_responses_stream(place, retriever, records):
    plain = RetrieverQueryEngine(retriever, response_synthesizer=ScaleDownSynthesizer(max_new_tokens=8, **place))
    streaming = RetrieverQueryEngine(
        retriever, response_synthesizer=ScaleDownSynthesizer(max_new_tokens=8, streaming=True, **place)
    )
    for record in records[:2]:
        expected, response = plain.query(record["query"]), streaming.query(record["query"])
        assert "".join(response.response_gen).strip() == expected.response
        assert _rounded(response) == _rounded(expected)

    async def later(question: str):
        response = await streaming.aquery(question)
        return "".join([piece async for piece in response.async_response_gen()]), response

    written, response = asyncio.run(later(records[0]["query"]))
    expected = plain.query(records[0]["query"])
    assert written.strip() == expected.response
    assert _rounded(response) == _rounded(expected)


def _rounded(response) -> list[dict]:
    """Sources without the digits in which batches differ."""
    return [{**source, "score": round(source["score"], 3)} for source in response.metadata["sources"]]


def test_what_listens_hears_of_answers(world_model):
    """Tracers and evaluations hang on these events."""
    heard = []

    class Listener(BaseEventHandler):
        def handle(self, event, **kwargs):
            heard.append(type(event).__name__)

    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(Listener())
    try:
        node = NodeWithScore(node=TextNode(text="A heron."))
        ScaleDownSynthesizer(world_model, max_new_tokens=2).synthesize("Who?", [node])
    finally:
        dispatcher.event_handlers.pop()
    assert heard == ["SynthesizeStartEvent", "SynthesizeEndEvent"]


def test_fewer_nodes_are_read_than_found(world_model, retriever, records):
    engine = RetrieverQueryEngine(
        retriever, response_synthesizer=ScaleDownSynthesizer(world_model, max_documents=2, max_new_tokens=8)
    )
    sources = engine.query(records[0]["query"]).metadata["sources"]
    assert len(sources) == 5 and sum(source["read"] for source in sources) == 2


def test_the_services_key_is_not_written_out():
    """Components stand in logs and traces."""
    component = ScaleDownRerank(url="http://127.0.0.1:8000", api_key="SECRET")
    assert "SECRET" not in f"{component!r} {component} {component.model_dump()}"


def test_nodes_without_a_query_are_refused(world_model):
    with pytest.raises(ScaleDownError, match="ranked by a query"):
        ScaleDownRerank(model=world_model).postprocess_nodes([])
