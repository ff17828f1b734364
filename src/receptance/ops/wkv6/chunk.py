"""The WKV of RWKV-5 and 6 in parallel over time, in plain torch: chunks of 32 tokens, one small step per chunk.

RWKV-6 decays can be arbitrarily strong (a log-decay of -1000 is legal), so the usual factoring e^{c_t}·e^{-c_s} over a
chunk overflows. Here every pair (t, s) is split at a midpoint between them, so that both factors are ≤ 1: a triangle of
scores is two triangles of half the size and a square whose reference point is the end of its early half.
"""

from typing import Any

import torch
from torch import Tensor

from receptance.ops.custom import custom_operator

CHUNK = 32  # a power of two


def sums_before(w: Tensor) -> Tensor:
    """Σ of the entries before each along dim -2. Never a difference of sums: a huge entry must not blur the others."""
    return torch.cat([torch.zeros_like(w[..., :1, :]), w[..., :-1, :]], -2).cumsum(-2)


def sums_after(w: Tensor) -> Tensor:
    """Σ of the entries after each along dim -2."""
    return torch.cat([w[..., 1:, :], torch.zeros_like(w[..., :1, :])], -2).flip(-2).cumsum(-2).flip(-2)


def _halves(length: int) -> list[int]:
    """Sizes of the squares that a strict triangle of `length` is made of: 1, 2, 4, …"""
    return [1 << i for i in range(length.bit_length() - 1)]


def _factors(w: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Decays [..., L/2h, h, N] from the end of a pair's early half to its late tokens; from early tokens to it."""
    early, late = w.view(*w.shape[:-2], -1, 2, half, w.shape[-1]).unbind(-3)
    return sums_before(late).exp_(), sums_after(early).exp_()


def strict_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Σ_n q_t k_s e^{w_{s+1} + … + w_{t-1}} for s < t, else zero: [..., L, N] ×3 → [..., L, L], L a power of two."""
    length = q.shape[-2]
    scores = q.new_zeros(*q.shape[:-1], length)
    for half in _halves(length):
        to_late, from_early = _factors(w, half)
        late = q.view(*q.shape[:-2], -1, 2, half, q.shape[-1])[..., 1, :, :] * to_late
        early = k.view(*k.shape[:-2], -1, 2, half, k.shape[-1])[..., 0, :, :] * from_early
        _squares(scores, half).copy_(late @ early.mT)
    return scores


def strict_scores_backward(g: Tensor, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and w from that of the scores; entries outside the triangle are not looked at."""
    gq, gk, gw = (torch.zeros_like(x) for x in (q, k, w))
    for half in _halves(q.shape[-2]):
        pairs = (*q.shape[:-2], -1, 2, half, q.shape[-1])
        to_late, from_early = _factors(w, half)
        square = _squares(g, half)
        late, early = q.view(pairs)[..., 1, :, :] * to_late, k.view(pairs)[..., 0, :, :] * from_early
        g_late, g_early = square @ early, square.mT @ late
        gq.view(pairs)[..., 1, :, :].addcmul_(g_late, to_late)
        gk.view(pairs)[..., 0, :, :].addcmul_(g_early, from_early)
        gw.view(pairs)[..., 1, :, :] += sums_after(late.mul_(g_late))
        gw.view(pairs)[..., 0, :, :] += sums_before(early.mul_(g_early))
    return gq, gk, gw


def _squares(scores: Tensor, half: int) -> Tensor:
    """Of scores [..., L, L] those of late tokens against the early ones of their pair of halves: [..., L/2h, h, h]."""
    blocks = scores.view(*scores.shape[:-2], scores.shape[-1] // (2 * half), 2, half, -1, 2, half)
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def to_chunks(x: Tensor, length: int) -> Tensor:
    """[B, T, H, N] → [B, H, T/L, L, N], zero-padded at the end (a token of zeros changes no state)."""
    b, t, h, n = x.shape
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -t % length))
    return x.view(b, -1, length, h, n).permute(0, 3, 1, 2, 4)


def from_chunks(x: Tensor, t: int) -> Tensor:
    """[B, H, n, L, N] → [B, T, H, N], contiguous, in memory of its own, without the padding."""
    b, h, chunks, length, n = x.shape
    out = x.new_empty(b, chunks * length, h, n)
    out.view(b, chunks, length, h, n).permute(0, 3, 1, 2, 4).copy_(x)
    return out[:, :t].contiguous()


def segments(resets: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a reset cuts inside chunks: masks [B, 1, T/L, L, L], [B, 1, T/L, L, 1] twice.

    Whether two tokens belong to one document; whether a token sees the chunk's start; whether the chunk's end sees it.
    """
    padded = torch.nn.functional.pad(resets, (0, -resets.shape[1] % length))
    segment = padded.view(len(resets), 1, -1, length, 1).cumsum(-2)
    return segment == segment.mT, segment == 0, segment == segment[..., -1:, :]


def _chunks(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, resets: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor | None]:
    """r, w, k, v in chunks [B, H, n, L, N]; decays from S₀ to each token, from it to S₁, and from S₀ to S₁; masks."""
    r, w, k, v = (to_chunks(x, CHUNK).contiguous() for x in (r, w, k, v))
    from_first, to_last, decay = sums_before(w).exp_(), sums_after(w).exp_(), w.sum(-2, keepdim=True).exp_()
    same = None
    if resets is not None:
        same, seen, lasting = segments(resets, CHUNK)
        from_first, to_last, decay = from_first * seen, to_last * lasting, decay * seen[..., -1:, :]
    return [r, w, k, v], from_first, to_last, decay, same


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, resets: Tensor | None, is_saving: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the final state; for the backward pass scores, the bonus on their diagonal, and chunks' start states."""
    t = r.shape[1]
    (r, w, k, v), from_first, to_last, decay, same = _chunks(r, w, k, v, resets)
    scores = strict_scores(r, k, w)
    if same is not None:
        scores *= same
    scores.diagonal(dim1=-2, dim2=-1).copy_((r * u[:, None, None] * k).sum(-1))
    new = v.mT @ (k * to_last)  # what each chunk adds to the state: [B, H, n, N, N]
    starts, end = [], state
    for decay_, new_ in zip(decay.unbind(2), new.unbind(2)):
        starts.append(end)
        end = torch.addcmul(new_, end, decay_)
    start = torch.stack(starts, 2)
    y = scores @ v + (r * from_first) @ start.mT
    kept = (scores, start) if is_saving else (r.new_empty(0), r.new_empty(0))
    return from_chunks(y, t), end, *kept


def _fake(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor,
          resets: Tensor | None, is_saving: bool) -> tuple[Tensor, ...]:  # fmt: skip
    b, t, h, n = r.shape
    shapes = ((b, h, -(-t // CHUNK), m, m) if is_saving else (0,) for m in (CHUNK, n))
    return r.new_empty(r.shape), state.new_empty(state.shape), *(r.new_empty(shape) for shape in shapes)


def _backward(
    gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...], others: tuple[Any, ...], kept: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    gy, g_end = gradients
    u, (scores, start), t = inputs[4], kept, gy.shape[1]
    (r, w, k, v), from_first, to_last, decay, same = _chunks(*inputs[:4], *others)
    gy = to_chunks(gy, CHUNK).contiguous()
    reads, writes = r * from_first, k * to_last
    from_y = gy.mT @ reads
    ends: list[Tensor] = []
    for decay_, from_y_ in zip(decay.unbind(2)[::-1], from_y.unbind(2)[::-1]):
        ends.append(g_end)
        g_end = torch.addcmul(from_y_, g_end, decay_)
    g = torch.stack(ends[::-1], 2)  # of each chunk's end state
    gv = (scores.mT @ gy).add_(writes @ g.mT)
    g_scores = gy @ v.mT
    g_bonus = g_scores.diagonal(dim1=-2, dim2=-1)[..., None]
    gr, gk, gw = strict_scores_backward(g_scores if same is None else g_scores * same, r, k, w)
    g_reads, g_writes = gy @ start, v @ g
    gr.addcmul_(g_reads, from_first).addcmul_(g_bonus, u[:, None, None] * k)
    gk.addcmul_(g_writes, to_last).addcmul_(g_bonus, u[:, None, None] * r)
    gw += sums_after(g_reads.mul_(reads))
    gw += sums_before(g_writes.mul_(writes))
    gw += (start * g).sum(-2, keepdim=True).mul_(decay)
    gu = (g_bonus * r).mul_(k).sum((0, 2, 3))
    return *(from_chunks(x, t) for x in (gr, gw, gk, gv)), gu, g_end


_wkv6 = custom_operator("wkv6_chunk", _forward, _backward, _fake, n_inputs=6, n_outputs=2)


def wkv6(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as the naive form."""
    y, end, *_ = _wkv6(r, w, k, v, u, state, resets)
    return y, end
