"""What a state holds, in figures: how large each layer's memory is, how it moved, how long it lasts."""

import asyncio
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from receptance.server.served import ServedModel

Floats = NDArray[np.float32]
MEMORY = ("wkv", "num")  # of RWKV-5, 6, 7 and of RWKV-4


async def state_report(now: Any, before: Any, is_first: bool, model: ServedModel) -> dict[str, Any]:
    """before: the state one turn earlier; None: zeros if `is_first`, else unknown."""
    return await asyncio.to_thread(_report, now, before, is_first, model)


def _report(now: Any, before: Any, is_first: bool, model: ServedModel) -> dict[str, Any]:
    fields = {name: _array(x) for name, x in now.items()}
    memory = fields[next(name for name in MEMORY if name in fields)]  # [L, 1, …]
    earlier = None if before is None else _array(before[next(name for name in MEMORY if name in fields)])
    if before is None and is_first:
        earlier = np.zeros_like(memory)
    lives = _half_lives(model)
    layers = []
    for layer, x in enumerate(memory):
        layers.append(
            {
                "layer": layer,
                "norm": _norm(x),
                "change": None if earlier is None else _norm(x - earlier[layer]),
                "half_life": lives[layer] if lives and layer < len(lives) else None,
            }
        )
    changed = None
    if earlier is not None:
        scale = _norm(memory) * _norm(earlier)
        cosine = float(np.vdot(memory.astype(np.float64), earlier.astype(np.float64))) / scale if scale else 0.0
        changed = {"norm": _norm(memory - earlier), "cosine": cosine}
    return {
        "object": "state",
        "fields": [{"name": name, "shape": list(x.shape), "bytes": x.nbytes} for name, x in fields.items()],
        "layers": layers,
        "changed": changed,
    }


def _array(x: Any) -> Floats:
    if not isinstance(x, np.ndarray):
        x = x.detach().float().cpu().numpy()
    return np.asarray(x, np.float32)


def _norm(x: Floats) -> float:
    return float(np.sqrt(np.square(x.astype(np.float64)).sum()))


@lru_cache(maxsize=64)
def _half_lives(model: ServedModel) -> list[dict[str, float | None]] | None:
    """Tokens after which half is left, over the channels of each layer, where the input says nothing else."""
    decays = model.decays()
    if decays is None:
        return None
    rows: list[dict[str, float | None]] = []
    for log_decay in decays:
        with np.errstate(divide="ignore"):
            lives = np.log(0.5) / np.minimum(log_decay.astype(np.float64), 0)
        values = np.percentile(lives, [50, 10, 90], method="nearest")
        rows.append({name: float(x) if np.isfinite(x) else None for name, x in zip(("median", "p10", "p90"), values)})
    return rows
