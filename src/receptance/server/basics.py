"""Models, tokens, embeddings, health and figures."""

import asyncio
import base64
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from receptance.errors import ReceptanceError
from receptance.server import generate, http
from receptance.server.completions import split
from receptance.server.errors import bad
from receptance.server.hub import Hub
from receptance.server.metrics import CONTENT_TYPE
from receptance.server.prompt import plain_messages
from receptance.server.schemas import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from receptance.server.served import ServedModel


def about(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "receptance",
        "states": sorted(name for name in model.states if name),
    }


def routes(hub: Hub, version: str) -> APIRouter:
    router = APIRouter()
    limits = hub.config.limits

    @router.get("/health")
    async def health() -> Response:
        """503 while the models are being loaded."""
        return http.answer({"status": "ok"}) if hub.models.is_loaded else http.answer({"status": "loading"}, 503)

    @router.get("/ready")
    async def ready() -> Response:
        """503 while the models are being loaded, and while the server shuts down."""
        state = "draining" if hub.models.is_draining else "ready" if hub.models.is_loaded else "loading"
        return http.answer({"status": state}, 200 if state == "ready" else 503)

    @router.get("/version")
    async def tell_version() -> Response:
        return http.answer({"version": version})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(hub.metrics.render), media_type=CONTENT_TYPE)

    @router.get("/v1/models")
    async def models() -> Response:
        hub.models.check_open()
        return http.answer({"object": "list", "data": [about(model) for model in hub.models]})

    @router.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        return http.answer(about(hub.models[name]))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """The ids of a text, or of a chat as the model's template writes it."""
        model = hub.models[body.model]
        if (body.prompt is None) == (body.messages is None):
            raise bad("give prompt or messages", "prompt")
        text = body.prompt
        if text is None:
            messages = plain_messages(body.messages or [])
            text = model.template.render(messages, add_generation_prompt=body.add_generation_prompt)
        ids = await generate.tokenize(model, text, limits)
        return http.answer({"count": len(ids), "tokens": ids, "max_model_len": None})

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        model = hub.models[body.model]
        if len(body.tokens) > limits.prompt_bytes:
            raise bad(f"there are {len(body.tokens):,} tokens, at most {limits.prompt_bytes:,} are allowed", "tokens")
        try:
            return http.answer({"prompt": await asyncio.to_thread(model.tokenizer.decode, body.tokens)})
        except ReceptanceError as error:
            raise bad(str(error), "tokens") from None

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        model = hub.models[body.model]
        size = model.model.config.n_embd
        if body.dimensions not in (None, size):
            raise bad(f"dimensions is {body.dimensions}, this model's vectors have {size}", "dimensions")
        prompts = []
        for prompt in split(body.input, limits.prompts, "input"):
            if isinstance(prompt, str):
                ids = await generate.tokenize(model, prompt, limits)
            else:
                ids = generate.check_ids(model, prompt, limits)
            prompts.append(ids or [model.tokenizer.eos_id])
        with hub.models.admit(len(prompts)):
            futures = [model.engine.submit_embedding(ids) for ids in prompts]
            waiting = asyncio.gather(*(asyncio.shield(asyncio.wrap_future(future)) for future in futures))
            try:
                vectors = await http.unless_left(request, waiting)
            except ReceptanceError as error:
                raise bad(str(error), "input") from None
        data = []
        for index, vector in enumerate(vectors):
            values = vector.tolist()
            if body.encoding_format == "base64":
                values = base64.b64encode(vector.astype("<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": values})
        count = sum(map(len, prompts))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return http.answer({"object": "list", "data": data, "model": model.name, "usage": usage})

    return router
