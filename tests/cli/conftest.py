from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import receptance
from receptance.cli import build
from receptance.models import RWKV
from receptance.tokenizers import Tokenizer
from tiny_model import tiny, write


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: weights, config and tokenizer."""
    return write(tiny(seed=1), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape."""
    return write(tiny(seed=2), tmp_path_factory.mktemp("models") / "other")


@pytest.fixture(scope="session")
def model(folder: Path) -> RWKV:
    return receptance.load(folder)


@pytest.fixture(scope="session")
def tok(folder: Path) -> Tokenizer:
    return receptance.tokenizer(folder)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run a command line in this process, with a cache of its own: `cli("run", folder, "Once")`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(build(), [str(a) for a in arguments], input=stdin)

    return run
