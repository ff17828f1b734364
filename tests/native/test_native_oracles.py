"""Every version, compiled and in NumPy, against independent references; in one piece, by token and split."""

from pathlib import Path

import numpy as np
import pytest
from native_helpers import engines
from safetensors import deserialize

from receptance.native import NativeModel, State, read_config, tensor_shapes
from receptance.native.arrays import Array, Weights

MODELS = {"v4_dev": "4", "v50_dev": "5.0", "v51_dev": "5.1", "v52_dev": "5.2", "v6_dev": "6", "v7_dev": "7"}
TYPES = {"F64": "<f8", "F32": "<f4", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
TOLERANCE = 2e-4  # logits of size 1 to 5; float32, with which AVX-512 and AMX round no inputs
STATE_TOLERANCE = 1e-3  # of the largest value, at least 1


def read(path: Path) -> Weights:
    return {
        name: np.frombuffer(entry["data"], TYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in deserialize(path.read_bytes())
    }


def reference_state(outputs: Weights, index: int, version: str, n_layer: int) -> dict[str, Array]:
    """The reference's flat list, as our named arrays with B = 1."""
    per = 5 if version == "4" else 3
    parts = [outputs[f"state_f64_{index}.{j}"] for j in range(n_layer * per)]
    field = lambda j: np.stack(parts[j::per])[:, None]
    if version == "4":
        scale = np.exp(field(3))
        return {"att_shift": field(0), "num": field(1) * scale, "den": field(2) * scale, "ffn_shift": field(4)}
    wkv = field(1) if version == "7" else field(1).swapaxes(-1, -2)
    return {"att_shift": field(0), "wkv": wkv, "ffn_shift": field(2)}


def comparable(state: State) -> dict[str, Array]:
    fields = dict(state)
    if "exp" in fields:
        scale = np.exp(fields.pop("exp"))
        fields["num"], fields["den"] = fields["num"] * scale, fields["den"] * scale
    return fields


def pieces(t: int) -> dict[str, list[int]]:
    split, left = [], t
    for size in [1, 3, 16, 5, 2, 9, 4]:
        if left:
            split.append(min(size, left))
            left -= split[-1]
    return {"whole": [t], "by token": [1] * t, "split": split}


@pytest.mark.parametrize("engine", engines())
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_states_match(shared, name, engine):
    folder, version = shared / "oracles" / name, MODELS[name]
    weights, outputs = read(folder / "weights.safetensors"), read(folder / "outputs.safetensors")
    shapes = {key: x.shape for key, x in weights.items()}
    config = read_config(version, shapes)
    assert tensor_shapes(config) == shapes
    model = NativeModel(weights, config, "", dtype="float32", engine_name=engine, threads=2)
    for index in range(3):
        tokens, expected = outputs[f"tokens_{index}"], outputs[f"logits_f64_{index}"]
        final = reference_state(outputs, index, version, config.n_layer)
        for sizes in pieces(len(tokens)).values():
            state, logits = None, []
            for piece in np.split(tokens, np.cumsum(sizes)[:-1]):
                out, state = model.forward(piece, state)
                logits.append(out)
            assert np.abs(np.concatenate(logits) - expected).max() <= TOLERANCE
            for key, value in comparable(state).items():
                scale = max(np.abs(final[key]).max(), 1)
                assert np.abs(value - final[key]).max() <= STATE_TOLERANCE * scale, key
