"""Answers: JSON, streams of events that notice when the client leaves, and the client's identity."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response

from receptance.server.errors import ApiError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
EVENTS, LINES = "text/event-stream", "application/x-ndjson"


def streams(kind: str) -> dict[int | str, dict[str, Any]]:
    """For a route's description: it also answers with a stream."""
    return {200: {"description": "The answer, or a stream of it", "content": {kind: {}}}}


def dump(body: Any) -> bytes:
    """JSON. What a client sent is told back in places, and may hold what orjson refuses."""
    try:
        return orjson.dumps(body)
    except TypeError:
        return json.dumps(body).encode()


def answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(body), status, headers, "application/json")


def failure(error: ApiError) -> Response:
    return answer(error.body, error.status, dict(error.headers or {}))


def event(body: Any) -> bytes:
    return b"data: " + dump(body) + b"\n\n"


def line(body: Any) -> bytes:
    return dump(body) + b"\n"


def owner(request: Request) -> str:
    """The name of the client's key; "" where none is needed."""
    return str(request.scope["state"].get("owner", ""))


@dataclass(frozen=True)
class Call:
    """Who asks, and how much. id: of the request. size: of its body, in bytes."""

    owner: str
    id: str
    size: int


async def call_of(request: Request) -> Call:
    return Call(owner(request), str(request.scope["state"]["request_id"]), len(await request.body()))


async def left(request: Request) -> None:
    """Return when the client has gone. To be called once the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone", code="cancelled")
        return task.result()
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class Stream(Response):
    """Sends what `chunks` gives. An error in it becomes a last chunk, made by `failed`; a client that leaves ends it.

    release: called in any case, at the end.
    """

    def __init__(
        self,
        request: Request,
        chunks: AsyncIterator[bytes],
        release: Callable[[], Awaitable[None]],
        *,
        failed: Callable[[ApiError], bytes] = lambda error: event(error.body),
        kind: str = EVENTS,
    ):
        super().__init__(media_type=kind, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request, self._chunks, self._release, self._failed = request, chunks, release, failed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        task, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(left(self._request))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for other in (task, gone):
                other.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)
            await self._release()
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})
        finally:
            await self._chunks.aclose()  # type: ignore[attr-defined]
        await send({"type": "http.response.body", "body": b"", "more_body": False})
