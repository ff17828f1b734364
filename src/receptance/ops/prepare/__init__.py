"""RWKV-7: what the WKV operator reads, made from keys, values and the outputs of the low-rank maps."""

import math

import torch
from torch import Tensor

from receptance.ops.pieces import upcast, uses_triton

MIN_LOG_DECAY = -math.exp(-0.5)  # a channel keeps at least e^-0.61 = 54.5 % per token
MIN_NORM = 1e-12  # of a removal key, as in torch's normalize


def decay_and_keys(
    w: Tensor,
    k: Tensor,
    a: Tensor,
    w0: Tensor,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    *,
    twice: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """The operator's (w, k, a, b) of shape [B, T, H, N] (Goose paper, eqs. 3 to 12); with `twice`, k again after them.

    k [B, T, H, N] keys; w, a [B, T, C] the low-rank maps' outputs for decay and in-context rate, w0 and a0 what is
    added to them; k_k, k_a scale the removal key and the rate's pull on k. In torch w comes back in float32 at
    least; the kernels write everything in k's dtype, and keep only their inputs for the backward pass. A tensor that
    comes twice is for two readers: where kernels run, their gradients are added on the way.
    """
    if uses_triton("prepare", k, backend):
        from receptance.ops.prepare.triton import decay_and_keys as kernel

        twice_there = twice and not torch.compiler.is_compiling()  # it takes no two results in one memory
        outs = kernel(w, k, a, w0, a0, k_k, k_a, twice_there)
        return (*outs, outs[1]) if twice and not twice_there else outs
    heads = k.shape
    w = MIN_LOG_DECAY * torch.sigmoid(upcast(w0) + upcast(w))  # log-decay; the chunked form relies on its bound
    rate = torch.sigmoid(a0 + a)  # in-context learning rate
    k = k.flatten(2)
    kk = torch.nn.functional.normalize(upcast(k * k_k).view(heads), dim=-1, eps=MIN_NORM)  # from k before its rescaling
    k = (k * (1 + (rate - 1) * k_a)).view(heads)
    outs = w.view(heads), k, -kk, kk * rate.view(heads)
    return (*outs, k) if twice else outs


def value_residual(v: Tensor, first: Tensor, gate: Tensor, v0: Tensor, *, backend: str = "auto") -> Tensor:
    """v + (first − v)·σ(v0 + gate): the first layer's values, mixed into a later one's. All [B, T, C]; v0 of C."""
    if uses_triton("prepare", v, backend):
        from receptance.ops.prepare.triton import value_residual as kernel

        return kernel(v, first, gate, v0)
    return v + (first - v) * torch.sigmoid(v0 + gate)


def value_residual_twice(
    v: Tensor, first: Tensor, gate: Tensor, v0: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """(`value_residual`, the same again, `first`): for two readers of the values and the next layer's residual."""
    if uses_triton("prepare", v, backend) and not torch.compiler.is_compiling():
        from receptance.ops.prepare.triton import value_residual_twice as kernel

        return kernel(v, first, gate, v0)
    v = value_residual(v, first, gate, v0, backend=backend)
    return v, v, first
