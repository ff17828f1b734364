"""Softmax, loss, logit penalty and their gradient for a block of logits, in place: one read, one write."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.pieces import multiprocessors

GROUPS, BN, WARPS, STAGES = (
    1024,
    8,
    32,
    3,
)  # groups of neighbours that a program reads at once; 16 bytes of bfloat16 each


@triton.jit
def _softmax_gradient(logits_ptr, targets_ptr, weights_ptr, loss_ptr, rows, V, penalty, PROGRAMS,
                      WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, GROUPS: tl.constexpr, BN: tl.constexpr,
                      STAGES: tl.constexpr):  # fmt: skip
    """Row after row. The second sweep finds a row in the second-level cache, half of which holds one for each program.

    In the first each group of BN neighbours, which a thread holds, has its own maximum and sum; they meet at its end.
    What only two elements of a row need, the target's and the largest one's, is done apart from both sweeps.
    """
    groups, few = tl.arange(0, GROUPS) * BN, tl.arange(0, BN)
    cols = groups[:, None] + few[None, :]
    for row in range(tl.program_id(0), rows, PROGRAMS):
        row_ptr = logits_ptr + tl.cast(V, tl.int64) * row
        tops = tl.full((GROUPS,), float("-inf"), tl.float32)
        totals = tl.zeros((GROUPS,), tl.float32)
        starts = tl.zeros((GROUPS,), tl.int32)  # of the groups with the maxima
        for start in tl.range(0, V, GROUPS * BN, num_stages=STAGES):
            at = start + cols
            z = tl.load(row_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
            here = tl.max(z, 1)
            starts = tl.where(here > tops, start + groups, starts)
            higher = tl.maximum(tops, here)
            finite = tl.where(higher == float("-inf"), 0.0, higher)  # a group beyond V has seen nothing
            totals = totals * tl.exp(tops - finite) + tl.sum(tl.exp(z - finite[:, None]), 1)
            tops = higher
        top = tl.max(tops, 0)
        total = tl.sum(totals * tl.exp(tops - top), 0)
        near = tl.min(tl.where(tops == top, starts, V), 0) + few
        at_top = tl.load(row_ptr + near, mask=near < V, other=float("-inf")).to(tl.float32) == top
        index = tl.min(tl.where(at_top, near, V), 0)
        log_sum = top + tl.log(total)
        target = tl.load(targets_ptr + row)
        wanted = tl.load(row_ptr + target).to(tl.float32)
        loss = log_sum - wanted
        if WEIGHTED:
            weight = tl.load(weights_ptr + row).to(tl.float32)
            loss *= weight
        tl.store(loss_ptr + row, loss)
        if GRADIENT:
            tl.debug_barrier()  # every thread has read what it needs before one overwrites it
            for start in tl.range(0, V, GROUPS * BN, num_stages=STAGES):
                at = start + cols
                z = tl.load(row_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
                g = tl.exp(z - log_sum)
                if WEIGHTED:
                    g *= weight
                tl.store(row_ptr + at, g.to(logits_ptr.dtype.element_ty), mask=at < V)
            pull = top * penalty
            g_top = tl.exp(top - log_sum) + pull
            g_target = tl.exp(wanted - log_sum) - 1.0 + tl.where(target == index, pull, 0.0)
            if WEIGHTED:
                g_top *= weight
                g_target *= weight
            tl.debug_barrier()  # these two come last
            tl.store(row_ptr + index, g_top.to(logits_ptr.dtype.element_ty), mask=(index < V) & (index != target))
            tl.store(row_ptr + target, g_target.to(logits_ptr.dtype.element_ty))


def softmax_gradient_(
    logits: Tensor, targets: Tensor, weights: Tensor | None, logit_penalty: float, gradient: bool
) -> Tensor:
    """Same contract as the plain form; logits [n, V] are contiguous, of at most 32 bits."""
    n, v = logits.shape
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    groups = min(GROUPS, max(16, triton.next_power_of_2(v) // BN))
    programs = min(n, multiprocessors(logits.device))
    _softmax_gradient[(programs,)](
        logits, targets, weights if weights is not None else loss, loss, n, v, logit_penalty, programs,
        WEIGHTED=weights is not None, GRADIENT=gradient, GROUPS=groups, BN=BN, STAGES=STAGES,
        num_warps=max(1, WARPS * groups // GROUPS),
    )  # fmt: skip
    return loss


def probe() -> None:
    """Build and run the kernel; raises whatever goes wrong."""
    logits = torch.zeros(2, 300, dtype=torch.bfloat16, device="cuda")
    softmax_gradient_(logits, torch.zeros(2, dtype=torch.int64, device="cuda"), None, 1e-4, True)
    torch.cuda.synchronize()
