"""RWKV-7's WKV on a GPU: chunks of 64 tokens in parallel (32 for wide heads), one small serial pass over states.

Per chunk with start state S₀ (docs/maths.md; all tiles [L, N], exponents relative to the middle of the chunk):

    T = (I - tril₋(a bᵀ))⁻¹        u = T (tril₋(a kᵀ) v + a₀ S₀ᵀ)        a₀, r₀: relative to the chunk's start
    y = r₀ S₀ᵀ + tril(r kᵀ) v + tril(r bᵀ) u                              b₁, k₁: relative to its end
    S₁ = S₀ diag(e^end) + uᵀ b₁ + vᵀ k₁ = S₀ diag(e^end) + S₀ P + Q

Forward: `_prepare` (T, P, Q of every chunk), `_scan` (S₀ of every chunk, written over Q), `_outputs`. Backward:
`_prepare_backward` (P again and G, what the outputs send to S₀), `_scan` from the end (dS₁ of every chunk, over G),
`_value_gradients`, `_key_gradients`. Saved between the passes: the inputs, T and S₀ in float32. The decay's diagonal is
applied outside the products, so that a long-lived state is never rounded to the products' precision.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(16)  # the triangular inverse substitutes inside blocks of 16 and merges them by products


@triton.jit
def _dot(x, y, PRECISION: tl.constexpr):
    """x @ y in float32: operands rounded to bfloat16, or multiplied as "tf32" or "ieee"."""
    if PRECISION == "bf16":
        return tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16))
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def _load(ptr, base, t, n, stride, mask):  # a tile [L, N] as float32, zero outside
    return tl.load(ptr + base + t[:, None] * stride + n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row(x, index, L: tl.constexpr):  # row `index` of a tile [L, N]
    return tl.sum(tl.where((tl.arange(0, L) == index)[:, None], x, 0.0), 0)


@triton.jit
def _inverse(ab, L: tl.constexpr, PRECISION: tl.constexpr):
    """(I - ab)⁻¹ of a strictly lower triangular [L, L]."""
    M: tl.constexpr = L // BLOCK
    i = tl.arange(0, M)
    j = tl.arange(0, BLOCK)
    diagonal = i[:, None, None, None] == i[None, None, :, None]  # [M, 1, M, 1]
    d = tl.sum(tl.where(diagonal, tl.reshape(ab, [M, BLOCK, M, BLOCK]), 0.0), 2)  # [M, 16, 16]
    x = tl.where((j[:, None] == j[None, :])[None, :, :], 1.0, 0.0) + tl.zeros([M, BLOCK, BLOCK], tl.float32)
    for step in range(1, BLOCK):  # row `step` of every block: x_step = Σ_j d[step, j] x_j + e_step
        here = (j == step)[None, :, None]
        row = tl.sum(tl.where(here, d, 0.0), 1)  # [M, 16]
        new = tl.sum(row[:, :, None] * x, 1)
        x = tl.where(here, new[:, None, :] + x, x)
    inner = tl.reshape(tl.where(diagonal, x[:, :, None, :], 0.0), [L, L])
    if M == 1:
        return inner
    same = (tl.arange(0, L)[:, None] // BLOCK) == (tl.arange(0, L)[None, :] // BLOCK)
    m = _dot(inner, tl.where(same, 0.0, ab), PRECISION)  # nilpotent over blocks
    total = inner + _dot(m, inner, PRECISION)  # (I + m) inner
    power = m
    reach: tl.constexpr = M // 2
    if reach > 1:  # four blocks: (I + m²)(I + m)
        power = _dot(m, m, PRECISION)
        total = total + _dot(power, total, PRECISION)
    return total


@triton.jit
def _decays(w, L: tl.constexpr):
    """Inclusive and exclusive cumulative log-decays [L, N], their value in mid-chunk and at the end [N]."""
    upto = tl.cumsum(w, 0)
    return upto, upto - w, _row(upto, L // 2 - 1, L), _row(upto, L - 1, L)


@triton.jit
def _prepare(
    w_ptr, k_ptr, v_ptr, a_ptr, b_ptr, t_ptr, p_ptr, q_ptr, d_ptr, T, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base, stride = (bh // H) * T * H * N + (bh % H) * N, H * N
    t, n = chunk * L + tl.arange(0, L), tl.arange(0, BN)
    mask = (t[:, None] < T) & (n[None, :] < N)
    w = _load(w_ptr, base, t, n, stride, mask)
    upto, before, mid, end = _decays(w, L)
    a = _load(a_ptr, base, t, n, stride, mask) * tl.exp(before - mid[None, :])
    fall = tl.exp(mid[None, :] - upto)
    b = _load(b_ptr, base, t, n, stride, mask) * fall
    k = _load(k_ptr, base, t, n, stride, mask) * fall
    v = _load(v_ptr, base, t, n, stride, mask)

    i = tl.arange(0, L)
    lower = i[:, None] > i[None, :]
    ab = tl.where(lower, _dot(a, tl.trans(b), EXACT), 0.0)
    inverse = _inverse(ab, L, EXACT)
    ak = tl.where(lower, _dot(a, tl.trans(k), PRECISION), 0.0)
    uv = _dot(inverse, _dot(ak, v, PRECISION), PRECISION)
    ua = _dot(inverse, a * tl.exp(mid)[None, :], PRECISION)
    rest = tl.exp(end - mid)[None, :]
    p = _dot(tl.trans(ua), b * rest, PRECISION)
    q = _dot(tl.trans(uv), b * rest, PRECISION)
    q += _dot(tl.trans(v), k * rest, PRECISION)

    where = bh * chunks + chunk
    tl.store(t_ptr + where * L * L + i[:, None] * L + i[None, :], inverse)
    square = where * N * N + n[:, None] * N + n[None, :]
    inside = (n[:, None] < N) & (n[None, :] < N)
    tl.store(p_ptr + square, p, mask=inside)
    tl.store(q_ptr + square, q, mask=inside)
    tl.store(d_ptr + where * N + n, tl.exp(end), mask=n < N)


@triton.jit
def _scan(
    p_ptr, q_ptr, d_ptr, start_ptr, end_ptr, chunks,
    N: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S ← S diag(d) + S P + Q over chunks; each chunk's S before the update goes where its Q was. Backwards with Pᵀ."""
    bh, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, n = block * BV + tl.arange(0, BV), tl.arange(0, BN)
    mask = (rows[:, None] < N) & (n[None, :] < N)
    tile = rows[:, None] * N + n[None, :]
    square = n[None, :] * N + n[:, None] if REVERSE else n[:, None] * N + n[None, :]
    inside = (n[:, None] < N) & (n[None, :] < N)
    state = tl.load(start_ptr + bh * N * N + tile, mask=mask, other=0.0)
    for step in range(chunks):
        where = bh * chunks + (chunks - 1 - step if REVERSE else step)
        p = tl.load(p_ptr + where * N * N + square, mask=inside, other=0.0)
        q = tl.load(q_ptr + where * N * N + tile, mask=mask, other=0.0)
        d = tl.load(d_ptr + where * N + n, mask=n < N, other=0.0)
        tl.store(q_ptr + where * N * N + tile, state, mask=mask)
        state = state * d[None, :] + q + _dot(state, p, PRECISION)
    tl.store(end_ptr + bh * N * N + tile, state, mask=mask)


@triton.jit
def _outputs(
    r_ptr, w_ptr, k_ptr, v_ptr, a_ptr, b_ptr, t_ptr, s_ptr, y_ptr, T, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base, stride = (bh // H) * T * H * N + (bh % H) * N, H * N
    t, n, i = chunk * L + tl.arange(0, L), tl.arange(0, BN), tl.arange(0, L)
    mask = (t[:, None] < T) & (n[None, :] < N)
    w = _load(w_ptr, base, t, n, stride, mask)
    upto, before, mid, _ = _decays(w, L)
    a = _load(a_ptr, base, t, n, stride, mask) * tl.exp(before - mid[None, :])
    r = _load(r_ptr, base, t, n, stride, mask) * tl.exp(upto - mid[None, :])
    fall = tl.exp(mid[None, :] - upto)
    k = _load(k_ptr, base, t, n, stride, mask) * fall
    v = _load(v_ptr, base, t, n, stride, mask)
    where = bh * chunks + chunk
    # S₀ᵀ scaled so that it meets the mid-chunk exponents of a and r
    s = tl.load(
        s_ptr + where * N * N + n[None, :] * N + n[:, None], mask=(n[:, None] < N) & (n[None, :] < N), other=0.0
    ) * tl.exp(mid)[:, None]  # fmt: skip
    u = _dot(a, s, PRECISION)
    ak = tl.where(i[:, None] > i[None, :], _dot(a, tl.trans(k), PRECISION), 0.0)
    u += _dot(ak, v, PRECISION)
    u = _dot(tl.load(t_ptr + where * L * L + i[:, None] * L + i[None, :]), u, PRECISION)
    y = _dot(r, s, PRECISION)
    rk = tl.where(i[:, None] >= i[None, :], _dot(r, tl.trans(k), PRECISION), 0.0)
    y += _dot(rk, v, PRECISION)
    b = _load(b_ptr, base, t, n, stride, mask) * fall
    rb = tl.where(i[:, None] >= i[None, :], _dot(r, tl.trans(b), PRECISION), 0.0)
    y += _dot(rb, u, PRECISION)
    tl.store(y_ptr + base + t[:, None] * stride + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _prepare_backward(
    r_ptr, w_ptr, a_ptr, b_ptr, gy_ptr, t_ptr, p_ptr, g_ptr, d_ptr, T, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P, e^end, and G = gyᵀ (r₀ + tril(r bᵀ) T a₀): what a chunk's outputs send to its start state."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base, stride = (bh // H) * T * H * N + (bh % H) * N, H * N
    t, n, i = chunk * L + tl.arange(0, L), tl.arange(0, BN), tl.arange(0, L)
    mask = (t[:, None] < T) & (n[None, :] < N)
    w = _load(w_ptr, base, t, n, stride, mask)
    upto, before, mid, end = _decays(w, L)
    a = _load(a_ptr, base, t, n, stride, mask) * tl.exp(before)
    r = _load(r_ptr, base, t, n, stride, mask) * tl.exp(upto - mid[None, :])
    b = _load(b_ptr, base, t, n, stride, mask) * tl.exp(mid[None, :] - upto)
    where = bh * chunks + chunk
    inverse = tl.load(t_ptr + where * L * L + i[:, None] * L + i[None, :])
    ua = _dot(inverse, a, PRECISION)
    p = _dot(tl.trans(ua), b * tl.exp(end - mid)[None, :], PRECISION)
    rb = tl.where(i[:, None] >= i[None, :], _dot(r, tl.trans(b), PRECISION), 0.0)
    reads = r * tl.exp(mid)[None, :] + _dot(rb, ua, PRECISION)
    g = _dot(tl.trans(_load(gy_ptr, base, t, n, stride, mask)), reads, PRECISION)
    square = where * N * N + n[:, None] * N + n[None, :]
    inside = (n[:, None] < N) & (n[None, :] < N)
    tl.store(p_ptr + square, p, mask=inside)
    tl.store(g_ptr + square, g, mask=inside)
    tl.store(d_ptr + where * N + n, tl.exp(end), mask=n < N)


@triton.jit
def _value_gradients(
    r_ptr, w_ptr, k_ptr, v_ptr, a_ptr, b_ptr, gy_ptr, t_ptr, s_ptr, gs_ptr, u_ptr, z_ptr, gv_ptr, T, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u, z (the gradient of the triangular system's right side) and v's gradient, from S₀ and the end gradient dS₁."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base, stride = (bh // H) * T * H * N + (bh % H) * N, H * N
    t, n, i = chunk * L + tl.arange(0, L), tl.arange(0, BN), tl.arange(0, L)
    mask = (t[:, None] < T) & (n[None, :] < N)
    inside = (n[:, None] < N) & (n[None, :] < N)
    where = bh * chunks + chunk
    square = where * N * N + n[None, :] * N + n[:, None]  # transposed: [key, value]
    strict, lower = i[:, None] > i[None, :], i[:, None] >= i[None, :]
    upto, before, mid, end = _decays(_load(w_ptr, base, t, n, stride, mask), L)
    a = _load(a_ptr, base, t, n, stride, mask) * tl.exp(before - mid[None, :])
    fall = tl.exp(mid[None, :] - upto)
    k = _load(k_ptr, base, t, n, stride, mask) * fall
    s = tl.load(s_ptr + square, mask=inside, other=0.0) * tl.exp(mid)[:, None]
    ak = tl.where(strict, _dot(a, tl.trans(k), PRECISION), 0.0)
    u = _dot(ak, _load(v_ptr, base, t, n, stride, mask), PRECISION) + _dot(a, s, PRECISION)
    u = _dot(tl.load(t_ptr + where * L * L + i[:, None] * L + i[None, :]), u, PRECISION)
    scratch = where * L * N + i[:, None] * N + n[None, :]
    tl.store(u_ptr + scratch, u, mask=n[None, :] < N)

    r = _load(r_ptr, base, t, n, stride, mask) * tl.exp(upto - mid[None, :])
    b = _load(b_ptr, base, t, n, stride, mask) * fall
    gy = _load(gy_ptr, base, t, n, stride, mask)
    gs = tl.load(gs_ptr + square, mask=inside, other=0.0) * tl.exp(end - mid)[:, None]
    br = tl.where(strict, 0.0, _dot(b, tl.trans(r), PRECISION))  # tril(r bᵀ)ᵀ
    z = _dot(br, gy, PRECISION) + _dot(b, gs, PRECISION)
    z = _dot(tl.load(t_ptr + where * L * L + i[None, :] * L + i[:, None]), z, PRECISION)
    tl.store(z_ptr + scratch, z, mask=n[None, :] < N)
    gv = _dot(tl.trans(ak), z, PRECISION) + _dot(k, gs, PRECISION)
    rk = tl.where(lower, _dot(r, tl.trans(k), PRECISION), 0.0)
    gv += _dot(tl.trans(rk), gy, PRECISION)
    tl.store(gv_ptr + base + t[:, None] * stride + n[None, :], gv.to(gv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _key_gradients(
    r_ptr, w_ptr, k_ptr, v_ptr, a_ptr, b_ptr, gy_ptr, u_ptr, z_ptr, s_ptr, gs_ptr,
    gr_ptr, gw_ptr, gk_ptr, ga_ptr, gb_ptr, T, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of r, k, a, b as they meet in the four score matrices, and from them w's, for BK key channels."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base, stride = (bh // H) * T * H * N + (bh % H) * N, H * N
    t, m, i = chunk * L + tl.arange(0, L), tl.arange(0, BN), tl.arange(0, L)  # m: value channels
    n = tl.program_id(2) * BK + tl.arange(0, BK)
    mask, mask_v = (t[:, None] < T) & (n[None, :] < N), (t[:, None] < T) & (m[None, :] < N)
    inside = (m[:, None] < N) & (n[None, :] < N)
    where = bh * chunks + chunk
    square = where * N * N + m[:, None] * N + n[None, :]
    tile = base + t[:, None] * stride + n[None, :]
    strict, lower = i[:, None] > i[None, :], i[:, None] >= i[None, :]
    upto, before, mid, end = _decays(_load(w_ptr, base, t, n, stride, mask), L)
    fall = tl.exp(mid[None, :] - upto)
    b = _load(b_ptr, base, t, n, stride, mask) * fall
    k = _load(k_ptr, base, t, n, stride, mask) * fall
    v = _load(v_ptr, base, t, m, stride, mask_v)
    scratch = where * L * N + i[:, None] * N + m[None, :]
    u = tl.load(u_ptr + scratch, mask=m[None, :] < N, other=0.0)
    z = tl.load(z_ptr + scratch, mask=m[None, :] < N, other=0.0)
    s = tl.load(s_ptr + square, mask=inside, other=0.0) * tl.exp(mid)[None, :]

    # One row of score matrices at a time: those that a reads …
    rise = tl.exp(before - mid[None, :])
    read = _load(a_ptr, base, t, n, stride, mask) * rise
    scores = tl.where(strict, _dot(z, tl.trans(u), PRECISION), 0.0)
    grad = _dot(scores, b, PRECISION)
    gb = _dot(tl.trans(scores), read, PRECISION)
    scores = tl.where(strict, _dot(z, tl.trans(v), PRECISION), 0.0)
    grad += _dot(scores, k, PRECISION)
    gk = _dot(tl.trans(scores), read, PRECISION)
    grad += _dot(z, s, PRECISION)
    tl.store(ga_ptr + tile, (grad * rise).to(ga_ptr.dtype.element_ty), mask=mask)
    g_before = grad * read
    # … and those that r reads
    rise = tl.exp(upto - mid[None, :])
    read = _load(r_ptr, base, t, n, stride, mask) * rise
    gy = _load(gy_ptr, base, t, m, stride, mask_v)
    scores = tl.where(lower, _dot(gy, tl.trans(u), PRECISION), 0.0)
    grad = _dot(scores, b, PRECISION)
    gb += _dot(tl.trans(scores), read, PRECISION)
    scores = tl.where(lower, _dot(gy, tl.trans(v), PRECISION), 0.0)
    grad += _dot(scores, k, PRECISION)
    gk += _dot(tl.trans(scores), read, PRECISION)
    grad += _dot(gy, s, PRECISION)
    tl.store(gr_ptr + tile, (grad * rise).to(gr_ptr.dtype.element_ty), mask=mask)
    g_upto = grad * read
    # what b and k wrote into the end state
    gs = tl.load(gs_ptr + square, mask=inside, other=0.0)
    ends = tl.sum(s * gs, 0) * tl.exp(end - mid)  # [N]: what S₀ diag(e^end) gives the end exponent
    gs = gs * tl.exp(end - mid)[None, :]
    through = _dot(u, gs, PRECISION)
    ends += tl.sum(through * b, 0)
    gb += through
    tl.store(gb_ptr + tile, (gb * fall).to(gb_ptr.dtype.element_ty), mask=mask)
    through = _dot(v, gs, PRECISION)
    ends += tl.sum(through * k, 0)
    gk += through
    tl.store(gk_ptr + tile, (gk * fall).to(gk_ptr.dtype.element_ty), mask=mask)
    g_upto -= gb * b + gk * k
    # w_s enters every inclusive sum from s on, every exclusive one after s, and the end
    both = g_upto + g_before
    gw = tl.sum(both, 0)[None, :] - tl.cumsum(both, 0) + g_upto + ends[None, :]
    tl.store(gw_ptr + tile, gw.to(gw_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class _Plan:
    """Tile sizes for a head: chunk length, power-of-two width, value rows and key channels that one program takes."""

    chunk: int
    width: int
    rows: int
    keys: int
    warps: int

    @staticmethod
    def of(n: int) -> "_Plan":
        width = max(16, triton.next_power_of_2(n))
        return _Plan(64 if width <= 64 else 32, width, 16, min(width, 32), 4 if width <= 32 else 8)

    def meta(self, n: int, precision: str) -> dict[str, Any]:
        return {"N": n, "BN": self.width, "PRECISION": precision, "num_warps": self.warps}


class _WKV7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
                precision: str) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, t, h, n = r.shape
        plan = _Plan.of(n)
        chunks, heads, meta = triton.cdiv(t, plan.chunk), batch * h, plan.meta(n, precision)
        new = lambda *shape: torch.empty((heads, chunks, *shape), dtype=torch.float32, device=r.device)
        inverse, p, s, decay = new(plan.chunk, plan.chunk), new(n, n), new(n, n), new(n)
        end, y = torch.empty_like(state), torch.empty_like(v)
        tiles, scans = (chunks, heads), (heads, triton.cdiv(n, plan.rows))
        exact = "ieee" if precision == "ieee" else "tf32"
        _prepare[tiles](w, k, v, a, b, inverse, p, s, decay, t, h, chunks, L=plan.chunk, EXACT=exact, **meta)
        _scan[scans](p, s, decay, state, end, chunks, BV=plan.rows, REVERSE=False, **{**meta, "num_warps": 4})
        _outputs[tiles](r, w, k, v, a, b, inverse, s, y, t, h, chunks, L=plan.chunk, **meta)
        ctx.save_for_backward(r, w, k, v, a, b, inverse, s)
        ctx.precision = precision
        return y, end

    @staticmethod
    def backward(ctx: Any, gy: Tensor, g_end: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        r, w, k, v, a, b, inverse, s = ctx.saved_tensors
        batch, t, h, n = r.shape
        plan = _Plan.of(n)
        chunks, heads, meta = triton.cdiv(t, plan.chunk), batch * h, plan.meta(n, ctx.precision)
        gy, g_end = gy.contiguous(), g_end.contiguous()
        p, gs = torch.empty_like(s), torch.empty_like(s)
        decay, g_start = s.new_empty(heads, chunks, n), torch.empty_like(g_end)
        tiles, scans = (chunks, heads), (heads, triton.cdiv(n, plan.rows))
        _prepare_backward[tiles](r, w, a, b, gy, inverse, p, gs, decay, t, h, chunks, L=plan.chunk, **meta)
        _scan[scans](p, gs, decay, g_end, g_start, chunks, BV=plan.rows, REVERSE=True, **{**meta, "num_warps": 4})
        gr, gw, gk, gv, ga, gb = (torch.empty_like(x) for x in (r, w, k, v, a, b))
        u = p if n == plan.chunk else s.new_empty(heads, chunks, plan.chunk, n)  # P is no longer needed
        z = torch.empty_like(u)
        _value_gradients[tiles](r, w, k, v, a, b, gy, inverse, s, gs, u, z, gv, t, h, chunks, L=plan.chunk, **meta)
        _key_gradients[(*tiles, triton.cdiv(n, plan.keys))](
            r, w, k, v, a, b, gy, u, z, s, gs, gr, gw, gk, ga, gb, t, h, chunks, L=plan.chunk, BK=plan.keys, **meta
        )
        return gr, gw, gk, gv, ga, gb, g_start, None


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as the naive form, but inputs may stay in half precision; the state is float32.

    Any T and head sizes up to 128. precision of the products: "tf32" by default, "ieee" for float32 inputs. "bf16" is
    twice as fast per product and too coarse: 3e-3 in y, 1e-2 in w's gradient, which is a difference of sums.
    """
    precision = precision or ("ieee" if v.dtype == torch.float32 else "tf32")
    inputs = [x.contiguous() for x in (r, w, k, v, a, b, state)]
    y, end = _WKV7.apply(*inputs, precision)  # type: ignore[no-untyped-call]
    return y, end
