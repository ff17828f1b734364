"""Softmax, loss, logit penalty and their gradient for a block of logits, in place: one read, one write."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _softmax_gradient(logits_ptr, targets_ptr, weights_ptr, loss_ptr, V, penalty,
                      WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program per row. The second sweep finds the row in the cache."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * V
    cols = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    index = tl.zeros((), tl.int32)
    for start in range(0, V, BLOCK):
        z = tl.load(logits_ptr + start + cols, mask=start + cols < V, other=float("-inf")).to(tl.float32)
        here, place = tl.max(z, 0, return_indices=True)
        index = tl.where(here > top, start + place, index)
        higher = tl.maximum(top, here)
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    log_sum = top + tl.log(total)
    target = tl.load(targets_ptr + row)
    loss = log_sum - tl.load(logits_ptr + target).to(tl.float32)
    if WEIGHTED:
        weight = tl.load(weights_ptr + row).to(tl.float32)
        loss *= weight
    tl.store(loss_ptr + row, loss)
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
        for start in range(0, V, BLOCK):
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
    block = min(8192, max(128, triton.next_power_of_2(v)))
    _softmax_gradient[(n,)](
        logits, targets, weights if weights is not None else loss, loss, v, logit_penalty,
        WEIGHTED=weights is not None, GRADIENT=gradient, BLOCK=block, num_warps=16 if block >= 4096 else 4,
    )  # fmt: skip
    return loss


def probe() -> None:
    """Build and run the kernel; raises whatever goes wrong."""
    logits = torch.zeros(2, 300, dtype=torch.bfloat16, device="cuda")
    softmax_gradient_(logits, torch.zeros(2, dtype=torch.int64, device="cuda"), None, 1e-4, True)
    torch.cuda.synchronize()
