"""What follows the WKV operator of RWKV-5 to 7: group norm over heads, bonus of the current token, gate."""

from typing import Literal

import torch
from torch import Tensor

from receptance.ops.pieces import upcast, uses_triton

Gate = Literal["none", "plain", "silu"]


def norm_and_gate(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gate: Tensor | None = None,
    activation: Gate = "plain",
    bonus: tuple[Tensor, Tensor] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """(GroupNorm(y) + bonus) ∘ gate, [B, T, C], in y's dtype.

    y [B, T, H, N], normalised per head in float32 at least; weight, bias of C elements; gate [B, T, C], taken as it is
    or through silu; bonus (u, v): u·v with u [B, T, H] and v [B, T, H, N]. The kernels keep only their inputs.
    """
    if uses_triton("heads", y, backend):
        from receptance.ops.heads.triton import norm_and_gate as kernel

        return kernel(y, weight, bias, eps, gate, activation, bonus)
    b, t, h, n = y.shape
    flat = upcast(y).reshape(b * t, h * n)
    out = torch.nn.functional.group_norm(flat, h, upcast(weight), upcast(bias), eps).view(b, t, h * n).to(y.dtype)
    if bonus is not None:
        out = out + (bonus[0].unsqueeze(-1) * bonus[1]).flatten(2).to(out.dtype)  # after the norm
    if gate is None:
        return out
    return out * (torch.nn.functional.silu(gate) if activation == "silu" else gate)
