"""States and whole sessions as bytes: safetensors files, checked before anything of them is used."""

import json
import zlib
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as serialise

from receptance.errors import CheckpointError

TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
MAX_HEADER = 64 << 20


def encode(state: Any, model: Any, **extra: str) -> bytes:
    """The file that `state.save` writes, with more words in its metadata. state: of any engine, or None."""
    arrays = {} if state is None else {name: _array(x) for name, x in state.items()}
    sums = {name: zlib.crc32(x.tobytes()) for name, x in arrays.items()}
    meta = {
        "receptance.kind": "state",
        "receptance.fingerprint": str(model.fingerprint),
        "receptance.crc32": json.dumps(sums, sort_keys=True),
    }
    for name, text in extra.items():
        meta |= {f"receptance.{name}": text, f"receptance.{name}.crc32": str(zlib.crc32(text.encode()))}
    return serialise(arrays, meta)


def word(meta: dict[str, str], name: str) -> str | None:
    """A word that `encode` was given, or None. Raises CheckpointError if it is not what was written."""
    text = meta.get(f"receptance.{name}")
    if text is not None and meta.get(f"receptance.{name}.crc32") != str(zlib.crc32(text.encode("utf-8", "replace"))):
        raise CheckpointError(f"its {name} does not match its checksum; the file is damaged")
    return text


def _array(x: Any) -> np.ndarray[Any, Any]:
    if not isinstance(x, np.ndarray):  # a tensor; bfloat16 is unknown to NumPy
        x = x.detach().float().cpu().numpy()
    return np.ascontiguousarray(x)


def metadata(data: bytes) -> dict[str, str]:
    """The words in a file's header. Raises CheckpointError for what is no safetensors file."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, MAX_HEADER):
        raise CheckpointError("not a safetensors file")
    try:
        meta = json.loads(data[8 : 8 + size])["__metadata__"]
        if not all(isinstance(x, str) for x in meta.values()):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CheckpointError("a file without the metadata of a state") from None
    return cast("dict[str, str]", meta)


def decode(data: bytes, model: Any) -> Any:
    """The state in a file, for this very model; a mapping of float32 arrays [L, 1, …], or None if it holds none.

    Raises CheckpointError for anything else: damaged, of another model, of other shapes, not finite.
    """
    meta = metadata(data)
    if meta.get("receptance.kind") != "state":
        raise CheckpointError("a safetensors file, but not a state")
    if meta.get("receptance.fingerprint") != model.fingerprint:
        raise CheckpointError("this state belongs to another model")
    arrays = {}
    try:
        sums = json.loads(meta.get("receptance.crc32", "{}"))
        for name, entry in deserialize(data):  # type: ignore[no-untyped-call]
            if sums.get(name) != zlib.crc32(entry["data"]):
                raise CheckpointError(f"tensor {name} does not match its checksum; the file is damaged")
            stored = np.frombuffer(entry["data"], TYPES[entry["dtype"]])
            arrays[name] = stored.reshape(entry["shape"]).astype(np.float32)
    except (SafetensorError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"not a readable state ({type(error).__name__})") from None
    if not arrays:
        return None
    return checked(arrays, model)


def checked(arrays: dict[str, np.ndarray[Any, Any]], model: Any) -> Any:
    if model.engine == "native":
        from receptance.native import State
    else:
        from receptance.models import State  # type: ignore[assignment]
    if "att_shift" not in arrays or arrays["att_shift"].ndim < 2 or arrays["att_shift"].shape[1] != 1:
        raise CheckpointError("a state that is not of one conversation")
    if not all(np.isfinite(x).all() for x in arrays.values()):
        raise CheckpointError("a state with values that are not numbers")
    state = State(arrays)
    try:
        model.check_state(state)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return state
