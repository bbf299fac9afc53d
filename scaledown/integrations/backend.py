"""What every component asks: a model in this process, or a service at an address. Both rank and answer."""

import contextlib
import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from errors_scaledown import ScaleDownError

from ..common.devices import pick_device
from ..common.streaming import stream_tokens, text_so_far


@dataclass(frozen=True)
class Source:
    """What became of a document.

    Args:
        index: Its place among the question's documents.
        id: The framework's name of it, where it has one.
        score: Reranking score; None where the model has none, and for a document without text.
        read: Whether the generator read it.
    """

    index: int
    id: str | None
    score: float | None
    read: bool

    def as_dict(self) -> dict[str, Any]:
        """The fields, for frameworks that pass on plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """An answer and what it was read from.

    Args:
        text: The answer.
        sources: One for each document.
    """

    text: str
    sources: list[Source]


@dataclass(frozen=True)
class Reading:
    """How documents are read and answers are written; None leaves it to the model.

    Args:
        compression_rate: Tokens per slot.
        max_documents: Documents that the generator reads, the best of them.
        min_reranking_score: Documents that score lower are not read.
        max_new_tokens: Tokens of an answer.
    """

    compression_rate: int | None = None
    max_documents: int | None = None
    min_reranking_score: float | None = None
    max_new_tokens: int | None = None


class Backend(Protocol):
    """Ranks and answers."""

    def rank(self, question: str, documents: Sequence[str], batch_size: int = 64) -> list[float]:
        """Reranking score of each document, higher is more relevant, −inf without text; so many chunks at a time."""

    def answer(
        self, questions: Sequence[str], documents: Sequence[Sequence[str]], reading: Reading, ids: Any = None
    ) -> list[Answer]:
        """Answer each question from its documents; `ids` holds a list of names for each list of documents."""

    def stream(
        self, question: str, documents: Sequence[str], reading: Reading, ids: Sequence[str | None] | None = None
    ) -> Iterator[str | Answer]:
        """Pieces of the answer as they are written, then the whole answer."""


def check_place(model: Any, url: str | None) -> None:
    """Refuse neither and both of a model and a service's address."""
    if (model is None) == (url is None):
        raise ScaleDownError(
            f"model is {model!r} and url is {url!r}; give one of them: a ScaleDown model, or a service's address."
        )


def open_backend(
    model: Any = None, url: str | None = None, revision: str | None = None, api_key: str | None = None
) -> Backend:
    """Open what a component was told to use.

    Args:
        model: A loaded `ScaleDownModel`, or its folder or name on the Hub.
        url: Address of a service, such as `http://127.0.0.1:8000`.
        revision: Branch, tag or commit of the model.
        api_key: Key of the service.

    Returns:
        The backend.

    Raises:
        ScaleDownError: Neither or both are given.
    """
    check_place(model, url)
    return WithoutBlanks(EndpointBackend(url, api_key) if url is not None else LocalBackend(model, revision))


class WithoutBlanks:
    """A backend that is not shown documents without text, which models and services refuse and stores may hold.

    Args:
        backend: Ranks and answers.
    """

    def __init__(self, backend: Backend):
        self._backend = backend

    def rank(self, question: str, documents: Sequence[str], batch_size: int = 64) -> list[float]:
        """See `Backend.rank`."""
        places = _with_text(documents)
        scores = [-math.inf] * len(documents)
        found = self._backend.rank(question, _at(documents, places), batch_size)
        for place, score in zip(places, found, strict=True):
            scores[place] = score
        return scores

    def answer(
        self, questions: Sequence[str], documents: Sequence[Sequence[str]], reading: Reading, ids: Any = None
    ) -> list[Answer]:
        """See `Backend.answer`."""
        places = [_with_text(row) for row in documents]
        names = ids or [[None] * len(row) for row in documents]
        texts, kept = ([_at(*row) for row in zip(rows, places, strict=True)] for rows in (documents, names))
        found = self._backend.answer(questions, texts, reading, kept)
        return [_of_all(*row) for row in zip(found, places, names, strict=True)]

    def stream(
        self, question: str, documents: Sequence[str], reading: Reading, ids: Sequence[str | None] | None = None
    ) -> Iterator[str | Answer]:
        """See `Backend.stream`."""
        places, names = _with_text(documents), ids or [None] * len(documents)
        found = self._backend.stream(question, _at(documents, places), reading, _at(names, places))
        with contextlib.closing(found) as pieces:
            for piece in pieces:
                yield piece if isinstance(piece, str) else _of_all(piece, places, names)


class LocalBackend:
    """A model in this process.

    Args:
        model: A loaded `ScaleDownModel`, which stays where it is, or its folder or name on the Hub, which goes to the
            accelerator where there is one.
        revision: Branch, tag or commit, where it is a name.
    """

    def __init__(self, model: Any, revision: str | None = None):
        if isinstance(model, str) or hasattr(model, "__fspath__"):
            from modeling_scaledown import ScaleDownModel

            model, device = ScaleDownModel.from_pretrained(str(model), revision=revision), pick_device()
            if model.device.type != device:  # a quantized one is there already, and cannot be moved
                model = model.to(device)
            model = model.optimize_for_inference()
        self._model = model

    def rank(self, question: str, documents: Sequence[str], batch_size: int = 64) -> list[float]:
        """See `Backend.rank`."""
        scores = [math.nan] * len(documents)
        for found in self._model.rank(question, list(documents), batch_size=batch_size) if documents else ():
            scores[found["corpus_id"]] = found["score"]
        return scores

    def answer(
        self, questions: Sequence[str], documents: Sequence[Sequence[str]], reading: Reading, ids: Any = None
    ) -> list[Answer]:
        """See `Backend.answer`."""
        if not questions:
            return []
        texts = [list(row) for row in documents]
        ids = ids or [[None] * len(row) for row in texts]
        settings = _arguments(reading)
        if not self._model.config.enable_reranking:  # nothing is known but the answers
            answers = self._model.answer(list(questions), texts, **settings)
            return [Answer(text, _unscored(names)) for text, names in zip(answers, ids, strict=True)]
        found = self._model.answer(list(questions), texts, return_reranking_scores=True, **settings)
        rows = zip(found.answers, found.reranking_scores, found.documents_read, ids, strict=True)
        return [Answer(text, _sources(scores, read, names)) for text, scores, read, names in rows]

    def stream(
        self, question: str, documents: Sequence[str], reading: Reading, ids: Sequence[str | None] | None = None
    ) -> Iterator[str | Answer]:
        """See `Backend.stream`."""
        settings = {**_arguments(reading), "return_reranking_scores": self._model.config.enable_reranking}
        whole: list[Any] = []

        def write(**streaming: Any) -> None:
            whole.append(self._model.answer(question, list(documents), **settings, **streaming))

        tokens: list[int] = []
        written = ""
        with contextlib.closing(stream_tokens(write)) as moments:  # where nobody reads on, nothing more is written
            for _, token in moments:
                if token is None:
                    break
                tokens.append(token)
                text = text_so_far(self._model.processor, tokens)
                if len(text) > len(written) and text.startswith(written):
                    yield text[len(written) :]
                    written = text
        (found,) = whole
        names = ids or [None] * len(documents)
        if isinstance(found, str):
            answer = Answer(found, _unscored(names))
        else:
            answer = Answer(found.answers, _sources(found.reranking_scores, found.documents_read, names))
        if len(answer.text) > len(written) and answer.text.startswith(written):
            yield answer.text[len(written) :]
        yield answer


class EndpointBackend:
    """A service of `scaledown.serving`.

    Args:
        url: Its address, with or without `/v1`.
        api_key: Its key.
        timeout: Seconds that the service may be silent.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 120.0):
        if not url.startswith(("http://", "https://")):
            raise ScaleDownError(f"url is {url!r}, expected a service's address, such as http://127.0.0.1:8000.")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout

    def rank(self, question: str, documents: Sequence[str], batch_size: int = 64) -> list[float]:
        """See `Backend.rank`; the service decides the size of its batches."""
        if not documents:
            return []
        with self._post("/v1/rerank", {"query": question, "documents": list(documents)}) as reply:
            results = json.load(reply)["results"]
            scores = {result["index"]: result["relevance_score"] for result in results}
            return [scores[place] for place in range(len(documents))]

    def answer(
        self, questions: Sequence[str], documents: Sequence[Sequence[str]], reading: Reading, ids: Any = None
    ) -> list[Answer]:
        """See `Backend.answer`; the service puts requests that come together into one batch."""
        names = ids or [[None] * len(row) for row in documents]
        if not questions:
            return []
        with ThreadPoolExecutor(min(len(questions), 32)) as pool:
            return list(
                pool.map(lambda row: self._answer(*row, reading), zip(questions, documents, names, strict=True))
            )

    def stream(
        self, question: str, documents: Sequence[str], reading: Reading, ids: Sequence[str | None] | None = None
    ) -> Iterator[str | Answer]:
        """See `Backend.stream`."""
        names = ids or [None] * len(documents)
        text, sources, is_whole = "", None, False
        with self._post("/v1/chat/completions", {**_body(question, documents, reading), "stream": True}) as reply:
            for line in reply:
                data = line.decode().removeprefix("data: ").strip()
                is_whole = is_whole or data == "[DONE]"
                if not data or is_whole:
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ScaleDownError(event["error"]["message"])
                if "documents" in event:
                    sources = _reported(event["documents"], names)
                piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
                if piece and sources is None:  # other servers answer too, without a look at the documents
                    raise KeyError("documents")
                if piece:
                    text += piece
                    yield piece
        if not is_whole:  # where a connection breaks between two events, its end looks like that of the answer
            raise ScaleDownError(f"{self._url} broke off in the middle of an answer; ask again.")
        yield Answer(text, sources or [])

    def _answer(self, question: str, documents: Sequence[str], names: Sequence[str | None], reading: Reading) -> Answer:
        with self._post("/v1/chat/completions", _body(question, documents, reading)) as reply:
            found = json.load(reply)
            return Answer(found["choices"][0]["message"]["content"], _reported(found["documents"], names))

    @contextlib.contextmanager
    def _post(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        """The reply, while it is read: what fails then is the service's failure too."""
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                yield reply
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                message = json.loads(text)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = text[:200]
            raise ScaleDownError(f"{self._url} answered with status {error.code}: {message}") from error
        except ScaleDownError:
            raise
        except TimeoutError as error:
            raise ScaleDownError(
                f"{self._url} sent nothing for {self._timeout:g} seconds; ask for fewer tokens or of fewer documents, "
                "ask less at once, or try later."
            ) from error
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ScaleDownError(
                f"{self._url} does not answer as a service of ScaleDown does ({type(error).__name__}: {error}); "
                "another server may listen there: correct url."
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ScaleDownError(
                f"{self._url} does not answer as a service should ({error}); start it with "
                "`python -m scaledown.serving`, or correct url."
            ) from error


def best_first(scores: Sequence[float], top_n: int | None) -> list[int]:
    """Places in the order of their scores, at most `top_n`, none without text; equal scores keep their order."""
    places = [place for place, score in enumerate(scores) if score != -math.inf]
    return sorted(places, key=lambda place: -scores[place])[:top_n]


def check_listed(documents: Any) -> None:
    """Refuse documents that were joined into one text, of which each letter would be taken for a document."""
    if isinstance(documents, str | bytes) or not isinstance(documents, Iterable):
        raise ScaleDownError(
            f"documents is {str(documents)[:80]!r}, expected a list of documents; do not join them: each is read by "
            "itself."
        )


def check_top_n(top_n: int | None, name: str = "top_n") -> None:
    """Refuse a number of documents below 1."""
    if top_n is not None and top_n < 1:
        raise ScaleDownError(f"{name} is {top_n}, expected at least 1, or None for all.")


def _with_text(documents: Sequence[str]) -> list[int]:
    """Places of the documents that have text; what is no text at all is for the model to refuse."""
    check_listed(documents)
    return [place for place, text in enumerate(documents) if not isinstance(text, str) or text.strip()]


def _at(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [values[place] for place in places]


def _of_all(answer: Answer, places: Sequence[int], names: Sequence[str | None]) -> Answer:
    """An answer from the documents at some places, with a source for every document."""
    sources = [Source(place, name, None, False) for place, name in enumerate(names)]
    for place, source in zip(places, answer.sources, strict=True):
        sources[place] = replace(source, index=place)
    return Answer(answer.text, sources)


def _arguments(reading: Reading) -> dict[str, Any]:
    return {name: value for name, value in asdict(reading).items() if value is not None}


def _body(question: str, documents: Sequence[str], reading: Reading) -> dict[str, Any]:
    settings = _arguments(reading)
    if "max_new_tokens" in settings:
        settings["max_tokens"] = settings.pop("max_new_tokens")
    return {"messages": [{"role": "user", "content": question}], "documents": list(documents), **settings}


def _sources(scores: Sequence[float], read: Sequence[int], names: Sequence[str | None]) -> list[Source]:
    return [
        Source(place, name, score, place in read) for place, (score, name) in enumerate(zip(scores, names, strict=True))
    ]


def _unscored(names: Sequence[str | None]) -> list[Source]:
    return [Source(place, name, None, True) for place, name in enumerate(names)]


def _reported(documents: list[dict[str, Any]], names: Sequence[str | None]) -> list[Source]:
    return [
        Source(place, name, found["relevance_score"], found["read"])
        for place, (found, name) in enumerate(zip(documents, names, strict=True))
    ]
