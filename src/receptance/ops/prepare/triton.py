"""RWKV-7's decay, keys and value residual in Triton: one kernel forward, one backward that makes everything again."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.prepare import MIN_LOG_DECAY, MIN_NORM
from receptance.ops.shares.triton import common_dtype, stages, sum_shares

TILE, WARPS = 1024, 4  # elements of a tile: 16 bytes of bfloat16 a thread
COLS = 64  # channels of a tile where heads do not matter
PROGRAMS = 1056  # of a backward pass: each sums its tiles' share of the gradients of vectors before it writes them


@triton.jit
def _tile(i, rows, C, N, BR: tl.constexpr, BN: tl.constexpr):
    """The i-th BR rows × one head (or N channels): (column, offsets, mask of columns, mask)."""
    row = i * BR + tl.arange(0, BR)
    n = tl.arange(0, BN)
    c = tl.program_id(1) * N + n
    inside = (n < N) & (c < C)
    return c, row[:, None].to(tl.int64) * C + c[None, :], inside, (row < rows)[:, None] & inside[None, :]


@triton.jit
def _load(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, at, x, mask):
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _keys_of(w_ptr, k_ptr, a_ptr, w0_ptr, a0_ptr, kk_ptr, ka_ptr, c, at, inside, mask, MIN_NORM: tl.constexpr):
    """σ of the decay, k, rate, k_k, k_a, 1 / norm, whether the norm counts, removal key."""
    k = _load(k_ptr, at, mask)
    k_k, k_a = _load(kk_ptr, c, inside)[None, :], _load(ka_ptr, c, inside)[None, :]
    decay = tl.sigmoid(_load(w_ptr, at, mask) + _load(w0_ptr, c, inside)[None, :])
    rate = tl.sigmoid(_load(a_ptr, at, mask) + _load(a0_ptr, c, inside)[None, :])
    key = k * k_k
    norm = tl.sqrt(tl.sum(key * key, 1))[:, None]
    inverse = 1.0 / tl.maximum(norm, MIN_NORM)
    return decay, k, rate, k_k, k_a, inverse, norm > MIN_NORM, key * inverse


@triton.jit
def _by_head(i, rows, C, N, BR: tl.constexpr):
    """Offsets and mask of the i-th BR rows of a head in [rows, C / N]."""
    row = i * BR + tl.arange(0, BR)
    return row * (C // N) + tl.program_id(1), row < rows


@triton.jit
def _keys(w_ptr, k_ptr, a_ptr, r_ptr, w0_ptr, a0_ptr, kk_ptr, ka_ptr, rk_ptr, out_w, out_k, out_a, out_b, bonus_ptr,
          rows, C, N,
          LOW: tl.constexpr, MIN_NORM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    c, at, inside, mask = _tile(tl.program_id(0), rows, C, N, BR, BN)
    decay, k, rate, _, k_a, _, _, kk = _keys_of(
        w_ptr, k_ptr, a_ptr, w0_ptr, a0_ptr, kk_ptr, ka_ptr, c, at, inside, mask, MIN_NORM
    )
    _store(out_w, at, LOW * decay, mask)
    k *= 1.0 + (rate - 1.0) * k_a
    _store(out_k, at, k, mask)
    _store(out_a, at, -kk, mask)
    _store(out_b, at, kk * rate, mask)
    if r_ptr is not None:
        place, valid = _by_head(tl.program_id(0), rows, C, N, BR)
        _store(bonus_ptr, place, tl.sum(_load(r_ptr, at, mask) * k * _load(rk_ptr, c, inside)[None, :], 1), valid)


@triton.jit
def _keys_backward(w_ptr, k_ptr, a_ptr, r_ptr, w0_ptr, a0_ptr, kk_ptr, ka_ptr, rk_ptr, gw_ptr, gk_ptr, ga_ptr, gb_ptr,
                   gr_ptr, g_bonus_ptr, out_w, out_k, out_a, out_r, partial_ptr, rows, C, N, SPAN,
                   LOW: tl.constexpr, MIN_NORM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    sum_w, sum_a = tl.zeros((BR, BN), tl.float32), tl.zeros((BR, BN), tl.float32)
    sum_kk, sum_ka = tl.zeros((BR, BN), tl.float32), tl.zeros((BR, BN), tl.float32)
    sum_rk = tl.zeros((BR, BN), tl.float32)
    for i in tl.range(0, SPAN, num_stages=STAGES):
        c, at, inside, mask = _tile(tl.program_id(0) * SPAN + i, rows, C, N, BR, BN)
        decay, k, rate, k_k, k_a, inverse, counts, kk = _keys_of(
            w_ptr, k_ptr, a_ptr, w0_ptr, a0_ptr, kk_ptr, ka_ptr, c, at, inside, mask, MIN_NORM
        )
        g_decay = _load(gw_ptr, at, mask) * LOW * decay * (1.0 - decay)
        gk, gb = _load(gk_ptr, at, mask), _load(gb_ptr, at, mask)
        if r_ptr is not None:
            place, valid = _by_head(tl.program_id(0) * SPAN + i, rows, C, N, BR)
            g_bonus = _load(g_bonus_ptr, place, valid)[:, None]
            r, scaled = _load(r_ptr, at, mask), g_bonus * _load(rk_ptr, c, inside)[None, :]
            new_k = k * (1.0 + (rate - 1.0) * k_a)
            _store(out_r, at, _load(gr_ptr, at, mask) + scaled * new_k, mask)
            gk += scaled * r
            sum_rk += g_bonus * r * new_k
        g_kk = gb * rate - _load(ga_ptr, at, mask)
        g_rate = (gb * kk + gk * k * k_a) * rate * (1.0 - rate)
        along = tl.where(counts, tl.sum(kk * g_kk, 1)[:, None], 0.0)
        g_key = (g_kk - kk * along) * inverse
        _store(out_w, at, g_decay, mask)
        _store(out_k, at, gk * (1.0 + (rate - 1.0) * k_a) + g_key * k_k, mask)
        _store(out_a, at, g_rate, mask)
        sum_w += g_decay
        sum_a += g_rate
        sum_kk += g_key * k
        sum_ka += gk * k * (rate - 1.0)
    c, _, inside, _ = _tile(0, rows, C, N, BR, BN)
    partial_ptr += tl.program_id(0) * 5 * C + c
    tl.store(partial_ptr, tl.sum(sum_w, 0), mask=inside)
    tl.store(partial_ptr + C, tl.sum(sum_a, 0), mask=inside)
    tl.store(partial_ptr + 2 * C, tl.sum(sum_kk, 0), mask=inside)
    tl.store(partial_ptr + 3 * C, tl.sum(sum_ka, 0), mask=inside)
    tl.store(partial_ptr + 4 * C, tl.sum(sum_rk, 0), mask=inside)


@triton.jit
def _residual(v_ptr, first_ptr, gate_ptr, v0_ptr, out, rows, C, N, BR: tl.constexpr, BN: tl.constexpr):
    c, at, inside, mask = _tile(tl.program_id(0), rows, C, N, BR, BN)
    v, first = _load(v_ptr, at, mask), _load(first_ptr, at, mask)
    share = tl.sigmoid(_load(gate_ptr, at, mask) + _load(v0_ptr, c, inside)[None, :])
    _store(out, at, v + (first - v) * share, mask)


@triton.jit
def _residual_backward(v_ptr, first_ptr, gate_ptr, v0_ptr, g_ptr, more_ptr, g_first_ptr,
                       out_v, out_first, out_gate, partial_ptr, rows, C, N, SPAN,
                       BR: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    total = tl.zeros((BR, BN), tl.float32)
    for i in range(SPAN):
        c, at, inside, mask = _tile(tl.program_id(0) * SPAN + i, rows, C, N, BR, BN)
        v, first, g = _load(v_ptr, at, mask), _load(first_ptr, at, mask), _load(g_ptr, at, mask)
        share = tl.sigmoid(_load(gate_ptr, at, mask) + _load(v0_ptr, c, inside)[None, :])
        if more_ptr is not None:
            g += _load(more_ptr, at, mask)
        g_gate = g * (first - v) * share * (1.0 - share)
        g_first = g * share
        if g_first_ptr is not None:
            g_first += _load(g_first_ptr, at, mask)
        _store(out_v, at, g * (1.0 - share), mask)
        _store(out_first, at, g_first, mask)
        _store(out_gate, at, g_gate, mask)
        total += g_gate
    c, _, inside, _ = _tile(0, rows, C, N, BR, BN)
    tl.store(partial_ptr + tl.program_id(0) * C + c, tl.sum(total, 0), mask=inside)


def _launch(rows: int, c: int, n: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and sizes for tiles of n channels (a head)."""
    width = triton.next_power_of_2(n)
    height = max(1, TILE // width)
    return (triton.cdiv(rows, height), triton.cdiv(c, n)), {"BR": height, "BN": width, "num_warps": WARPS}


def _launch_backward(rows: int, c: int, n: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The same with several tiles to a program."""
    (tiles, across), meta = _launch(rows, c, n)
    span = triton.cdiv(tiles, max(1, PROGRAMS // across))
    return (triton.cdiv(tiles, span), across), {"SPAN": span, **meta}


_LIMITS = {"LOW": MIN_LOG_DECAY, "MIN_NORM": MIN_NORM}


Reading = tuple[Tensor, Tensor] | None  # r [B, T, H, N] and r_k [H, N]


def _run_keys(
    w: Tensor, k: Tensor, a: Tensor, vectors: tuple[Tensor, ...], reading: Reading
) -> tuple[list[Tensor], Tensor | None]:
    """w, k, a, b, and the bonus [B, T, H]."""
    b, t, h, n = k.shape
    outs = [torch.empty_like(k) for _ in range(4)]
    r, r_k = reading or (None, None)
    bonus = None if r is None else torch.empty(b, t, h, dtype=torch.float32, device=k.device)
    grid, meta = _launch(b * t, h * n, n)
    _keys[grid](w, k, a, r, *vectors, r_k, *outs, bonus, b * t, h * n, n, **_LIMITS, **meta)
    return outs, bonus


def _run_keys_backward(
    grads: tuple[Tensor, ...], w: Tensor, k: Tensor, a: Tensor, vectors: tuple[Tensor, ...], reading: Reading,
    g_reading: Reading, dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor | None, Tensor]:  # fmt: skip
    """Gradients of w, k, a; of r; [5, C]: of the vectors and r_k. g_reading: those of r so far, and of the bonus."""
    b, t, h, n = k.shape
    outs = [torch.empty_like(x) for x in (w, k, a)]
    r, r_k = reading or (None, None)
    out_r = None if r is None else torch.empty_like(r)
    grid, meta = _launch_backward(b * t, h * n, n)
    partial = torch.empty(grid[0], 5, h * n, dtype=torch.float32, device=k.device)
    _keys_backward[grid](w, k, a, r, *vectors, r_k, *grads, *(g_reading or (None, None)), *outs, out_r, partial,
                         b * t, h * n, n, STAGES=stages(9, meta["BR"] * meta["BN"], k.element_size()), **_LIMITS,
                         **meta)  # fmt: skip
    return outs, out_r, sum_shares(partial, dtype)


def _make_keys(
    w: Tensor, k: Tensor, a: Tensor, w0: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outs, _ = _run_keys(w, k, a, (w0, a0, k_k, k_a), None)
    return outs[0], outs[1], outs[2], outs[3]


def _key_gradients(
    gw: Tensor, gk: Tensor, ga: Tensor, gb: Tensor,
    w: Tensor, k: Tensor, a: Tensor, w0: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of w, k, a, and [4, C]: of the vectors."""
    outs, _, sums = _run_keys_backward((gw, gk, ga, gb), w, k, a, (w0, a0, k_k, k_a), None, None)
    return outs[0], outs[1], outs[2], sums[:4].clone()


_decay_and_keys = torch.library.custom_op("receptance::decay_and_keys", _make_keys, mutates_args=())
_decay_and_keys_backward = torch.library.custom_op(
    "receptance::decay_and_keys_backward", _key_gradients, mutates_args=()
)


@_decay_and_keys.register_fake
def _(w, k, a, w0, a0, k_k, k_a):
    return tuple(torch.empty_like(k) for _ in range(4))


@_decay_and_keys_backward.register_fake
def _(gw, gk, ga, gb, w, k, a, w0, a0, k_k, k_a):
    partial = torch.empty(4, k.shape[2] * k.shape[3], dtype=torch.float32, device=k.device)
    return torch.empty_like(w), torch.empty_like(k), torch.empty_like(a), partial


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_keys(ctx, *grads):
    saved = ctx.saved_tensors  # may be asked for once: activation checkpointing makes them then
    *tensors, vectors = _decay_and_keys_backward(*(g.contiguous() for g in grads), *saved)
    return *tensors, *(g.view_as(p).to(p.dtype) for g, p in zip(vectors.unbind(), saved[3:]))


_decay_and_keys.register_autograd(_differentiate_keys, setup_context=_keep)


class _KeysAndBonus(torch.autograd.Function):
    """Not an operator of torch.library: r passes through, so that the kernel adds its gradients."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, k: Tensor, a: Tensor, r: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(w, k, a, r, *vectors)
        ctx.set_materialize_grads(False)
        with torch.cuda.device_of(k):
            outs, bonus = _run_keys(w, k, a, vectors[:4], (r, vectors[4]))
        assert bonus is not None
        return *outs, r, bonus

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        w, k, a, r, *vectors = ctx.saved_tensors
        given = [torch.zeros_like(k) if g is None else g.contiguous() for g in grads[:5]]
        g_bonus = r.new_zeros(r.shape[:3]) if grads[5] is None else grads[5].contiguous()
        with torch.cuda.device_of(k):
            outs, out_r, sums = _run_keys_backward(
                tuple(given[:4]),
                w,
                k,
                a,
                tuple(vectors[:4]),
                (r, vectors[4]),
                (given[4], g_bonus),
                common_dtype(*vectors),
            )
        return *outs, out_r, *(g.view_as(p).to(p.dtype) for g, p in zip(sums.unbind(), vectors))


def _make_value(v: Tensor, first: Tensor, gate: Tensor, v0: Tensor) -> Tensor:
    out = torch.empty_like(v)
    rows, c = v.shape[0] * v.shape[1], v.shape[2]
    grid, meta = _launch(rows, c, COLS)
    _residual[grid](v, first, gate, v0, out, rows, c, COLS, **meta)
    return out


def _value_gradients(
    g: Tensor, v: Tensor, first: Tensor, gate: Tensor, v0: Tensor, more: Tensor | None = None,
    g_first: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of v, first, gate, v0. more, g_first: what else reached the result and `first`."""
    outs = [torch.empty_like(x) for x in (v, first, gate)]
    rows, c = v.shape[0] * v.shape[1], v.shape[2]
    grid, meta = _launch_backward(rows, c, COLS)
    partial = torch.empty(grid[0], 1, c, dtype=torch.float32, device=v.device)
    _residual_backward[grid](v, first, gate, v0, g, more, g_first, *outs, partial, rows, c, COLS, **meta)
    return outs[0], outs[1], outs[2], sum_shares(partial, v0.dtype).view_as(v0)


_value_residual = torch.library.custom_op("receptance::value_residual", _make_value, mutates_args=())
_value_residual_backward = torch.library.custom_op(
    "receptance::value_residual_backward", _value_gradients, mutates_args=()
)


@_value_residual.register_fake
def _(v, first, gate, v0):
    return torch.empty_like(v)


@_value_residual_backward.register_fake
def _(g, v, first, gate, v0, more=None, g_first=None):
    return torch.empty_like(v), torch.empty_like(first), torch.empty_like(gate), torch.empty_like(v0)


def _differentiate_value(ctx, g):
    return _value_residual_backward(g.contiguous(), *ctx.saved_tensors)


_value_residual.register_autograd(_differentiate_value, setup_context=_keep)


class _ValueTwice(torch.autograd.Function):
    """The result twice, and `first` passed on to the next layer: the kernel adds all their gradients."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, first: Tensor, gate: Tensor, v0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(v, first, gate, v0)
        ctx.set_materialize_grads(False)
        with torch.cuda.device_of(v):
            out = _make_value(v, first, gate, v0)
        return out, out.data, first

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        g, more, g_first = (None if x is None else x.contiguous() for x in grads)
        if g is None:
            g, more = torch.zeros_like(saved[0]) if more is None else more, None
        arguments = g, *saved, more, g_first
        with torch.cuda.device_of(g):
            return _value_gradients(*arguments)


def decay_and_keys(
    w: Tensor, k: Tensor, a: Tensor, w0: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same contract as the plain form; all come back in k's dtype."""
    return _decay_and_keys(w.contiguous(), k.contiguous(), a.contiguous(), w0, a0, k_k, k_a)


def keys_and_bonus(
    w: Tensor, k: Tensor, a: Tensor, r: Tensor, w0: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, r_k: Tensor
) -> tuple[Tensor, ...]:
    """Same contract as the plain form; w, k, a, b come back in k's dtype, the bonus in float32."""
    tensors = (x.contiguous() for x in (w, k, a, r))
    return _KeysAndBonus.apply(*tensors, w0, a0, k_k, k_a, r_k.contiguous())


def value_residual(v: Tensor, first: Tensor, gate: Tensor, v0: Tensor) -> Tensor:
    """Same contract as the plain form."""
    return _value_residual(v.contiguous(), first.contiguous(), gate.contiguous(), v0)


def value_residual_twice(v: Tensor, first: Tensor, gate: Tensor, v0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the plain form."""
    return _ValueTwice.apply(v.contiguous(), first.contiguous(), gate.contiguous(), v0)


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    draw = lambda *shape: torch.ones(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    w, k, v = draw(1, 2, 64), draw(1, 2, 1, 64), draw(64)
    sum(y.sum() for y in decay_and_keys(w, k, w, v, v, v, v)).backward()
    sum(y.sum() for y in keys_and_bonus(w, k, w, k, v, v, v, v, draw(1, 64))).backward()
    value_residual(w, w, w, v).sum().backward()
    value_residual_twice(w, w, w, v)[0].sum().backward()
    torch.cuda.synchronize()
