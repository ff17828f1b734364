"""What is decided about a request before any route sees it: who asks, from where, how much, and what is logged."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from receptance.server import http
from receptance.server.config import ServerConfig, is_loopback
from receptance.server.errors import ApiError, failed
from receptance.server.hub import log
from receptance.server.keys import Keys
from receptance.server.metrics import Metrics
from receptance.server.names import new_id

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
IMPORT = "/v1/sessions/import"


class Guard:
    """Wraps the app. open_paths: files of the page, which need no key."""

    def __init__(self, app: App, config: ServerConfig, keys: Keys | None, metrics: Metrics, open_paths: frozenset[str]):
        self.app, self.config, self.keys, self.metrics = app, config, keys, metrics
        self.open_paths = OPEN_PATHS | open_paths
        self.active = 0  # requests under way; the server's end waits for them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} connections are served")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else new_id("req")
        began, status = time.perf_counter(), 0
        scope.setdefault("state", {})["request_id"] = request_id
        origin = self._allowed_origin(headers)

        async def tell(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                if origin is not None:
                    more += [(b"access-control-allow-origin", origin.encode()), (b"vary", b"Origin")]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        self.active += 1
        self.metrics.connections.inc()
        try:
            try:
                limited = self._check(scope, headers, receive)
            except ApiError as error:
                await http.failure(error)(scope, receive, tell)
                return
            if scope["method"] == "OPTIONS" and origin is not None:
                await self._preflight(scope, receive, tell)
                return
            await self.app(scope, limited, tell)
        except Exception as error:
            log.exception("a request failed", extra={"request_id": request_id, "error": type(error).__name__})
            if not status:
                await http.failure(failed())(scope, receive, tell)
        finally:
            self.active -= 1
            self.metrics.connections.dec()
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.http.labels(method, str(status)).inc()
            route = scope.get("route")
            log.info(
                "request",
                extra={
                    "request_id": request_id,
                    "method": method,
                    "route": getattr(route, "path", None),  # never the path itself: it may hold anything
                    "status": status,
                    "seconds": round(time.perf_counter() - began, 4),
                    "key": scope["state"].get("owner", ""),
                },
            )

    # Checks -----------------------------------------------------------------------------------------------------------

    def _check(self, scope: Scope, headers: dict[str, str], receive: Receive) -> Receive:
        """Raises ApiError; else gives the request's body, bounded."""
        path = scope["path"]
        self._check_host(headers)
        self._check_origin(scope, headers)
        is_open = path in self.open_paths or (
            scope["method"] == "OPTIONS" and self._allowed_origin(headers) is not None
        )
        if self.keys is not None and not is_open:
            scope["state"]["owner"] = self._owner(headers)
        limits = self.config.limits
        if self.active > limits.requests and path not in OPEN_PATHS:
            raise ApiError(503, "too many requests are under way", code="overloaded", retry_after=1)
        most = limits.import_bytes if path == IMPORT else limits.body_bytes
        length = headers.get("content-length", "0")
        if not length.isdigit() or len(length) > 18 or int(length) > most:
            raise too_large(most)
        return bounded(receive, most, limits.body_seconds)

    def _owner(self, headers: dict[str, str]) -> str:
        assert self.keys is not None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        owner = self.keys.owner(key.strip())
        if owner is None:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return owner

    def _check_host(self, headers: dict[str, str]) -> None:
        """A web page whose name was made to mean this machine must not reach a server without keys (DNS rebinding)."""
        listen = self.config.listen
        if self.keys is not None or not is_loopback(listen.host):
            return
        name = re.sub(r":\d+$", "", headers.get("host", "localhost")).lower()
        if name not in LOCAL_NAMES and name not in listen.hosts:
            raise ApiError(403, "this name is not the server's; see listen.hosts", code="wrong_host")

    def _check_origin(self, scope: Scope, headers: dict[str, str]) -> None:
        """Another web page may not make the browser of somebody here send requests."""
        origin = headers.get("origin")
        if origin is None or scope["method"] in ("GET", "HEAD") or self._allowed_origin(headers) is not None:
            return
        if re.sub(r"^https?://", "", origin) != headers.get("host"):
            raise ApiError(
                403, "requests from other web pages are not allowed; see listen.origins", code="wrong_origin"
            )

    def _allowed_origin(self, headers: dict[str, str]) -> str | None:
        origin = headers.get("origin")
        return origin if origin in self.config.listen.origins else None

    async def _preflight(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = {
            "Access-Control-Allow-Methods": "GET, POST, PATCH, DELETE",
            "Access-Control-Allow-Headers": "authorization, content-type, x-api-key, x-request-id",
            "Access-Control-Max-Age": "600",
        }
        await http.answer({}, 200, allowed)(scope, receive, send)


METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "DELETE", "OPTIONS", "PUT"})


def too_large(most: int) -> ApiError:
    return ApiError(413, f"the request's body is larger than {most:,} bytes", code="request_too_large")


def bounded(receive: Receive, most: int, seconds: float) -> Receive:
    """`receive` that raises ApiError for a body that is too long or takes too long."""
    read, is_whole = 0, False
    deadline = asyncio.get_running_loop().time() + seconds

    async def take() -> Any:
        nonlocal read, is_whole
        if is_whole:
            return await receive()  # waits for the client to leave
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"the request's body did not come within {seconds:g} s", code="timeout") from None
        if message["type"] == "http.request":
            read += len(message.get("body", b""))
            if read > most:
                raise too_large(most)
            is_whole = not message.get("more_body", False)
        return message

    return take
