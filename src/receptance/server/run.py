"""From a configuration to a server that loads, listens, and ends without losing what is under way."""

import gc
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn

from receptance.server.app import Application
from receptance.server.config import ServerConfig
from receptance.server.hub import Hub, log
from receptance.server.protocol import protocol
from receptance.server.served import ServedModel

Loader = Callable[[], ServedModel]
USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    """A log line as a JSON object: time, level, event, and the fields it was given."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in USUAL},
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def set_up_logs(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("receptance.server", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.access").handlers = []  # it would log whole paths


def set_up_python() -> None:
    sys.setswitchinterval(0.0005)  # a thread that reads a long prompt must not make others wait 5 ms for each token
    gc.set_threshold(10_000, 10, 10)  # a body of a million lists would be looked through hundreds of times


class Server(uvicorn.Server):
    """After SIGTERM or SIGINT: no new requests (503), those under way end in `drain_seconds`; then the sockets close.

    A second signal ends at once.
    """

    def __init__(self, config: uvicorn.Config, app: Application):
        super().__init__(config)
        self._app = app
        self.failed = False

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._app.hub.models.is_draining:
            self.should_exit = self.force_exit = True
            return
        self._app.hub.models.is_draining = True
        log.info("draining", extra={"requests": self._app.active})
        self._until = time.monotonic() + self._app.config.limits.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if self._app.hub.models.is_draining and (self._app.active == 0 or time.monotonic() > self._until):
            self.should_exit = True
        return bool(await super().on_tick(counter))


def load_all(hub: Hub, loaders: Sequence[Loader], failed: Callable[[], None]) -> None:
    """In a thread: load the models one after the other, then open."""
    for load in loaders:
        try:
            model = load()
        except Exception as error:
            log.error("a model cannot be loaded", extra={"error": str(error)})
            failed()
            return
        hub.models.add(model)
        log.info("loaded", extra={"model": model.name})
    hub.models.is_loaded = True
    log.info("ready")


def serve(config: ServerConfig, loaders: Sequence[Loader]) -> int:
    """Listen until told to end. Returns the exit code. Raises ConfigError."""
    set_up_logs(config.log.level)
    set_up_python()
    server: Server

    def failed() -> None:
        server.failed = True
        server.should_exit = True

    def on_start(hub: Hub) -> None:
        threading.Thread(target=load_all, args=(hub, loaders, failed), name="receptance-loader", daemon=True).start()

    app = Application(config, on_start=on_start)
    listen = config.listen
    server = Server(
        uvicorn.Config(
            app,
            http=protocol(config.limits.header_seconds),
            host=listen.host,
            port=listen.port,
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,  # after our own draining
            backlog=4096,
        ),
        app,
    )
    log.info("listening", extra={"host": listen.host, "port": listen.port, "keys": config.auth.keys is not None})
    server.run()
    return 1 if server.failed or not server.started else 0
