"""First matrices of low-rank maps of a token-shifted input: one product by cuBLAS, what is around it in Triton."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.low_rank import ACTIVATIONS
from receptance.ops.shift.triton import _opens

ROWS, COLS, WARPS = 32, 64, 4  # of a tile
DEEP = 64  # rows of matrices that a program goes through at once


@triton.jit
def _stack(mix_ptr, map_ptr, out_ptr, C, R, OFFSET, WIDTH, BR: tl.constexpr, BN: tl.constexpr):
    """Columns OFFSET … of out [C, 2 · WIDTH]: (1 − μ) ∘ W, and WIDTH further μ ∘ W."""
    c, n = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (c < C)[:, None] & (n < R)[None, :]
    mu = tl.load(mix_ptr + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    w = tl.load(map_ptr + c[:, None] * R + n[None, :], mask=mask, other=0.0).to(tl.float32)
    at = c[:, None] * (2 * WIDTH) + OFFSET + n[None, :]
    tl.store(out_ptr + at, ((1.0 - mu) * w).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + at + WIDTH, (mu * w).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _stack_backward(g_ptr, mix_ptr, map_ptr, g_map_ptr, g_mix_ptr, C, R, OFFSET, WIDTH, BR: tl.constexpr,
                    BN: tl.constexpr):  # fmt: skip
    c = tl.program_id(0) * BR + tl.arange(0, BR)
    mu = tl.load(mix_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    g_mu = tl.zeros((BR,), tl.float32)
    for first in range(0, R, BN):
        n = first + tl.arange(0, BN)
        mask = (c < C)[:, None] & (n < R)[None, :]
        at, place = c[:, None] * (2 * WIDTH) + OFFSET + n[None, :], c[:, None] * R + n[None, :]
        ga, gb = tl.load(g_ptr + at, mask=mask, other=0.0), tl.load(g_ptr + at + WIDTH, mask=mask, other=0.0)
        ga, gb = ga.to(tl.float32), gb.to(tl.float32)
        g_map = (1.0 - mu)[:, None] * ga + mu[:, None] * gb
        tl.store(g_map_ptr + place, g_map.to(g_map_ptr.dtype.element_ty), mask=mask)
        g_mu += tl.sum(tl.load(map_ptr + place, mask=mask, other=0.0).to(tl.float32) * (gb - ga), 1)
    tl.store(g_mix_ptr + c, g_mu.to(g_mix_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _shift(product_ptr, before_ptr, resets_ptr, out_ptr, rows, T, R, OFFSET, WIDTH, F: tl.constexpr, BR: tl.constexpr,
           BN: tl.constexpr):  # fmt: skip
    """f(x A + previous(x B)) for the columns OFFSET … of x [A B] [rows, 2 · WIDTH]; before: last B [B, WIDTH]."""
    row, n = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1) * BN + tl.arange(0, BN)
    inside, column = row < rows, (n < R)[None, :]
    t = row % T
    opens = _opens(resets_ptr, row, inside)
    at = row.to(tl.int64)[:, None] * (2 * WIDTH) + OFFSET + n[None, :]
    h = tl.load(product_ptr + at, mask=inside[:, None] & column, other=0.0).to(tl.float32)
    follows, first = inside & (t > 0) & (opens == 0), inside & (t == 0) & (opens == 0)
    h += tl.load(product_ptr + at - WIDTH, mask=follows[:, None] & column, other=0.0).to(tl.float32)  # the row above
    before = (row // T)[:, None] * WIDTH + OFFSET + n[None, :]
    h += tl.load(before_ptr + before, mask=first[:, None] & column, other=0.0).to(tl.float32)
    if F == 1:
        h = 2.0 * tl.sigmoid(2.0 * h) - 1.0
    if F == 2:
        h = tl.sigmoid(h)
    place = row.to(tl.int64)[:, None] * R + n[None, :]
    tl.store(out_ptr + place, h.to(out_ptr.dtype.element_ty), mask=inside[:, None] & column)


@triton.jit
def _inner(h_ptr, g_ptr, place, mask, F: tl.constexpr):
    """The gradient before the activation whose result is h."""
    g = tl.load(g_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if F > 0:
        h = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
        g *= 1.0 - h * h if F == 1 else h * (1.0 - h)
    return g


@triton.jit
def _shift_backward(h_ptr, g_ptr, resets_ptr, out_ptr, g_before_ptr, rows, T, R, OFFSET, WIDTH, F: tl.constexpr,
                    BR: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    row, n = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1) * BN + tl.arange(0, BN)
    inside, column = row < rows, (n < R)[None, :]
    t = row % T
    place = row.to(tl.int64)[:, None] * R + n[None, :]
    g = _inner(h_ptr, g_ptr, place, inside[:, None] & column, F)
    has_next = inside & (t < T - 1)
    follows = has_next & (_opens(resets_ptr, row + 1, has_next) == 0)
    after = _inner(h_ptr, g_ptr, place + R, follows[:, None] & column, F)
    at = row.to(tl.int64)[:, None] * (2 * WIDTH) + OFFSET + n[None, :]
    tl.store(out_ptr + at, g.to(out_ptr.dtype.element_ty), mask=inside[:, None] & column)
    tl.store(out_ptr + at + WIDTH, after.to(out_ptr.dtype.element_ty), mask=inside[:, None] & column)
    kept = tl.where(_opens(resets_ptr, row, inside)[:, None], 0.0, g)
    before = (row // T)[:, None] * WIDTH + OFFSET + n[None, :]
    first = (inside & (t == 0))[:, None] & column
    tl.store(g_before_ptr + before, kept.to(g_before_ptr.dtype.element_ty), mask=first)


def _stacked(mixes: Sequence[Tensor], maps: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[A B] of all maps, [C, 2 · the sum of their ranks]."""
    c, width = len(maps[0]), sum(w.shape[1] for w in maps)
    out = torch.empty(c, 2 * width, dtype=dtype, device=maps[0].device)
    offset = 0
    for mu, w in zip(mixes, maps):
        rank = w.shape[1]
        grid = triton.cdiv(c, DEEP), triton.cdiv(rank, COLS)
        _stack[grid](mu, w, out, c, rank, offset, width, BR=DEEP, BN=COLS, num_warps=WARPS)
        offset += rank
    return out


class _ShiftedMaps(torch.autograd.Function):
    """Keeps x, the results and the matrices; [A B] is made again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, last: Tensor, resets: Tensor | None, activations: tuple[int, ...], *vectors: Tensor
    ) -> tuple[Tensor, ...]:
        b, t, c = x.shape
        n = len(activations)
        mixes, maps = vectors[:n], vectors[n:]
        with torch.cuda.device_of(x):
            stacked = _stacked(mixes, maps, x.dtype)
            width = stacked.shape[1] // 2
            product, before = x.view(-1, c) @ stacked, last @ stacked[:, width:]
            outs, offset = [], 0
            for w, f in zip(maps, activations):
                rank = w.shape[1]
                out = torch.empty(b, t, rank, dtype=x.dtype, device=x.device)
                grid = triton.cdiv(b * t, ROWS), triton.cdiv(rank, COLS)
                _shift[grid](product, before, resets, out, b * t, t, rank, offset, width, F=f, BR=ROWS, BN=COLS,
                             num_warps=WARPS)  # fmt: skip
                outs.append(out)
                offset += rank
        ctx.save_for_backward(x, last, resets, *vectors, *outs)
        ctx.activations = activations
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, last, resets, *rest = ctx.saved_tensors
        (b, t, c), n = x.shape, len(ctx.activations)
        mixes, maps, outs = rest[:n], rest[n : 2 * n], rest[2 * n :]
        width = sum(w.shape[1] for w in maps)
        with torch.cuda.device_of(x):
            g_product = torch.empty(b * t, 2 * width, dtype=x.dtype, device=x.device)
            g_before = torch.empty(b, width, dtype=x.dtype, device=x.device)
            offset = 0
            for h, g, f in zip(outs, grads, ctx.activations):
                rank = h.shape[2]
                grid = triton.cdiv(b * t, ROWS), triton.cdiv(rank, COLS)
                _shift_backward[grid](h, g.contiguous(), resets, g_product, g_before, b * t, t, rank, offset, width,
                                      F=f, BR=ROWS, BN=COLS, num_warps=WARPS)  # fmt: skip
                offset += rank
            stacked = _stacked(mixes, maps, x.dtype)
            g_x = (g_product @ stacked.T).view(x.shape)
            g_last = g_before @ stacked[:, width:].T if ctx.needs_input_grad[1] else None
            g_stacked = x.view(-1, c).T @ g_product
            g_stacked[:, width:].addmm_(last.T, g_before)
            g_mixes, g_maps = [torch.empty_like(mu) for mu in mixes], [torch.empty_like(w) for w in maps]
            offset = 0
            for mu, w, g_mu, g_w in zip(mixes, maps, g_mixes, g_maps):
                rank = w.shape[1]
                _stack_backward[(triton.cdiv(c, DEEP),)](
                    g_stacked, mu, w, g_w, g_mu, c, rank, offset, width, BR=DEEP, BN=COLS, num_warps=WARPS
                )
                offset += rank
        return g_x, g_last, None, None, *g_mixes, *g_maps


def shifted_maps(
    x: Tensor, last: Tensor, mixes: Sequence[Tensor], maps: Sequence[Tensor], activations: Sequence[str],
    resets: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Same contract as the plain form."""
    codes = tuple(ACTIVATIONS.index(f) for f in activations)
    x, resets = x.contiguous(), None if resets is None else resets.contiguous()
    vectors = [z.contiguous() for z in (*mixes, *maps)]
    return list(_ShiftedMaps.apply(x, last.to(x.dtype).contiguous(), resets, codes, *vectors))


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    maps = [torch.zeros(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)] * 3
    mixes = [torch.zeros(64, device="cuda", dtype=torch.bfloat16, requires_grad=True)] * 3
    sum(y.sum() for y in shifted_maps(x, x[:, 0], mixes, maps, ACTIVATIONS)).backward()
    torch.cuda.synchronize()
