"""First matrices of low-rank maps of a token-shifted input."""

from collections.abc import Sequence

import torch
from torch import Tensor

from receptance.ops.pieces import uses_triton
from receptance.ops.shift import token_shift

ACTIVATIONS = ("none", "tanh", "sigmoid")


def shifted_maps(
    x: Tensor,
    last: Tensor,
    mixes: Sequence[Tensor],
    maps: Sequence[Tensor],
    activations: Sequence[str],
    *,
    resets: Tensor | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """f((x + (previous − x)·μ) W) for each μ of `mixes`, W [C, R] of `maps` and f of `activations`: [B, T, R] each.

    x [B, T, C]; last, resets: as in `shift_mix`. The kernels, for half precision, move the shift behind the product,
    x A + previous(x B) with A = (1 − μ) ∘ W and B = μ ∘ W: all maps are one product of x, and no mix is made.
    """
    if uses_triton("low_rank", x, backend):
        from receptance.ops.low_rank.triton import shifted_maps as kernel

        return kernel(x, last, mixes, maps, activations, resets)
    d = token_shift(x, last, resets) - x
    functions = {"none": lambda h: h, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
    return [functions[f]((x + d * mu) @ w) for mu, w, f in zip(mixes, maps, activations)]
