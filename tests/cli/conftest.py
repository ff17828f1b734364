from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import receptance
from receptance.cli import build
from receptance.models import RWKV, RWKV7
from receptance.tokenizers import Tokenizer, tokenizer


def tiny(seed: int) -> RWKV7:
    """A random model that writes bytes, with all the variety that a seed can show."""
    generator = torch.Generator().manual_seed(seed)
    model = RWKV7(RWKV7.Config.make(257, n_layer=2, n_embd=32, head_size=16))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.dim() < 2 else 0.5))
        model.head.weight *= 0.3
        # one channel is always 1 and speaks against all but printable ASCII, so that text and bytes are the same thing
        model.ln_out.weight[0], model.ln_out.bias[0] = 0.0, 1.0
        model.head.weight[:, 0] = -100.0
        model.head.weight[ord(" ") + 1 : ord("~") + 2, 0] = 0.0
    return model.eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: weights, config and tokenizer."""
    return write(tiny(seed=1), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape."""
    return write(tiny(seed=2), tmp_path_factory.mktemp("models") / "other")


def write(model: RWKV7, path: Path) -> Path:
    receptance.save(model, path, "folder")
    tokenizer("byte").save(path)
    return path


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
