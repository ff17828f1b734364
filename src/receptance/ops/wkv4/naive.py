"""RWKV-4's WKV, one token at a time: the specification that every faster form is judged by."""

import torch
from torch import Tensor

State4 = tuple[Tensor, Tensor, Tensor]  # numerator, denominator, exponent: [B, C] each; true numerator = num * e^exp

EMPTY = -1e38  # exponent of a state that has seen nothing


def wkv4(
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: State4,
    lengths: Tensor | None,
    resets: Tensor | None = None,
) -> tuple[Tensor, State4]:
    """y_t = (Σ_{s<t} e^{(t-1-s)w + k_s} v_s + e^{u+k_t} v_t) / (the same sum without v), per channel.

    w, u [C]; k, v [B, T, C]. Exponents are kept relative to a running maximum, so nothing overflows; the maximum is a
    pure normaliser and carries no gradient. Where resets [B, T] is true, the state is emptied before the token.
    """
    num, den, exp = state
    ys = []
    for t in range(k.shape[1]):
        kt, vt = k[:, t], v[:, t]
        if resets is not None:
            empty = resets[:, t, None]
            num, den, exp = num.masked_fill(empty, 0), den.masked_fill(empty, 0), exp.masked_fill(empty, EMPTY)
        top = torch.maximum(exp, u + kt).detach()
        past, now = (exp - top).exp(), (u + kt - top).exp()
        ys.append((past * num + now * vt) / (past * den + now))
        top = torch.maximum(exp + w, kt).detach()
        past, now = (exp + w - top).exp(), (kt - top).exp()
        new = past * num + now * vt, past * den + now, top
        if lengths is None:
            num, den, exp = new
        else:
            alive = (t < lengths)[:, None]
            num, den, exp = (torch.where(alive, a, b) for a, b in zip(new, (num, den, exp)))
    return torch.stack(ys, 1), (num, den, exp.detach())
