"""Quantised matrices in the block formats of GGUF files, and what their bytes stand for.

A row is a sequence of blocks of 32 (Q8_0, Q4_0) or 256 (Q4_K, Q5_K, Q6_K) numbers. The core reads the rows where they
lie, in a mapped file; `Blocks.to_float` is the definition in NumPy: what judges the core, and what runs without it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

FORMATS = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}
"""Name → numbers of a block, bytes of a block."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix [rows, cols] of one of FORMATS. `data`: its bytes, contiguous uint8 of any shape, mapped or not.

    Raises ValueError when the format is unknown, the rows do not divide into blocks, or the number of bytes is wrong.
    """

    format: str
    shape: tuple[int, int]
    data: Bytes

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is not one of {', '.join(FORMATS)}")
        numbers, size = FORMATS[self.format]
        rows, cols = self.shape
        if cols % numbers:
            raise ValueError(f"rows of {cols} numbers do not divide into {self.format} blocks of {numbers}")
        if self.data.dtype != np.uint8 or not self.data.flags.c_contiguous or self.data.size != self.nbytes:
            raise ValueError(
                f"a {self.format} matrix {rows} × {cols} is {rows * cols // numbers * size} contiguous bytes, "
                f"found {self.data.size} of {self.data.dtype}"
            )

    @property
    def nbytes(self) -> int:
        numbers, size = FORMATS[self.format]
        return self.shape[0] * self.shape[1] // numbers * size

    def rows(self, first: int, last: int) -> "Blocks":
        """Some rows, in place."""
        part = self.data.reshape(self.shape[0], -1)[first:last]
        return Blocks(self.format, (len(part), self.shape[1]), part)

    def to_float(self) -> Array:
        """All numbers, [rows, cols]: exactly what they stand for, each product and sum rounded to float32."""
        blocks = self.data.reshape(-1, FORMATS[self.format][1])
        return DECODERS[self.format](blocks).reshape(self.shape)


def half(x: Bytes) -> Array:
    """Two bytes each → [blocks, 1]."""
    return np.ascontiguousarray(x).view("<f2").astype(np.float32)


def nibbles(x: Bytes) -> Bytes:
    """[…, n] → […, 2 n]: all low halves, then all high ones."""
    return np.concatenate([x & 15, x >> 4], -1)


def decode_q8_0(x: Bytes) -> Array:
    """Scale; 32 signed bytes."""
    return np.asarray(half(x[:, :2]) * x[:, 2:].view(np.int8), np.float32)


def decode_q4_0(x: Bytes) -> Array:
    """Scale; 16 bytes whose low halves are numbers 0–15, less 8."""
    return np.asarray(half(x[:, :2]) * (nibbles(x[:, 2:]).astype(np.int8) - 8), np.float32)


def scales_and_minima(x: Bytes) -> tuple[Array, Array]:
    """The 12 bytes of Q4_K and Q5_K that hold 8 scales and 8 minima of 6 bits → each [blocks, 8, 1]."""
    low, middle, high = x[:, :4], x[:, 4:8], x[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], -1)
    minima = np.concatenate([middle & 63, high >> 4 | (middle >> 6) << 4], -1)
    return scales.astype(np.float32)[:, :, None], minima.astype(np.float32)[:, :, None]


def with_minima(x: Bytes, numbers: Bytes) -> Array:
    """Scale of the scales, scale of the minima, 12 bytes of both; numbers [blocks, 8, 32]."""
    scales, minima = scales_and_minima(x[:, 4:16])
    d, least = half(x[:, :2])[:, :, None], half(x[:, 2:4])[:, :, None]
    return np.asarray(d * scales * numbers - least * minima, np.float32)


def decode_q4_k(x: Bytes) -> Array:
    """Four times 32 bytes: the low halves are 32 numbers, the high halves the next 32."""
    return with_minima(x, nibbles(x[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def decode_q5_k(x: Bytes) -> Array:
    """As Q4_K, with 32 bytes before them: bit i of byte j is the fifth bit of number j of part i."""
    fifth = (x[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # [blocks, 8, 32]
    numbers = nibbles(x[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth << 4
    return with_minima(x, numbers.astype(np.uint8))


def decode_q6_k(x: Bytes) -> Array:
    """128 bytes with low halves, 64 with 2 bits more, 16 scales, scale. Each half of the block has half of each:

    64 bytes whose low halves are the first 64 numbers, and 32 bytes with the upper bits of numbers j, j + 32, …
    """
    low = nibbles(x[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = (x[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)) & 3
    numbers = (low | high << 4).astype(np.int8) - 32
    scales = x[:, 192:208].view(np.int8).astype(np.float32).reshape(-1, 16, 1)
    return np.asarray(half(x[:, 208:])[:, :, None] * scales * numbers.reshape(-1, 16, 16), np.float32)


DECODERS: dict[str, Callable[[Bytes], Array]] = {
    "Q8_0": decode_q8_0,
    "Q4_0": decode_q4_0,
    "Q4_K": decode_q4_k,
    "Q5_K": decode_q5_k,
    "Q6_K": decode_q6_k,
}
