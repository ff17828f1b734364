"""The application: routes, and what surrounds them."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import receptance
from receptance.server import basics, chat, completions, http, ollama, responses, session_routes
from receptance.server.config import DEFAULT_CONFIG_FOLDER, ServerConfig
from receptance.server.conversations import Conversations
from receptance.server.errors import ApiError, failed, first_fault
from receptance.server.hub import Hub
from receptance.server.keys import Keys, read_keys
from receptance.server.metrics import Metrics
from receptance.server.middleware import Guard
from receptance.server.page import page_routes
from receptance.server.served import Models, ServedModel
from receptance.server.store import Store


def open_store(config: ServerConfig) -> Store:
    """Raises ConfigError where sessions cannot be kept."""
    sessions = config.sessions
    if sessions.redis is not None:
        from receptance.server.redis_store import RedisStore

        return RedisStore(sessions.redis, sessions.state_bytes, sessions.sessions, sessions.responses)
    from receptance.server.sqlite_store import SqliteStore

    folder = Path(sessions.folder) if sessions.folder else DEFAULT_CONFIG_FOLDER / "sessions"
    return SqliteStore(folder, sessions.state_bytes, sessions.sessions, sessions.responses)


class Application(Guard):
    """An ASGI application. models: those that are loaded already; more may be added to `hub.models`.

    `hub.models.is_loaded` says that all are there. Raises ConfigError for keys or a store that cannot be read.
    """

    def __init__(
        self,
        config: ServerConfig,
        models: Sequence[ServedModel] = (),
        *,
        store: Store | None = None,
        on_start: Callable[[Hub], Any] | None = None,
    ):
        keys: Keys | None = read_keys(Path(config.auth.keys)) if config.auth.keys else None
        served = Models(config.limits.texts)
        for model in models:
            served.add(model)
        served.is_loaded = bool(models)
        metrics = Metrics(served)
        kept = Conversations(store or open_store(config), config.sessions.memory_bytes, served)
        self.hub = Hub(config, served, metrics, kept)

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            if on_start is not None:
                on_start(self.hub)
            yield
            self.hub.models.close()
            self.hub.conversations.close()

        app = FastAPI(
            title="receptance",
            version=receptance.__version__,
            lifespan=lifespan,
            docs_url=None,  # its page loads scripts from elsewhere
            redoc_url=None,
            openapi_url="/openapi.json",
            redirect_slashes=False,
            responses={"4XX": FAILURE, "5XX": FAILURE},  # what else FastAPI would tell is a 422 that nobody gets
        )
        for router in (
            basics.routes(self.hub, receptance.__version__),
            chat.routes(self.hub),
            completions.routes(self.hub),
            responses.routes(self.hub),
            session_routes.routes(self.hub),
            ollama.routes(self.hub, receptance.__version__),
        ):
            app.include_router(router)
        page = page_routes() if config.listen.page else []
        app.router.routes.extend(page)
        app.add_exception_handler(ApiError, _api_error)
        app.add_exception_handler(RequestValidationError, _invalid)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, _failed)
        self.fastapi = app
        super().__init__(app, config, keys, metrics, frozenset(route.path for route in page))


FAILURE = {
    "description": "OpenAI's error object",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "code", "param"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "code": {"type": ["string", "null"]},
                            "param": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return http.failure(error)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    where, message = first_fault(error.errors())
    return http.failure(ApiError(400, message[:500], code="invalid_value", param=where[:200] or None))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    failed = http.failure(ApiError(error.status_code, str(error.detail)[:500]))
    failed.headers.update(headers)
    return failed


async def _failed(_: Request, error: Exception) -> Response:
    """The error itself goes on to the log."""
    return http.failure(failed())
