"""RWKV-7's WKV, one token at a time: the specification that every faster form is judged by."""

import torch
from torch import Tensor


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S ← S·diag(eʷ) + (S a) bᵀ + v kᵀ;  y = S r.  Reads the new state.

    r, w, k, v, a, b [B, T, H, N]; w is log-decay, a = -kk, b = kk·iclr; state [B, H, N, N], value × key.
    Where resets [B, T] is true, the state is zeroed before the token.
    """
    ys = []
    for t in range(r.shape[1]):
        if resets is not None:
            state = state.masked_fill(resets[:, t, None, None, None], 0)
        erase = (state @ a[:, t, :, :, None]) @ b[:, t, :, None]  # a = -kk: forget what this key held
        state = state * w[:, t, :, None].exp() + erase + v[:, t, :, :, None] @ k[:, t, :, None]
        ys.append((state @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(ys, 1), state
