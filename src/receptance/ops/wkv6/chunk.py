"""The WKV of RWKV-5 and 6 in parallel over time, in plain torch: chunks of 32 tokens, one small step per chunk.

RWKV-6 decays can be arbitrarily strong (a log-decay of -1000 is legal), so the usual factoring e^{c_t}·e^{-c_s} over a
chunk overflows. Here every pair (t, s) is split at a midpoint between them, so that both factors are ≤ 1: a triangle of
scores is two triangles of half the size and a square whose reference point is the end of its early half.
"""

import torch
from torch import Tensor

CHUNK = 32  # a power of two


def sums_before(w: Tensor) -> Tensor:
    """Σ of the entries before each along dim -2. Never a difference of sums: a huge entry must not blur the others."""
    return torch.cat([torch.zeros_like(w[..., :1, :]), w[..., :-1, :]], -2).cumsum(-2)


def sums_after(w: Tensor) -> Tensor:
    """Σ of the entries after each along dim -2."""
    return torch.cat([w[..., 1:, :], torch.zeros_like(w[..., :1, :])], -2).flip(-2).cumsum(-2).flip(-2)


def strict_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Σ_n q_t k_s e^{w_{s+1} + … + w_{t-1}} for s < t, else zero: [..., L, N] ×3 → [..., L, L], L a power of two."""
    length = q.shape[-2]
    scores = q.new_zeros(*q.shape[:-2], length, 1, 1)  # L triangles of one token each: nothing strictly below
    half = 1
    while half < length:
        halves = (*q.shape[:-2], length // (2 * half), 2, half, q.shape[-1])
        w_early, w_late = w.view(halves).unbind(-3)
        late = q.view(halves)[..., 1, :, :] * sums_before(w_late).exp()
        early = k.view(halves)[..., 0, :, :] * sums_after(w_early).exp()
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


def segments(resets: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a reset cuts inside chunks: masks [B, 1, T/L, L, L], [B, 1, T/L, L, 1] twice.

    Whether two tokens belong to one document; whether a token sees the chunk's start; whether the chunk's end sees it.
    """
    padded = torch.nn.functional.pad(resets, (0, -resets.shape[1] % length))
    segment = padded.view(len(resets), 1, -1, length, 1).cumsum(-2)
    return segment == segment.mT, segment == 0, segment == segment[..., -1:, :]


def wkv6(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as the naive form."""
    b, t, h, n = r.shape
    r, w, k, v = (to_chunks(x, CHUNK).contiguous() for x in (r, w, k, v))  # [B, H, n, L, N]
    scores = strict_scores(r, k, w)
    bonus = (r * u[:, None, None] * k).sum(-1, keepdim=True)
    reads, writes = r * sums_before(w).exp(), k * sums_after(w).exp()
    decay = w.sum(-2, keepdim=True).exp()  # [B, H, n, 1, N]
    if resets is not None:
        same, from_start, to_end = segments(resets, CHUNK)
        scores, reads, writes = scores * same, reads * from_start, writes * to_end
        decay = decay * from_start[..., -1:, :]
    y = scores @ v + bonus * v
    new = v.mT @ writes  # what each chunk adds to the state: [B, H, n, N, N]
    starts = []
    for decay_, new_ in zip(decay.unbind(2), new.unbind(2)):
        starts.append(state)
        state = state * decay_ + new_
    y = y + reads @ torch.stack(starts, 2).mT
    return y.permute(0, 2, 3, 1, 4).reshape(b, -1, h, n)[:, :t], state
