"""Token shift: each position blended with the one before it, by several vectors at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from receptance.ops.norm import add_norm, layer_norm
from receptance.ops.pieces import compute_dtype, uses_triton


def token_shift(x: Tensor, last: Tensor, resets: Tensor | None = None) -> Tensor:
    """The previous position's vector, [B, T, C]; `last` [B, C] stands before position 0, zero before a document.

    resets [B, T]: true at the first token of a document.
    """
    previous = torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1)
    return previous if resets is None else previous.masked_fill(resets[..., None], 0)


def shift_mix(
    x: Tensor,
    last: Tensor,
    mixes: Sequence[Tensor],
    own: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    present: bool = False,
    backend: str = "auto",
) -> list[Tensor]:
    """x + (previous − x)·μ for each μ of `mixes`, at most six of C elements; with `present`, μ is the share of x.

    x [B, T, C]; last [B, C] stands before position 0; where resets [B, T] is true, zero does. own [mixes, B, T, C]:
    what each position adds to the μ (RWKV-6). The kernels read x once for all mixes, keep only their inputs for the
    backward pass, and write in autocast's dtype, which the matrix products after them want.
    """
    if uses_triton("shift", x, backend):
        from receptance.ops.shift.triton import shift_mix as kernel

        return kernel(x, last, mixes, own, resets, present, compute_dtype(x))
    previous = token_shift(x, last, resets)
    if present and own is None:
        return [previous.lerp(x, mu.to(x.dtype)) for mu in mixes]
    if own is not None:
        mixes = [mu + more for mu, more in zip(mixes, own)]
    d = x - previous if present else previous - x
    return [(previous if present else x) + d * mu for mu in mixes]


def norm_mix(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    last: Tensor,
    mixes: Sequence[Tensor],
    *,
    resets: Tensor | None = None,
    present: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x + delta (None: x), the last position of its LayerNorm [B, C], and `shift_mix` of that norm.

    The kernels write nothing in between; the gradients of all mixes, the norm's and the sum's own meet in one pass.
    Under torch.compile, which cannot take a result that is an argument, they are three operators.
    """
    if uses_triton("shift", x, backend) and not torch.compiler.is_compiling():
        from receptance.ops.shift.triton import norm_mix as kernel

        return kernel(x, delta, weight, bias, eps, last, mixes, resets, present, compute_dtype(x))
    if delta is None:
        normed = layer_norm(x, weight, bias, eps, backend=backend)
    else:
        x, normed = add_norm(x, delta, weight, bias, eps, backend=backend)
    return x, normed[:, -1], shift_mix(normed, last, mixes, resets=resets, present=present, backend=backend)
