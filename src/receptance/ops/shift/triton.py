"""Token shift and mixes in Triton, alone or behind the residual addition and layer norm whose result they mix.

A program walks along rows of C channels, the row before (backward: after) in registers, so nothing between the residual
sum and the mixes goes through memory, and gradients of several mixes are read once.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.shares.triton import common_dtype, stages, sum_shares

MOST = 6
SPAN = 16  # rows of a program; the one before them is read twice
CHANNELS = 256  # of a warp of the backward pass
PROGRAMS = 528  # of the backward pass, each with its share of the gradients of vectors: four per multiprocessor


@triton.jit
def _load(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, at, x, mask):
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row(c, C, valid):
    """The mask of a row of C channels, empty unless valid."""
    return c < tl.where(valid, C, 0)


@triton.jit
def _opens(resets_ptr, row, valid):
    """Whether a row of [B·T] begins a document, and so has no previous one."""
    if resets_ptr is None:
        return row < 0
    else:
        return tl.load(resets_ptr + row, mask=valid, other=0).to(tl.int32) != 0


@triton.jit
def _share(mix_ptr, own_ptr, j: tl.constexpr, at, c, inside, mask, rows, C, PRESENT: tl.constexpr):
    """The share of the previous position in mix j."""
    mu = _load(mix_ptr, j * C + c, inside)
    if own_ptr is not None:
        mu += _load(own_ptr + j * rows.to(tl.int64) * C, at, mask)
    return 1.0 - mu if PRESENT else mu


@triton.jit
def _sum_of(x_ptr, delta_ptr, at, mask):
    """x, or x + delta as rounded where it is kept: the backward pass sees that one."""
    x = _load(x_ptr, at, mask)
    if delta_ptr is not None:
        x = (x + _load(delta_ptr, at, mask)).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _normalise(x, inside, C, eps):
    """(x − mean) / deviation, mean, 1 / deviation."""
    mean = tl.sum(x, 0) / C
    centred = tl.where(inside, x - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    return centred * inverse, mean, inverse


@triton.jit(do_not_specialize=["rows"])  # a constant 1 could not be widened
def _mix(x_ptr, delta_ptr, weight_ptr, bias_ptr, last_ptr, resets_ptr, mix_ptr, own_ptr,
         sum_ptr, end_ptr, statistics_ptr, o0, o1, o2, o3, o4, o5, rows, T, C, SPAN, eps,
         NORM: tl.constexpr, M: tl.constexpr, PRESENT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    c = tl.arange(0, BC)
    inside = c < C
    start = tl.program_id(0) * SPAN
    outs = (o0, o1, o2, o3, o4, o5)
    first = tl.program_id(1).to(tl.int64) * T
    ahead = _row(c, C, start > 0)
    previous = _sum_of(x_ptr, delta_ptr, (first + start - 1) * C + c, ahead)
    if NORM:
        weight, bias = _load(weight_ptr, c, inside), _load(bias_ptr, c, inside)
        previous = _normalise(previous, inside, C, eps)[0] * weight + bias
    previous = tl.where(start > 0, previous, _load(last_ptr, tl.program_id(1) * C + c, _row(c, C, start == 0)))
    for i in range(SPAN):
        t = start + i
        row = first + t
        at, mask = row * C + c, _row(c, C, t < T)
        x = _sum_of(x_ptr, delta_ptr, at, mask)
        if delta_ptr is not None:
            _store(sum_ptr, at, x, mask)
        if NORM:
            normed, mean, inverse = _normalise(x, inside, C, eps)
            x = normed * weight + bias
            tl.store(statistics_ptr + row, mean, mask=t < T)
            tl.store(statistics_ptr + rows + row, inverse, mask=t < T)
            _store(end_ptr, tl.program_id(1) * C + c, x, _row(c, C, t == T - 1))
        d = tl.where(_opens(resets_ptr, row, t < T), 0.0, previous) - x
        for j in tl.static_range(M):
            _store(outs[j], at, x + d * _share(mix_ptr, own_ptr, j, at, c, inside, mask, rows, C, PRESENT), mask)
        previous = x


@triton.jit
def _take(g_ptr, mix_ptr, own_ptr, g_own_ptr, j: tl.constexpr, at, c, inside, mask, rows, C, d, here, back, total,
          PRESENT: tl.constexpr):  # fmt: skip
    """Add mix j's gradient to what reaches this row, the one before, and μ."""
    share = _share(mix_ptr, own_ptr, j, at, c, inside, mask, rows, C, PRESENT)
    g = _load(g_ptr, at, mask)
    g_mix = -g * d if PRESENT else g * d
    if own_ptr is not None:
        _store(g_own_ptr + j * rows.to(tl.int64) * C, at, g_mix, mask)
    return here + g * (1.0 - share), back + g * share, total + g_mix


@triton.jit(do_not_specialize=["rows"])  # a constant 1 could not be widened
def _mix_backward(x_ptr, weight_ptr, bias_ptr, statistics_ptr, last_ptr, resets_ptr, mix_ptr, own_ptr,
                  g0, g1, g2, g3, g4, g5, g_sum_ptr, g_end_ptr, gx_ptr, g_last_ptr, g_own_ptr, partial_ptr,
                  rows, T, C, SPAN, NORM: tl.constexpr, M: tl.constexpr, PRESENT: tl.constexpr,
                  BC: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """From a program's last row to its first: a row reaches its own mixes and those of the row after it."""
    c = tl.arange(0, BC)
    inside = c < C
    start = tl.program_id(0) * SPAN
    stop = tl.minimum(start + SPAN, T)
    first = tl.program_id(1).to(tl.int64) * T
    gradients = (g0, g1, g2, g3, g4, g5)
    after = tl.zeros((BC,), tl.float32)
    follows = (stop < T) & (_opens(resets_ptr, first + stop, stop < T) == 0)
    at, mask = (first + stop) * C + c, _row(c, C, follows)
    for j in tl.static_range(M):
        after += _load(gradients[j], at, mask) * _share(mix_ptr, own_ptr, j, at, c, inside, mask, rows, C, PRESENT)
    s0, s1, s2 = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    s3, s4, s5 = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    g_weight, g_bias = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    x = _load(x_ptr, (first + stop - 1) * C + c, _row(c, C, stop > start))
    inverse = 1.0
    if NORM:
        weight, bias = _load(weight_ptr, c, inside), _load(bias_ptr, c, inside)
        inverse = tl.load(statistics_ptr + rows + first + stop - 1, mask=stop > start, other=0.0)
        x = tl.where(inside, (x - tl.load(statistics_ptr + first + stop - 1, mask=stop > start, other=0.0)) * inverse,
                     0.0)  # fmt: skip
    for i in tl.range(0, stop - start, num_stages=STAGES):
        t = stop - 1 - i
        row = first + t
        at, behind = row * C + c, _row(c, C, t > 0)
        before = _load(x_ptr, at - C, behind)
        previous = before
        inverse_before = inverse
        mixed = x
        if NORM:
            inverse_before = tl.load(statistics_ptr + rows + row - 1, mask=t > 0, other=0.0)
            before = (before - tl.load(statistics_ptr + row - 1, mask=t > 0, other=0.0)) * inverse_before
            before = tl.where(inside, before, 0.0)
            previous = before * weight + bias
            mixed = x * weight + bias
        previous = tl.where(t > 0, previous, _load(last_ptr, tl.program_id(1) * C + c, _row(c, C, t == 0)))
        opens = _opens(resets_ptr, row, t < T)
        d = tl.where(opens, 0.0, previous) - mixed
        g, back = after, tl.zeros((BC,), tl.float32)
        g, back, s0 = _take(g0, mix_ptr, own_ptr, g_own_ptr, 0, at, c, inside, inside, rows, C, d, g, back, s0, PRESENT)
        if M > 1:
            g, back, s1 = _take(g1, mix_ptr, own_ptr, g_own_ptr, 1, at, c, inside, inside, rows, C, d, g, back, s1,
                                PRESENT)  # fmt: skip
        if M > 2:
            g, back, s2 = _take(g2, mix_ptr, own_ptr, g_own_ptr, 2, at, c, inside, inside, rows, C, d, g, back, s2,
                                PRESENT)  # fmt: skip
        if M > 3:
            g, back, s3 = _take(g3, mix_ptr, own_ptr, g_own_ptr, 3, at, c, inside, inside, rows, C, d, g, back, s3,
                                PRESENT)  # fmt: skip
        if M > 4:
            g, back, s4 = _take(g4, mix_ptr, own_ptr, g_own_ptr, 4, at, c, inside, inside, rows, C, d, g, back, s4,
                                PRESENT)  # fmt: skip
        if M > 5:
            g, back, s5 = _take(g5, mix_ptr, own_ptr, g_own_ptr, 5, at, c, inside, inside, rows, C, d, g, back, s5,
                                PRESENT)  # fmt: skip
        after = tl.where(opens, 0.0, back)
        _store(g_last_ptr, tl.program_id(1) * C + c, after, _row(c, C, t == 0))
        if NORM:
            g += _load(g_end_ptr, tl.program_id(1) * C + c, _row(c, C, t == T - 1))
            g_weight += g * x
            g_bias += g
            g *= weight
            g = (g - tl.sum(g, 0) / C - x * (tl.sum(g * x, 0) / C)) * inverse
        if g_sum_ptr is not None:
            g += _load(g_sum_ptr, at, inside)
        _store(gx_ptr, at, g, inside)
        x = before
        inverse = inverse_before
    shares = (s0, s1, s2, s3, s4, s5)
    partial_ptr += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * (M + 2 * NORM) * C + c
    for j in tl.static_range(M):
        tl.store(partial_ptr + j * C, shares[j], mask=inside)
    if NORM:
        tl.store(partial_ptr + M * C, g_weight, mask=inside)
        tl.store(partial_ptr + (M + 1) * C, g_bias, mask=inside)


def _sizes(c: int) -> dict[str, int]:
    """A row to a program: 16 bytes of bfloat16 a thread."""
    width = triton.next_power_of_2(c)
    return {"BC": width, "num_warps": min(16, max(1, width // 256))}


def _sizes_backward(c: int) -> dict[str, int]:
    """More warps than forward: each row ends in sums across them, which others must hide."""
    width = triton.next_power_of_2(c)
    return {"BC": width, "num_warps": min(16, max(1, width // CHANNELS))}


def _fill(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [*tensors, *[tensors[0]] * (MOST - len(tensors))]


def _forward(
    x: Tensor, delta: Tensor | None, norm: tuple[Tensor, Tensor, float] | None, last: Tensor, mixes: Tensor,
    own: Tensor | None, resets: Tensor | None, present: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:  # fmt: skip
    """x + delta, the norm's last row and its statistics [2, B·T], the mixes."""
    b, t, c = x.shape
    outs = [torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(len(mixes))]
    total = x if delta is None else torch.empty_like(x)
    weight, bias, eps = norm or (None, None, 0.0)
    end = None if norm is None else torch.empty(b, c, dtype=dtype, device=x.device)
    statistics = None if norm is None else torch.empty(2, b * t, dtype=torch.float32, device=x.device)
    _mix[(triton.cdiv(t, SPAN), b)](
        x, delta, weight, bias, last, resets, mixes, own, total, end, statistics, *_fill(outs), b * t, t, c, SPAN, eps,
        NORM=norm is not None, M=len(mixes), PRESENT=present, **_sizes(c),
    )  # fmt: skip
    return total, end, statistics, outs


def _backward(
    grads: Sequence[Tensor], g_sum: Tensor | None, g_end: Tensor | None, x: Tensor,
    norm: tuple[Tensor, Tensor, Tensor] | None, last: Tensor, mixes: Tensor, own: Tensor | None, resets: Tensor | None,
    present: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of x, last, own, and [M, C] or [M + 2, C]: of the mixes, then the norm's weight and bias."""
    b, t, c = x.shape
    gx, g_last, g_own = torch.empty_like(x), torch.empty_like(last), None if own is None else torch.empty_like(own)
    programs = max(1, PROGRAMS // b)
    span = max(8, triton.cdiv(t, programs))
    programs = triton.cdiv(t, span)
    n_vectors = len(mixes) + (0 if norm is None else 2)
    partial = torch.empty(b * programs, n_vectors, c, dtype=torch.float32, device=x.device)
    weight, bias, statistics = norm or (None, None, None)
    sizes = _sizes_backward(c)
    n_tiles = len(mixes) * (1 if own is None else 2) + 2
    _mix_backward[(programs, b)](
        x, weight, bias, statistics, last, resets, mixes, own, *_fill(grads), g_sum, g_end, gx, g_last, g_own, partial,
        b * t, t, c, span, NORM=norm is not None, M=len(mixes), PRESENT=present,
        STAGES=stages(n_tiles, sizes["BC"], x.element_size()), **sizes,
    )  # fmt: skip
    dtype = common_dtype(mixes) if norm is None else common_dtype(mixes, norm[0], norm[1])
    return gx, g_last, g_own, sum_shares(partial, dtype)


@torch.library.custom_op("receptance::shift_mix", mutates_args=())
def _shift_mix(
    x: Tensor, last: Tensor, mixes: Tensor, own: Tensor | None, resets: Tensor | None, present: bool,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    return _forward(x, None, None, last, mixes, own, resets, present, dtype)[3]


@_shift_mix.register_fake
def _(x, last, mixes, own, resets, present, dtype):
    return [torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(len(mixes))]


@torch.library.custom_op("receptance::shift_mix_backward", mutates_args=())
def _shift_mix_backward(
    grads: list[Tensor], x: Tensor, last: Tensor, mixes: Tensor, own: Tensor | None, resets: Tensor | None,
    present: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, last, mixes and own (empty without it)."""
    gx, g_last, g_own, vectors = _backward(grads, None, None, x, None, last, mixes, own, resets, present)
    return gx, g_last, vectors.to(mixes.dtype), x.new_empty(0) if g_own is None else g_own


@_shift_mix_backward.register_fake
def _(grads, x, last, mixes, own, resets, present):
    g_own = x.new_empty(0) if own is None else torch.empty_like(own)
    return torch.empty_like(x), torch.empty_like(last), torch.empty_like(mixes), g_own


def _keep(ctx, inputs, output):
    *tensors, ctx.present, _ = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grads):
    grads = [g.contiguous() for g in grads]
    saved = ctx.saved_tensors  # may be asked for once: activation checkpointing makes them then
    gx, g_last, g_mixes, g_own = _shift_mix_backward(grads, *saved, ctx.present)
    return gx, g_last, g_mixes, None if saved[3] is None else g_own, None, None, None


_shift_mix.register_autograd(_gradients, setup_context=_keep)


def shift_mix(
    x: Tensor, last: Tensor, mixes: Sequence[Tensor], own: Tensor | None = None, resets: Tensor | None = None,
    present: bool = False, dtype: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """Same contract as the plain form; the results are of `dtype` (x's by default)."""
    own, resets = (None if z is None else z.contiguous() for z in (own, resets))
    return _shift_mix(x.contiguous(), last.contiguous(), _stack(mixes), own, resets, present, dtype or x.dtype)


def _stack(mixes: Sequence[Tensor]) -> Tensor:
    return torch.stack([mu.reshape(-1) for mu in mixes])


class _NormMix(torch.autograd.Function):
    """Not an operator of torch.library: the sum passes through, so that its gradient is added by the kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, last: Tensor, mixes: Tensor,
        resets: Tensor | None, eps: float, present: bool, dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        with torch.cuda.device_of(x):
            total, end, statistics, outs = _forward(
                x, delta, (weight, bias, eps), last, mixes, None, resets, present, dtype
            )
        ctx.save_for_backward(total, weight, bias, statistics, last, mixes, resets)
        ctx.delta_dtype, ctx.present = None if delta is None else delta.dtype, present
        ctx.set_materialize_grads(False)
        assert end is not None
        return total, end, *outs

    @staticmethod
    def backward(ctx: Any, g_sum: Tensor | None, g_end: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
        total, weight, bias, statistics, last, mixes, resets = ctx.saved_tensors
        given = [torch.zeros_like(total) if g is None else g.contiguous() for g in grads]
        g_end = torch.zeros_like(last) if g_end is None else g_end.contiguous()
        g_sum = None if g_sum is None else g_sum.contiguous()
        norm = weight, bias, statistics
        with torch.cuda.device_of(total):
            gx, g_last, _, vectors = _backward(given, g_sum, g_end, total, norm, last, mixes, None, resets, ctx.present)
        m = len(mixes)
        g_mixes, g_weight, g_bias = vectors[:m].to(mixes.dtype), vectors[m].to(weight.dtype), vectors[m + 1]
        g_delta = None if ctx.delta_dtype is None else gx.to(ctx.delta_dtype)
        return gx, g_delta, g_weight, g_bias.to(bias.dtype), g_last, g_mixes, None, None, None, None


def norm_mix(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, last: Tensor, mixes: Sequence[Tensor],
    resets: Tensor | None = None, present: bool = False, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Same contract as the plain form; the last row and the mixes are of `dtype` (x's by default)."""
    x, dtype = x.contiguous(), dtype or x.dtype
    delta, resets = (None if z is None else z.contiguous() for z in (delta, resets))
    total, end, *outs = _NormMix.apply(
        x, delta, weight, bias, last.to(dtype).contiguous(), _stack(mixes), resets, eps, present, dtype
    )
    return total, end, outs


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    mixes = [torch.zeros(64, device="cuda", requires_grad=True)] * 2
    sum(y.sum() for y in shift_mix(x, x[:, 0], mixes)).backward()
    sum(y.sum() for y in norm_mix(x, x, mixes[0], mixes[0], 1e-5, x[:, 0], mixes)[2]).backward()
    torch.cuda.synchronize()
