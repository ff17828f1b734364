"""RWKV-7's WKV in parallel over time, in plain torch: chunks of 32 tokens, one N×N product per chunk in sequence.

Inside a chunk with start state S₀ and cumulative decay W_t, the erased vectors u_t = S_{t-1} a_t solve a unit
triangular system; eliminating them leaves a map that is affine in S₀, S_end = S₀ P + Q, with P and Q known before S₀ is
(docs/maths.md). Decays are factored around the middle of the chunk: exact in float32 while the log-decay stays above
about -5 per token; the model's own bound is -e^{-1/2} = -0.61.

Per chunk, a and r are stacked as reads, b and k as writes, U (the u_t) and v as what is written, so that each of the
four score matrices, and each gradient, is a quarter of one product.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from receptance.ops.custom import custom_operator
from receptance.ops.wkv6.chunk import from_chunks, segments, to_chunks

CHUNK = L = 32


class _Chunks(NamedTuple):
    """Of every chunk [B, H, n, …]; exponents relative to its middle, masked by documents where it says so."""

    reads: Tensor  # [2L, N], a over r
    writes: Tensor  # [2L, N], b over k
    first: Tensor  # reads of S₀, masked
    last: Tensor  # writes to S₁, masked
    rise_a: Tensor  # [L, N], what scales a, r, and b and k
    rise_r: Tensor
    fall: Tensor
    to_first: Tensor  # from reads to first, from writes to last: [1 or 2L, N]
    to_last: Tensor
    decay: Tensor  # [N], of S₀ on its way to S₁, masked
    pairs: Tensor  # [2L, 2L]: a read sees what was written before, that of its own token if it is r's


def _chunks(r: Tensor, w: Tensor, k: Tensor, a: Tensor, b: Tensor, resets: Tensor | None) -> _Chunks:
    r, w, k, a, b = (to_chunks(x, L) for x in (r, w, k, a, b))  # [B, H, n, L, N]
    upto = w.cumsum(-2)  # log W_t
    end, mid = upto[..., -1:, :], upto[..., L // 2 - 1 : L // 2, :]
    rise_a, rise_r = (upto - w).sub_(mid).exp_(), (upto - mid).exp_()
    fall = rise_r.reciprocal()
    reads, writes = (r.new_empty(*r.shape[:-2], 2 * L, r.shape[-1]) for _ in range(2))
    for x, factor, out in (
        (a, rise_a, reads[..., :L, :]), (r, rise_r, reads[..., L:, :]),
        (b, fall, writes[..., :L, :]), (k, fall, writes[..., L:, :]),
    ):  # fmt: skip
        torch.mul(x, factor, out=out)
    pairs = torch.ones(L, L, dtype=r.dtype, device=r.device).tril()
    pairs = torch.cat([pairs.tril(-1), pairs]).repeat(1, 2)
    to_first, to_last, decay = mid.exp(), (end - mid).exp(), end.exp().squeeze(-2)
    if resets is not None:
        same, from_start, to_end = segments(resets, L)
        pairs = pairs * same.repeat(1, 1, 1, 2, 2)
        to_first, to_last = (x * y.repeat(1, 1, 1, 2, 1) for x, y in ((to_first, from_start), (to_last, to_end)))
        decay = decay * from_start[..., -1, :]
    return _Chunks(
        reads, writes, reads * to_first, writes * to_last, rise_a, rise_r, fall, to_first, to_last, decay, pairs
    )


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
    resets: Tensor | None, is_saving: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state; scores, T = (I - AB)⁻¹, what is written, P, S₀, and how y reads S₀ in the end."""
    c = _chunks(r, w, k, a, b, resets)
    scores = (c.reads @ c.writes.mT).mul_(c.pairs)  # [B, H, n, 2L, 2L]
    one = torch.eye(L, dtype=r.dtype, device=r.device).expand_as(scores[..., :L, :L])
    inverse = torch.linalg.solve_triangular(-scores[..., :L, :L], one, upper=False, unitriangular=True).contiguous()
    ua = inverse @ c.first[..., :L, :]  # U = ua S₀ᵀ + what it is from zero
    written = torch.empty_like(c.reads)
    written[..., L:, :] = to_chunks(v, L)
    written[..., :L, :] = inverse @ (scores[..., :L, L:] @ written[..., L:, :])
    p = ua.mT @ c.last[..., :L, :]  # [B, H, n, N, N]
    p.diagonal(dim1=-2, dim2=-1).add_(c.decay)
    q = written.mT @ c.last
    starts, end = [], state
    for p_, q_ in zip(p.unbind(2), q.unbind(2)):
        starts.append(end)
        end = end @ p_ + q_
    start = torch.stack(starts, 2)
    written[..., :L, :] += ua @ start.mT
    y = scores[..., L:, :] @ written + c.first[..., L:, :] @ start.mT
    if not is_saving:
        scores, inverse, written, p, start, through = (r.new_empty(0) for _ in range(6))
    else:
        through = c.first[..., L:, :] + scores[..., L:, :L] @ ua
    return from_chunks(y, r.shape[1]), end, scores, inverse, written, p, start, through


def _fake(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
          resets: Tensor | None, is_saving: bool) -> tuple[Tensor, ...]:  # fmt: skip
    batch, t, h, n = r.shape
    shapes = (2 * L, 2 * L), (L, L), (2 * L, n), (n, n), (n, n), (L, n)
    kept = ((batch, h, -(-t // L), *shape) if is_saving else (0,) for shape in shapes)
    return r.new_empty(r.shape), state.new_empty(state.shape), *(r.new_empty(shape) for shape in kept)


def _backward(
    gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...], others: tuple[Any, ...], kept: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    gy, g_end = gradients
    r, w, k, _, a, b, _ = inputs
    scores, inverse, written, p, start, through = kept
    c, t = _chunks(r, w, k, a, b, *others), r.shape[1]
    x = torch.empty_like(written)  # gradients of the two systems' rows: z (of U's), gy
    x[..., L:, :] = to_chunks(gy, L)
    from_y = x[..., L:, :].mT @ through  # [B, H, n, N, N]
    ends: list[Tensor] = []
    for p_, from_y_ in zip(p.unbind(2)[::-1], from_y.unbind(2)[::-1]):
        ends.append(g_end)
        g_end = g_end @ p_.mT + from_y_
    g = torch.stack(ends[::-1], 2)  # of each chunk's end state
    by_writing = c.last @ g.mT  # [B, H, n, 2L, N]
    x[..., :L, :] = inverse.mT @ (scores[..., L:, :L].mT @ x[..., L:, :]).add_(by_writing[..., :L, :])
    gv = (scores[..., L:].mT @ x).add_(by_writing[..., L:, :])
    g_scores = (x @ written.mT).mul_(c.pairs)
    g_reads = (x @ start).mul_(c.to_first).add_(g_scores @ c.writes)
    to_last = (written @ g).mul_(c.to_last)
    g_end_exponent = (to_last * c.writes).sum(-2).add_((start * g).sum(-2).mul_(c.decay))
    g_writes = to_last.add_(g_scores.mT @ c.reads)

    # w_s enters the exponents of r, b and k from s on, those of a after s, and the end's
    exponents = g_reads * c.reads
    after, upto = exponents[..., :L, :], exponents[..., L:, :]
    for half in (g_writes * c.writes).split(L, -2):
        upto.sub_(half)
    after.add_(upto)
    gw = (after.sum(-2) + g_end_exponent).unsqueeze(-2).sub(after.cumsum(-2)).add_(upto)
    ga, gr = g_reads[..., :L, :].mul_(c.rise_a), g_reads[..., L:, :].mul_(c.rise_r)
    gb, gk = g_writes[..., :L, :].mul_(c.fall), g_writes[..., L:, :].mul_(c.fall)
    return *(from_chunks(x, t) for x in (gr, gw, gk, gv, ga, gb)), g_end


_wkv7 = custom_operator("wkv7_chunk", _forward, _backward, _fake, n_inputs=7, n_outputs=2)


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as the naive form."""
    y, end, *_ = _wkv7(r, w, k, v, a, b, state, resets)
    return y, end
