"""RWKV-7's WKV on a GPU: chunks of 32 tokens in parallel, one serial pass over their states.

Per chunk with start state S₀ (docs/maths.md; all tiles [L, N], exponents relative to the middle of the chunk):

    T = (I - tril₋(a bᵀ))⁻¹        A = T a₀        X = T tril₋(a kᵀ)        a₀, r₀: relative to the chunk's start
    R = r₀ + tril(r bᵀ) A          Y = tril(r kᵀ) + tril(r bᵀ) X
    K = k₁ + Xᵀ b₁                                                          b₁, k₁: relative to its end
    y = R S₀ᵀ + Y v                S₁ = S₀ diag(e^end) + (A S₀ᵀ)ᵀ b₁ + vᵀ K

The gradient of the states runs the same recurrence backwards: dS₀ = dS₁ diag(e^end) + (b₁ dS₁ᵀ)ᵀ A + gyᵀ R.

Forward: `_prepare` (A, b₁, R, K, Y of every chunk), `_sequence` (y and each S₀). Backward: `_prepare` again,
`_sequence` backwards (each dS₁), `_gradients`. When batch × heads leave the GPU idle, rows are cut into segments: a
first pass finds each segment's own map S → S P + Q, `_join` the segments' start states.

Between the kernels, what half-precision inputs became travels as float16 with a scale per token or state row: as exact
as the tf32 operands that it turns into, at half the bytes. The decay's diagonal is applied outside the products, so
that a long-lived state is never rounded.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.custom import custom_operator
from receptance.ops.wkv6.triton import documents

CHUNK = 32
LEVELS = tl.constexpr(5)  # 2^5 tokens a chunk


@triton.jit
def _dot(x, y, PRECISION: tl.constexpr):
    """x @ y in float32; operands multiplied as "tf32", or "tf32x3" for float32's accuracy."""
    return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRECISION)


@triton.jit
def _load(ptr, base, t, n, stride, mask):  # a tile [L, N] as float32, zero outside
    return tl.load(ptr + base + t[:, None] * stride + n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row(x, index, L: tl.constexpr):  # row `index` of a tile [L, N]
    return tl.sum(tl.where((tl.arange(0, L) == index)[:, None], x, 0.0), 0)


@triton.jit
def _unit(x):
    """x [L, N] over each row's largest magnitude, and those magnitudes [L] (1 where a row is zero)."""
    top = tl.max(tl.abs(x), 1)
    top = tl.where(top > 0, top, 1.0)
    return x / top[:, None], top


@triton.jit
def _inverse(ab, L: tl.constexpr, PRECISION: tl.constexpr):
    """(I - ab)⁻¹ of a strictly lower triangular [L, L]: blocks of two directly, then siblings merged by products."""
    i = tl.arange(0, L)
    apart = i[:, None] ^ i[None, :]
    x = tl.where(apart == 0, 1.0, tl.where(apart == 1, ab, 0.0))
    for level in tl.static_range(1, LEVELS):
        between = tl.where(apart >> level == 1, ab, 0.0)
        x += _dot(x, _dot(between, x, PRECISION), PRECISION)
    return x


@triton.jit
def _decays(w, L: tl.constexpr):
    """Inclusive and exclusive cumulative log-decays [L, N], their value in mid-chunk and at the end [N]."""
    upto = tl.cumsum(w, 0)
    return upto, upto - w, _row(upto, L // 2 - 1, L), _row(upto, L - 1, L)


@triton.jit
def _prepare(
    r_ptr, w_ptr, k_ptr, a_ptr, b_ptr, resets_ptr, a0_ptr, b1_ptr, r0_ptr, k1_ptr, y_ptr, t_ptr, d_ptr, rs_ptr, ks_ptr,
    T, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """A, b₁, R, e^end and r's scale of every chunk; forward also K, Y and k's scale, backward T."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base, stride = (bh // H) * T * H * N + (bh % H) * N, H * N
    i, n = tl.arange(0, L), tl.arange(0, BN)
    t = chunk * L + i
    mask = (t[:, None] < T) & (n[None, :] < N)
    upto, before, mid, end = _decays(_load(w_ptr, base, t, n, stride, mask), L)
    document, last = documents(resets_ptr, (bh // H) * T + chunk * L, i, T - chunk * L)
    same = document[:, None] == document[None, :]
    lower, strict = same & (i[:, None] >= i[None, :]), same & (i[:, None] > i[None, :])
    opens = tl.where(document == 0, 1.0, 0.0)[:, None]  # tokens that still see S₀
    closes = tl.where(document == last, 1.0, 0.0)[:, None]  # tokens that S₁ still sees
    fall = tl.exp(mid[None, :] - upto)
    b = _load(b_ptr, base, t, n, stride, mask) * fall
    a = _load(a_ptr, base, t, n, stride, mask) * tl.exp(before - mid[None, :])
    inverse = _inverse(tl.where(strict, _dot(a, tl.trans(b), PRECISION), 0.0), L, PRECISION)
    to_end, from_start = tl.exp(end - mid)[None, :] * closes, tl.exp(mid)[None, :] * opens

    where = bh * chunks + chunk
    tile = where * L * N + i[:, None] * N + n[None, :]
    square = where * L * L + i[:, None] * L + i[None, :]
    wide = n[None, :] < N
    a0 = _dot(inverse, a * from_start, PRECISION)
    b1 = b * to_end
    tl.store(a0_ptr + tile, a0.to(a0_ptr.dtype.element_ty), mask=wide)
    tl.store(b1_ptr + tile, b1.to(b1_ptr.dtype.element_ty), mask=wide)
    tl.store(d_ptr + where * N + n, tl.where(last == 0, tl.exp(end), 0.0), mask=n < N)

    r, scale = _unit(_load(r_ptr, base, t, n, stride, mask))
    tl.store(rs_ptr + where * L + i, scale)
    r *= tl.exp(upto - mid[None, :])
    rb = tl.where(lower, _dot(r, tl.trans(b), PRECISION), 0.0)
    r0 = r * from_start + _dot(rb, a0, PRECISION)
    tl.store(r0_ptr + tile, r0.to(r0_ptr.dtype.element_ty), mask=wide)
    if BACKWARD:
        tl.store(t_ptr + square, inverse)
    else:
        k, scale = _unit(_load(k_ptr, base, t, n, stride, mask))
        tl.store(ks_ptr + where * L + i, scale)
        k *= fall
        x = _dot(inverse, tl.where(strict, _dot(a, tl.trans(k), PRECISION), 0.0), PRECISION)
        k1 = k * to_end + _dot(tl.trans(x), b1, PRECISION)
        tl.store(k1_ptr + tile, k1.to(k1_ptr.dtype.element_ty), mask=wide)
        y = tl.where(lower, _dot(r, tl.trans(k), PRECISION), 0.0) + _dot(rb, x, PRECISION)
        tl.store(y_ptr + square, y.to(y_ptr.dtype.element_ty))


@triton.jit
def _sequence(
    a_ptr, b_ptr, x_ptr, xs_ptr, c_ptr, d_ptr, start_ptr, end_ptr, saved_ptr, scale_ptr,
    r_ptr, rs_ptr, q_ptr, y_ptr, T, H, chunks, length, segments,
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr, SAVE: tl.constexpr, OUTPUT: tl.constexpr, MAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """S ← S diag(d) + (a Sᵀ)ᵀ b + xᵀ c over the `length` chunks of one segment, for BV of the state's rows.

    SAVE: each chunk's S from before its update. OUTPUT: y = r Sᵀ + q x. MAP: start and end hold 2N rows a segment; the
    second N begin as the identity and take no x, so the end is Q over P.
    """
    bh, segment, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    base, stride = (bh // H) * T * H * N + (bh % H) * N, H * N
    i, n = tl.arange(0, L), tl.arange(0, BN)
    rows = block * BV + tl.arange(0, BV)
    taken = rows < N  # by x; in a MAP the rest are P's
    square = rows[:, None] * N + n[None, :]
    inside = (rows[:, None] < (2 * N if MAP else N)) & (n[None, :] < N)
    at = (bh * segments + segment) * N * N
    if MAP:
        at *= 2
        state = tl.where(rows[:, None] - N == n[None, :], 1.0, 0.0)
    else:
        state = tl.load(start_ptr + at + square, mask=inside, other=0.0)
    for step in tl.range(0, length, num_stages=STAGES):
        chunk = segment * length + (length - 1 - step if REVERSE else step)
        left, short = tl.where(chunk < chunks, N, 0), tl.where(chunk < chunks, L, 0)  # the last segment may be short
        where = bh * chunks + chunk
        t = chunk * L + i
        tile, wide = where * L * N + i[:, None] * N + n[None, :], n[None, :] < left
        a = tl.load(a_ptr + tile, mask=wide, other=0.0)
        b = tl.load(b_ptr + tile, mask=wide, other=0.0)
        c = tl.load(c_ptr + tile, mask=wide, other=0.0)
        d = tl.load(d_ptr + where * N + n, mask=n < left, other=1.0)
        x = _load(x_ptr, base, t, rows, stride, (t[:, None] < T) & taken[None, :])
        x *= tl.load(xs_ptr + where * L + i, mask=i < short, other=0.0)[:, None]
        if SAVE:
            unit, top = _unit(state)
            if saved_ptr.dtype.element_ty == tl.float32:
                unit, top = state, top * 0 + 1
            tl.store(saved_ptr + where * N * N + square, unit.to(saved_ptr.dtype.element_ty), mask=inside & wide)
            tl.store(scale_ptr + where * N + rows, top, mask=rows < left)
        back = tl.trans(state)
        if OUTPUT:
            r = tl.load(r_ptr + tile, mask=wide, other=0.0)
            q = tl.load(q_ptr + where * L * L + i[:, None] * L + i[None, :], mask=i[:, None] < short, other=0.0)
            y = _dot(r, back, PRECISION) + _dot(q, x, PRECISION)
            y *= tl.load(rs_ptr + where * L + i, mask=i < short, other=0.0)[:, None]
            place = y_ptr + base + t[:, None] * stride + rows[None, :]
            tl.store(place, y.to(y_ptr.dtype.element_ty), mask=(t[:, None] < T) & taken[None, :])
        u = _dot(a, back, PRECISION)
        state = state * d[None, :] + _dot(tl.trans(u), b, PRECISION) + _dot(tl.trans(x), c, PRECISION)
    tl.store(end_ptr + at + square, state, mask=inside)


@triton.jit
def _join(
    map_ptr, first_ptr, starts_ptr, segments,
    N: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every segment's start state from the first one's and the segments' maps, Q over P each."""
    bh, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, n = block * BV + tl.arange(0, BV), tl.arange(0, BN)
    tile, inside = rows[:, None] * N + n[None, :], (rows[:, None] < N) & (n[None, :] < N)
    square, full = N * N + n[:, None] * N + n[None, :], (n[:, None] < N) & (n[None, :] < N)
    state = tl.load(first_ptr + bh * N * N + tile, mask=inside, other=0.0)
    for step in range(segments):
        where = bh * segments + (segments - 1 - step if REVERSE else step)
        tl.store(starts_ptr + where * N * N + tile, state, mask=inside)
        p = tl.load(map_ptr + where * 2 * N * N + square, mask=full, other=0.0)
        q = tl.load(map_ptr + where * 2 * N * N + tile, mask=inside, other=0.0)
        state = _dot(state, p, PRECISION) + q


@triton.jit
def _gradients(
    r_ptr, w_ptr, k_ptr, v_ptr, a_ptr, b_ptr, gy_ptr, resets_ptr, t_ptr, s_ptr, ss_ptr, gs_ptr, gss_ptr,
    gr_ptr, gw_ptr, gk_ptr, gv_ptr, ga_ptr, gb_ptr, T, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """All input gradients of a chunk from its start state S₀ and the gradient dS₁ of its end state.

    u = T (tril₋(a kᵀ) v + a₀ S₀ᵀ) are the erased vectors, z = Tᵀ (tril(r bᵀ)ᵀ gy + b₁ dS₁ᵀ) their system's gradient.
    """
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base, stride = (bh // H) * T * H * N + (bh % H) * N, H * N
    i, n = tl.arange(0, L), tl.arange(0, BN)
    t = chunk * L + i
    mask = (t[:, None] < T) & (n[None, :] < N)
    tile = base + t[:, None] * stride + n[None, :]
    where = bh * chunks + chunk
    document, last = documents(resets_ptr, (bh // H) * T + chunk * L, i, T - chunk * L)
    same = document[:, None] == document[None, :]
    lower, strict = same & (i[:, None] >= i[None, :]), same & (i[:, None] > i[None, :])
    upto, before, mid, end = _decays(_load(w_ptr, base, t, n, stride, mask), L)
    rise_a, rise_r, fall = tl.exp(before - mid[None, :]), tl.exp(upto - mid[None, :]), tl.exp(mid[None, :] - upto)
    a = _load(a_ptr, base, t, n, stride, mask) * rise_a
    r = _load(r_ptr, base, t, n, stride, mask) * rise_r
    b = _load(b_ptr, base, t, n, stride, mask) * fall
    k = _load(k_ptr, base, t, n, stride, mask) * fall
    opens = tl.where(document == 0, 1.0, 0.0)[:, None]
    closes = tl.where(document == last, 1.0, 0.0)[:, None]
    inverse = tl.load(t_ptr + where * L * L + i[:, None] * L + i[None, :])
    ak = tl.where(strict, _dot(a, tl.trans(k), PRECISION), 0.0)
    rb = tl.where(lower, _dot(r, tl.trans(b), PRECISION), 0.0)
    rk = tl.where(lower, _dot(r, tl.trans(k), PRECISION), 0.0)

    # Some values at a time, so that the states of wide heads fit into shared memory: S₀ and dS₁ [value, key], scaled to
    # meet the mid-chunk exponents; what S₀ diag(e^end) gives the end exponent
    zu, zv = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    gyu, gyv = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    zs, gys = tl.zeros((L, BN), tl.float32), tl.zeros((L, BN), tl.float32)
    ugs, vgs = tl.zeros((L, BN), tl.float32), tl.zeros((L, BN), tl.float32)
    ends = tl.zeros((BN,), tl.float32)
    for first in tl.static_range(0, BN, BV):
        m = first + tl.arange(0, BV)
        some = (t[:, None] < T) & (m[None, :] < N)
        v = _load(v_ptr, base, t, m, stride, some)
        gy = _load(gy_ptr, base, t, m, stride, some)
        rows = where * N * N + m[:, None] * N + n[None, :]
        inside = (m[:, None] < N) & (n[None, :] < N)
        s = tl.load(s_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        s *= tl.load(ss_ptr + where * N + m, mask=m < N, other=0.0)[:, None] * tl.exp(mid)[None, :]
        gs = tl.load(gs_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        gs *= tl.load(gss_ptr + where * N + m, mask=m < N, other=0.0)[:, None] * tl.exp(end - mid)[None, :]
        ends += tl.where(last == 0, tl.sum(s * gs, 0), 0.0)

        u = _dot(ak, v, PRECISION) + _dot(a, tl.trans(s), PRECISION) * opens
        u = _dot(inverse, u, PRECISION)
        z = _dot(tl.trans(rb), gy, PRECISION) + _dot(b, tl.trans(gs), PRECISION) * closes
        z = _dot(tl.trans(inverse), z, PRECISION)
        gv = _dot(tl.trans(ak), z, PRECISION) + _dot(tl.trans(rk), gy, PRECISION)
        gv += _dot(k, tl.trans(gs), PRECISION) * closes
        tl.store(gv_ptr + base + t[:, None] * stride + m[None, :], gv.to(gv_ptr.dtype.element_ty), mask=some)

        zu += _dot(z, tl.trans(u), PRECISION)
        zv += _dot(z, tl.trans(v), PRECISION)
        gyu += _dot(gy, tl.trans(u), PRECISION)
        gyv += _dot(gy, tl.trans(v), PRECISION)
        zs += _dot(z * opens, s, PRECISION)
        gys += _dot(gy * opens, s, PRECISION)
        ugs += _dot(u * closes, gs, PRECISION)
        vgs += _dot(v * closes, gs, PRECISION)

    # the score matrices that a reads …
    scores = tl.where(strict, zu, 0.0)
    grad = _dot(scores, b, PRECISION) + zs
    gb = _dot(tl.trans(scores), a, PRECISION)
    scores = tl.where(strict, zv, 0.0)
    grad += _dot(scores, k, PRECISION)
    gk = _dot(tl.trans(scores), a, PRECISION)
    tl.store(ga_ptr + tile, (grad * rise_a).to(ga_ptr.dtype.element_ty), mask=mask)
    both = grad * a  # the gradient of the exponents that a, and below r, carry
    # … and those that r reads
    scores = tl.where(lower, gyu, 0.0)
    grad = _dot(scores, b, PRECISION) + gys
    gb += _dot(tl.trans(scores), r, PRECISION)
    scores = tl.where(lower, gyv, 0.0)
    grad += _dot(scores, k, PRECISION)
    gk += _dot(tl.trans(scores), r, PRECISION)
    tl.store(gr_ptr + tile, (grad * rise_r).to(gr_ptr.dtype.element_ty), mask=mask)
    g_upto = grad * r
    # what b and k wrote into the end state
    ends += tl.sum(ugs * b, 0) + tl.sum(vgs * k, 0)
    gb += ugs
    tl.store(gb_ptr + tile, (gb * fall).to(gb_ptr.dtype.element_ty), mask=mask)
    gk += vgs
    tl.store(gk_ptr + tile, (gk * fall).to(gk_ptr.dtype.element_ty), mask=mask)
    g_upto -= gb * b + gk * k
    # w_s enters every inclusive sum from s on, every exclusive one after s, and the end
    both += g_upto
    gw = tl.sum(both, 0)[None, :] - tl.cumsum(both, 0) + g_upto + ends[None, :]
    tl.store(gw_ptr + tile, gw.to(gw_ptr.dtype.element_ty), mask=mask)


PROGRAMS = 512  # of `_sequence`, enough to fill an H200
MIN_SEGMENT = 16  # chunks


@dataclass(frozen=True)
class _Plan:
    """Launch settings for one shape: the one place to tune."""

    batch: int
    t: int
    h: int
    n: int
    precision: str

    @classmethod
    def of(cls, v: Tensor) -> "_Plan":
        batch, t, h, n = v.shape
        return cls(batch, t, h, n, "tf32x3" if v.dtype == torch.float32 else "tf32")

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.t, CHUNK)

    @property
    def heads(self) -> int:
        return self.batch * self.h

    @property
    def width(self) -> int:
        return max(16, triton.next_power_of_2(self.n))

    @property
    def rows(self) -> int:  # of the state that one program of `_sequence` takes
        return min(self.width, 32)

    @property
    def values(self) -> int:
        """Of a head that `_gradients` takes at once: all 128 want 290 KiB of shared memory, where an A100 has 163."""
        return self.width if self.width <= 64 else 32

    @property
    def length(self) -> int:
        """Chunks in a segment."""
        programs = self.heads * triton.cdiv(self.n, self.rows)
        wanted = max(1, PROGRAMS // programs)
        return self.chunks if wanted == 1 else min(self.chunks, max(MIN_SEGMENT, triton.cdiv(self.chunks, wanted)))

    def meta(self, warps: int) -> dict[str, Any]:
        return {"N": self.n, "BN": self.width, "L": CHUNK, "PRECISION": self.precision, "num_warps": warps}


@dataclass(frozen=True)
class _Prepared:
    """What `_prepare` leaves for the other kernels; tensors [heads, chunks, L, N] unless said otherwise."""

    a: Tensor
    b: Tensor
    r: Tensor
    k: Tensor | None
    y: Tensor | None  # [heads, chunks, L, L]
    inverse: Tensor | None  # [heads, chunks, L, L], float32
    decay: Tensor  # [heads, chunks, N], float32, as all scales
    r_scale: Tensor  # [heads, chunks, L]
    k_scale: Tensor | None


def _run_prepare(plan: _Plan, r: Tensor, w: Tensor, k: Tensor, a: Tensor, b: Tensor, resets: Tensor | None,
                 backward: bool) -> _Prepared:  # fmt: skip
    half = torch.float32 if plan.precision == "tf32x3" else torch.float16
    new = lambda *shape, dtype=half: torch.empty((plan.heads, plan.chunks, *shape), dtype=dtype, device=r.device)
    tile, square, scale = (CHUNK, plan.n), (CHUNK, CHUNK), (CHUNK,)
    out = _Prepared(
        new(*tile), new(*tile), new(*tile),
        None if backward else new(*tile),
        None if backward else new(*square),
        new(*square, dtype=torch.float32) if backward else None,
        new(plan.n, dtype=torch.float32), new(*scale, dtype=torch.float32),
        None if backward else new(*scale, dtype=torch.float32),
    )  # fmt: skip
    _prepare[(plan.chunks, plan.heads)](
        r, w, k, a, b, resets, out.a, out.b, out.r, out.k, out.y, out.inverse, out.decay, out.r_scale, out.k_scale,
        plan.t, plan.h, plan.chunks, BACKWARD=backward, **plan.meta(2),
    )  # fmt: skip
    return out


def _run_sequence(plan: _Plan, a: Tensor, b: Tensor, x: Tensor, x_scale: Tensor, c: Tensor, decay: Tensor,
                  start: Tensor, saved: tuple[Tensor, Tensor] | None, outputs: tuple[Tensor, ...] | None,
                  reverse: bool) -> Tensor:  # fmt: skip
    """The final state [B, H, N, N] of the recurrence that `_sequence` describes."""
    heads, n = plan.heads, plan.n
    segments = triton.cdiv(plan.chunks, plan.length)
    sizes = plan.t, plan.h, plan.chunks, plan.length, segments
    inputs = a, b, x, x_scale, c, decay
    meta: dict[str, Any] = {"BV": plan.rows, "REVERSE": reverse, "STAGES": 2, **plan.meta(2)}
    none = None, None, None, None
    starts = start
    if segments > 1:
        maps = torch.empty((heads, segments, 2 * n, n), dtype=torch.float32, device=x.device)
        grid = heads, segments, triton.cdiv(2 * n, plan.rows)
        _sequence[grid](
            *inputs, None, maps, None, None, *none, *sizes, SAVE=False, OUTPUT=False, MAP=True, **meta
        )  # fmt: skip
        starts = torch.empty((heads, segments, n, n), dtype=torch.float32, device=x.device)
        _join[(heads, triton.cdiv(n, 16))](
            maps, start, starts, segments, N=n, BN=plan.width, BV=16, REVERSE=reverse, PRECISION="ieee"
        )
    ends = torch.empty((heads, segments, n, n), dtype=torch.float32, device=x.device)
    _sequence[(heads, segments, triton.cdiv(n, plan.rows))](
        *inputs, starts, ends, *(saved or (None, None)), *(outputs or none), *sizes,
        SAVE=saved is not None, OUTPUT=outputs is not None, MAP=False, **meta,
    )  # fmt: skip
    return ends[:, 0 if reverse else -1].reshape(start.shape)


def _new_states(plan: _Plan, like: Tensor, wanted: bool = True) -> tuple[Tensor, Tensor]:
    """Room for a state per chunk, and its rows' scales."""
    dtype = torch.float32 if plan.precision == "tf32x3" else torch.float16
    heads = plan.heads if wanted else 0
    states = torch.empty((heads, plan.chunks, plan.n, plan.n), dtype=dtype, device=like.device)
    return states, torch.empty((heads, plan.chunks, plan.n), dtype=torch.float32, device=like.device)


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
    resets: Tensor | None, is_saving: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state, and for the backward pass every chunk's start state with its scales."""
    plan = _Plan.of(v)
    p = _run_prepare(plan, r, w, k, a, b, resets, backward=False)
    assert p.k is not None
    assert p.y is not None
    assert p.k_scale is not None
    y = torch.empty_like(v)
    saved = _new_states(plan, r, is_saving)
    outputs = p.r, p.r_scale, p.y, y
    end = _run_sequence(
        plan, p.a, p.b, v, p.k_scale, p.k, p.decay, state, saved if is_saving else None, outputs, reverse=False
    )
    return y, end, *saved


def _fake(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
          resets: Tensor | None, is_saving: bool) -> tuple[Tensor, ...]:  # fmt: skip
    return torch.empty_like(v), torch.empty_like(state), *_new_states(_Plan.of(v), r, is_saving)


def _backward(
    gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...], others: tuple[Any, ...], saved: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    gy, g_end = gradients
    r, w, k, v, a, b, _ = inputs
    (resets,) = others
    plan = _Plan.of(v)
    p = _run_prepare(plan, r, w, k, a, b, resets, backward=True)
    g_states = _new_states(plan, r)
    g_start = _run_sequence(
        plan, p.b, p.a, gy, p.r_scale, p.r, p.decay, g_end, g_states, None, reverse=True
    )  # fmt: skip
    grads = [torch.empty_like(x) for x in (r, w, k, v, a, b)]
    _gradients[(plan.chunks, plan.heads)](
        r,
        w,
        k,
        v,
        a,
        b,
        gy,
        resets,
        p.inverse,
        *saved,
        *g_states,
        *grads,
        plan.t,
        plan.h,
        plan.chunks,
        BV=plan.values,
        **plan.meta(4),
    )
    return *grads, g_start


_wkv7 = custom_operator("wkv7_triton", _forward, _backward, _fake, n_inputs=7, n_outputs=2)


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as the naive form, but inputs may stay in half precision; the state is float32.

    Any T and head sizes up to 128. Products are tf32 for half-precision inputs; bfloat16 would be too coarse: 3e-3 in
    y, 1e-2 in w's gradient, which is a difference of sums. For float32 inputs they are three tf32 products each, which
    overflow the registers: slow to compile and to run, so that "auto" leaves float32 to the chunked form.
    """
    y, end, *_ = _wkv7(*(x.contiguous() for x in (r, w, k, v, a, b, state)), resets)
    return y, end


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    wkv7(x, x, x, x, x, x, torch.zeros(1, 1, 64, 64, device="cuda"))[0].sum().backward()
    torch.cuda.synchronize()
