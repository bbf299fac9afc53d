"""Stands in for a vLLM server with `--enable-prompt-embeds`: the part of its API that the engine uses.

Replies have the form of vLLM 0.32, as `tests/serving/test_vllm.py` meets it.
"""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from scaledown import ScaleDownModel


class FakeVLLM:
    """Greedy answers of a model's generator, and whatever trouble is asked for.

    Args:
        model: Its generator answers.
        max_length: What is said of the length of prompts.
    """

    def __init__(self, model: ScaleDownModel, max_length: int = 512):
        self.model, self.max_length = model, max_length
        self.names = ["generator"]
        self.bodies: list[dict[str, Any]] = []  # of the requests so far
        # What becomes of the next requests: a status, "cut" after so many tokens, or "error" in the stream.
        self.troubles: list[int | tuple[str, int]] = []
        self.seconds_per_token = 0.0
        self.streams_closed = 0
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/completions")(self.complete)

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "max_model_len": self.max_length} for name in self.names]}

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        trouble = self.troubles.pop(0) if self.troubles else None
        if "prompt" in body:
            return _refusal(400, "Either prompt or prompt_embeds must be provided and non-empty.")
        if body["model"] not in self.names:
            return _refusal(404, f"The model `{body['model']}` does not exist.")
        if isinstance(trouble, int):
            return _refusal(trouble, "as asked for")
        assert body["stream"] and body["return_token_ids"] and body["return_tokens_as_token_ids"]
        return StreamingResponse(self._events(body, trouble), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], trouble: tuple[str, int] | None) -> AsyncIterator[str]:
        try:
            for place, choice in enumerate(self._choices(body)):
                await asyncio.sleep(self.seconds_per_token)
                if trouble is not None and place == trouble[1]:
                    if trouble[0] == "cut":
                        raise ConnectionResetError("as asked for")
                    yield f"data: {json.dumps({'error': {'message': 'EngineCore died', 'code': 500}})}\n\n"
                    return
                yield f"data: {json.dumps({'id': 'cmpl', 'object': 'text_completion', 'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.streams_closed += 1

    @torch.inference_mode()
    def _choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        embeddings = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        written = self.model.generator.generate(
            inputs_embeds=embeddings.unsqueeze(0),
            attention_mask=torch.ones(1, len(embeddings), dtype=torch.long),
            max_new_tokens=body["max_tokens"],
            min_new_tokens=body["min_tokens"] or None,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=self.model.generation_config.eos_token_id,
        )
        tokens = written.sequences[0].tolist()
        choices = []
        for place, token in enumerate(tokens):
            ended = token == self.model.processor.tokenizer.eos_token_id
            reason = "stop" if ended else "length" if place + 1 == body["max_tokens"] else None
            logprobs = None
            if body.get("logprobs") is not None:
                row = written.logits[place][0].log_softmax(dim=-1)
                best = {token, *row.topk(body["logprobs"]).indices.tolist()}  # vLLM adds the one that was written
                logprobs = {
                    "tokens": [f"token_id:{token}"],
                    "token_logprobs": [float(row[token])],
                    "top_logprobs": [{f"token_id:{other}": float(row[other]) for other in best}],
                    "text_offset": [0],
                }
            choices.append(
                {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": reason, "token_ids": [token]}
            )
        return choices


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "error", "param": None, "code": status}}, status)
