"""RWKV-7's WKV in parallel over time, in plain torch: chunks of 32 tokens, one N×N product per chunk in sequence.

Inside a chunk with start state S₀ and cumulative decay W_t, the erased vectors u_t = S_{t-1} a_t solve a unit
triangular system; eliminating them leaves a map that is affine in S₀, S_end = S₀ P + Q, with P and Q known before S₀ is
(docs/maths.md). Decays are factored around the middle of the chunk: exact in float32 while the log-decay stays above
about -5 per token; the model's own bound is -e^{-1/2} = -0.61.
"""

import torch
from torch import Tensor

from receptance.ops.wkv6.chunk import segments, to_chunks

CHUNK = 32


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as the naive form."""
    batch, t, h, n = r.shape
    r, w, k, v, a, b = (to_chunks(x, CHUNK) for x in (r, w, k, v, a, b))  # [B, H, n, L, N]
    upto = w.cumsum(-2)  # log W_t
    before = upto - w  # log W_{t-1}
    end = upto[..., -1:, :]
    mid = upto[..., CHUNK // 2 - 1 : CHUNK // 2, :]

    reads = torch.cat([a * (before - mid).exp(), r * (upto - mid).exp()], -2)  # [B, H, n, 2L, N]
    scale = (mid - upto).exp()
    writes = torch.cat([b * scale, k * scale], -2)
    (ab, ak), (rb, rk) = ((x.split(CHUNK, -1)) for x in (reads @ writes.mT).split(CHUNK, -2))
    ab, ak, rb, rk = ab.tril(-1), ak.tril(-1), rb.tril(), rk.tril()  # [B, H, n, L, L]

    a0, r0 = a * before.exp(), r * upto.exp()  # what reads S₀
    tail = (end - upto).exp()
    b_end, k_end = b * tail, k * tail
    decay = end.squeeze(-2).exp()  # [B, H, n, N]
    if resets is not None:
        same, from_start, to_end = segments(resets, CHUNK)
        ab, ak, rb, rk = ab * same, ak * same, rb * same, rk * same
        a0, r0, b_end, k_end = a0 * from_start, r0 * from_start, b_end * to_end, k_end * to_end
        decay = decay * from_start[..., -1, :]

    # u = (I - ab)⁻¹ (ak V + a₀ S₀ᵀ) = uv + ua S₀ᵀ
    rhs = torch.cat([ak @ v, a0], -1)
    uv, ua = torch.linalg.solve_triangular(-ab, rhs, upper=False, unitriangular=True).split(n, -1)
    p = torch.diag_embed(decay) + ua.mT @ b_end  # [B, H, n, N, N]
    q = uv.mT @ b_end + v.mT @ k_end
    starts = []
    for p_, q_ in zip(p.unbind(2), q.unbind(2)):  # unbind: indexing would cost a full-size zero fill each, backwards
        starts.append(state)
        state = state @ p_ + q_
    y = (r0 + rb @ ua) @ torch.stack(starts, 2).mT + rk @ v + rb @ uv
    return y.permute(0, 2, 3, 1, 4).reshape(batch, -1, h, n)[:, :t], state
