"""RWKV-4's WKV in parallel over time, in plain torch: ~2√T small steps instead of T.

The recurrence (num, den) ← e^w (num, den) + e^{k} (v, 1) is an associative scan. T is cut into n chunks of L ≈ √T
tokens; all chunks are scanned side by side from an empty state, then the chunk ends are chained and each chunk's start
is folded into its tokens. Every exponent is relative to a running maximum (spec of the stable form: RWKV-4 paper,
appendix; the backward pass is the same scan run from the end, see docs/maths.md).
"""

import math
from typing import Any

import torch
from torch import Tensor

from receptance.ops.wkv4.naive import EMPTY, State4


def _combine(a: State4, b: State4) -> State4:
    """Sum of two (num, den, exp) triples."""
    top = torch.maximum(a[2], b[2])
    ea, eb = (a[2] - top).exp(), (b[2] - top).exp()
    return ea * a[0] + eb * b[0], ea * a[1] + eb * b[1], top


def _empty_where(mask: Tensor, state: State4) -> State4:
    return state[0].masked_fill(mask, 0), state[1].masked_fill(mask, 0), state[2].masked_fill(mask, EMPTY)


def scan(w: Tensor, e: Tensor, x: Tensor, y: Tensor, start: State4, resets: Tensor | None) -> State4:
    """States *before* each of T+1 positions of (num, den) ← e^w (num, den) + e^{e_t} (x_t, y_t).

    w [C]; e, x, y [B, T, C]; start [B, C] ×3. Returns three [B, T+1, C]; position 0 is the start, T the final state.
    resets [B, T+1]: positions where the state is emptied of what came before.
    """
    b, t, c = e.shape
    length = max(1, math.isqrt(t + 1))
    n = -(-(t + 1) // length)
    pad = n * length - t
    e = torch.nn.functional.pad(e, (0, 0, 0, pad), value=EMPTY).view(b, n, length, c)
    x, y = (torch.nn.functional.pad(z, (0, 0, 0, pad)).view(b, n, length, c) for z in (x, y))
    if resets is not None:
        resets = torch.nn.functional.pad(resets, (0, n * length - t - 1)).view(b, n, length, 1)
        from_start = resets.cumsum(2) == 0  # no reset between the chunk's start and here

    zero = torch.zeros_like(e[:, :, 0])
    local: State4 = (zero, zero, torch.full_like(zero, EMPTY))
    inside = []
    for j in range(length):  # all chunks at once, each from nothing
        if resets is not None:
            local = _empty_where(resets[:, :, j], local)
        inside.append(local)
        num, den, exp = local
        local = _combine((num, den, exp + w), (x[:, :, j], y[:, :, j], e[:, :, j]))
    carry, starts = start, []
    for i in range(n):  # chain the chunk ends
        starts.append(carry)
        if resets is not None:
            carry = _empty_where(~from_start[:, i, -1], carry)
        num, den, exp = carry
        carry = _combine((num, den, exp + length * w), (local[0][:, i], local[1][:, i], local[2][:, i]))

    steps = torch.arange(length, device=w.device, dtype=w.dtype)[:, None]  # [L, 1]
    num, den, exp = (torch.stack(part, 1)[:, :, None] for part in zip(*starts))  # [B, n, 1, C]
    first: State4 = (num, den, exp + steps * w)
    if resets is not None:
        first = _empty_where(~from_start, (num.expand_as(first[2]), den.expand_as(first[2]), first[2]))
    rest = [torch.stack(part, 2) for part in zip(*inside)]  # [B, n, L, C]
    out = _combine(first, (rest[0], rest[1], rest[2]))
    num, den, exp = (z.view(b, n * length, c)[:, : t + 1] for z in out)
    return num, den, exp


class _WKV4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, k: Tensor, v: Tensor, u: Tensor, num: Tensor, den: Tensor, exp: Tensor,
                lengths: Tensor | None, resets: Tensor | None) -> tuple[Tensor, ...]:  # fmt: skip
        if resets is not None:
            resets = torch.nn.functional.pad(resets, (0, 1))
        nums, dens, exps = scan(w, k, v, torch.ones_like(v), (num, den, exp), resets)
        before = nums[:, :-1], dens[:, :-1], exps[:, :-1]
        top = torch.maximum(before[2], u + k)  # [B, T, C]
        past, now = (before[2] - top).exp(), (u + k - top).exp()
        norm = past * before[1] + now
        y = (past * before[0] + now * v) / norm
        if lengths is None:
            end = [z[:, -1] for z in (nums, dens, exps)]
        else:
            rows = torch.arange(len(lengths), device=k.device)
            end = [z[rows, lengths] for z in (nums, dens, exps)]
        ctx.save_for_backward(w, k, v, u, *before, exp, top, norm, y, end[2], lengths, resets)
        ctx.mark_non_differentiable(end[2])
        return y, end[0].clone(), end[1].clone(), end[2].clone()

    @staticmethod
    def backward(ctx: Any, gy: Tensor, gnum: Tensor, gden: Tensor, gexp: Tensor) -> tuple[Tensor | None, ...]:
        w, k, v, u, num, den, exp, exp0, top, norm, y, exp_end, lengths, resets = ctx.saved_tensors
        b, t, _ = k.shape
        rows = torch.arange(b, device=k.device)
        if lengths is None:
            lengths = torch.full((b,), t, device=k.device)
        # The output's gradient is q·e^{-top} w.r.t. the true numerator and -q·y·e^{-top} w.r.t. the denominator.
        q = gy / norm
        q = q.masked_fill((torch.arange(t, device=k.device) >= lengths[:, None])[:, :, None], 0)
        # G_t, the gradient w.r.t. the state after token t, obeys G_{t-1} = e^w G_t + (token t's share): the same scan
        # run from the end. The final state's own gradient enters as the share of the position after a row's last token.
        extra = (0, 0, 0, 1)
        gp, gr, ge = (torch.nn.functional.pad(z, extra) for z in (q, -q * y, -top))
        gp[rows, lengths], gr[rows, lengths], ge[rows, lengths] = gnum, gden, -exp_end
        zero = torch.zeros_like(exp0)
        start = (zero, zero, torch.full_like(zero, EMPTY))
        if resets is not None:  # what empties a state stops its gradient
            resets = torch.nn.functional.pad(resets, (0, 1)).flip(1)
        p, r, o = (z.flip(1) for z in scan(w, ge.flip(1), gp.flip(1), gr.flip(1), start, resets))
        p0, r0, o0 = p[:, 0], r[:, 0], o[:, 0]
        p, r, o = p[:, 1 : t + 1], r[:, 1 : t + 1], o[:, 1 : t + 1]

        now, later = (u + k - top).exp() * q, (k + o).exp()
        gk = now * (v - y) + later * (p * v + r)
        gv = now + later * p
        gu = (now * (v - y)).sum((0, 1))
        gw = ((w + exp + o).exp() * (p * num + r * den)).sum((0, 1))
        scale = (o0 + exp0).exp()
        return gw, gk, gv, gu, p0 * scale, r0 * scale, None, None, None


def wkv4(
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: State4,
    lengths: Tensor | None,
    resets: Tensor | None = None,
) -> tuple[Tensor, State4]:
    """Same contract as the naive form; about √T sequential steps of [B, √T, C] work."""
    y, num, den, exp = _WKV4.apply(w, k, v, u, *state, lengths, resets)  # type: ignore[no-untyped-call]
    return y, (num, den, exp)
