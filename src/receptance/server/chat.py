"""/v1/chat/completions, with and without a session."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from receptance.engine.params import SamplingParams
from receptance.engine.request import Completion, Token
from receptance.errors import ConfigError
from receptance.server import conversations, generate, http
from receptance.server.errors import ApiError, bad
from receptance.server.generate import Generation
from receptance.server.hub import Hub, log
from receptance.server.names import new_id
from receptance.server.parse import CLOSE_CALL, OPEN_CALL, Piece, ReplyParser
from receptance.server.prompt import Chat, call_text, make_chat, sampling
from receptance.server.schemas import ChatRequest
from receptance.server.served import ServedModel
from receptance.server.store import Turn


@dataclass(eq=False)
class Reply:
    """A chat request that is running. position: in its session, if it has one.

    keep: makes the finished text part of what is kept, before the client hears that it is finished.
    """

    model: ServedModel
    chat: Chat
    generation: Generation
    parsers: list[ReplyParser]
    unread: str  # of the prompt, that a session's dropped state had read before
    prompt: str
    before: int = 0  # tokens of the session so far
    position: conversations.Position | None = None
    keep: Callable[["Reply", Completion], Awaitable[None]] | None = None
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    reasoning_tokens: int = 0
    _is_kept: bool = False
    _is_released: bool = False

    async def pieces(self) -> AsyncIterator[tuple[int, list[Piece], Token | None]]:
        """(index, what became known, the token); with None for the token before the first and after the last."""
        for index, parser in enumerate(self.parsers):
            if self.chat.prefix and (known := parser.push(self.chat.prefix)):
                yield index, known, None
        async for index, token in self.generation.events():
            known = self.parsers[index].push(token.text)
            self.reasoning_tokens += self.parsers[index].is_thinking
            yield index, known, token
        await self._keep()
        for index, parser in enumerate(self.parsers):
            yield index, parser.finish(), None

    async def release(self) -> None:
        """To be called when all is over, for whatever reason. A session's text that was broken off is kept so far."""
        if self._is_released:
            return
        self._is_released = True
        try:
            if self.keep is not None and not self._is_kept:
                await self.generation.cancel()
                await self._keep()
        except ApiError as error:
            log.warning("a stopped turn was not kept", extra={"reason": error.code})
        finally:
            self.generation.close()
            await self.stack.aclose()

    async def _keep(self) -> None:
        completion = self.generation.completions[0]
        is_empty = completion.finish_reason == "cancelled" and not completion.tokens
        if self.keep is None or completion.state is None or is_empty:
            return
        self._is_kept = True
        await self.keep(self, completion)

    def finish_reason(self, index: int) -> str:
        reason = self.generation.completions[index].finish_reason
        return "tool_calls" if self.parsers[index].calls and reason == "stop" else str(reason)

    @property
    def usage(self) -> dict[str, Any]:
        """A session's earlier tokens count as read from the cache, as with a client that sends all of them."""
        made = self.generation
        prompt = made.prompt_tokens + self.before
        cached = made.cached_tokens + self.before
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made.completion_tokens,
            "total_tokens": prompt + made.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }

    def turn(self, completion: Completion) -> Turn:
        """What is kept of the first text."""
        parser = ReplyParser(self.model.template.thinks, self.chat.calls, strip=bool(self.model.template.assistant))
        parser.push(self.chat.prefix + completion.text)
        parser.finish()
        calls = "".join(f"{OPEN_CALL}{call_text(c['function'])}{CLOSE_CALL}" for c in parser.calls)
        return Turn(
            user=self.chat.user,
            assistant=parser.content or calls,
            reasoning=parser.reasoning.strip() or None,
            raw=self.prompt + completion.text,
            prompt_tokens=len(completion.prompt_ids),
            completion_tokens=len(completion.tokens),
            finish_reason=str(completion.finish_reason),
            start=self.position.session.start if self.position else "",
        )


def chat_params(hub: Hub, request: ChatRequest, model: ServedModel) -> SamplingParams:
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    if request.top_logprobs is not None and not request.logprobs:
        raise bad("top_logprobs needs logprobs to be true", "top_logprobs")
    max_tokens = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    params = sampling(
        request,
        model.sampling,
        hub.config.limits,
        model.model.config.vocab_size,
        max_tokens=max_tokens,
        logprobs=logprobs,
    )
    return params


def with_stops(params: SamplingParams, model: ServedModel) -> SamplingParams:
    """The stops of the template and the request's. Raises ApiError for more than the engine takes."""
    try:
        return replace(params, stop=tuple(dict.fromkeys((*model.template.stop, *params.stop_strings))))
    except ConfigError as error:
        raise bad(f"with those of the model's template {error}", "stop") from None


async def begin(hub: Hub, request: ChatRequest, call: http.Call) -> Reply:
    """Prepare and submit. Raises ApiError."""
    if request.session_id is not None:
        return await begin_turn(hub, request, call)
    model = hub.models[request.model]
    start, key = await generate.start_of(model, request)
    chat, prompt = await written(
        hub, request, model, call, is_begun=request.state_data is not None, system=model.system
    )
    return await submit(hub, request, model, chat, prompt, call.id, state=start, state_key=key)


async def written(
    hub: Hub, request: ChatRequest, model: ServedModel, call: http.Call, *, is_begun: bool, system: str | None
) -> tuple[Chat, str]:
    """A chat, and the prompt that the model's template makes of it. is_begun: a state has read what came before.

    system: at the beginning, unless the request has a system message. Raises ApiError.
    """

    def write() -> tuple[Chat, str]:
        chat = make_chat(request, model, hub.config.limits, None if is_begun else system)
        render = model.template.render_next if is_begun else model.template.render
        return chat, render(chat.messages, thinking=chat.thinking)

    return await generate.aside(call.size, write)


async def begin_turn(hub: Hub, request: ChatRequest, call: http.Call) -> Reply:
    """A turn of a session: only the new messages are read."""
    assert request.session_id is not None
    if (request.n or 1) != 1:
        raise bad("a turn of a session has n = 1", "n")
    if request.state_data is not None:
        raise bad("a session goes on from its own state", "state_data")
    kept, stack = hub.conversations, AsyncExitStack()
    hub.models.check_open()
    await stack.enter_async_context(kept.turn_of(f"{call.owner}/{request.session_id}"))
    try:
        session = await kept.call(kept.store.get, call.owner, request.session_id)
        model = conversations.check_model(session, request.model, lambda name: hub.models[name])
        if request.state not in (None, session.start):
            raise bad(f"the session began with the state {session.start!r}", "state")
        position = await kept.position(session, model)
        chat, prompt = await written(
            hub, request, model, call, is_begun=position.is_begun, system=session.system or model.system
        )

        async def keep(reply: Reply, completion: Completion) -> None:
            await kept.keep(position, reply.turn(completion), completion, model)

        reply = await submit(
            hub, request, model, chat, prompt, call.id,
            state=position.state, state_key=position.key, unread=position.unread, keep_state=True,
        )  # fmt: skip
    except BaseException:
        await stack.aclose()
        raise
    reply.position, reply.keep, reply.stack, reply.before = position, keep, stack, session.tokens
    if position.unread:
        reply.before = 0  # it was read again
    return reply


async def submit(
    hub: Hub,
    request: ChatRequest,
    model: ServedModel,
    chat: Chat,
    prompt: str,
    request_id: str,
    *,
    state: Any,
    state_key: str | None,
    unread: str = "",
    keep_state: bool = False,
) -> Reply:
    params = with_stops(chat_params(hub, request, model), model)
    if hub.config.log.prompts:
        log.info("prompt", extra={"request_id": request_id, "prompt": prompt})
    limits = hub.config.limits
    ids = await generate.tokenize(model, prompt, limits)
    if unread:  # of any length: it was taken in pieces before
        ids = await asyncio.to_thread(model.tokenizer.encode, unread) + ids
    if not ids and state is None:
        ids = [model.tokenizer.eos_id]
    if not ids:
        raise bad("the messages hold no text", "messages")
    generation = await generate.start(
        hub.models, hub.metrics, limits, model, ids, params, id=request_id, state=state, state_key=state_key,
        n=request.n or 1, priority=request.priority or 0, keep_state=keep_state or bool(request.return_state),
        grammar=chat.grammar,
    )  # fmt: skip
    strip = bool(model.template.assistant)
    parsers = [ReplyParser(model.template.thinks, chat.calls, strip=strip) for _ in range(request.n or 1)]
    return Reply(model, chat, generation, parsers, unread, prompt)


# Answers --------------------------------------------------------------------------------------------------------------


def token_report(model: ServedModel, token: Token) -> dict[str, Any]:
    """A token with its log-probability, as chats report it."""

    def one(id: int, logprob: float | None) -> dict[str, Any]:
        data = model.tokenizer.token_bytes(id) if id < model.tokenizer.vocab_size else b""
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    return {**one(token.id, token.logprob), "top_logprobs": [one(id, value) for id, value in token.top]}


def message_of(parser: ReplyParser) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": parser.content, "refusal": None}
    if parser.reasoning.strip():
        message["reasoning_content"] = parser.reasoning.strip()
    if parser.calls:
        message["tool_calls"] = parser.calls
        message["content"] = parser.content.strip() or None
    return message


async def whole(reply: Reply, request: ChatRequest) -> dict[str, Any]:
    """The answer to a request without `stream`."""
    try:
        async for _ in reply.pieces():
            pass
    finally:
        await reply.release()
    choices = []
    for index, parser in enumerate(reply.parsers):
        tokens = reply.generation.completions[index].tokens
        logprobs = (
            {"content": [token_report(reply.model, t) for t in tokens], "refusal": None} if request.logprobs else None
        )
        choice = {
            "index": index,
            "message": message_of(parser),
            "logprobs": logprobs,
            "finish_reason": reply.finish_reason(index),
        }
        if request.return_state:
            choice["state_data"] = await reply.generation.state_data(index)
        choices.append(choice)
    return {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": reply.model.name,
        "choices": choices,
        "usage": reply.usage,
    }


async def chunks(reply: Reply, request: ChatRequest) -> AsyncIterator[bytes]:
    """The stream: the role first, the finish reason last, then the usage if asked for, then [DONE]."""
    base = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": reply.model.name,
    }
    wants_usage = request.stream_options is not None and request.stream_options.include_usage
    if wants_usage:
        base["usage"] = None  # type: ignore[assignment]

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None, **more: str) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason, **more}
        return http.event({**base, "choices": [choice]})

    try:
        for index in range(len(reply.parsers)):
            yield chunk(index, {"role": "assistant", "content": ""})
        counts = [0] * len(reply.parsers)
        async for index, pieces, token in reply.pieces():
            logprobs = None
            if token is not None and request.logprobs:
                logprobs = {"content": [token_report(reply.model, token)], "refusal": None}
            for piece in pieces:
                yield chunk(index, _delta(piece, counts, index), logprobs=logprobs)
                logprobs = None
            if logprobs is not None:
                yield chunk(index, {}, logprobs=logprobs)
        for index in range(len(reply.parsers)):
            more = {"state_data": await reply.generation.state_data(index)} if request.return_state else {}
            yield chunk(index, {}, reply.finish_reason(index), **more)
        if wants_usage:
            yield http.event({**base, "choices": [], "usage": reply.usage})
        yield http.DONE
    finally:
        await reply.release()


def _delta(piece: Piece, counts: list[int], index: int) -> dict[str, Any]:
    if piece.kind == "reasoning":
        return {"reasoning_content": piece.text}
    if piece.kind == "content":
        return {"content": piece.text}
    counts[index] += 1
    return {"tool_calls": [{"index": counts[index] - 1, **piece.call}]}


def routes(hub: Hub) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", responses=http.streams(http.EVENTS))
    async def complete(body: ChatRequest, request: Request) -> Response:
        reply = await http.unless_left(request, begin(hub, body, await http.call_of(request)))
        if body.stream:
            return http.Stream(request, chunks(reply, body), reply.release)
        return http.answer(await http.unless_left(request, whole(reply, body)))

    return router
