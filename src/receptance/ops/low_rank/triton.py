"""First matrices of low-rank maps of a token-shifted input: one product by cuBLAS, what is around it in Triton."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.low_rank import ACTIVATIONS
from receptance.ops.shift.triton import _opens

MOST = 4  # maps at once
ROWS, COLS, WARPS = 32, 64, 4  # of a tile
DEEP = 64  # rows of matrices that a program goes through at once


@triton.jit
def _choose(j, a, b, c, d):
    """The j-th of four pointers or numbers."""
    chosen = a
    if j == 1:
        chosen = b
    if j == 2:
        chosen = c
    if j == 3:
        chosen = d
    return chosen


@triton.jit
def _map_of(tile, R0, R1, R2, R3, BN: tl.constexpr):
    """Of a tile of BN columns: its map, where that map's columns begin among all maps', its first column in the map."""
    e0 = tl.cdiv(R0, BN)
    e1 = e0 + tl.cdiv(R1, BN)
    e2 = e1 + tl.cdiv(R2, BN)
    j = (tile >= e0).to(tl.int32) + (tile >= e1).to(tl.int32) + (tile >= e2).to(tl.int32)
    return j, _choose(j, 0, R0, R0 + R1, R0 + R1 + R2), (tile - _choose(j, 0, e0, e1, e2)) * BN


@triton.jit
def _stack(u0, u1, u2, u3, w0, w1, w2, w3, out_ptr, C, R0, R1, R2, R3, WIDTH, BR: tl.constexpr, BN: tl.constexpr):
    """out [C, 2 · WIDTH]: (1 − μ) ∘ W of all maps, then μ ∘ W of all."""
    j, offset, first = _map_of(tl.program_id(1), R0, R1, R2, R3, BN)
    mix_ptr, map_ptr, R = _choose(j, u0, u1, u2, u3), _choose(j, w0, w1, w2, w3), _choose(j, R0, R1, R2, R3)
    c, n = tl.program_id(0) * BR + tl.arange(0, BR), first + tl.arange(0, BN)
    mask = (c < C)[:, None] & (n < R)[None, :]
    mu = tl.load(mix_ptr + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    w = tl.load(map_ptr + c[:, None] * R + n[None, :], mask=mask, other=0.0).to(tl.float32)
    at = c[:, None] * (2 * WIDTH) + offset + n[None, :]
    tl.store(out_ptr + at, ((1.0 - mu) * w).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + at + WIDTH, (mu * w).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _stack_backward(g_ptr, u0, u1, u2, u3, w0, w1, w2, w3, gu0, gu1, gu2, gu3, gw0, gw1, gw2, gw3,
                    C, R0, R1, R2, R3, WIDTH, BR: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """A program for some rows of one map."""
    j = tl.program_id(1)
    mix_ptr, map_ptr = _choose(j, u0, u1, u2, u3), _choose(j, w0, w1, w2, w3)
    g_mix_ptr, g_map_ptr = _choose(j, gu0, gu1, gu2, gu3), _choose(j, gw0, gw1, gw2, gw3)
    R, offset = _choose(j, R0, R1, R2, R3), _choose(j, 0, R0, R0 + R1, R0 + R1 + R2)
    c = tl.program_id(0) * BR + tl.arange(0, BR)
    mu = tl.load(mix_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    g_mu = tl.zeros((BR,), tl.float32)
    for first in range(0, R, BN):
        n = first + tl.arange(0, BN)
        mask = (c < C)[:, None] & (n < R)[None, :]
        at, place = c[:, None] * (2 * WIDTH) + offset + n[None, :], c[:, None] * R + n[None, :]
        ga, gb = tl.load(g_ptr + at, mask=mask, other=0.0), tl.load(g_ptr + at + WIDTH, mask=mask, other=0.0)
        ga, gb = ga.to(tl.float32), gb.to(tl.float32)
        g_map = (1.0 - mu)[:, None] * ga + mu[:, None] * gb
        tl.store(g_map_ptr + place, g_map.to(g_map_ptr.dtype.element_ty), mask=mask)
        g_mu += tl.sum(tl.load(map_ptr + place, mask=mask, other=0.0).to(tl.float32) * (gb - ga), 1)
    tl.store(g_mix_ptr + c, g_mu.to(g_mix_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _shift(product_ptr, before_ptr, resets_ptr, o0, o1, o2, o3, rows, T, R0, R1, R2, R3, WIDTH,
           F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr, F3: tl.constexpr, BR: tl.constexpr,
           BN: tl.constexpr):  # fmt: skip
    """f(x A + previous(x B)) of x [A B] [rows, 2 · WIDTH], all maps; before: last B [B, WIDTH]."""
    j, offset, start = _map_of(tl.program_id(1), R0, R1, R2, R3, BN)
    out_ptr, R, f = _choose(j, o0, o1, o2, o3), _choose(j, R0, R1, R2, R3), _choose(j, F0, F1, F2, F3)
    row, n = tl.program_id(0) * BR + tl.arange(0, BR), start + tl.arange(0, BN)
    inside, column = row < rows, (n < R)[None, :]
    t = row % T
    opens = _opens(resets_ptr, row, inside)
    at = row.to(tl.int64)[:, None] * (2 * WIDTH) + offset + n[None, :]
    h = tl.load(product_ptr + at, mask=inside[:, None] & column, other=0.0).to(tl.float32)
    follows, first = inside & (t > 0) & (opens == 0), inside & (t == 0) & (opens == 0)
    h += tl.load(product_ptr + at - WIDTH, mask=follows[:, None] & column, other=0.0).to(tl.float32)  # the row above
    before = (row // T)[:, None] * WIDTH + offset + n[None, :]
    h += tl.load(before_ptr + before, mask=first[:, None] & column, other=0.0).to(tl.float32)
    if f == 1:
        h = 2.0 * tl.sigmoid(2.0 * h) - 1.0
    if f == 2:
        h = tl.sigmoid(h)
    place = row.to(tl.int64)[:, None] * R + n[None, :]
    tl.store(out_ptr + place, h.to(out_ptr.dtype.element_ty), mask=inside[:, None] & column)


@triton.jit
def _inner(h_ptr, g_ptr, place, mask, f):
    """The gradient before the activation whose result is h."""
    g = tl.load(g_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if f > 0:
        h = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
        g *= tl.where(f == 1, 1.0 - h * h, h * (1.0 - h))
    return g


@triton.jit
def _shift_backward(h0, h1, h2, h3, g0, g1, g2, g3, resets_ptr, out_ptr, g_before_ptr, rows, T, R0, R1, R2, R3, WIDTH,
                    F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr, F3: tl.constexpr, BR: tl.constexpr,
                    BN: tl.constexpr):  # fmt: skip
    j, offset, start = _map_of(tl.program_id(1), R0, R1, R2, R3, BN)
    h_ptr, g_ptr = _choose(j, h0, h1, h2, h3), _choose(j, g0, g1, g2, g3)
    R, f = _choose(j, R0, R1, R2, R3), _choose(j, F0, F1, F2, F3)
    row, n = tl.program_id(0) * BR + tl.arange(0, BR), start + tl.arange(0, BN)
    inside, column = row < rows, (n < R)[None, :]
    t = row % T
    place = row.to(tl.int64)[:, None] * R + n[None, :]
    g = _inner(h_ptr, g_ptr, place, inside[:, None] & column, f)
    has_next = inside & (t < T - 1)
    follows = has_next & (_opens(resets_ptr, row + 1, has_next) == 0)
    after = _inner(h_ptr, g_ptr, place + R, follows[:, None] & column, f)
    at = row.to(tl.int64)[:, None] * (2 * WIDTH) + offset + n[None, :]
    tl.store(out_ptr + at, g.to(out_ptr.dtype.element_ty), mask=inside[:, None] & column)
    tl.store(out_ptr + at + WIDTH, after.to(out_ptr.dtype.element_ty), mask=inside[:, None] & column)
    kept = tl.where(_opens(resets_ptr, row, inside)[:, None], 0.0, g)
    before = (row // T)[:, None] * WIDTH + offset + n[None, :]
    first = (inside & (t == 0))[:, None] & column
    tl.store(g_before_ptr + before, kept.to(g_before_ptr.dtype.element_ty), mask=first)


def _fill(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Pointers for MOST maps; those of ranks of zero are never used."""
    return [*tensors, *[tensors[0]] * (MOST - len(tensors))]


class _Ranks:
    def __init__(self, maps: Sequence[Tensor], activations: tuple[int, ...] = ()) -> None:
        ranks = [w.shape[1] for w in maps]
        self.width, self.tiles = sum(ranks), sum(triton.cdiv(r, COLS) for r in ranks)
        self.each = ranks + [0] * (MOST - len(ranks))
        codes = [*activations, *[0] * (MOST - len(activations))]
        self.meta = {f"F{j}": f for j, f in enumerate(codes)} | {"BR": ROWS, "BN": COLS, "num_warps": WARPS}


class _ShiftedMaps(torch.autograd.Function):
    """Keeps x, the results, the matrices and [A B]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, last: Tensor, resets: Tensor | None, activations: tuple[int, ...], *vectors: Tensor
    ) -> tuple[Tensor, ...]:
        b, t, c = x.shape
        n = len(activations)
        mixes, maps = vectors[:n], vectors[n:]
        ranks = _Ranks(maps, activations)
        width, across = ranks.width, ranks.tiles
        with torch.cuda.device_of(x):
            stacked = torch.empty(c, 2 * width, dtype=x.dtype, device=x.device)
            _stack[(triton.cdiv(c, DEEP), across)](
                *_fill(mixes), *_fill(maps), stacked, c, *ranks.each, width, BR=DEEP, BN=COLS, num_warps=WARPS
            )
            product, before = x.view(-1, c) @ stacked, last @ stacked[:, width:]
            outs = [torch.empty(b, t, w.shape[1], dtype=x.dtype, device=x.device) for w in maps]
            grid = triton.cdiv(b * t, ROWS), across
            _shift[grid](product, before, resets, *_fill(outs), b * t, t, *ranks.each, width, **ranks.meta)
        ctx.save_for_backward(x, last, resets, stacked, *vectors, *outs)
        ctx.activations = activations
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, last, resets, stacked, *rest = ctx.saved_tensors
        (b, t, c), n = x.shape, len(ctx.activations)
        mixes, maps, outs = rest[:n], rest[n : 2 * n], rest[2 * n :]
        ranks = _Ranks(maps, ctx.activations)
        width = ranks.width
        with torch.cuda.device_of(x):
            g_product = torch.empty(b * t, 2 * width, dtype=x.dtype, device=x.device)
            g_before = torch.empty(b, width, dtype=x.dtype, device=x.device)
            given = [g.contiguous() for g in grads]
            _shift_backward[(triton.cdiv(b * t, ROWS), ranks.tiles)](
                *_fill(outs), *_fill(given), resets, g_product, g_before, b * t, t, *ranks.each, width, **ranks.meta
            )
            g_x = (g_product @ stacked.T).view(x.shape)
            g_last = g_before @ stacked[:, width:].T if ctx.needs_input_grad[1] else None
            g_stacked = x.view(-1, c).T @ g_product
            g_stacked[:, width:].addmm_(last.T, g_before)
            g_mixes, g_maps = [torch.empty_like(mu) for mu in mixes], [torch.empty_like(w) for w in maps]
            _stack_backward[(triton.cdiv(c, DEEP), n)](
                g_stacked, *_fill(mixes), *_fill(maps), *_fill(g_mixes), *_fill(g_maps), c, *ranks.each, width,
                BR=DEEP, BN=COLS, num_warps=WARPS,
            )  # fmt: skip
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
