"""The update in Triton: each number is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.adamw import Tensors

BLOCK, WARPS = 2048, 8  # two times 16 bytes of float32 a thread and tensor


@triton.jit
def _update(g_ptr, master_ptr, mean_ptr, square_ptr, weight_ptr, numbers_ptr, n, beta1, rest1, beta2, rest2, eps,
            BLOCK: tl.constexpr):  # fmt: skip
    if tl.load(numbers_ptr) > 0:
        factor, rate = tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
        decay, root = tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4)
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < n
        g = tl.load(g_ptr + at, mask=mask).to(tl.float32) * factor
        mean, square = tl.load(mean_ptr + at, mask=mask), tl.load(square_ptr + at, mask=mask)
        mean += rest1 * (g - mean)
        square = beta2 * square + rest2 * g * g
        master = tl.load(master_ptr + at, mask=mask) * decay - rate * mean / (tl.sqrt(square) * root + eps)
        tl.store(mean_ptr + at, mean, mask=mask)
        tl.store(square_ptr + at, square, mask=mask)
        tl.store(master_ptr + at, master, mask=mask)
        tl.store(weight_ptr + at, master.to(weight_ptr.dtype.element_ty), mask=mask)


def update(tensors: Tensors, numbers: Tensor, betas: tuple[float, float], eps: float) -> None:
    """Same contract as the plain form."""
    n = tensors[0].numel()
    with torch.cuda.device_of(tensors[0]):
        _update[(triton.cdiv(n, BLOCK),)](
            *tensors, numbers, n, betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def probe() -> None:
    """Build and run the kernel; raises whatever goes wrong."""
    half, x = torch.ones(8, dtype=torch.bfloat16, device="cuda"), torch.ones(8, device="cuda")
    update((half, x, x.clone(), x.clone(), half.clone()), torch.ones(5, device="cuda"), (0.9, 0.99), 1e-18)
    torch.cuda.synchronize()
