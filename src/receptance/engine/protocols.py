"""What generating text asks of a model and its state, whichever engine they are of. Needs no torch."""

from pathlib import Path
from typing import Any, Protocol


class State(Protocol):
    """`receptance.models.State` or `receptance.native.State`."""

    @property
    def batch(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def clone(self) -> "State": ...
    def select(self, rows: list[int]) -> "State": ...
    def save(self, path: str | Path, model: Any) -> None: ...


class Model(Protocol):
    """`receptance.models.RWKV` or `receptance.native.NativeModel`; `engine` is "torch" or "native"."""

    config: Any
    engine: str

    def load_state(self, path: str | Path) -> Any: ...
    def check_state(self, state: Any, source: str = "state") -> None: ...
