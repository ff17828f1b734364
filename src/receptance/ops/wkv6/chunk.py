"""The WKV of RWKV-5 and 6 in parallel over time, in plain torch: chunks of 32 tokens, one small step per chunk.

RWKV-6 decays can be arbitrarily strong (a log-decay of -1000 is legal), so the usual factoring e^{c_t}·e^{-c_s} over a
chunk overflows. Here every pair (t, s) is split at a midpoint between them, so that both factors are ≤ 1: a triangle of
scores is two triangles of half the size and a square whose reference point is the end of its early half.
"""

import torch
from torch import Tensor

CHUNK = 32  # a power of two


def strict_scores(q: Tensor, k: Tensor, before: Tensor, upto: Tensor) -> Tensor:
    """Σ_n q_t k_s e^{before_t - upto_s} for s < t, zero elsewhere: [..., L, N] ×4 → [..., L, L], L a power of two.

    `upto` is the inclusive cumulative log-decay, `before` the exclusive one; both fall with t.
    """
    length = q.shape[-2]
    scores = q.new_zeros(*q.shape[:-2], length, 1, 1)  # L triangles of one token each: nothing strictly below
    half = 1
    while half < length:
        halves = (*q.shape[:-2], length // (2 * half), 2, half, q.shape[-1])
        mid = upto.view(halves)[..., 0, -1:, :]  # the end of each early half
        late = q.view(halves)[..., 1, :, :] * (before.view(halves)[..., 1, :, :] - mid).exp()
        early = k.view(halves)[..., 0, :, :] * (mid - upto.view(halves)[..., 0, :, :]).exp()
        square = late @ early.mT  # [..., L/2h, h, h]
        top = torch.cat([scores[..., 0::2, :, :], torch.zeros_like(square)], -1)
        bottom = torch.cat([square, scores[..., 1::2, :, :]], -1)
        scores = torch.cat([top, bottom], -2)  # [..., L/2h, 2h, 2h]
        half *= 2
    return scores.squeeze(-3)


def to_chunks(x: Tensor, length: int) -> Tensor:
    """[B, T, H, N] → [B, H, T/L, L, N], zero-padded at the end (a token of zeros changes no state)."""
    b, t, h, n = x.shape
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -t % length))
    return x.view(b, -1, length, h, n).permute(0, 3, 1, 2, 4)


def wkv6(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Same contract as the naive form."""
    b, t, h, n = r.shape
    r, w, k, v = (to_chunks(x, CHUNK).contiguous() for x in (r, w, k, v))  # [B, H, n, L, N]
    upto = w.cumsum(-2)  # inclusive: through token t
    before = upto - w  # exclusive: up to the read of token t
    end = upto[..., -1:, :]
    scores = strict_scores(r, k, before, upto)
    bonus = (r * u[:, None, None] * k).sum(-1, keepdim=True)
    y = scores @ v + bonus * v
    new = v.mT @ (k * (end - upto).exp())  # what each chunk adds to the state: [B, H, n, N, N]
    decay = end.exp()  # [B, H, n, 1, N]
    starts = []
    for decay_, new_ in zip(decay.unbind(2), new.unbind(2)):
        starts.append(state)
        state = state * decay_ + new_
    y = y + (r * before.exp()) @ torch.stack(starts, 2).mT
    return y.permute(0, 2, 3, 1, 4).reshape(b, -1, h, n)[:, :t], state
