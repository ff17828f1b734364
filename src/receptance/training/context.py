"""Context parallelism: each row of a batch cut into pieces, one per rank, with the results of the whole row.

Two things cross the cuts. A token shift needs the last vector of the piece before: every rank shows its own, and takes
its predecessor's. A WKV state needs everything before, but each operator's final state is affine in its initial one,

    RWKV-7      S_end = S₀ P + Q        P [N, N], the product of the piece's transition matrices
    RWKV-5, 6   S_end = S₀ diag(d) + Q  d = e^(sum of the log-decays)
    RWKV-4      the same with a scalar decay per channel, in (num, den, exp) form

so every rank finds its P and Q without knowing S₀, all exchange them, and each merges those before its own. The work is
that of the piece alone plus one small exchange per layer, whatever the length. docs/distributed.md has the costs.

`ContextParallel` is given as the back end of a forward call, which asks it for the shifts (`Call.enter`).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from receptance import ops
from receptance.models import State


class ContextParallel:
    """The WKV operators on one rank's piece of the rows; ranks of `group` hold the pieces in order.

    Pieces may differ in length and hold at least one token each. Of the start states only the first rank's counts, and
    only the last rank's end state is that of the row (`last_state` gives it to all). form: back end of the piece.
    """

    def __init__(self, group: dist.ProcessGroup, form: str = "auto"):
        self.group = group
        self.form = form
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def shift(self, last: Tensor, start: Tensor) -> Tensor:
        """The last vector [B, C] of the rank before; on the first rank, `start`."""
        # always connected to the exchange, also on the first rank: all ranks must take part in its backward pass
        return torch.cat([start[None].to(last.dtype), self._gather(last)[: self.rank]])[-1]

    def last_state(self, state: State) -> State:
        """The last rank's end state, on every rank."""
        return State({name: self._gather(x)[-1] for name, x in state.items()})

    def wkv7(
        self,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor,
        *,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """First, without gradients, the piece from zero, which gives Q, and with v = 0 from the identity: P.

        Each row of a state lives alone (S r and S P act from the right), so the second run's outputs P_t r_t say what y
        owes to any start. A reset ends both runs' past, so P is zero after one. The start then known, the piece runs as
        it would alone; its backward pass waits in `_Join` for the gradient of its end, found in the same way.
        """
        with torch.no_grad():
            two_r, two_w, two_k, two_a, two_b = (torch.cat([x, x]) for x in (r, w, k, a, b))  # [2B, T, H, N]
            one = torch.eye(state.shape[-1], dtype=state.dtype, device=state.device).expand_as(state)
            y, end = ops.wkv7(
                two_r, two_w, two_k, torch.cat([v, torch.zeros_like(v)]), two_a, two_b,
                torch.cat([torch.zeros_like(state), one]),
                resets=None if resets is None else torch.cat([resets, resets]), backend=self.form,
            )  # fmt: skip
            from_start = y.chunk(2)[1].clone()  # [B, T, H, N]
            q, p = end.chunk(2)
            parts = self._gather(torch.stack([p, q + state @ p if self.rank == 0 else q]))  # [R, 2, B, H, N, N]
            start = parts[0, 1]
            for i in range(1, self.rank):
                start = start @ parts[i, 0] + parts[i, 1]
        start = state if self.rank == 0 else start
        y, end = ops.wkv7(r, w, k, v, a, b, start, resets=resets, backend=self.form)
        found: tuple[Tensor, Tensor] = _Join.apply(  # type: ignore[no-untyped-call]
            y, end, state, from_start, parts[:, 0], self.rank, self.group
        )
        return found

    def wkv6(
        self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, *, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """From zero, then the start's share: it decays on its own, so y gains S₀ (r_t ∘ e^(w_1 + … + w_{t-1}))."""
        y, q = ops.wkv6(r, w, k, v, u, torch.zeros_like(state), resets=resets, backend=self.form)
        w = w.to(state.dtype)
        d = w.sum(1).exp()[:, :, None]  # [B, H, 1, N]
        if resets is not None:
            d = d.masked_fill(resets.any(1)[:, None, None, None], 0)
        parts = self._gather(torch.cat([d, q + state * d if self.rank == 0 else q], 2))  # [R, B, H, 1 + N, N]
        before = torch.cat([state[None], parts[: self.rank, :, :, 1:]])
        start = before[0] if self.rank == 0 else before[1]
        for i in range(1, self.rank):
            start = start * parts[i, :, :, :1] + before[i + 1]
        decayed = r.to(state.dtype) * torch.cat([torch.zeros_like(w[:, :1]), w[:, :-1]], 1).cumsum(1).exp()
        if resets is not None:  # what follows one has nothing of the start
            decayed = decayed.masked_fill(resets.cumsum(1).bool()[:, :, None, None], 0)
        read = torch.einsum("bhij,bthj->bthi", start, decayed)
        return (y + read).to(v.dtype), start * d + q

    def wkv4(
        self,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        u: Tensor,
        state: ops.State4,
        lengths: Tensor | None,
        *,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, ops.State4]:
        """What the piece adds to the state is one sum over its tokens; y is a quotient, so the piece then runs once."""
        t = k.shape[1]
        age = torch.arange(t - 1, -1, -1, dtype=state[0].dtype, device=k.device)[:, None]  # steps until the end
        exponent = age * w + k.to(state[0].dtype)  # [B, T, C]
        if resets is not None:  # of the tokens before the last reset nothing is left
            later = resets.flip(1).cumsum(1).flip(1) - resets.long()  # resets after each token
            exponent = exponent.masked_fill(later[:, :, None] > 0, ops.EMPTY)
        top = exponent.amax(1).detach()
        weight = (exponent - top[:, None]).exp()
        new = (weight * v).sum(1), weight.sum(1), top
        decay = (t * w).expand_as(top)
        if resets is not None:
            decay = decay.masked_fill(resets.any(1)[:, None], ops.EMPTY)
        if self.rank == 0:
            new = _add((state[0], state[1], state[2] + decay), new)
        parts = self._gather(torch.stack([*new, decay]))  # [R, 4, B, C]
        before = torch.cat([torch.stack([*state, torch.zeros_like(decay)])[None], parts[: self.rank]])
        num, den, exp, _ = (before[0] if self.rank == 0 else before[1]).unbind()
        for i in range(1, self.rank):
            n, d, e, more = before[i + 1].unbind()
            num, den, exp = _add((num, den, exp.detach() + more), (n, d, e))
        return ops.wkv4(w, k, v, u, (num, den, exp.detach()), resets=resets, backend=self.form)

    def _gather(self, x: Tensor) -> Tensor:
        """[…] → [R, …], the tensors of all ranks."""
        return _Gather.apply(x, self.group)  # type: ignore[no-untyped-call,no-any-return]


def _add(a: ops.State4, b: ops.State4) -> ops.State4:
    """Sum of two (num, den, exp) triples. The larger exponent is a normaliser, without gradient."""
    top = torch.maximum(a[2], b[2]).detach()
    ea, eb = (a[2] - top).exp(), (b[2].detach() - top).exp()
    return ea * a[0] + eb * b[0], ea * a[1] + eb * b[1], top


class _Join(torch.autograd.Function):
    """y and the end state of a piece of RWKV-7; backwards, what the pieces after it say about its end comes in.

    A start's gradient is what its own piece's y and end say, and Gᵢ₊₁ Pᵢᵀ, from the next piece's start on.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, end: Tensor, state: Tensor, from_start: Tensor, maps: Tensor, rank: int,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(from_start, maps)
        ctx.rank, ctx.group = rank, group
        return y.view_as(y), end.view_as(end)

    @staticmethod
    def backward(ctx: Any, gy: Tensor, g_end: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from_start, maps = ctx.saved_tensors
        dtype = g_end.dtype
        own = torch.einsum("bthi,bthj->bhij", gy.to(dtype), from_start.to(dtype)) + g_end @ maps[ctx.rank].mT
        parts = [torch.empty_like(own) for _ in range(len(maps))]
        dist.all_gather(parts, own.contiguous(), group=ctx.group)
        later = torch.zeros_like(own)
        for i in range(len(maps) - 1, ctx.rank, -1):
            later = parts[i] + later @ maps[i].mT
        unused = None if ctx.rank == 0 else torch.zeros_like(own)  # of the state that only the first rank starts from
        return gy, g_end + later, unused, None, None, None, None


class _Gather(torch.autograd.Function):
    """All ranks' tensors on every rank; backwards, the sum of what all ranks say about each rank's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None
