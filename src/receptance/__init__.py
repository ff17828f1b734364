"""receptance: RWKV-4, 5, 6 and 7 — train, run, serve, evaluate and look inside.

The names below are loaded on first use, so that `import receptance` stays quick and never imports torch by itself.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import load, save
    from .engine.engine import Engine
    from .engine.request import Grammar, Request
    from .generation import SamplingParams, generate
    from .models import State
    from .tokenizers import tokenizer

__version__ = "0.1.0"

_HOME = {
    "Engine": "engine.engine",
    "Grammar": "engine.request",
    "Request": "engine.request",
    "load": "checkpoint",
    "save": "checkpoint",
    "tokenizer": "tokenizers",
    "generate": "generation",
    "SamplingParams": "generation",
    "State": "models",
}

__all__ = [
    "Engine",
    "Grammar",
    "Request",
    "SamplingParams",
    "State",
    "__version__",
    "generate",
    "load",
    "save",
    "tokenizer",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        home = _HOME[name]
        if name == "State" and find_spec("torch") is None:  # then the native engine is the only one
            home = "native"
        return getattr(import_module(f"receptance.{home}"), name)
    raise AttributeError(f"module 'receptance' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
