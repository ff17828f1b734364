"""The recurrent state: everything a model remembers of its context, as a few named tensors of fixed size."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from receptance.errors import CheckpointError
from receptance.state_file import Stored, pack, read, write

if TYPE_CHECKING:
    from receptance.models.base import RWKV

FILE_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.long: "I64",
}


class State(Mapping[str, Tensor]):
    """Named tensors [L, B, …], one entry per layer and row of the batch.

    att_shift [L, B, C], ffn_shift [L, B, C]: the last input of each token shift.
    wkv [L, B, H, N, N], value × key, float32 (RWKV-5, 6, 7); RWKV-4 has num, den, exp [L, B, A] instead, where the true
    numerator is num·e^exp.
    Read like a dict (`state["wkv"]`). Nothing is changed in place: each method returns a new state.
    """

    def __init__(self, tensors: Mapping[str, object]):
        """tensors: or NumPy arrays, as in a state of the native engine."""
        self._tensors = {name: torch.as_tensor(x) for name, x in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    __eq__ = object.__eq__  # comparing tensors is the caller's: exactly, or within a tolerance
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {list(x.shape)}" for name, x in self.items())
        return f"State({parts}, {self.nbytes:,} bytes)"

    @property
    def batch(self) -> int:
        """Number of rows."""
        return next(iter(self.values())).shape[1]

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.values())

    def layer(self, index: int) -> dict[str, Tensor]:
        return {name: x[index] for name, x in self.items()}

    def _map(self, function: Callable[[Tensor], Tensor]) -> "State":
        return State({name: function(x) for name, x in self.items()})

    def clone(self) -> "State":
        return self._map(lambda x: x.clone())

    def detach(self) -> "State":
        """The same values outside the autograd graph (where truncated training cuts)."""
        return self._map(lambda x: x.detach())

    def to(self, device: torch.device | str) -> "State":
        return self._map(lambda x: x.to(device))

    def select(self, rows: int | list[int] | Tensor) -> "State":
        """Some rows of the batch, in the given order; one may be taken several times (a fork)."""
        index = torch.as_tensor([rows] if isinstance(rows, int) else rows, device=next(iter(self.values())).device)
        return self._map(lambda x: x[:, index])

    def put(self, rows: int | list[int] | Tensor, other: "State") -> "State":
        """This batch with `rows` replaced by the rows of `other`."""
        index = torch.as_tensor([rows] if isinstance(rows, int) else rows, device=self["att_shift"].device)
        if other.batch != len(index):
            raise ValueError(f"{len(index)} rows to replace, but the other state has {other.batch}")
        return State({name: x.index_copy(1, index, other[name].to(x)) for name, x in self.items()})

    @staticmethod
    def cat(states: "list[State]") -> "State":
        """One batch of all rows of several states."""
        return State({name: torch.cat([s[name] for s in states], 1) for name in states[0]})

    def save(self, path: str | Path, model: "RWKV") -> None:
        """Write a safetensors file that carries the model's fingerprint and checksums. Atomic: all or nothing."""
        tensors = {name: _stored(x) for name, x in self.items()}
        write(path, pack(tensors, model.fingerprint))

    @staticmethod
    def load(path: str | Path, model: "RWKV") -> "State":
        """Read a state that `save` wrote for this very model.

        Raises CheckpointError when the file is damaged, is no state, or belongs to another model.
        """
        if model.engine == "native":
            return model.load_state(path)
        tensors = read(path, model.fingerprint)
        state = State({name: _tensor(x) for name, x in tensors.items()})
        try:
            model.check_state(state, str(path))
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        return state.to(model.device)


def _stored(x: Tensor) -> Stored:
    data = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return Stored(FILE_TYPES[x.dtype], list(x.shape), data)


def _tensor(x: Stored) -> Tensor:
    (dtype,) = (dtype for dtype, name in FILE_TYPES.items() if name == x.dtype)
    return torch.frombuffer(bytearray(x.data), dtype=dtype).reshape(x.shape)
