"""The recurrent state without torch: the same named tensors and the same file as `receptance.models.State`."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from receptance.errors import CheckpointError
from receptance.native.arrays import Array, from_torch_or_numpy, to_float
from receptance.state_file import Stored, pack, read, write

if TYPE_CHECKING:
    from receptance.native.model import NativeModel

FILE_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}


class State(Mapping[str, Array]):
    """Named float32 arrays [L, B, …]; `receptance.models.State` says which. Nothing is changed in place.

    Made of any mapping with these names: a state of the torch engine too, whose tensors are copied where they must be.
    """

    def __init__(self, arrays: Mapping[str, object]):
        self._arrays = {name: from_torch_or_numpy(x) for name, x in arrays.items()}

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    __eq__ = object.__eq__  # comparing arrays is the caller's: exactly, or within a tolerance
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {list(x.shape)}" for name, x in self.items())
        return f"State({parts}, {self.nbytes:,} bytes)"

    @property
    def batch(self) -> int:
        """Number of rows."""
        return int(self["att_shift"].shape[1])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.values())

    def layer(self, index: int) -> dict[str, Array]:
        return {name: x[index] for name, x in self.items()}

    def _map(self, function: Callable[[Array], Array]) -> "State":
        return State({name: function(x) for name, x in self.items()})

    def clone(self) -> "State":
        return self._map(lambda x: x.copy())

    def select(self, rows: int | list[int]) -> "State":
        """Some rows of the batch, in the given order; one may be taken several times (a fork)."""
        index = [rows] if isinstance(rows, int) else rows
        if index == [0] and self.batch == 1:  # the only row of a state that nobody changes
            return self
        return self._map(lambda x: x[:, index])

    def put(self, rows: int | list[int], other: "State") -> "State":
        """This batch with `rows` replaced by the rows of `other`."""
        index = [rows] if isinstance(rows, int) else rows
        if other.batch != len(index):
            raise ValueError(f"{len(index)} rows to replace, but the other state has {other.batch}")
        replaced = self.clone()
        for name, x in replaced.items():
            x[:, index] = other[name]
        return replaced

    @staticmethod
    def cat(states: "list[State]") -> "State":
        """One batch of all rows of several states."""
        return State({name: np.concatenate([s[name] for s in states], 1) for name in states[0]})

    def save(self, path: str | Path, model: "NativeModel") -> None:
        """Write a safetensors file that carries the model's fingerprint and checksums. Atomic: all or nothing."""
        write(path, pack(stored(self), model.fingerprint))

    @staticmethod
    def load(path: str | Path, model: "NativeModel") -> "State":
        """Read a state that `save`, here or in the torch engine, wrote for this very model.

        Raises CheckpointError when the file is damaged, is no state, or belongs to another model.
        """
        tensors = read(path, model.fingerprint)
        state = State({name: floats(x) for name, x in tensors.items()})
        try:
            model.check_state(state, str(path))
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        return state


def stored(state: Mapping[str, Array]) -> dict[str, Stored]:
    return {name: Stored("F32", list(x.shape), x.astype("<f4").tobytes()) for name, x in state.items()}


def floats(x: Stored) -> Array:
    return to_float(np.frombuffer(x.data, FILE_TYPES[x.dtype]).reshape(x.shape))
