from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from server_helpers import Running, listening

from receptance.cli.model_source import find_model
from receptance.cli.serve import load
from receptance.server.config import ServedConfig, ServerConfig, read_config
from receptance.server.served import ServedModel

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
