"""Token shift and mixes in Triton: one read of x forward, one read of each gradient backward."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLS, WARPS = 32, 64, 8  # a tile: 16 bytes of bfloat16 a thread, 128 contiguous ones a row
MOST = 6


@triton.jit
def _tile(rows, C, BR: tl.constexpr, BC: tl.constexpr):
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    return row, c, row[:, None].to(tl.int64) * C + c[None, :], (row < rows)[:, None] & (c < C)[None, :]


@triton.jit
def _opens(resets_ptr, row, rows):
    """Whether each row of [B·T] begins a document, and so has no previous one."""
    if resets_ptr is None:
        return row < 0
    else:
        return tl.load(resets_ptr + row, mask=row < rows, other=0).to(tl.int32) != 0


@triton.jit
def _differences(x_ptr, last_ptr, resets_ptr, row, c, at, mask, rows, T, C):
    """x and (previous − x) of a tile."""
    first = (row % T == 0)[:, None]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    linked = mask & ~_opens(resets_ptr, row, rows)[:, None]
    previous = tl.load(x_ptr + at - C, mask=linked & ~first, other=0.0).to(tl.float32)
    start = (row // T)[:, None].to(tl.int64) * C + c[None, :]
    previous += tl.load(last_ptr + start, mask=linked & first, other=0.0).to(tl.float32)
    return x, previous - x


@triton.jit
def _share(mix_ptr, own_ptr, j, c, at, mask, rows, C, PRESENT: tl.constexpr):
    """The share of the previous position in mix j at `at`; a tile, or a row if all positions have the same."""
    mu = tl.load(mix_ptr + j * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if own_ptr is not None:
        start = own_ptr + j * rows.to(tl.int64) * C
        mu = mu + tl.load(start + at, mask=mask, other=0.0).to(tl.float32)
    return 1.0 - mu if PRESENT else mu


@triton.jit(do_not_specialize=["rows"])  # a constant 1 could not be widened
def _mix(x_ptr, last_ptr, resets_ptr, mix_ptr, own_ptr, o0, o1, o2, o3, o4, o5, rows, T, C,
         M: tl.constexpr, PRESENT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    row, c, at, mask = _tile(rows, C, BR, BC)
    x, d = _differences(x_ptr, last_ptr, resets_ptr, row, c, at, mask, rows, T, C)
    outs = (o0, o1, o2, o3, o4, o5)
    for j in tl.static_range(M):
        mixed = x + d * _share(mix_ptr, own_ptr, j, c, at, mask, rows, C, PRESENT)
        tl.store(outs[j] + at, mixed.to(outs[j].dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])  # a constant 1 could not be widened
def _mix_backward(x_ptr, last_ptr, resets_ptr, mix_ptr, own_ptr, g0, g1, g2, g3, g4, g5, gx_ptr, gl_ptr, g_own_ptr,
                  partial_ptr, rows, T, C, M: tl.constexpr, PRESENT: tl.constexpr,
                  BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """x_t reaches its own mixes and those of t + 1; a tile's share of the mixes' gradients goes to `partial`."""
    row, c, at, mask = _tile(rows, C, BR, BC)
    _, d = _differences(x_ptr, last_ptr, resets_ptr, row, c, at, mask, rows, T, C)
    follows = mask & (row % T != T - 1)[:, None] & ~_opens(resets_ptr, row + 1, rows)[:, None]
    gradients = (g0, g1, g2, g3, g4, g5)
    gx = tl.zeros((BR, BC), tl.float32)
    to_previous = tl.zeros((BR, BC), tl.float32)
    for j in tl.static_range(M):
        mu = _share(mix_ptr, own_ptr, j, c, at, mask, rows, C, PRESENT)
        g = tl.load(gradients[j] + at, mask=mask, other=0.0).to(tl.float32)
        after = tl.load(gradients[j] + at + C, mask=follows, other=0.0).to(tl.float32)
        to_previous += g * mu
        gx += g * (1.0 - mu)
        if own_ptr is not None:
            mu = _share(mix_ptr, own_ptr, j, c, at + C, follows, rows, C, PRESENT)
        gx += after * mu
        g_mix = -g * d if PRESENT else g * d
        if own_ptr is not None:
            start = g_own_ptr + j * rows.to(tl.int64) * C
            tl.store(start + at, g_mix.to(g_own_ptr.dtype.element_ty), mask=mask)
        tl.store(partial_ptr + (tl.program_id(0) * M + j) * C + c, tl.sum(g_mix, 0), mask=c < C)
    tl.store(gx_ptr + at, gx.to(gx_ptr.dtype.element_ty), mask=mask)
    start = (row // T)[:, None].to(tl.int64) * C + c[None, :]
    first = (row % T == 0)[:, None]
    to_previous = tl.where(_opens(resets_ptr, row, rows)[:, None], 0.0, to_previous)
    tl.store(gl_ptr + start, to_previous.to(gl_ptr.dtype.element_ty), mask=mask & first)


def _launch(x: Tensor, mixes: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    grid = triton.cdiv(x.shape[0] * x.shape[1], ROWS), triton.cdiv(x.shape[2], COLS)
    return grid, {"M": len(mixes), "BR": ROWS, "BC": COLS, "num_warps": WARPS}


@torch.library.custom_op("receptance::shift_mix", mutates_args=())
def _shift_mix(
    x: Tensor, last: Tensor, mixes: Tensor, own: Tensor | None, resets: Tensor | None, present: bool,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    outs = [torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(len(mixes))]
    grid, meta = _launch(x, mixes)
    b, t, c = x.shape
    unused = [x] * (MOST - len(outs))
    _mix[grid](x, last, resets, mixes, own, *outs, *unused, b * t, t, c, PRESENT=present, **meta)
    return outs


@_shift_mix.register_fake
def _(x, last, mixes, own, resets, present, dtype):
    return [torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(len(mixes))]


@torch.library.custom_op("receptance::shift_mix_backward", mutates_args=())
def _shift_mix_backward(
    grads: list[Tensor], x: Tensor, last: Tensor, mixes: Tensor, own: Tensor | None, resets: Tensor | None,
    present: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, last, mixes and own (empty without it)."""
    grid, meta = _launch(x, mixes)
    b, t, c = x.shape
    gx, g_last = torch.empty_like(x), torch.empty_like(last)
    g_own = x.new_empty(0) if own is None else torch.empty_like(own)
    partial = torch.empty(grid[0], *mixes.shape, dtype=torch.float32, device=x.device)
    unused = [x] * (MOST - len(grads))
    _mix_backward[grid](
        x, last, resets, mixes, own, *grads, *unused, gx, g_last, None if own is None else g_own, partial,
        b * t, t, c, PRESENT=present, **meta,
    )  # fmt: skip
    return gx, g_last, partial.sum(0).to(mixes.dtype), g_own


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
    stacked = torch.stack([mu.reshape(-1) for mu in mixes])
    own, resets = (None if z is None else z.contiguous() for z in (own, resets))
    return _shift_mix(x.contiguous(), last.contiguous(), stacked, own, resets, present, dtype or x.dtype)


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    mixes = [torch.zeros(64, device="cuda", requires_grad=True)] * 2
    sum(y.sum() for y in shift_mix(x, x[:, 0], mixes)).backward()
    torch.cuda.synchronize()
