"""Products with squared ReLU in their last step, in Triton for Hopper: what lies between them is written once.

Tiles are fetched by the tensor memory accelerator, which pads what lies beyond an edge with zeros and never writes it.
As many programs as multiprocessors take one tile after the other, so that loads of the next run under the end of this.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Of the tile [BM, BN] and its steps along K; measured on an H200 at 32,768 x 1,024 x 4,096.
BM, BN, BK, GROUP, STAGES, WARPS = 128, 256, 64, 8, 3, 8
WAVES = 4  # tiles a multiprocessor from which cuBLAS's choice of smaller ones for the last wave no longer matters
ALIGNED = 8  # elements: rows begin at multiples of 16 bytes


@triton.jit
def _finished(product, squares, at, n, BACKWARD: tl.constexpr):
    """Of a part of a tile: max(product, 0)², or product · 2 √square, the derivative where square = max(z, 0)²."""
    if BACKWARD:
        return product * (2.0 * tl.sqrt(squares.load([at, n]).to(tl.float32)))
    else:
        product = tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return product * product


@triton.jit
def _product(a, b, squares, out, M, N, K, PROGRAMS, BACKWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             BK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """out [M, N] = max(a bᵀ, 0)², b [N, K]; or, with BACKWARD, (a b) ∘ 2 √squares, b [K, N]. a is [M, K].

    GROUP rows of tiles are walked column by column: what they share of a and b is still in the cache.
    """
    high, wide = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), high * wide, PROGRAMS, flatten=True):
        first = tile // (GROUP * wide) * GROUP
        size = tl.minimum(high - first, GROUP)
        m, n = (first + tile % (GROUP * wide) % size) * BM, tile % (GROUP * wide) // size * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            if BACKWARD:
                total = tl.dot(a.load([m, k]), b.load([k, n]), total)
            else:
                total = tl.dot(a.load([m, k]), b.load([n, k]).T, total)
        # by halves: the whole tile at once would not fit into shared memory beside the next one's steps
        left, right = tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))
        out.store([m, n], _finished(left, squares, m, n, BACKWARD).to(out.dtype))
        out.store([m, n + BN // 2], _finished(right, squares, m, n + BN // 2, BACKWARD).to(out.dtype))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _run(a: Tensor, b: Tensor, squares: Tensor | None, out: Tensor | None = None) -> Tensor:
    m, k = a.shape
    n = b.shape[0] if squares is None else b.shape[1]
    if out is None:
        out = torch.empty(m, n, dtype=a.dtype, device=a.device)
    half = [BM, BN // 2]
    describe = TensorDescriptor.from_tensor
    programs = min(_multiprocessors(a.device), triton.cdiv(m, BM) * triton.cdiv(n, BN))
    _product[(programs,)](
        describe(a, [BM, BK]), describe(b, [BN, BK] if squares is None else [BK, BN]),
        describe(out if squares is None else squares, half), describe(out, half), m, n, k, programs,
        BACKWARD=squares is not None, BM=BM, BN=BN, BK=BK, GROUP=GROUP, num_stages=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return out


def fits(x: Tensor, key: Tensor, dtype: torch.dtype, waves: float | None = None) -> bool:
    """Whether the kernels take x [..., C] with key [F, C] as `dtype`, and beat cuBLAS and a pass after it.

    waves: tiles a multiprocessor from which they do; for training WAVES.
    """
    f, c = key.shape
    if not x.is_cuda or dtype not in (torch.bfloat16, torch.float16) or c % ALIGNED or f % ALIGNED:
        return False
    tiles = triton.cdiv(x.numel() // c, BM) * triton.cdiv(f, BN)
    least = (WAVES if waves is None else waves) * _multiprocessors(x.device)
    return tiles >= least and torch.cuda.get_device_capability(x.device)[0] == 9


class _Products(torch.autograd.Function):
    """Keeps x, the squares between the products, and both matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.cuda.device_of(x):
            squares = _run(x.view(-1, x.shape[-1]), key, None)
        ctx.save_for_backward(x, squares, key, value)
        return (squares @ value.T).view(*x.shape[:-1], len(value))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, squares, key, value = ctx.saved_tensors
        rows, g = x.view(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]).contiguous()
        g_x = g_key = g_value = None
        if ctx.needs_input_grad[2]:
            g_value = g.T @ squares
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            with torch.cuda.device_of(x):
                inner = _run(g, value, squares)
            g_x = (inner @ key).view(x.shape) if ctx.needs_input_grad[0] else None
            g_key = inner.T @ rows if ctx.needs_input_grad[1] else None
        return g_x, g_key, g_value


def relu_square_products(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Same contract as the plain form; all three are of one half-precision type."""
    return _Products.apply(x.contiguous(), key.contiguous(), value.contiguous())


def relu_square_product(x: Tensor, key: Tensor, out: Tensor) -> Tensor:
    """out [rows, F] = max(x keyᵀ, 0)², contiguous and of one half-precision type."""
    return _run(x, key, None, out)


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.ones(BM, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    matrix = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y = relu_square_products(x, matrix, matrix)
    y.sum().backward()
    torch.cuda.synchronize()
    if y[0, 0] != 64**3 or x.grad is None or x.grad[-1, 0] != 64 * 64 * 2 * 64:
        raise RuntimeError("a wrong product")
