"""LangChain: a reranker for retrievers, and an answerer for chains.

from langchain_classic.retrievers import ContextualCompressionRetriever

retriever = ContextualCompressionRetriever(
    base_compressor=ScaleDownReranker(model=folder, top_n=5), base_retriever=retriever
)
chain = {"question": RunnablePassthrough(), "documents": retriever} | ScaleDownAnswerer(model=folder)
chain.invoke("Who wrote Ivanhoe?")["answer"]
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import Document
from langchain_core.documents.compressor import BaseDocumentCompressor
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import run_in_executor
from langchain_core.runnables.utils import AddableDict
from pydantic import ConfigDict, Field, PrivateAttr

from errors_scaledown import ScaleDownError

from .backend import Answer, Backend, Reading, best_first, check_listed, check_top_n, open_backend


class ScaleDownReranker(BaseDocumentCompressor):
    """Orders documents by their relevance to the query, in the pass that would compress them.

    Args:
        model: A loaded `ScaleDownModel`, or its folder or name on the Hub.
        url: Address of a service, in place of a model.
        revision: Branch, tag or commit of the model.
        api_key: Key of the service.
        top_n: Documents to return; all where None.
    """

    model: Any = None
    url: str | None = None
    revision: str | None = None
    api_key: str | None = Field(default=None, exclude=True, repr=False)  # logs and traces write a component out
    top_n: int | None = None

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    _backend: Backend = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Open the model or the service's address."""
        check_top_n(self.top_n)
        self._backend = open_backend(self.model, self.url, self.revision, self.api_key)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rank documents.

        Args:
            documents: What was retrieved.
            query: The question.
            callbacks: Unused.

        Returns:
            Copies of the best, best first, with `relevance_score` in their metadata; none without text.
        """
        scores = self._backend.rank(query, [document.page_content for document in documents])
        return [
            documents[place].model_copy(
                update={"metadata": {**documents[place].metadata, "relevance_score": scores[place]}}
            )
            for place in best_first(scores, self.top_n)
        ]


class ScaleDownAnswerer(Runnable[dict[str, Any], dict[str, Any]]):
    """Answers a question from documents that are read compressed.

    The input is `{"question": str, "documents": [Document or str, …]}`; the output has `answer`, `sources` (index, id,
    score, and whether it was read, of each document) and `documents`, those that were read.

    Args:
        model, url, revision, api_key: As in `ScaleDownReranker`.
        compression_rate: Tokens per slot; the model's own where None.
        max_documents: Documents that are read, the best of them; where None, as many as the model's configuration says,
            or all.
        min_reranking_score: Documents that score lower are not read.
        max_new_tokens: Tokens of an answer; the model's own limit where None.
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
    ):
        self._backend = open_backend(model, url, revision, api_key)
        self._reading = Reading(compression_rate, max_documents, min_reranking_score, max_new_tokens)

    def invoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Answer one question."""
        return self._call_with_config(lambda asked: self._answer([asked])[0], input, config)

    def batch(
        self,
        inputs: list[dict[str, Any]],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Answer several questions at once."""
        if return_exceptions:  # one at a time, so that one bad question costs no other its answer
            return super().batch(inputs, config, return_exceptions=True, **kwargs)
        return self._batch_with_config(self._answer, inputs, config)

    def stream(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[dict[str, Any]]:
        """Pieces of `answer` as they are written, then `sources` and `documents`; their sum is that of `invoke`."""

        def pieces(inputs: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for asked in inputs:
                question, documents, texts, ids = _read(asked)
                for piece in self._backend.stream(question, texts, self._reading, ids):
                    if isinstance(piece, str):
                        yield AddableDict(answer=piece)
                        continue
                    if not piece.text:  # no piece of it has come
                        yield AddableDict(answer="")
                    yield AddableDict(_sources(piece, documents))

        yield from self._transform_stream_with_config(iter([input]), pieces, config)

    async def ainvoke(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Answer one question, in a thread."""
        return await run_in_executor(config, self.invoke, input, config)

    async def abatch(
        self,
        inputs: list[dict[str, Any]],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Answer several questions at once, in a thread."""
        return await run_in_executor(None, lambda: self.batch(inputs, config, return_exceptions=return_exceptions))

    async def astream(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """As `stream`, from a thread."""
        pieces, done = self.stream(input, config), object()
        while (piece := await run_in_executor(None, next, pieces, done)) is not done:
            yield piece

    def _answer(self, asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        questions, documents, texts, ids = zip(*(_read(one) for one in asked), strict=True)
        found = self._backend.answer(questions, texts, self._reading, ids)
        return [{"answer": answer.text, **_sources(answer, row)} for answer, row in zip(found, documents, strict=True)]


def _read(asked: Any) -> tuple[str, list[Any], list[str], list[str | None]]:
    """Question, documents, their texts and their ids of an input."""
    if not isinstance(asked, dict) or not {"question", "documents"} <= asked.keys():
        raise ScaleDownError(
            f"the input is {str(asked)[:80]!r}, expected a dictionary with `question` and `documents`."
        )
    check_listed(asked["documents"])
    documents = list(asked["documents"])
    texts = [document if isinstance(document, str) else document.page_content for document in documents]
    return asked["question"], documents, texts, [getattr(document, "id", None) for document in documents]


def _sources(answer: Answer, documents: Sequence[Any]) -> dict[str, Any]:
    return {
        "sources": [source.as_dict() for source in answer.sources],
        "documents": [documents[source.index] for source in answer.sources if source.read],
    }
