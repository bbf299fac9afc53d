"""LlamaIndex: a node postprocessor that reranks, and a response synthesizer that reads nodes compressed.

engine = RetrieverQueryEngine(
    retriever,
    response_synthesizer=ScaleDownSynthesizer(model=folder),
    node_postprocessors=[ScaleDownRerank(model=folder, top_n=5)],
)
engine.query("Who wrote Ivanhoe?")
"""

import asyncio
from collections.abc import Generator, Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from errors_scaledown import ScaleDownError

from .backend import Answer, Backend, Reading, best_first, check_top_n, open_backend


class ScaleDownRerank(BaseNodePostprocessor):
    """Orders nodes by their relevance to the query, in the pass that would compress them.

    Args:
        model: A loaded `ScaleDownModel`, or its folder or name on the Hub.
        url: Address of a service, in place of a model.
        revision: Branch, tag or commit of the model.
        api_key: Key of the service.
        top_n: Nodes to return; all where None.
    """

    model: Any = Field(default=None, exclude=True)
    url: str | None = None
    revision: str | None = None
    api_key: str | None = Field(default=None, exclude=True, repr=False)
    top_n: int | None = None

    _backend: Backend = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Open the model or the service's address."""
        super().model_post_init(context)
        check_top_n(self.top_n)
        self._backend = open_backend(self.model, self.url, self.revision, self.api_key)

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's settings."""
        return "ScaleDownRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ScaleDownError("nodes are ranked by a query; pass query_str or query_bundle.")
        # What the model will read, so that the score is of that.
        texts = [node.node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]
        scores = self._backend.rank(query_bundle.query_str, texts)
        return [NodeWithScore(node=nodes[place].node, score=scores[place]) for place in best_first(scores, self.top_n)]


class ScaleDownSynthesizer(BaseSynthesizer):
    """Answers from nodes that are read compressed.

    The response's metadata has `sources` besides the nodes': index, id and reranking score of each node, and whether
    it was read. Where the response streams, they come with its last piece.

    Args:
        model, url, revision, api_key: As in `ScaleDownRerank`.
        compression_rate: Tokens per slot; the model's own where None.
        max_documents: Nodes that are read, the best of them; where None, as many as the model's configuration says,
            or all.
        min_reranking_score: Nodes that score lower are not read.
        max_new_tokens: Tokens of an answer; the model's own limit where None.
        streaming: Whether a response is written piece by piece.
    """

    def __init__(
        self,
        model: Any = None,
        url: str | None = None,
        revision: str | None = None,
        api_key: str | None = None,
        compression_rate: int | None = None,
        max_documents: int | None = None,
        min_reranking_score: float | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
    ):
        super().__init__(llm=MockLLM(), streaming=streaming)  # the base asks for one; it is never called
        self._backend = open_backend(model, url, revision, api_key)
        self._reading = Reading(compression_rate, max_documents, min_reranking_score, max_new_tokens)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> Any:
        """Answer from texts; a generator of pieces where the synthesizer streams."""
        if self._streaming:
            return self._pieces(query_str, text_chunks, **response_kwargs)
        return self._answer(query_str, text_chunks, **response_kwargs)

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> Any:
        """Answer from texts, in a thread."""
        if self._streaming:
            return self._apieces(query_str, text_chunks, **response_kwargs)
        return await asyncio.to_thread(self._answer, query_str, text_chunks, **response_kwargs)

    def synthesize(self, query: Any, nodes: list[NodeWithScore], *args: Any, **kwargs: Any) -> Any:
        """Answer from nodes, and say what became of each."""
        ids, sources = _ids_of(nodes), []
        return _with(sources, super().synthesize(query, nodes, *args, ids=ids, sources=sources, **kwargs))

    async def asynthesize(self, query: Any, nodes: list[NodeWithScore], *args: Any, **kwargs: Any) -> Any:
        """Answer from nodes, in a thread."""
        ids, sources = _ids_of(nodes), []
        return _with(sources, await super().asynthesize(query, nodes, *args, ids=ids, sources=sources, **kwargs))

    def _answer(
        self,
        question: str,
        texts: Sequence[str],
        ids: list[str] | None = None,
        sources: list[Any] | None = None,
        **_: Any,
    ) -> str:
        (answer,) = self._backend.answer([question], [texts], self._reading, None if ids is None else [ids])
        _report(answer, sources)
        return answer.text

    def _pieces(
        self,
        question: str,
        texts: Sequence[str],
        ids: list[str] | None = None,
        sources: list[Any] | None = None,
        **_: Any,
    ) -> Generator[str, None, None]:
        for piece in self._backend.stream(question, texts, self._reading, ids):
            if isinstance(piece, str):
                yield piece
            else:
                _report(piece, sources)

    async def _apieces(self, question: str, texts: Sequence[str], **reported: Any) -> Any:
        pieces, done = self._pieces(question, texts, **reported), object()
        while (piece := await asyncio.to_thread(next, pieces, done)) is not done:
            yield piece

    def _get_prompts(self) -> PromptDictType:
        return {}  # the prompt is the model's

    def _update_prompts(self, prompts_dict: PromptDictType) -> None:
        """Nothing: the prompt is what the model was trained with."""


def _ids_of(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [node.node.node_id for node in nodes]


def _report(answer: Answer, sources: list[dict[str, Any]] | None) -> None:
    if sources is not None:
        sources += [source.as_dict() for source in answer.sources]


def _with(sources: list[dict[str, Any]], response: Any) -> Any:
    """A response that tells its sources, which come with the last piece where it streams."""
    response.metadata = {**(response.metadata or {}), "sources": sources}
    return response
