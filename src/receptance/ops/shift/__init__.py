"""Token shift: each position blended with the one before it, by several vectors at once."""

from collections.abc import Sequence
from typing import Any

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
    if own is None:
        vectors = [mu.to(x.dtype) for mu in mixes]
        return list(ShiftMix.apply(x, last, resets, present, *vectors))  # type: ignore[no-untyped-call]
    previous = token_shift(x, last, resets)
    d = x - previous if present else previous - x
    return [torch.addcmul(previous if present else x, d, mu + more) for mu, more in zip(mixes, own)]


class ShiftMix(torch.autograd.Function):
    """Without `own`. The backward pass adds up all mixes' gradients before it shifts them back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, last: Tensor, resets: Tensor | None, present: bool, *mixes: Tensor
    ) -> tuple[Tensor, ...]:
        previous = token_shift(x, last, resets)
        d = x - previous if present else previous - x
        ctx.save_for_backward(d, resets, *mixes)
        ctx.present, ctx.last_dtype = present, last.dtype
        return tuple(torch.addcmul(previous if present else x, d, mu) for mu in mixes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d, resets, *mixes = ctx.saved_tensors
        moved, whole = gradients[0] * mixes[0], gradients[0]  # of what μ multiplies, of both
        for g, mu in zip(gradients[1:], mixes[1:]):
            moved, whole = torch.addcmul(moved, g, mu), whole + g
        g_mixes = [(g * d).sum((0, 1)).view_as(mu) for g, mu in zip(gradients, mixes)]
        of_x, of_previous = (moved, whole - moved) if ctx.present else (whole - moved, moved)
        if resets is not None:
            of_previous = of_previous.masked_fill(resets[..., None], 0)
        of_x[:, :-1] += of_previous[:, 1:]
        return of_x, of_previous[:, 0].to(ctx.last_dtype), None, None, *g_mixes


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
