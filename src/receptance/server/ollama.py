"""Ollama's /api/chat, /api/generate and /api/tags, for programs that speak nothing else."""

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from receptance.server import chat, completions, http
from receptance.server.errors import ApiError, bad, first_fault
from receptance.server.hub import Hub
from receptance.server.schemas import ChatRequest, CompletionRequest, OllamaChat, OllamaGenerate, OllamaRequest

OPTIONS = {
    "num_predict": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}


def fields_of(body: OllamaRequest) -> dict[str, Any]:
    """As our own requests have them."""
    options = body.options or {}
    found = {ours: options[theirs] for theirs, ours in OPTIONS.items() if theirs in options}
    if isinstance(count := found.get("max_tokens"), int) and count < 0:
        del found["max_tokens"]  # -1: as long as it likes
    fields: dict[str, Any] = {"model": body.model, "stream": body.stream, **found}
    if body.format == "json":
        fields["response_format"] = {"type": "json_object"}
    elif isinstance(body.format, dict):
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": body.format}}
    return fields


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def last(model: str, reason: str, prompt: int, written: int, began: float) -> dict[str, Any]:
    return {
        "model": model,
        "created_at": now(),
        "done": True,
        "done_reason": reason,
        "total_duration": int((time.perf_counter() - began) * 1e9),
        "prompt_eval_count": prompt,
        "eval_count": written,
    }


def failed(error: ApiError) -> bytes:
    return http.line({"error": error.message})


def checked(kind: Any, fields: dict[str, Any]) -> Any:
    try:
        return kind(**fields)
    except ValidationError as error:
        raise bad(f"options: {first_fault(error.errors())[1]}", "options") from None


def routes(hub: Hub, version: str) -> APIRouter:
    router = APIRouter(prefix="/api")

    @router.get("/version")
    async def tell_version() -> Response:
        return http.answer({"version": version})

    @router.get("/tags")
    async def tags() -> Response:
        hub.models.check_open()
        models = []
        for model in hub.models:
            details = {"format": "safetensors", "family": f"rwkv{model.model.config.version}"}
            modified = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
            models.append({"name": model.name, "model": model.name, "modified_at": modified, "size": 0,
                           "digest": model.model.fingerprint, "details": details})  # fmt: skip
        return http.answer({"models": models})

    @router.post("/chat", responses=http.streams(http.LINES))
    async def talk(body: OllamaChat, request: Request) -> Response:
        began, fields = time.perf_counter(), fields_of(body)
        if body.think is not None and hub.models[body.model].template.thinks:
            fields["thinking"] = "on" if body.think else "off"
        messages = [message.model_dump() for message in body.messages]
        asked = checked(ChatRequest, {**fields, "messages": messages or [{"role": "user", "content": ""}]})
        reply = await http.unless_left(request, chat.begin(hub, asked, await http.call_of(request)))
        name = reply.model.name

        def end() -> dict[str, Any]:
            usage = reply.usage
            return last(name, reply.finish_reason(0), usage["prompt_tokens"], usage["completion_tokens"], began)

        if not body.stream:
            report = await http.unless_left(request, chat.whole(reply, asked))
            said = report["choices"][0]["message"]
            message = {"role": "assistant", "content": said["content"] or ""}
            if "reasoning_content" in said:
                message["thinking"] = said["reasoning_content"]
            return http.answer({**end(), "message": message})

        async def chunks() -> AsyncIterator[bytes]:
            async for _, pieces, _ in reply.pieces():
                for piece in pieces:
                    word = {"reasoning": "thinking"}.get(piece.kind, "content")
                    message = {"role": "assistant", "content": "", word: piece.text}
                    yield http.line({"model": name, "created_at": now(), "message": message, "done": False})
            yield http.line({**end(), "message": {"role": "assistant", "content": ""}})

        return http.Stream(request, chunks(), reply.release, failed=failed, kind=http.LINES)

    @router.post("/generate", responses=http.streams(http.LINES))
    async def go_on(body: OllamaGenerate, request: Request) -> Response:
        """Ollama puts the prompt into the model's template, unless `raw`."""
        began, model, fields = time.perf_counter(), hub.models[body.model], fields_of(body)
        prompt = body.prompt
        if not body.raw:
            system = [{"role": "system", "content": body.system}] if body.system else []
            prompt = model.template.render([*system, {"role": "user", "content": prompt}])
            stops = fields.get("stop") or []
            fields["stop"] = [*model.template.stop, *([stops] if isinstance(stops, str) else stops)]
        fields.setdefault("max_tokens", min(model.sampling.max_tokens, hub.config.limits.max_tokens))
        asked = checked(CompletionRequest, {**fields, "prompt": prompt})
        texts = await http.unless_left(request, completions.begin(hub, asked, await http.call_of(request)))
        one = texts.running[0].generation
        strips = bool(model.template.assistant) and not body.raw  # the blank after "Assistant:"

        def end() -> dict[str, Any]:
            reason = str(one.completions[0].finish_reason)
            return last(model.name, reason, one.prompt_tokens, one.completion_tokens, began)

        if not body.stream:
            report = await http.unless_left(request, completions.whole(texts, asked))
            text = report["choices"][0]["text"]
            return http.answer({**end(), "response": text.lstrip() if strips else text})

        async def chunks() -> AsyncIterator[bytes]:
            began_text = not strips
            async for _, token in one.events():
                text = token.text if began_text else token.text.lstrip()
                began_text = began_text or bool(text)
                if text:
                    yield http.line({"model": model.name, "created_at": now(), "response": text, "done": False})
            yield http.line({**end(), "response": ""})

        return http.Stream(request, chunks(), texts.release, failed=failed, kind=http.LINES)

    return router
