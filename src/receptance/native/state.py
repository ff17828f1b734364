"""The recurrent state without torch: the same named tensors and the same file as `receptance.models.State`."""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save as serialise

from receptance.errors import CheckpointError
from receptance.native.arrays import Array, from_torch_or_numpy, to_float

if TYPE_CHECKING:
    from receptance.native.model import NativeModel

FILE_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


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
        path = Path(path)
        arrays = {name: np.ascontiguousarray(x) for name, x in self.items()}
        meta = {
            "receptance.kind": "state",
            "receptance.fingerprint": model.fingerprint,
            "receptance.crc32": json.dumps(
                {name: zlib.crc32(x.tobytes()) for name, x in arrays.items()}, sort_keys=True
            ),
        }
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file; give the name of a file to write")
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                file.write(serialise(arrays, meta))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error})") from None
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path, model: "NativeModel") -> "State":
        """Read a state that `save`, here or in the torch engine, wrote for this very model.

        Raises CheckpointError when the file is damaged, is no state, or belongs to another model.
        """
        path = Path(path)
        arrays = {}
        try:
            with safe_open(path, "np") as file:
                meta = file.metadata() or {}
            sums = json.loads(meta.get("receptance.crc32", "{}"))
            for name, entry in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
                if meta.get("receptance.kind") == "state" and sums.get(name) != zlib.crc32(entry["data"]):
                    raise CheckpointError(f"{path}: tensor {name} does not match its checksum; the file is damaged")
                if entry["dtype"] in FILE_TYPES:
                    stored = np.frombuffer(entry["data"], FILE_TYPES[entry["dtype"]])
                    arrays[name] = to_float(stored.reshape(entry["shape"]))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such state file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable state file ({error})") from None
        if meta.get("receptance.kind") != "state":
            raise CheckpointError(f"{path}: a safetensors file, but not a state saved by receptance")
        if (found := meta.get("receptance.fingerprint")) != model.fingerprint:
            raise CheckpointError(
                f"{path}: this state belongs to another model (its fingerprint is {found}, this model's is "
                f"{model.fingerprint}); load it with the model that wrote it"
            )
        state = State(arrays)
        model.check_state(state, str(path))
        return state
