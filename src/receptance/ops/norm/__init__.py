"""Layer norm with the residual addition before it."""

import torch
from torch import Tensor

from receptance.ops.pieces import compute_dtype, uses_triton


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str = "auto") -> Tensor:
    """LayerNorm over the last axis. The kernels write in autocast's dtype, which the products after it want."""
    if uses_triton("norm", x, backend):
        from receptance.ops.norm.triton import layer_norm as kernel

        return kernel(x, weight, bias, eps, compute_dtype(x))
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


def add_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(x + delta, its LayerNorm), both of x's shape; the sum is in x's dtype."""
    if uses_triton("norm", x, backend):
        from receptance.ops.norm.triton import add_norm as kernel

        return kernel(x, delta, weight, bias, eps, compute_dtype(x))
    x = x + delta
    return x, torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)
