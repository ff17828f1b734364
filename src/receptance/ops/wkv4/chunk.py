"""RWKV-4's WKV in parallel over time, in plain torch: ~2√T small steps instead of T.

The state is kept as an average a = num/den and a log-weight ℓ = log den. Then a token is one step of an average,

    p = σ(k - ℓ - w),   a ← a + p (v - a),   ℓ ← log(e^{ℓ+w} + e^k),   y = a + σ(u + k - ℓ) (v - a),

in which ℓ knows nothing of v, and a obeys a linear recurrence whose factors 1 - p are known in advance and at most 1.
Both are scanned in n chunks of L ≈ √T tokens: all chunks side by side from an empty state, then the chunks' ends are
chained and each chunk's start is folded into its tokens. The backward pass is two more such linear recurrences, run
from the end, without an exponential (docs/maths.md).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from receptance.ops.custom import custom_operator
from receptance.ops.wkv4.naive import EMPTY, State4


def log_weights(w: Tensor, k: Tensor, start: Tensor, resets: Tensor | None) -> Tensor:
    """ℓ before each position, for k in chunks [B, n, L, C] and start [B, C].

    resets [B, n, L, 1]: positions where the past is forgotten before they are read.
    """
    length = k.shape[2]
    local = torch.full_like(k[:, :, 0], EMPTY)
    inside = []
    for j in range(length):  # all chunks at once, each from nothing
        if resets is not None:
            local = local.masked_fill(resets[:, :, j], EMPTY)
        inside.append(local)
        local = torch.logaddexp(local + w, k[:, :, j])
    whole = None if resets is None else ~resets.any(2)  # [B, n, 1]: the start reaches the chunk's end
    carry, starts = start, []
    for i in range(k.shape[1]):  # chain the chunks' ends
        starts.append(carry)
        carry = carry + length * w
        if whole is not None:
            carry = torch.where(whole[:, i], carry, EMPTY)
        carry = torch.logaddexp(carry, local[:, i])
    steps = torch.arange(length, device=w.device, dtype=w.dtype)[:, None]  # [L, 1]
    reaching = torch.stack(starts, 1)[:, :, None] + steps * w
    if resets is not None:
        reaching = reaching.masked_fill(resets.cumsum(2) > 0, EMPTY)
    return torch.logaddexp(reaching, torch.stack(inside, 2))


class Recurrence:
    """x ← keep·x + add over positions in chunks [B, n, L, C], from either end, for several `add`s."""

    def __init__(self, keep: Tensor, *, from_end: bool = False):
        self._keep = keep.unbind(2)
        self._order = self._ordered(range(len(self._keep)), from_end)
        self._chunks = self._ordered(range(keep.shape[1]), from_end)
        product, reach = torch.ones_like(self._keep[0]), list(self._keep)
        for j in self._order:
            reach[j] = product
            product = product * self._keep[j]
        self._reach, self._through = (
            torch.stack(reach, 2),
            product,
        )  # of the chunk's start: to each position, to the end

    @staticmethod
    def _ordered(indices: range, from_end: bool) -> Sequence[int]:
        return indices[::-1] if from_end else indices

    def before(self, add: Tensor, start: Tensor) -> Tensor:
        """x before each position is reached, shaped as `add`; start [B, C]."""
        parts = add.unbind(2)
        local, inside = torch.zeros_like(parts[0]), list(parts)
        for j in self._order:
            inside[j] = local
            local = torch.addcmul(parts[j], self._keep[j], local)
        carry, starts = start, [start] * add.shape[1]
        for i in self._chunks:
            starts[i] = carry
            carry = torch.addcmul(local[:, i], self._through[:, i], carry)
        return torch.addcmul(torch.stack(inside, 2), self._reach, torch.stack(starts, 1)[:, :, None])


def _shape(k: Tensor) -> tuple[int, int, int, int]:
    """[B, n, L, C] of the chunks. Position T, with the final state before it, is there too."""
    b, t, c = k.shape
    length = max(1, math.isqrt(t + 1))
    return b, -(-(t + 1) // length), length, c


def _forward(
    w: Tensor, k: Tensor, v: Tensor, u: Tensor, num: Tensor, den: Tensor,
    exp: Tensor, lengths: Tensor | None, resets: Tensor | None, is_saving: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final num, den and exp; for the backward pass p, s and a, [B, n, L, C] each."""
    t = k.shape[1]
    chunks = b, n, length, c = _shape(k)
    extra = n * length - t
    k, v = pad(k, (0, 0, 0, extra), value=EMPTY).view(chunks), pad(v, (0, 0, 0, extra)).view(chunks)
    if resets is not None:
        resets = pad(resets, (0, extra)).view(b, n, length, 1)
    seen = den > 0
    start_a = torch.where(seen, num / den, 0)
    start_l = torch.where(seen, exp + den.log(), EMPTY)
    l = log_weights(w, k, start_l, resets)
    p = (k - l).sub_(w).sigmoid_()  # in place: at these sizes fresh memory costs more than the arithmetic
    a = Recurrence(1 - p).before(p * v, start_a)
    if resets is not None:
        a = a.masked_fill(resets, 0)
    s = (k - l).add_(u).sigmoid_()
    y = torch.addcmul(a, s, v - a)
    rows = torch.arange(b, device=k.device)
    last = torch.full((b,), t, device=k.device) if lengths is None else lengths
    end_a, end_l = (x.view(b, n * length, c)[rows, last] for x in (a, l))
    kept = (p, s, a) if is_saving else (k.new_empty(0), k.new_empty(0), k.new_empty(0))
    return y.view(b, n * length, c)[:, :t], end_a, torch.ones_like(end_a), end_l, *kept


def _fake(w: Tensor, k: Tensor, v: Tensor, u: Tensor, num: Tensor, den: Tensor, exp: Tensor,
          lengths: Tensor | None, resets: Tensor | None, is_saving: bool) -> tuple[Tensor, ...]:  # fmt: skip
    b, n, length, c = chunks = _shape(k)
    y = k.new_empty(b, n * length, c)[:, : k.shape[1]]
    kept = chunks if is_saving else (0,)
    return y, *(torch.empty_like(num) for _ in range(3)), *(k.new_empty(kept) for _ in range(3))


def _backward(
    gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...], others: tuple[Any, ...], kept: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    gy, gnum, gden = gradients
    _, _, v, _, num, den = inputs
    _, lengths, _ = others
    _, p, s, a = kept
    b, n, length, c = p.shape
    t = v.shape[1]
    flat = (b, n * length, c)
    rows = torch.arange(b, device=p.device)
    last = torch.full((b,), t, device=p.device) if lengths is None else lengths
    start_a, end_a = torch.where(den > 0, num / den, 0), a.view(flat)[rows, last]
    v, gy = (pad(x, (0, 0, 0, n * length - t)) for x in (v, gy))
    gy = gy.masked_fill((torch.arange(n * length, device=p.device) >= last[:, None])[:, :, None], 0).view(p.shape)
    keep, ahead = 1 - p, v.view(p.shape) - a
    recurrence, zero = Recurrence(keep, from_end=True), torch.zeros_like(end_a)

    def shares(by_reading: Tensor, final: Tensor) -> Tensor:
        """The gradient that each position's state gets at once: by its token's read, and where the row ends."""
        by_reading.view(flat)[rows, last] += final
        return by_reading

    read = s * gy
    add = shares(gy - read, gnum)
    ga = recurrence.before(add, zero)  # of the average after each token
    gs = (1 - s).mul_(read).mul_(ahead)  # of the argument of y's σ
    written = p * ga
    gp = (keep * written).mul_(ahead)  # of the argument of p's σ
    both = gs + gp
    add_l = shares(-both, gnum * end_a + gden)
    gl = recurrence.before(add_l, zero)  # of the log-weight after each token
    gk = both.addcmul_(p, gl).view(flat)[:, :t]
    gv = written.add_(read).view(flat)[:, :t]
    gw = (keep * gl).sub_(gp).sum((0, 1, 2))
    ga0 = add[:, 0, 0] + keep[:, 0, 0] * ga[:, 0, 0]
    gl0 = add_l[:, 0, 0] + keep[:, 0, 0] * gl[:, 0, 0]
    gnum0, gden0 = (torch.where(den > 0, x / den, 0) for x in (ga0, gl0 - start_a * ga0))
    return gw, gk.contiguous(), gv.contiguous(), gs.sum((0, 1, 2)), gnum0, gden0


_wkv4 = custom_operator("wkv4_chunk", _forward, _backward, _fake, n_inputs=6, n_outputs=3)


def wkv4(
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: State4,
    lengths: Tensor | None,
    resets: Tensor | None = None,
) -> tuple[Tensor, State4]:
    """Same contract as the naive form; about √T sequential steps of [B, √T, C] work. The state's den returns as 1."""
    y, num, den, exp, *_ = _wkv4(w, k, v, u, *state, lengths, resets)
    return y, (num, den, exp)
