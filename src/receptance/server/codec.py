"""States and whole sessions as the bytes of a state file, for whichever engine serves the model."""

from typing import Any

import numpy as np

from receptance.errors import CheckpointError
from receptance.native.state import floats, stored
from receptance.state_file import pack, unpack


def encode(state: Any, model: Any, **words: str) -> bytes:
    """The file that `state.save` writes, with more words in its metadata. state: of any engine, or None."""
    arrays = {} if state is None else {name: _array(x) for name, x in state.items()}
    return pack(stored(arrays), str(model.fingerprint), words)


def _array(x: Any) -> np.ndarray[Any, Any]:
    return x if isinstance(x, np.ndarray) else np.asarray(x.detach().float().cpu().numpy())


def decode(data: bytes, model: Any) -> Any:
    """The state in a file, for this very model; a mapping of float32 arrays [L, 1, …], or None if it holds none.

    Raises CheckpointError for anything else: damaged, of another model, of other shapes, not finite.
    """
    tensors = unpack(data, model.fingerprint)
    if not tensors:
        return None
    try:
        return checked({name: floats(x) for name, x in tensors.items()}, model)
    except ValueError as error:  # a shape that its bytes do not fill
        raise CheckpointError(f"not a readable state ({error})") from None


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
