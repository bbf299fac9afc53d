import pytest

pytest.importorskip("haystack", reason="make test-integrations installs it")

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import Secret

from errors_scaledown import ScaleDownError
from folders import ROOT
from scaledown.integrations.haystack import ScaleDownAnswerer, ScaleDownRanker
from tiny import build_model


@pytest.fixture(scope="module")
def store(passages):
    store = InMemoryDocumentStore()
    store.write_documents([Document(id=f"d{place}", content=text) for place, text in enumerate(passages)])
    return store


def build(place: dict, store) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store, top_k=5))
    pipeline.add_component("ranker", ScaleDownRanker(top_k=3, **place))
    pipeline.add_component("answerer", ScaleDownAnswerer(max_new_tokens=8, **place))
    pipeline.connect("retriever.documents", "ranker.documents")
    pipeline.connect("ranker.documents", "answerer.documents")
    return pipeline


def run(pipeline: Pipeline, question: str):
    inputs = {name: {"query": question} for name in ("retriever", "ranker", "answerer")}
    return pipeline.run(inputs, include_outputs_from={"ranker"})


def test_a_pipeline_ranks_and_answers(place, store, world_model, records):
    pipeline = build(place, store)
    for record in records[:3]:
        found = run(pipeline, record["query"])
        documents = found["ranker"]["documents"]
        scores = [document.score for document in documents]
        assert scores == sorted(scores, reverse=True) and len(scores) == 3
        (answer,) = found["answerer"]["answers"]
        texts = [document.content for document in documents]
        assert answer.data == world_model.answer(record["query"], texts, max_new_tokens=8)
        assert [source["id"] for source in answer.meta["sources"]] == [document.id for document in documents]
        assert [document.score for document in answer.documents] == pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"model": str(ROOT)}, {"url": "http://127.0.0.1:8000", "api_key": Secret.from_env_var("KEY", strict=False)}],
)
def test_a_pipeline_goes_through_yaml(settings, store):
    pipeline = build(settings, store)
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=["scaledown.integrations.haystack"])
    assert again.to_dict()["components"] == pipeline.to_dict()["components"]
    ranker, answerer = (again.get_component(name) for name in ("ranker", "answerer"))
    assert ranker.top_k == 3 and answerer._reading.max_new_tokens == 8
    assert {name: getattr(ranker, name) for name in settings} == settings


def test_a_folder_may_be_a_path():
    again = ScaleDownRanker.from_dict(ScaleDownRanker(ROOT).to_dict())
    assert again.model == str(ROOT)


def test_a_pipeline_passes_over_what_has_no_text(world_model, records):
    """Pictures have none, and are retrieved beside texts."""
    record = records[0]
    documents = [Document(content=None, meta={"picture": "heron.png"})]
    documents += [Document(content=text) for text in record["documents"]]
    ranked = ScaleDownRanker(world_model).run(record["query"], documents)["documents"]
    assert len(ranked) == len(record["documents"])
    (answer,) = ScaleDownAnswerer(world_model, max_new_tokens=8).run(record["query"], documents)["answers"]
    assert answer.documents[0].content == record["documents"][0]
    assert [source["read"] for source in answer.meta["sources"]] == [False, True, True, True]


def test_the_retrievers_score_stays_where_the_model_has_none():
    answerer = ScaleDownAnswerer(build_model("n_layers", enable_reranking=False), max_new_tokens=2)
    (answer,) = answerer.run("Who?", [Document(content="A heron.", score=0.7)])["answers"]
    assert [document.score for document in answer.documents] == [0.7]


def test_a_loaded_model_is_not_saved(world_model, store):
    with pytest.raises(ScaleDownError, match="names its model by a folder"):
        build({"model": world_model}, store).dumps()
