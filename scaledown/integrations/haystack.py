"""Haystack: a ranker and an answerer, as components of a pipeline.

pipeline.add_component("ranker", ScaleDownRanker(model=folder, top_k=5))
pipeline.add_component("answerer", ScaleDownAnswerer(model=folder))
pipeline.connect("retriever.documents", "ranker.documents")
pipeline.connect("ranker.documents", "answerer.documents")
"""

import os
from dataclasses import replace
from typing import Any

from haystack import component, default_from_dict, default_to_dict
from haystack.dataclasses import Document, GeneratedAnswer
from haystack.utils import Secret, deserialize_secrets_inplace

from errors_scaledown import ScaleDownError

from .backend import Backend, Reading, Source, best_first, check_place, check_top_n, open_backend


class _Component:
    """What both components share: a model or a service, opened when the pipeline is warmed up."""

    def _set_up(self, model: Any, url: str | None, revision: str | None, api_key: Secret | None) -> None:
        check_place(model, url)
        model = os.fspath(model) if isinstance(model, os.PathLike) else model  # as it stands in YAML
        self.model, self.url, self.revision, self.api_key = model, url, revision, api_key
        self._backend: Backend | None = None

    def warm_up(self) -> None:
        """Load the model."""
        if self._backend is None:
            key = None if self.api_key is None else self.api_key.resolve_value()
            self._backend = open_backend(self.model, self.url, self.revision, key)

    def _to_dict(self, **settings: Any) -> dict[str, Any]:
        if self.model is not None and not isinstance(self.model, str):
            raise ScaleDownError("only a pipeline that names its model by a folder or a name can be saved.")
        key = None if self.api_key is None else self.api_key.to_dict()
        return default_to_dict(self, model=self.model, url=self.url, revision=self.revision, api_key=key, **settings)

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> Any:
        if data["init_parameters"].get("api_key") is not None:
            deserialize_secrets_inplace(data["init_parameters"], keys=["api_key"])
        return default_from_dict(cls, data)


@component
class ScaleDownRanker(_Component):
    """Orders documents by their relevance to the query, in the pass that would compress them.

    Args:
        model: A loaded `ScaleDownModel`, or its folder or name on the Hub.
        url: Address of a service, in place of a model.
        revision: Branch, tag or commit of the model.
        api_key: Key of the service.
        top_k: Documents to return; all where None.
    """

    def __init__(
        self,
        model: Any = None,
        url: str | None = None,
        revision: str | None = None,
        api_key: Secret | None = None,
        top_k: int | None = None,
    ):
        check_top_n(top_k, "top_k")
        self._set_up(model, url, revision, api_key)
        self.top_k = top_k

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """Rank documents.

        Args:
            query: The question.
            documents: What was retrieved.
            top_k: In place of the component's own.

        Returns:
            `documents`: the best, best first, with their reranking score; none without text.
        """
        self.warm_up()
        check_top_n(top_k, "top_k")
        scores = self._backend.rank(query, [document.content or "" for document in documents])
        places = best_first(scores, self.top_k if top_k is None else top_k)
        return {"documents": [replace(documents[place], score=scores[place]) for place in places]}

    def to_dict(self) -> dict[str, Any]:
        """Settings, for a pipeline in YAML."""
        return self._to_dict(top_k=self.top_k)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ScaleDownRanker":
        """The component of such settings."""
        return cls._from_dict(data)


@component
class ScaleDownAnswerer(_Component):
    """Answers from documents that are read compressed.

    Args:
        model, url, revision, api_key: As in `ScaleDownRanker`.
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
        api_key: Secret | None = None,
        compression_rate: int | None = None,
        max_documents: int | None = None,
        min_reranking_score: float | None = None,
        max_new_tokens: int | None = None,
    ):
        self._set_up(model, url, revision, api_key)
        self._reading = Reading(compression_rate, max_documents, min_reranking_score, max_new_tokens)

    @component.output_types(answers=list[GeneratedAnswer])
    def run(self, query: str, documents: list[Document]) -> dict[str, list[GeneratedAnswer]]:
        """Answer a question.

        Args:
            query: The question.
            documents: What it is answered from.

        Returns:
            `answers`: one, with the documents that were read, their scores, and `sources` of all in `meta`.
        """
        self.warm_up()
        texts, ids = [document.content or "" for document in documents], [document.id for document in documents]
        (answer,) = self._backend.answer([query], [texts], self._reading, [ids])
        read = [_scored(documents[source.index], source) for source in answer.sources if source.read]
        meta = {"sources": [source.as_dict() for source in answer.sources]}
        return {"answers": [GeneratedAnswer(data=answer.text, query=query, documents=read, meta=meta)]}

    def to_dict(self) -> dict[str, Any]:
        """Settings, for a pipeline in YAML."""
        return self._to_dict(**vars(self._reading))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ScaleDownAnswerer":
        """The component of such settings."""
        return cls._from_dict(data)


def _scored(document: Document, source: Source) -> Document:
    """A document with its reranking score; the retriever's stays where the model has none."""
    return document if source.score is None else replace(document, score=source.score)
