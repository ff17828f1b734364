"""The models of a server, and how many texts they may be asked for at once."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from receptance.engine.engine import Engine
from receptance.engine.params import SamplingParams
from receptance.server.errors import ApiError, not_found
from receptance.tokenizers import ChatTemplate, Thinking, Tokenizer


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model that is loaded. states: tuned states by name; "" is the model's own start, None for zeros.

    sampling, completion_sampling: what a chat and a plain completion have where a request says nothing.
    decays: makes the log-decay of each layer's channels, or gives None where it cannot be told.
    """

    name: str
    engine: Engine
    template: ChatTemplate
    thinking: Thinking = "off"
    system: str | None = None
    new_document: bool = False
    sampling: SamplingParams = field(default_factory=SamplingParams)
    completion_sampling: SamplingParams = field(default_factory=SamplingParams)
    states: Mapping[str, Any] = field(default_factory=dict)
    decays: Callable[[], list[NDArray[np.float32]] | None] = lambda: None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def model(self) -> Any:
        return self.engine.model

    def start(self, name: str) -> Any:
        """The state of this name. Raises ApiError."""
        if name and name not in self.states:
            raise not_found("state", name, "state")
        return self.states.get(name)


class Models:
    """By name; the first is the one that is meant where a request names none."""

    def __init__(self, most_texts: int):
        self.most_texts = most_texts
        self.texts = 0  # that run or wait
        self.is_loaded = False
        self.is_draining = False
        self._models: dict[str, ServedModel] = {}

    def add(self, model: ServedModel) -> None:
        self._models[model.name] = model

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def __getitem__(self, name: str | None) -> ServedModel:
        self.check_open()
        if not name:
            return next(iter(self._models.values()))
        # Ollama's clients add a tag
        found = self._models.get(name) or self._models.get(name.removesuffix(":latest"))
        if found is None:
            raise ApiError(404, f"there is no model {name[:200]!r}; GET /v1/models lists them", code="model_not_found",
                           param="model")  # fmt: skip
        return found

    def check_open(self) -> None:
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if not self.is_loaded:
            raise ApiError(503, "the models are being loaded", code="loading", retry_after=2)

    def close(self) -> None:
        for model in self._models.values():
            model.engine.close()

    def admit(self, texts: int) -> "Place":
        """Room for so many texts, to be used as a context manager. Raises ApiError 429."""
        self.check_open()
        if self.texts + texts > self.most_texts:
            raise ApiError(
                429, f"the server is busy with {self.texts} texts; try again", code="rate_limit_exceeded", retry_after=1
            )
        self.texts += texts
        return Place(self, texts)


class Place:
    def __init__(self, models: Models, texts: int):
        self._models, self._texts = models, texts

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """May be called again."""
        self._models.texts -= self._texts
        self._texts = 0
