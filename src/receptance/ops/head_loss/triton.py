"""Softmax, loss, logit penalty and their gradient for a block of logits, in place: one read, one write."""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS, BN, WARPS = 1024, 8, 32  # groups of neighbours that a program reads at once; 16 bytes of bfloat16 each


@triton.jit
def _softmax_gradient(logits_ptr, targets_ptr, weights_ptr, loss_ptr, V, penalty,
                      WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, GROUPS: tl.constexpr,
                      BN: tl.constexpr):  # fmt: skip
    """One program per row. The second sweep finds the row in the cache.

    In the first each group of BN neighbours, which one thread holds, has its own maximum and sum; they meet at its end.
    """
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * V
    cols = tl.arange(0, GROUPS)[:, None] * BN + tl.arange(0, BN)[None, :]
    tops = tl.full((GROUPS,), float("-inf"), tl.float32)
    totals = tl.zeros((GROUPS,), tl.float32)
    places = tl.zeros((GROUPS,), tl.int32)
    for start in range(0, V, GROUPS * BN):
        at = start + cols
        z = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
        here, place = tl.max(z, 1, return_indices=True)
        places = tl.where(here > tops, start + tl.arange(0, GROUPS) * BN + place, places)
        higher = tl.maximum(tops, here)
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # a group beyond V has seen nothing
        totals = totals * tl.exp(tops - finite) + tl.sum(tl.exp(z - finite[:, None]), 1)
        tops = higher
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp(tops - top), 0)
    index = tl.min(tl.where(tops == top, places, V), 0)
    log_sum = top + tl.log(total)
    target = tl.load(targets_ptr + row)
    loss = log_sum - tl.load(logits_ptr + target).to(tl.float32)
    if WEIGHTED:
        weight = tl.load(weights_ptr + row).to(tl.float32)
        loss *= weight
    tl.store(loss_ptr + row, loss)
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
        for start in range(0, V, GROUPS * BN):
            at = start + cols
            z = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
            g = tl.exp(z - log_sum)
            g -= tl.where(at == target, 1.0, 0.0)
            g += tl.where(at == index, top * penalty, 0.0)
            if WEIGHTED:
                g *= weight
            tl.store(logits_ptr + at, g.to(logits_ptr.dtype.element_ty), mask=at < V)


def softmax_gradient_(
    logits: Tensor, targets: Tensor, weights: Tensor | None, logit_penalty: float, gradient: bool
) -> Tensor:
    """Same contract as the plain form; logits [n, V] are contiguous, of at most 32 bits."""
    n, v = logits.shape
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    groups = min(GROUPS, max(16, triton.next_power_of_2(v) // BN))
    _softmax_gradient[(n,)](
        logits, targets, weights if weights is not None else loss, loss, v, logit_penalty,
        WEIGHTED=weights is not None, GRADIENT=gradient, GROUPS=groups, BN=BN,
        num_warps=max(1, WARPS * groups // GROUPS),
    )  # fmt: skip
    return loss


def probe() -> None:
    """Build and run the kernel; raises whatever goes wrong."""
    logits = torch.zeros(2, 300, dtype=torch.bfloat16, device="cuda")
    softmax_gradient_(logits, torch.zeros(2, dtype=torch.int64, device="cuda"), None, 1e-4, True)
    torch.cuda.synchronize()
