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
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's (w, k, a, b) of shape [B, T, H, N] (Goose paper, eqs. 3 to 12).

    k [B, T, H, N] keys; w, a [B, T, C] the low-rank maps' outputs for decay and in-context rate, w0 and a0 what is
    added to them; k_k, k_a scale the removal key and the rate's pull on k. In torch w comes back in float32 at
    least; the kernels write everything in k's dtype, and keep only their inputs for the backward pass.
    """
    if uses_triton("prepare", k, backend):
        from receptance.ops.prepare.triton import decay_and_keys as kernel

        return kernel(w, k, a, w0, a0, k_k, k_a)
    heads = k.shape
    w = MIN_LOG_DECAY * torch.sigmoid(upcast(w0) + upcast(w))  # log-decay; the chunked form relies on its bound
    rate = torch.sigmoid(a0 + a)  # in-context learning rate
    k = k.flatten(2)
    kk = torch.nn.functional.normalize(upcast(k * k_k).view(heads), dim=-1, eps=MIN_NORM)  # from k before its rescaling
    k = (k * (1 + (rate - 1) * k_a)).view(heads)
    return w.view(heads), k, -kk, kk * rate.view(heads)


def keys_and_bonus(
    w: Tensor,
    k: Tensor,
    a: Tensor,
    r: Tensor,
    w0: Tensor,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """(w, k, a, b) of `decay_and_keys`; r [B, T, H, N] as it is; the bonus r·(k∘r_k) [B, T, H] with r_k [H, N].

    The operator should read r from here: the kernels then add both gradients of r, and of k, on the way.
    """
    if uses_triton("prepare", k, backend) and not torch.compiler.is_compiling():
        from receptance.ops.prepare.triton import keys_and_bonus as kernel

        return kernel(w, k, a, r, w0, a0, k_k, k_a, r_k)
    outs = decay_and_keys(w, k, a, w0, a0, k_k, k_a, backend=backend)
    return *outs, r, (r * outs[1] * r_k).sum(-1)


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
