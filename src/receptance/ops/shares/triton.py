"""The second stage of vectors' gradients: what the programs of a backward kernel found is added up and rounded."""

import torch
import triton
import triton.language as tl
from torch import Tensor

STAGES = 3  # of the loops of backward kernels: while a tile is worked on, the next ones are on their way
AHEAD_BYTES = 40 * 1024  # for that; some kernels take more shared memory for it, below 50 KiB for any width and type
ROWS, COLS, WARPS = 128, 32, 8  # of a tile; 128 bytes of a row at a time


@triton.jit
def _sum_shares(shares_ptr, out_ptr, rows, N, BR: tl.constexpr, BN: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BR, BN), tl.float32)
    for first in range(0, rows, BR):
        row = first + tl.arange(0, BR)
        mask = (row < rows)[:, None] & (n < N)[None, :]
        total += tl.load(shares_ptr + row.to(tl.int64)[:, None] * N + n[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + n, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=n < N)


def sum_shares(shares: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over the first axis of shares [programs, vectors, C] (float32), always in the same order, as `dtype`."""
    out = torch.empty(shares.shape[1:], dtype=dtype, device=shares.device)
    rows = max(16, min(ROWS, triton.next_power_of_2(len(shares))))
    _sum_shares[(triton.cdiv(out.numel(), COLS),)](shares, out, len(shares), out.numel(), BR=rows, BN=COLS,
                                                   num_warps=WARPS)  # fmt: skip
    return out


def stages(n_tiles: int, elements: int, itemsize: int) -> int:
    """For a loop that reads `n_tiles` tiles of so many elements a turn; 1: it fetches nothing ahead."""
    return max(1, min(STAGES, 1 + AHEAD_BYTES // (n_tiles * elements * itemsize)))


def common_dtype(*vectors: Tensor) -> torch.dtype:
    """Of gradients that lie in one tensor: the vectors' own if they agree."""
    dtypes = {x.dtype for x in vectors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
