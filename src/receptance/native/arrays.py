"""Weights as NumPy arrays. NumPy has no bfloat16: here an array of uint16 always means its bits."""

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from receptance.native.blocks import Blocks

Array = NDArray[np.float32]
Weight = NDArray[np.generic] | Blocks  # float64, float32, float16, or uint16 for bfloat16; or blocks
Weights = Mapping[str, Weight]


def to_float(x: Weight) -> Array:
    """Exactly these numbers (of float64: the nearest) as float32, without a copy where they are that already."""
    if isinstance(x, Blocks):
        return x.to_float()
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(x, dtype=np.float32)


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """Memory for the core, on a 64-byte boundary."""
    raw = np.empty(nbytes + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def from_torch_or_numpy(x: object) -> Array:
    """An entry of anybody's state: a NumPy array, or a torch tensor of any float type on any device."""
    if isinstance(x, np.ndarray):
        return to_float(x)
    return np.asarray(x.detach().float().cpu().numpy(), dtype=np.float32)  # type: ignore[attr-defined]


def fingerprint(version: str, weights: Weights) -> str:
    """That of `receptance.models.fingerprint`: states are bound to it."""
    digest = hashlib.sha256(f"rwkv-{version}".encode())
    for name in sorted(weights.keys() - {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}):
        x = weights[name]
        digest.update(f"\n{name} {list(x.shape)} ".encode())
        start = x.rows(0, -(-256 // x.shape[1])) if isinstance(x, Blocks) else x.reshape(-1)[:256]
        digest.update(to_float(start).reshape(-1)[:256].astype("<f4").tobytes())
    return digest.hexdigest()[:32]
