"""What gemv.cuh and those who launch it share, and matrices as it reads them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NONE, TANH, SIGMOID, RELU_SQUARE = range(4)  # Activation
WRITE, ADD, LOGITS, GATED = range(4)  # gemv::Mode
WARPS, DEPTH = 16, 4  # of a block; steps of a ring

Weights = Literal["full", "int8", "float8"]  # of a step of few rows
LARGEST_FLOAT8 = 448.0


def ring_bytes(depth: int, row_tiles: int = 1) -> int:
    return WARPS * depth * row_tiles * 1024


def sums_bytes(batch_tiles: int, row_tiles: int = 1) -> int:
    return WARPS * row_tiles * 16 * (8 * batch_tiles + 1) * 4


@dataclass(frozen=True)
class Matrix:
    """full [rows, columns], of the model's type; the same in 8 bits, or None: numbers uint8, scales float32 [rows]."""

    full: Tensor
    numbers: Tensor | None = None
    scales: Tensor | None = None

    @staticmethod
    def of(full: Tensor, weights: Weights) -> "Matrix":
        if weights == "full":
            return Matrix(full)
        return Matrix(full, *(quantised(full) if weights == "int8" else quantised_float8(full)))


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in bytes that are 128 too large, and each row's scale, float32."""
    x = weight.float()
    scales = x.abs().amax(1) / 127
    q = (x / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
    return (q + 128).to(torch.uint8), scales


def quantised_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in bytes of type e4m3, and each row's scale, float32, for numbers that are 1/256 of them."""
    x = weight.float()
    scales = x.abs().amax(1) / LARGEST_FLOAT8
    q = (x / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8)
    return q.to(torch.float8_e4m3fn).view(torch.uint8), scales * 256
