"""The recurrent state: everything a model remembers of its context, as a few named tensors of fixed size."""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from receptance.errors import CheckpointError

if TYPE_CHECKING:
    from receptance.models.base import RWKV


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
        path = Path(path)
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.items()}
        sums = {name: _crc(x) for name, x in tensors.items()}
        meta = {
            "receptance.kind": "state",
            "receptance.fingerprint": model.fingerprint,
            "receptance.crc32": json.dumps(sums, sort_keys=True),
        }
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file; give the name of a file to write")
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                file.write(serialise(tensors, meta))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error})") from None
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path, model: "RWKV") -> "State":
        """Read a state that `save` wrote for this very model.

        Raises CheckpointError when the file is damaged, is no state, or belongs to another model.
        """
        if model.engine == "native":
            return model.load_state(path)
        path = Path(path)
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            sums = json.loads(meta.get("receptance.crc32", "{}"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such state file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable state file ({error})") from None
        if meta.get("receptance.kind") != "state":
            raise CheckpointError(f"{path}: a safetensors file, but not a state saved by receptance")
        for name, x in tensors.items():
            if sums.get(name) != _crc(x):
                raise CheckpointError(f"{path}: tensor {name} does not match its checksum; the file is damaged")
        if meta.get("receptance.fingerprint") != model.fingerprint:
            found = meta.get("receptance.fingerprint")
            raise CheckpointError(
                f"{path}: this state belongs to another model (its fingerprint is {found}, this model's is "
                f"{model.fingerprint}); load it with the model that wrote it"
            )
        state = State(tensors)
        model.check_state(state, str(path))
        return state.to(model.device)


def _crc(x: Tensor) -> int:
    return zlib.crc32(x.contiguous().view(torch.uint8).numpy().tobytes())
