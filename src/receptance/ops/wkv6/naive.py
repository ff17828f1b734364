"""The WKV of RWKV-5 and 6, one token at a time: the specification that every faster form is judged by."""

import torch
from torch import Tensor


def wkv6(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = (S + v (u∘k)ᵀ) r;  S ← S·diag(eʷ) + v kᵀ.  Reads the old state plus a bonus for the current token.

    r, w, k, v [B, T, H, N]; w is log-decay (RWKV-5: one for all tokens); u [H, N]; state [B, H, N, N], value × key.
    Where resets [B, T] is true, the state is zeroed before the token.
    """
    ys = []
    for t in range(r.shape[1]):
        if resets is not None:
            state = state.masked_fill(resets[:, t, None, None, None], 0)
        now = v[:, t, :, :, None] * k[:, t, :, None]  # [B, H, N, N]
        ys.append(((state + now * u[:, None]) @ r[:, t, :, :, None]).squeeze(-1))
        state = state * w[:, t, :, None].exp() + now
    return torch.stack(ys, 1), state
