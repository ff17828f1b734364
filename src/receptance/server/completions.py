"""/v1/completions: a text to go on with, as text or token ids."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from receptance.engine.request import Completion, Score, Token
from receptance.errors import ReceptanceError
from receptance.server import generate, http
from receptance.server.errors import bad
from receptance.server.generate import Generation
from receptance.server.hub import Hub
from receptance.server.names import new_id
from receptance.server.prompt import form_of, sampling
from receptance.server.schemas import CompletionRequest, Ids
from receptance.server.served import ServedModel


@dataclass(eq=False)
class Running:
    """One prompt of a request. text: the prompt; opened: end of document was put before it, and is not the client's."""

    ids: list[int]
    text: str
    generation: Generation
    prompt_logprobs: list[float] | None = None


@dataclass(eq=False)
class Texts:
    model: ServedModel
    running: list[Running] = field(default_factory=list)

    async def release(self) -> None:
        for one in self.running:
            one.generation.close()

    @property
    def usage(self) -> dict[str, Any]:
        made = [one.generation for one in self.running]
        prompt, written = sum(g.prompt_tokens for g in made), sum(g.completion_tokens for g in made)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(g.cached_tokens for g in made)},
        }


def split(prompt: str | Ids | list[str] | list[Ids], most: int, param: str) -> list[str | list[int]]:
    """The prompts of a request: one or several, each text or ids."""
    prompts: list[Any]
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompts = [prompt]
    else:
        prompts = list(prompt)
    if not 1 <= len(prompts) <= most:
        raise bad(f"{param} holds {len(prompts)} texts, expected 1 to {most}", param)
    return prompts


async def begin(hub: Hub, request: CompletionRequest, call: http.Call) -> Texts:
    """Raises ApiError."""
    model, limits = hub.models[request.model], hub.config.limits
    n, best_of = request.n or 1, request.best_of
    if best_of is not None and best_of != n:
        raise bad("best_of other than n is not supported", "best_of")
    if request.suffix:
        raise bad("suffix is not supported: the model reads from left to right", "suffix")
    if request.echo and request.stream and request.logprobs is not None:
        raise bad("echo with logprobs cannot be streamed", "echo")
    default = model.completion_sampling
    max_tokens = request.max_tokens
    if max_tokens == 0 and not request.echo:
        raise bad("max_tokens is 0, which needs echo", "max_tokens")
    params = sampling(
        request, default, limits, model.model.config.vocab_size, max_tokens=max_tokens, logprobs=request.logprobs
    )
    form = form_of(request, request.response_format, limits)
    start, key = await generate.start_of(model, request)
    texts = Texts(model)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(texts.release)
        for i, prompt in enumerate(split(request.prompt, limits.prompts, "prompt")):
            if isinstance(prompt, str):
                ids, text = await generate.tokenize(model, prompt, limits), prompt
                if (model.new_document and start is None) or not ids:
                    ids = [model.tokenizer.eos_id, *ids]
            else:
                ids = generate.check_ids(model, prompt, limits)
                text = model.tokenizer.decode(x for x in ids if x < model.tokenizer.vocab_size)
            if params.logprobs is not None and request.echo and len(ids) > 1:
                scored = model.engine.submit_score(Score(ids[:1], ids[1:]))
                try:
                    logprobs = (await asyncio.shield(asyncio.wrap_future(scored))).logprobs
                except ReceptanceError as error:
                    raise bad(str(error), "prompt") from None
            else:
                logprobs = None
            generation = await generate.start(
                hub.models, hub.metrics, limits, model, ids, params, id=f"{call.id}-{i}", state=start, state_key=key,
                n=n, priority=request.priority or 0, keep_state=bool(request.return_state),
                grammar=form.after("") if form else None,
            )  # fmt: skip
            texts.running.append(Running(ids, text, generation, logprobs))
        stack.pop_all()
    return texts


class Report:
    """The log-probabilities of a text as completions report them: four lists, one item a token."""

    def __init__(self, model: ServedModel):
        self._model, self._offset = model, 0
        self.body: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}

    def add(self, id: int, logprob: float | None, top: dict[str, float] | None) -> None:
        word = self.word(id)
        self.body["text_offset"].append(self._offset)
        self.body["token_logprobs"].append(logprob)
        self.body["tokens"].append(word)
        self.body["top_logprobs"].append(top)
        self._offset += len(word)

    def add_token(self, token: Token) -> None:
        self.add(token.id, token.logprob, {self.word(i): value for i, value in token.top})

    def word(self, id: int) -> str:
        tokenizer = self._model.tokenizer
        return tokenizer.decode([id], keep_special=True) if id < tokenizer.vocab_size else f"<{id}>"


def _choice(texts: Texts, request: CompletionRequest, number: int, one: Running, made: Completion) -> dict[str, Any]:
    report = None
    if request.logprobs is not None:
        report = Report(texts.model)
        if request.echo:
            for id, logprob in zip(one.ids, [None, *(one.prompt_logprobs or [])]):
                report.add(id, logprob, None)
        for token in made.tokens:
            report.add_token(token)
    return {
        "index": number,
        "text": (one.text if request.echo else "") + made.text,
        "logprobs": None if report is None else report.body,
        "finish_reason": made.finish_reason,
    }


def _base(texts: Texts) -> dict[str, Any]:
    return {
        "id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": texts.model.name
    }  # fmt: skip


async def whole(texts: Texts, request: CompletionRequest) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    try:
        for one in texts.running:
            for made in await one.generation.finish():
                choices.append(_choice(texts, request, len(choices), one, made))
                if request.return_state:
                    choices[-1]["state_data"] = await one.generation.state_data(made.index)
    finally:
        await texts.release()
    return {**_base(texts), "choices": choices, "usage": texts.usage}


async def chunks(texts: Texts, request: CompletionRequest) -> AsyncIterator[bytes]:
    """All texts at once, as their tokens come."""
    base, n = _base(texts), request.n or 1

    def chunk(number: int, text: str, reason: str | None = None, logprobs: Any = None, **more: str) -> bytes:
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason, **more}
        return http.event({**base, "choices": [choice]})

    try:
        if request.echo:
            for i, one in enumerate(texts.running):
                for index in range(n):
                    yield chunk(i * n + index, one.text)
        async with aclosing(_together([one.generation for one in texts.running])) as tokens:
            async for number, token in tokens:
                report = None
                if request.logprobs is not None:
                    report = Report(texts.model)
                    report.add_token(token)
                if token.text or report:
                    yield chunk(number, token.text, None, report.body if report else None)
        for i, one in enumerate(texts.running):
            for made in one.generation.completions:
                more = {"state_data": await one.generation.state_data(made.index)} if request.return_state else {}
                yield chunk(i * n + made.index, "", made.finish_reason, **more)
        if request.stream_options is not None and request.stream_options.include_usage:
            yield http.event({**base, "choices": [], "usage": texts.usage})
        yield http.DONE
    finally:
        await texts.release()


def _together(generations: list[Generation]) -> AsyncGenerator[tuple[int, Token], None]:
    """What all of them give, as it comes: (number of the text among all, token)."""
    return generations[0].events() if len(generations) == 1 else _merged(generations)


async def _merged(generations: list[Generation]) -> AsyncGenerator[tuple[int, Token], None]:
    queue: asyncio.Queue[tuple[int, Token] | Exception | None] = asyncio.Queue(64)

    async def pass_on(first: int, generation: Generation) -> None:
        try:
            async for index, token in generation.events():
                await queue.put((first + index, token))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks, first = [], 0
    for generation in generations:
        tasks.append(asyncio.ensure_future(pass_on(first, generation)))
        first += len(generation.completions)
    try:
        left = len(tasks)
        while left:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def routes(hub: Hub) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", responses=http.streams(http.EVENTS))
    async def complete(body: CompletionRequest, request: Request) -> Response:
        texts = await http.unless_left(request, begin(hub, body, await http.call_of(request)))
        if body.stream:
            return http.Stream(request, chunks(texts, body), texts.release)
        return http.answer(await http.unless_left(request, whole(texts, body)))

    return router
