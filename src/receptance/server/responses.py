"""/v1/responses: each response is a state that later ones go on from, however long the conversation."""

import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import ValidationError
from starlette.responses import Response

from receptance.engine.request import Completion
from receptance.server import chat, conversations, http
from receptance.server.chat import Reply
from receptance.server.errors import ApiError, bad, first_fault
from receptance.server.hub import Hub
from receptance.server.names import new_id
from receptance.server.schemas import ChatRequest, ResponsesRequest
from receptance.server.store import Session

Id = Annotated[str, Path(pattern=r"^[a-z0-9._-]{1,128}$")]


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The same as a chat request. Raises ApiError."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        messages += map(_message, body.input)
    fields: dict[str, Any] = {
        "model": body.model, "messages": messages, "max_tokens": body.max_output_tokens, "stream": body.stream,
        "temperature": body.temperature, "top_p": body.top_p, "seed": body.seed,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
    }  # fmt: skip
    if body.text is not None and body.text.format is not None:
        kind = body.text.format
        fields["response_format"] = {"type": kind.get("type"), "json_schema": kind}
    if body.tools:
        fields["tools"] = [
            {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
            for tool in body.tools
            if tool.get("type") == "function"
        ]
    if body.tool_choice is not None:
        choice = body.tool_choice
        fields["tool_choice"] = choice if isinstance(choice, str) else {"function": {"name": choice.get("name")}}
    try:
        return ChatRequest(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise bad(first_fault(error.errors())[1]) from None


def _message(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role"), "content": item.get("content")}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        return {"role": "assistant", "tool_calls": [{"id": str(item.get("call_id", "")), "function": function}]}
    if kind == "function_call_output":
        return {"role": "tool", "content": item.get("output"), "tool_call_id": str(item.get("call_id", ""))}
    raise bad(f"input has an item of type {str(kind)[:100]!r}, which is not supported", "input")


async def begin(hub: Hub, body: ResponsesRequest, call: http.Call, id: str) -> Reply:
    """Prepare and submit; the finished response is kept under `id`. Raises ApiError."""
    request, kept = chat_request(body), hub.conversations
    if body.previous_response_id is None:
        model = hub.models[request.model]
        session = Session(call.owner, model.name, kind="response")
    else:
        hub.models.check_open()
        try:
            session = await kept.call(kept.store.get, call.owner, body.previous_response_id, "response")
        except ApiError as error:
            error.param = "previous_response_id"
            raise
        model = conversations.check_model(session, request.model, lambda name: hub.models[name])
    position = await kept.position(session, model)
    made, prompt = await chat.written(hub, request, model, call, is_begun=position.is_begun, system=model.system)

    async def keep(reply: Reply, completion: Completion) -> None:
        report = response_of(reply, body, id, "completed")
        now = time.time()
        new = replace(session, id=id, body=json.dumps(report), created=now, updated=now)
        await kept.keep_response(new, reply.turn(completion), completion, model)

    reply = await chat.submit(
        hub, request, model, made, prompt, call.id,
        state=position.state, state_key=position.key, unread=position.unread, keep_state=body.store,
    )  # fmt: skip
    reply.position, reply.before = position, 0 if position.unread else session.tokens
    reply.keep = keep if body.store else None
    return reply


def output_of(reply: Reply, id: str) -> list[dict[str, Any]]:
    parser, items = reply.parsers[0], []
    if parser.reasoning.strip():
        items.append({"id": f"rs_{id}", "type": "reasoning", "summary": [],
                      "content": [{"type": "reasoning_text", "text": parser.reasoning.strip()}]})  # fmt: skip
    if parser.content or not parser.calls:
        part = {"type": "output_text", "text": parser.content, "annotations": []}
        items.append({"id": f"msg_{id}", "type": "message", "role": "assistant", "status": "completed",
                      "content": [part]})  # fmt: skip
    for call in parser.calls:
        items.append({"id": f"fc_{call['id']}", "type": "function_call", "call_id": call["id"], "status": "completed",
                      **call["function"]})  # fmt: skip
    return items


def response_of(reply: Reply, body: ResponsesRequest, id: str, status: str) -> dict[str, Any]:
    report: dict[str, Any] = {
        "id": id,
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": reply.model.name,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": body.previous_response_id,
        "store": body.store,
        "temperature": body.temperature,
        "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": body.top_p,
        "usage": None,
    }
    if status == "in_progress":
        return report
    if reply.generation.completions[0].finish_reason == "length":
        report |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    usage = reply.usage
    report["output"] = output_of(reply, id)
    report["usage"] = {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }
    return report


# of a piece of a reply: the type of its item, the prefix of the item's id, the type of the item's part
PARTS = {"reasoning": ("reasoning", "rs", "reasoning_text"), "content": ("message", "msg", "output_text")}
EXTRA: dict[str, dict[str, Any]] = {"reasoning": {}, "content": {"annotations": []}}
LOGPROBS: dict[str, dict[str, Any]] = {"reasoning": {}, "content": {"logprobs": []}}


async def chunks(reply: Reply, body: ResponsesRequest, id: str) -> AsyncIterator[bytes]:
    """The events of a stream, each with its name and number."""
    count = 0

    def send(kind: str, **fields: Any) -> bytes:
        nonlocal count
        data = http.event({"type": kind, "sequence_number": count, **fields})
        count += 1
        return f"event: {kind}\n".encode() + data

    def opening(kind: str) -> Iterator[bytes]:
        type, prefix, part = PARTS[kind]
        more: dict[str, Any] = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
        item = {"id": f"{prefix}_{id}", "type": type, "status": "in_progress", "content": [], **more}
        yield send("response.output_item.added", output_index=number, item=item)
        place.update(item_id=item["id"], output_index=number)
        yield send("response.content_part.added", **place, part={"type": part, "text": "", **EXTRA[kind]})

    def closing(kind: str) -> Iterator[bytes]:
        item = output_of(reply, id)[number]
        (part,) = item["content"]
        yield send(f"response.{PARTS[kind][2]}.done", **place, text=part["text"], **LOGPROBS[kind])
        yield send("response.content_part.done", **place, part=part)
        yield send("response.output_item.done", output_index=number, item=item)

    place: dict[str, Any] = {"content_index": 0}
    number, now = -1, ""  # the item that is being written, and its kind
    begun = response_of(reply, body, id, "in_progress")
    yield send("response.created", response=begun)
    yield send("response.in_progress", response=begun)
    async for _, pieces, _ in reply.pieces():
        for piece in pieces:
            if piece.kind == "call":  # told whole, at the end
                continue
            if piece.kind != now:
                for event in closing(now) if now else ():
                    yield event
                number, now = number + 1, piece.kind
                for event in opening(now):
                    yield event
            yield send(f"response.{PARTS[now][2]}.delta", **place, delta=piece.text, **LOGPROBS[now])
    for event in closing(now) if now else ():
        yield event
    finished = response_of(reply, body, id, "completed")
    for index, item in enumerate(finished["output"][number + 1 :], number + 1):
        yield send("response.output_item.added", output_index=index, item=item)
        if item["type"] == "function_call":
            where = {"item_id": item["id"], "output_index": index}
            yield send("response.function_call_arguments.delta", **where, delta=item["arguments"])
            yield send("response.function_call_arguments.done", **where, arguments=item["arguments"])
        yield send("response.output_item.done", output_index=index, item=item)
    kind = "response.incomplete" if finished["status"] == "incomplete" else "response.completed"
    yield send(kind, response=finished)


def failed(error: ApiError) -> bytes:
    body = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    return b"event: error\n" + http.event(body)


def routes(hub: Hub) -> APIRouter:
    router = APIRouter(prefix="/v1/responses")
    kept = hub.conversations

    @router.post("", responses=http.streams(http.EVENTS))
    async def create(body: ResponsesRequest, request: Request) -> Response:
        id = new_id("resp").replace("-", "_")
        starting = begin(hub, body, await http.call_of(request), id)
        reply = await http.unless_left(request, starting)
        if body.stream:
            return http.Stream(request, chunks(reply, body, id), reply.release, failed=failed)

        async def whole() -> dict[str, Any]:
            try:
                async for _ in reply.pieces():
                    pass
            finally:
                await reply.release()
            return response_of(reply, body, id, "completed")

        return http.answer(await http.unless_left(request, whole()))

    @router.get("/{id}")
    async def get(id: Id, request: Request) -> Response:
        session = await kept.call(kept.store.get, http.owner(request), id, "response")
        return http.answer(json.loads(session.body or "{}"))

    @router.delete("/{id}")
    async def delete(id: Id, request: Request) -> Response:
        await kept.call(kept.store.delete, http.owner(request), id, "response")
        return http.answer({"id": id, "object": "response", "deleted": True})

    return router
