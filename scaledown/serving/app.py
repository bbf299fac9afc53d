"""The service's routes: chat completions with documents, reranking, compression, and what operators ask."""

import asyncio
import base64
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from safetensors.torch import save
from starlette.exceptions import HTTPException

from filling_scaledown import DocumentReport

from ..data.questions import titled
from .arguments import ServingArguments
from .engine import Engine
from .errors import ServiceError, as_field_error, as_service_error
from .jobs import AnswerJob, End, Piece, Sampling, Start
from .limits import BodyLimit, check_key
from .metrics import Metrics
from .schemas import ChatRequest, CompressRequest, Document, RerankRequest, WithDocuments

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
CLIENT_CLOSED = 499  # what web servers log where nobody is left to read a reply


def create_app(engine: Engine, arguments: ServingArguments, metrics: Metrics, model_name: str) -> FastAPI:
    """Build the application.

    Args:
        engine: What answers; closed when the application ends.
        arguments: Limits, key and origins.
        metrics: What is counted.
        model_name: What clients call the model.

    Returns:
        The application, to be run by an ASGI server.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.close()

    app = FastAPI(title="ScaleDown", version="1", lifespan=lifespan)
    service = _Service(engine, arguments, metrics, model_name)
    keyed = [Depends(service.check_key)]
    errors = {status: {"description": text} for status, text in ERRORS.items()}
    app.post("/v1/chat/completions", dependencies=keyed, responses=errors)(service.chat)
    app.post("/v1/rerank", dependencies=keyed, responses=errors)(service.rerank)
    for path in ("/rerank", "/v2/rerank"):  # as vLLM and Jina, and Cohere's second client, name it
        app.post(path, dependencies=keyed, responses=errors, include_in_schema=False)(service.rerank)
    app.post("/v1/compress", dependencies=keyed, responses=errors)(service.compress)
    app.get("/v1/models", dependencies=keyed, responses={401: errors[401]})(service.models)
    app.get("/health", responses={503: errors[503]})(service.health)
    app.get("/metrics", response_class=Response)(service.collect)

    app.add_exception_handler(ServiceError, lambda request, error: _reply(error))
    app.add_exception_handler(RequestValidationError, lambda request, error: _reply(as_field_error(error)))
    app.add_exception_handler(HTTPException, _reply_http)
    app.middleware("http")(service.count)
    refused = metrics.requests.labels("none", "413")  # which no route sees
    app.add_middleware(BodyLimit, max_bytes=arguments.max_body_bytes, on_refusal=refused.inc)
    if arguments.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=arguments.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


ERRORS = {
    400: "The body is wrong; the error names the field.",
    401: "The key is missing or wrong.",
    404: "No such model is served.",
    413: "The body is too large.",
    429: "Too many requests wait.",
    500: "The service failed.",
    502: "The engine broke off.",
    503: "The engine does not answer.",
    504: "The answer took too long.",
}


class _Service:
    """The routes, and what they share."""

    def __init__(self, engine: Engine, arguments: ServingArguments, metrics: Metrics, model_name: str):
        self.engine, self.arguments, self.metrics, self.model_name = engine, arguments, metrics, model_name
        self._started = int(time.time())

    async def check_key(self, request: Request) -> None:
        check_key(request, self.arguments.api_key)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer the last message from the documents; earlier messages are read as text."""
        if body.limit is None and body.min_tokens > self.arguments.max_new_tokens:
            raise ServiceError(
                400,
                f"min_tokens is {body.min_tokens}, and an answer has {self.arguments.max_new_tokens} at most where no "
                f"max_tokens is sent; send one",
                "min_tokens",
            )
        texts = await self._admit(body, body.compression_rate)
        settings = self.engine.compressor.settings(body.compression_rate, body.max_documents, body.min_reranking_score)
        sampling = Sampling(
            max_tokens=body.limit,
            min_tokens=body.min_tokens,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stop=tuple(body.stop),
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        conversation = body.conversation
        _check_conversation(self.engine, conversation)
        job = AnswerJob(conversation, texts, settings, sampling)
        self.engine.submit(job)
        pieces = job.pieces()
        try:
            if body.stream:
                # The first piece comes before the headers, so that what goes wrong has a status of its own.
                start = await self._in_time(request, anext(pieces))
                return StreamingResponse(self._events(body, start, pieces), media_type="text/event-stream")
            return await self._in_time(request, self._whole(body, pieces))
        except BaseException:
            job.cancel()
            raise

    async def rerank(self, body: RerankRequest, request: Request) -> dict[str, Any]:
        """Score documents by their relevance to a query, best first."""
        texts = await self._admit(body)
        if not self.engine.compressor.ranks:
            raise ServiceError(400, "this model has no reranking scores")
        found = await self._in_time(request, self.engine.compressor.compress(body.query, texts))
        order = sorted(range(len(texts)), key=lambda place: -found.scores[place])[: body.top_n]
        results = []
        for place in order:
            document = body.documents[place]
            result: dict[str, Any] = {"index": place, "relevance_score": found.scores[place]}
            if document.id is not None:
                result["id"] = document.id
            if body.return_documents:
                result["document"] = {"text": document.text}
            results.append(result)
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": self.model_name,
            "usage": {"total_tokens": found.num_tokens, "prompt_tokens": found.num_tokens},
            "results": results,
        }

    async def compress(self, body: CompressRequest, request: Request) -> dict[str, Any]:
        """Compress documents into memory embeddings: safetensors in base64, one tensor per document."""
        texts = await self._admit(body, body.compression_rate)
        work = self.engine.compressor.compress(body.query, texts, body.compression_rate)
        found = await self._in_time(request, work)
        tensors = {str(place): rows.cpu().clone() for place, rows in enumerate(found.embeddings)}
        documents = [
            {
                "index": place,
                "id": document.id,
                "relevance_score": None if found.scores is None else found.scores[place],
                "slots": len(found.embeddings[place]),
            }
            for place, document in enumerate(body.documents)
        ]
        return {
            "object": "compression",
            "model": self.model_name,
            "format": "safetensors",
            "dtype": str(found.embeddings[0].dtype).removeprefix("torch."),
            "data": base64.b64encode(await asyncio.to_thread(save, tensors)).decode(),
            "documents": documents,
            "usage": {"total_tokens": found.num_tokens, "prompt_tokens": found.num_tokens},
        }

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        model = {"id": self.model_name, "object": "model", "created": self._started, "owned_by": "scaledown"}
        return {"object": "list", "data": [model]}

    async def health(self) -> dict[str, Any]:
        """Whether answers can be had."""
        reason = await self.engine.unavailable()
        if reason is not None:
            raise ServiceError(503, reason)
        return {"status": "ok", "engine": self.engine.name, "model": self.model_name}

    async def collect(self) -> Response:
        """Counts for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def count(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Middleware that counts requests and their time, to the end of what is streamed."""
        start = time.perf_counter()
        try:
            response = await call_next(request)
        except Exception:
            logger.exception("a request failed")
            response = _reply(as_service_error(RuntimeError()))
        path = getattr(request.scope.get("route"), "path", "none")
        body = getattr(response, "body_iterator", None)
        status = str(response.status_code)

        def finish() -> None:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

        if body is None:
            finish()
            return response

        async def counted() -> AsyncIterator[Any]:
            try:
                async for part in body:
                    yield part
            finally:
                finish()

        response.body_iterator = counted()
        return response

    async def _admit(self, body: WithDocuments, compression_rate: int | None = None) -> list[str]:
        """The documents' texts, of a request that may wait for its turn."""
        arguments = self.arguments
        if body.model is not None and body.model != self.model_name:
            raise ServiceError(404, f"there is no model {body.model!r} here; it is {self.model_name!r}", "model")
        if len(body.documents) > arguments.max_documents:
            raise ServiceError(
                400,
                f"documents holds {len(body.documents)}, and this service reads {arguments.max_documents} per request; "
                f"send the best of them",
                "documents",
            )
        texts = [_text_of(document) for document in body.documents]
        await self.engine.compressor.check(body.asked, texts, compression_rate)
        batcher = self.engine.compressor.batcher
        if batcher.is_full:
            raise ServiceError(
                429, f"{batcher.waiting} requests wait already; try again later", headers={"Retry-After": "1"}
            )
        return texts

    async def _in_time(self, request: Request, work: Awaitable[Result]) -> Result:
        """What work comes to, unless it takes too long or nobody waits any more."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({task, gone}, timeout=self.arguments.timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                try:
                    return task.result()
                except Exception as error:
                    raise as_service_error(error) from error
            if gone.done():
                raise ServiceError(CLIENT_CLOSED, "nobody waits for the reply")
            raise ServiceError(
                504,
                f"the answer took longer than {self.arguments.timeout:g} seconds; ask for fewer tokens, or try later",
            )
        finally:
            task.cancel()
            gone.cancel()

    async def _whole(self, body: ChatRequest, pieces: AsyncIterator[Start | Piece | End]) -> JSONResponse:
        text, logprobs, reply = "", [], self._envelope("chat.completion")
        async for piece in pieces:
            if isinstance(piece, Start):
                start = piece
                reply["documents"] = _documents(body.documents, piece.documents)
            elif isinstance(piece, Piece):
                text += piece.text
                logprobs += piece.logprobs
            else:
                reply["choices"] = [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": text},
                        "logprobs": {"content": logprobs} if body.logprobs else None,
                        "finish_reason": piece.finish_reason,
                    }
                ]
                reply["usage"] = self._usage(start, piece)
        return JSONResponse(reply)

    async def _events(
        self, body: ChatRequest, start: Start, pieces: AsyncIterator[Start | Piece | End]
    ) -> AsyncIterator[str]:
        envelope = self._envelope("chat.completion.chunk")
        usage = {"usage": None} if body.stream_options is not None and body.stream_options.include_usage else {}

        def event(choices: list[dict[str, Any]], **more: Any) -> str:
            return f"data: {json.dumps({**envelope, 'choices': choices, **usage, **more})}\n\n"

        def choice(delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> list[dict[str, Any]]:
            return [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]

        documents = _documents(body.documents, start.documents)
        yield event(choice({"role": "assistant", "content": ""}), documents=documents)
        try:
            async with asyncio.timeout(self.arguments.timeout):
                async for piece in pieces:
                    if isinstance(piece, Piece):
                        logprobs = {"content": piece.logprobs} if body.logprobs else None
                        yield event(choice({"content": piece.text}, logprobs))
                    elif isinstance(piece, End):
                        yield event(choice({}, reason=piece.finish_reason))
                        counts = self._usage(start, piece)
                        if usage:
                            yield event([], usage=counts)
        except (ServiceError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                error = ServiceError(504, f"the answer took longer than {self.arguments.timeout:g} seconds")
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        finally:
            await pieces.aclose()
        yield "data: [DONE]\n\n"

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model_name,
        }

    def _usage(self, start: Start, end: End) -> dict[str, int]:
        self.metrics.tokens.labels("in").inc(start.prompt_tokens)
        self.metrics.tokens.labels("out").inc(end.completion_tokens)
        return {
            "prompt_tokens": start.prompt_tokens,
            "completion_tokens": end.completion_tokens,
            "total_tokens": start.prompt_tokens + end.completion_tokens,
        }


def _text_of(document: Document) -> str:
    return titled(document.title or "", document.text)


def _check_conversation(engine: Engine, conversation: list[dict[str, str]]) -> None:
    """Refuse, before it waits, what the processor cannot read."""
    try:
        engine.compressor.model.processor.check_texts([conversation], None)
        engine.compressor.model.processor.conversations([conversation])
    except ValueError as error:
        raise ServiceError(400, str(error).replace("questions[0]", "messages"), "messages") from error


def _documents(given: list[Document], found: list[DocumentReport]) -> list[dict[str, Any]]:
    return [
        {
            "index": place,
            "id": document.id,
            "relevance_score": report.score,
            "slots": report.slots,
            "read": report.read,
        }
        for place, (document, report) in enumerate(zip(given, found, strict=True))
    ]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _reply(error: ServiceError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def _reply_http(request: Request, error: HTTPException) -> JSONResponse:
    return _reply(ServiceError(error.status_code, str(error.detail), headers=error.headers))
