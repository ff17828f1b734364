"""RWKV-5 and 6's WKV on a GPU: chunks of 32 tokens in parallel, tensor-core products, a small serial pass over states.

Per chunk with start state S₀; tiles [L, N]; upto, before: inclusive and exclusive sums of the log-decay; end: the last:

    y = A v + (r e^before) S₀ᵀ        A[t, s] = Σ_n r_t k_s e^{before_t - upto_s} for s < t, Σ_n r_t u k_t for s = t
    S₁ = S₀ diag(e^end) + vᵀ (k e^{end - upto})

Forward: `_outer` (what each chunk adds to the state) → `_scan` (S₀ of every chunk, written over it) → `_outputs`.
Backward: `_outer` (gyᵀ (r e^before), what y sends to S₀) → `_scan` from the end (dS₁ of every chunk, over it) →
`_gradients`. Saved between the passes: the inputs, S₀ and e^end, in float32: a bfloat16 state would add an error as
large as the rounding of y itself. The decay is applied outside the products, so a long-lived state is never rounded.

Decays may be arbitrarily strong, so A is no single product of two factors. It is one masked product per level: pairs in
sibling blocks of 16 and 8 tokens meet at the siblings' border, and both factors are ≤ 1. Inside 8 tokens they meet
in the middle of the block, and one may exceed 1 by three decays at most; FLOOR keeps that finite. Exponents are sums of
the decays between two tokens, not differences of long sums: a decay of -1e4 does not blur the tiny ones after it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.custom import custom_operator

CHUNK = 32
LEVELS = tl.constexpr(2)  # sibling blocks of 1 and 2 times 8 tokens
BLOCK = tl.constexpr(8)
FLOOR = tl.constexpr(-23.0)  # of one token's log-decay: e^-23 = 1e-10, below what float32 sees; -inf is welcome
CAP = tl.constexpr(70.0)  # ≥ 3·23; only pairs outside the triangle reach it, and they are masked


@triton.jit
def _load(ptr, i, n, stride_t, stride_n, mask):  # a tile [L, N] as float32, zero outside
    return tl.load(ptr + i[:, None] * stride_t + n[None, :] * stride_n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _decays(w_ptr, i, n, stride_t, stride_n, mask, L: tl.constexpr, BN: tl.constexpr):
    """Sums of log-decays inside blocks of 8 tokens [L/8, 8, N]: through, before and after a token; totals [L/8, N]."""
    w = tl.maximum(_load(w_ptr, i, n, stride_t, stride_n, mask), FLOOR)
    w = tl.reshape(w, [L // BLOCK, BLOCK, BN])
    upto = tl.cumsum(w, 1)
    total = tl.sum(w, 1)
    return upto, upto - w, total[:, None, :] - upto, total


@triton.jit
def _earlier(x, L: tl.constexpr):  # [L/8, N]: the sum over the blocks before each
    i = tl.arange(0, L // BLOCK)
    return tl.sum(tl.where((i[:, None] > i[None, :])[:, :, None], x[None, :, :], 0.0), 1)


@triton.jit
def _later(x, L: tl.constexpr):  # [L/8, N]: the sum over the blocks after each
    i = tl.arange(0, L // BLOCK)
    return tl.sum(tl.where((i[:, None] < i[None, :])[:, :, None], x[None, :, :], 0.0), 1)


@triton.jit
def _late(level, L: tl.constexpr):  # [L/8]: is the block in the late half of its pair?
    return (tl.arange(0, L // BLOCK) >> level) % 2 == 1


@triton.jit
def _between(level, L: tl.constexpr):  # [L/8, L/8]: is block j between block i and the border inside i's pair?
    i = tl.arange(0, L // BLOCK)[:, None]
    j = tl.arange(0, L // BLOCK)[None, :]
    return (i >> level == j >> level) & (((i >> level) % 2 == 1) == (j < i)) & (i != j)


@triton.jit
def _meet(r, k, rise, fall, total, level, L: tl.constexpr, BN: tl.constexpr):
    """r of the late and k of the early halves, and their decays to the border inside their pair: [L, N] each."""
    late = _late(level, L)[:, None, None]
    far = tl.exp(tl.sum(tl.where(_between(level, L)[:, :, None], total[None, :, :], 0.0), 1))
    factor = tl.reshape(tl.where(late, rise, fall) * far[:, None, :], [L, BN])
    return tl.where(((tl.arange(0, L) // BLOCK >> level) % 2 == 1)[:, None], r, k), factor


@triton.jit
def _pairs(level, L: tl.constexpr):  # [L, L]: one token in the late, one in the early half of the same pair
    i = tl.arange(0, L) // BLOCK >> level
    return (i[:, None] ^ i[None, :]) == 1


@triton.jit
def _to_middle(before, upto, L: tl.constexpr, BN: tl.constexpr):
    """r's and k's factors [L, N] inside blocks: to and from the middle of the block, so one of a pair may exceed 1."""
    half = (tl.arange(0, BLOCK) == BLOCK // 2 - 1)[None, :, None]
    middle = tl.sum(tl.where(half, upto, 0.0), 1)[:, None, :]
    rise = tl.reshape(tl.exp(tl.minimum(before - middle, CAP)), [L, BN])
    return rise, tl.reshape(tl.exp(tl.minimum(middle - upto, CAP)), [L, BN])


@triton.jit
def _blocks(x, L: tl.constexpr, BN: tl.constexpr):  # [L, N] → [L/8, N]: sums over blocks
    return tl.sum(tl.reshape(x, [L // BLOCK, BLOCK, BN]), 1)


@triton.jit
def documents(resets_ptr, first, i, left):
    """Which document of the chunk each token belongs to [L], and the last one; 0 is the one that began before it.

    first: where the chunk's tokens begin in `resets` [B, T].
    """
    if resets_ptr is None:
        return i * 0, 0
    else:
        document = tl.cumsum(tl.load(resets_ptr + first + i, mask=i < left, other=0).to(tl.int32), 0)
        return document, tl.max(document, 0)


@triton.jit
def _where(T, H, chunks, w_b, w_t, w_h, N: tl.constexpr, L: tl.constexpr):
    """This program's chunk: its number, head, tokens left from its first on, and where the inputs and w start.

    Heads vary fastest, so programs that run together read whole rows of the inputs.
    """
    number = tl.program_id(0)
    head = number % H
    batch = (number // H // chunks).to(tl.int64)
    first = (number // H % chunks) * L
    start = ((batch * T + first) * H + head) * N
    return number.to(tl.int64), head, T - first, start, batch * w_b + first.to(tl.int64) * w_t + head * w_h


@triton.jit
def _outer(
    x_ptr, w_ptr, v_ptr, resets_ptr, s_ptr, d_ptr, w_b, w_t, w_h, w_n, T, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, READS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s = vᵀ (x e^before) if READS, else vᵀ (x e^{end - upto}) and d = e^end."""
    number, _, left, start, start_w = _where(T, H, chunks, w_b, w_t, w_h, N, L)
    i, n = tl.arange(0, L), tl.arange(0, BN)
    mask = (i[:, None] < left) & (n[None, :] < N)
    _, before, after, total = _decays(w_ptr + start_w, i, n, w_t, w_n, mask, L, BN)
    document, last = documents(resets_ptr, start // (H * N), i, left)
    if READS:
        factor = tl.exp(before + _earlier(total, L)[:, None, :])
    else:
        factor = tl.exp(after + _later(total, L)[:, None, :])
        decay = tl.where(last == 0, tl.exp(tl.sum(total, 0)), 0.0)
        tl.store(d_ptr + number * N + n, decay, mask=n < N)
    x = _load(x_ptr + start, i, n, H * N, 1, mask) * tl.reshape(factor, [L, BN])
    x = tl.where((document == (0 if READS else last))[:, None], x, 0.0)
    v = _load(v_ptr + start, i, n, H * N, 1, mask)
    s = tl.dot(tl.trans(v), x, input_precision=PRECISION)
    tl.store(s_ptr + number * N * N + n[:, None] * N + n[None, :], s, mask=(n[:, None] < N) & (n[None, :] < N))


@triton.jit
def _scan(
    s_ptr, d_ptr, start_ptr, end_ptr, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """S ← S diag(d) + s over a head's chunks, writing each chunk's S from before the update over its s."""
    bh, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, n = block * BV + tl.arange(0, BV), tl.arange(0, BN)
    mask = (rows[:, None] < N) & (n[None, :] < N)
    tile = rows[:, None] * N + n[None, :]
    state = tl.load(start_ptr + bh * N * N + tile, mask=mask, other=0.0)
    for step in tl.range(0, chunks, num_stages=STAGES):  # loads run ahead of the one multiplication per step
        number = (bh // H * chunks + (chunks - 1 - step if REVERSE else step)) * H + bh % H
        new = tl.load(s_ptr + number * N * N + tile, mask=mask, other=0.0)
        decay = tl.load(d_ptr + number * N + n, mask=n < N, other=0.0)
        tl.store(s_ptr + number * N * N + tile, state, mask=mask)
        state = state * decay[None, :] + new
    tl.store(end_ptr + bh * N * N + tile, state, mask=mask)


@triton.jit
def _apply(
    r_ptr, w_ptr, k_ptr, u_ptr, resets_ptr, first, s_ptr, x_ptr, y_ptr, w_t, w_n, left, H,
    N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = A x + (r e^before) Sᵀ of one chunk; if BACK, y = Aᵀ x + (k e^{end - upto}) Sᵀ. Pointers are the chunk's."""
    i, m = tl.arange(0, L), tl.arange(0, BN)  # tokens, value channels
    if BACK:
        ordered = i[:, None] < i[None, :]
    else:
        ordered = i[:, None] > i[None, :]
    document, last = documents(resets_ptr, first, i, left)
    ordered = ordered & (document[:, None] == document[None, :])
    linked = (document == (last if BACK else 0))[:, None]  # tokens that S₁ sees, or that see S₀
    scores = tl.zeros([L, L], tl.float32)
    bonus = tl.zeros([L], tl.float32)
    y = tl.zeros([L, BN], tl.float32)
    for c in tl.range(0, BN // BC, num_stages=1):  # key channels
        n = c * BC + tl.arange(0, BC)
        mask = (i[:, None] < left) & (n[None, :] < N)
        upto, before, after, total = _decays(w_ptr, i, n, w_t, w_n, mask, L, BC)
        r = _load(r_ptr, i, n, H * N, 1, mask)
        k = _load(k_ptr, i, n, H * N, 1, mask)
        u = tl.load(u_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        bonus += tl.sum(r * u[None, :] * k, 1)
        rise, fall = _to_middle(before, upto, L, BC)
        if BACK:
            product = tl.dot(k * fall, tl.trans(r * rise), input_precision=PRECISION)
        else:
            product = tl.dot(r * rise, tl.trans(k * fall), input_precision=PRECISION)
        scores += tl.where(ordered & (i[:, None] // BLOCK == i[None, :] // BLOCK), product, 0.0)
        before, after = tl.exp(before), tl.exp(after)
        for level in tl.range(0, LEVELS, num_stages=1):
            z, factor = _meet(r, k, before, after, total, level, L, BC)
            z *= factor
            product = tl.dot(z, tl.trans(z), input_precision=PRECISION)
            scores += tl.where(_pairs(level, L) & ordered, product, 0.0)
        if BACK:
            q = k * tl.reshape(after * tl.exp(_later(total, L))[:, None, :], [L, BC])
        else:
            q = r * tl.reshape(before * tl.exp(_earlier(total, L))[:, None, :], [L, BC])
        s = tl.load(s_ptr + m[:, None] * N + n[None, :], mask=(m[:, None] < N) & (n[None, :] < N), other=0.0)
        y = tl.dot(tl.where(linked, q, 0.0), tl.trans(s), y, input_precision=PRECISION)
    mask = (i[:, None] < left) & (m[None, :] < N)
    scores = tl.where(i[:, None] == i[None, :], bonus[:, None], scores)
    y = tl.dot(scores, _load(x_ptr, i, m, H * N, 1, mask), y, input_precision=PRECISION)
    tl.store(y_ptr + i[:, None] * (H * N) + m[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _outputs(
    r_ptr, w_ptr, k_ptr, v_ptr, u_ptr, resets_ptr, s_ptr, y_ptr, w_b, w_t, w_h, w_n, T, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    number, head, left, start, start_w = _where(T, H, chunks, w_b, w_t, w_h, N, L)
    _apply(
        r_ptr + start, w_ptr + start_w, k_ptr + start, u_ptr + head * N, resets_ptr, start // (H * N),
        s_ptr + number * N * N, v_ptr + start, y_ptr + start, w_t, w_n, left, H, N, BN, BC, L, False, PRECISION,
    )  # fmt: skip


@triton.jit
def _gradients(
    r_ptr, w_ptr, k_ptr, v_ptr, u_ptr, gy_ptr, resets_ptr, s_ptr, gs_ptr, gr_ptr, gw_ptr, gk_ptr, gv_ptr, gu_ptr,
    w_b, w_t, w_h, w_n, T, H, chunks,
    N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All input gradients of a chunk from its start state S₀ and the gradient dS₁ of its end state.

    A decay's gradient is the sum over the (query, key) pairs around it. Each factor hands its gradient to the decays it
    is the sum of, so that other pairs never enter and need not cancel (but inside blocks of 8 tokens, where they do).
    """
    number, head, left, start, start_w = _where(T, H, chunks, w_b, w_t, w_h, N, L)
    _apply(
        r_ptr + start, w_ptr + start_w, k_ptr + start, u_ptr + head * N, resets_ptr, start // (H * N),
        gs_ptr + number * N * N, gy_ptr + start, gv_ptr + start, w_t, w_n, left, H, N, BN, BC, L, True, PRECISION,
    )  # fmt: skip

    i, m = tl.arange(0, L), tl.arange(0, BN)  # tokens, value channels
    filled = (i[:, None] < left) & (m[None, :] < N)
    lower, upper = i[:, None] > i[None, :], i[:, None] < i[None, :]
    same = i[:, None] // BLOCK == i[None, :] // BLOCK
    gy = _load(gy_ptr + start, i, m, H * N, 1, filled)
    v = _load(v_ptr + start, i, m, H * N, 1, filled)
    g_bonus = tl.sum(gy * v, 1)[:, None]
    # The gradient of A below the diagonal, its mirror image above: one product then serves late and early tokens.
    g = tl.dot(gy, tl.trans(v), input_precision=PRECISION)
    g = tl.where(lower, g, tl.dot(v, tl.trans(gy), input_precision=PRECISION))
    document, last = documents(resets_ptr, start // (H * N), i, left)
    g = tl.where(document[:, None] == document[None, :], g, 0.0)
    opens, closes = (document == 0)[:, None], (document == last)[:, None]

    for c in tl.range(0, BN // BC, num_stages=1):  # key channels
        n = c * BC + tl.arange(0, BC)
        mask = (i[:, None] < left) & (n[None, :] < N)
        upto, before, after, total = _decays(w_ptr + start_w, i, n, w_t, w_n, mask, L, BC)
        r = _load(r_ptr + start, i, n, H * N, 1, mask)
        k = _load(k_ptr + start, i, n, H * N, 1, mask)

        rise, fall = _to_middle(before, upto, L, BC)
        gr = tl.dot(tl.where(same & lower, g, 0.0), k * fall, input_precision=PRECISION) * rise
        gk = tl.dot(tl.where(same & upper, g, 0.0), r * rise, input_precision=PRECISION) * fall

        # The reads of S₀ and the writes to S₁. g_total [L/8, N]: the gradient of each block's whole decay.
        square = number * N * N + m[:, None] * N + n[None, :]
        inside = (m[:, None] < N) & (n[None, :] < N)
        s = tl.load(s_ptr + square, mask=inside, other=0.0)
        gs = tl.load(gs_ptr + square, mask=inside, other=0.0)
        before, after = tl.exp(before), tl.exp(after)
        through = tl.where(last == 0, tl.sum(s * gs, 0) * tl.exp(tl.sum(total, 0)), 0.0)
        g_total = through[None, :] - _blocks(k * gk, L, BC)
        factor = tl.reshape(before * tl.exp(_earlier(total, L))[:, None, :], [L, BC])
        gz = tl.dot(_load(gy_ptr + start, i, m, H * N, 1, filled), s, input_precision=PRECISION)
        gz = tl.where(opens, gz * factor, 0.0)
        g_total += _later(_blocks(r * gz, L, BC), L)
        gr += gz
        factor = tl.reshape(after * tl.exp(_later(total, L))[:, None, :], [L, BC])
        gz = tl.dot(_load(v_ptr + start, i, m, H * N, 1, filled), gs, input_precision=PRECISION)
        gz = tl.where(closes, gz * factor, 0.0)
        g_total += _earlier(_blocks(k * gz, L, BC), L)
        gk += gz

        for level in tl.range(0, LEVELS, num_stages=1):
            x, factor = _meet(r, k, before, after, total, level, L, BC)
            gz = tl.dot(tl.where(_pairs(level, L), g, 0.0), x * factor, input_precision=PRECISION) * factor
            late = ((i // BLOCK >> level) % 2 == 1)[:, None]
            gr += tl.where(late, gz, 0.0)
            gk += tl.where(late, 0.0, gz)
            crossed = _blocks(x * gz, L, BC)
            g_total += tl.sum(tl.where(_between(level, L)[:, :, None], crossed[:, None, :], 0.0), 0)

        # w_s enters `before` of the later tokens of its block, `upto` from s on, and `after` of the earlier ones
        g_before, g_after = r * gr, k * gk
        g_total += _blocks(g_after, L, BC)
        suffix = tl.reshape(g_before - g_after, [L // BLOCK, BLOCK, BC])
        suffix = suffix - tl.cumsum(suffix, 1) + (tl.sum(suffix, 1) + g_total)[:, None, :]
        tile = start + i[:, None] * (H * N) + n[None, :]
        gw = tl.reshape(suffix, [L, BC]) - g_before
        tl.store(gw_ptr + tile, gw.to(gw_ptr.dtype.element_ty), mask=mask)

        u = tl.load(u_ptr + head * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(gr_ptr + tile, (gr + u * k * g_bonus).to(gr_ptr.dtype.element_ty), mask=mask)
        tl.store(gk_ptr + tile, (gk + u * r * g_bonus).to(gk_ptr.dtype.element_ty), mask=mask)
        tl.store(gu_ptr + number * N + n, tl.sum(r * k * g_bonus, 0), mask=n < N)


class _Sizes:
    """Tile sizes and warps of the kernels for heads of n channels."""

    def __init__(self, n: int) -> None:
        width = max(16, triton.next_power_of_2(n))
        self.tile = {"N": n, "BN": width, "L": CHUNK, "num_warps": 2 if width <= 64 else 4}
        self.keys = min(width, 32)  # key channels at a time: more do not fit the registers
        self.scan = {"N": n, "BN": width, "BV": max(1, 512 // width), "STAGES": 6, "num_warps": 4}


def _new_states(r: Tensor, wanted: bool = True) -> tuple[Tensor, Tensor]:
    """Room for each chunk's start state and its decay."""
    batch, t, h, n = r.shape
    shape = (batch if wanted else 0, triton.cdiv(t, CHUNK), h, n)
    return tuple(torch.empty(s, dtype=torch.float32, device=r.device) for s in ((*shape, n), shape))  # type: ignore[return-value]


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor,
    resets: Tensor | None, precision: str, is_saving: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state, and for the backward pass every chunk's start state and decay."""
    batch, t, h, n = r.shape
    chunks, sizes = triton.cdiv(t, CHUNK), _Sizes(n)
    grid, shape = (batch * chunks * h,), (*w.stride(), t, h, chunks)
    s, decay = _new_states(r)
    end, y = torch.empty_like(state), torch.empty_like(v)
    meta = {**sizes.tile, "PRECISION": precision}
    scan_grid = (batch * h, triton.cdiv(n, sizes.scan["BV"]))
    _outer[grid](k, w, v, resets, s, decay, *shape, READS=False, **meta)
    _scan[scan_grid](s, decay, state, end, h, chunks, REVERSE=False, **sizes.scan)
    _outputs[grid](r, w, k, v, u, resets, s, y, *shape, BC=sizes.keys, **meta)
    return y, end, *((s, decay) if is_saving else _new_states(r, wanted=False))


def _fake(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor,
          resets: Tensor | None, precision: str, is_saving: bool) -> tuple[Tensor, ...]:  # fmt: skip
    return torch.empty_like(v), torch.empty_like(state), *_new_states(r, is_saving)


def _backward(
    gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...], others: tuple[Any, ...], saved: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    gy, g_end = gradients
    r, w, k, v, u, _ = inputs
    resets, precision = others
    s, decay = saved
    batch, t, h, n = r.shape
    chunks, sizes = triton.cdiv(t, CHUNK), _Sizes(n)
    grid, shape = (batch * chunks * h,), (*w.stride(), t, h, chunks)
    gs, g_start = torch.empty_like(s), torch.empty_like(g_end)
    meta = {**sizes.tile, "PRECISION": precision}
    scan_grid = (batch * h, triton.cdiv(n, sizes.scan["BV"]))
    _outer[grid](r, w, gy, resets, gs, decay, *shape, READS=True, **meta)
    _scan[scan_grid](gs, decay, g_end, g_start, h, chunks, REVERSE=True, **sizes.scan)
    gr, gk, gv = (torch.empty_like(x) for x in (r, k, v))
    gw = torch.empty(w.shape, dtype=w.dtype, device=w.device)  # w itself may be an expanded constant
    gu = torch.empty_like(decay)
    _gradients[grid](r, w, k, v, u, gy, resets, s, gs, gr, gw, gk, gv, gu, *shape, BC=sizes.keys, **meta)
    return gr, gw, gk, gv, gu.sum((0, 1)).to(u.dtype), g_start


_wkv6 = custom_operator("wkv6_triton", _forward, _backward, _fake, n_inputs=6, n_outputs=2)


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    resets: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as the naive form, but inputs may stay in half precision; the state is float32.

    Any T and head sizes up to 128; w may be an expanded constant (RWKV-5), which is not copied.
    precision: of the products, "tf32" by default; for float32 inputs "tf32x3", float32's accuracy on tensor cores.
    "ieee" avoids them, slowly.
    """
    precision = precision or ("tf32x3" if v.dtype == torch.float32 else "tf32")
    r, k, v, u, state = (x.contiguous() for x in (r, k, v, u, state))
    y, end, *_ = _wkv6(r, w, k, v, u, state, resets, precision)
    return y, end


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    u, state = torch.zeros(1, 64, device="cuda"), torch.zeros(1, 1, 64, 64, device="cuda")
    wkv6(x, x, x, x, u, state)[0].sum().backward()
    torch.cuda.synchronize()
