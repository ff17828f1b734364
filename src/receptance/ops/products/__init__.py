"""Two products with squared ReLU between them: the channel mix without its gate."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from receptance.ops.ffn import relu_square
from receptance.ops.pieces import compute_dtype, uses_triton


def relu_square_products(x: Tensor, key: Tensor, value: Tensor, *, backend: str = "auto") -> Tensor:
    """max(x keyᵀ, 0)² valueᵀ, [..., C] → [..., D], with key [F, C] and value [D, F].

    The kernels square a product while it is still in float32, so that it is rounded once, not twice; the same goes for
    the gradient behind it. They need a Hopper GPU, half precision and many rows, and torch.compile, which cannot look
    into them, does not get them.
    """
    if has_kernel(x, key, backend):
        from receptance.ops.products.triton import relu_square_products as kernel

        dtype = compute_dtype(x)
        return kernel(x.to(dtype), key.to(dtype), value.to(dtype))
    return linear(relu_square(linear(x, key), backend=backend), value)


def has_kernel(x: Tensor, key: Tensor, backend: str = "auto", waves: float | None = None) -> bool:
    """Whether these are squared within the product, by a kernel that beats cuBLAS and a pass after it.

    waves: tiles a multiprocessor from which it does; None: in training.
    """
    if not uses_triton("products", x, backend) or torch.compiler.is_compiling():
        return False
    from receptance.ops.products.triton import fits

    return fits(x, key, compute_dtype(x), waves)


def relu_square_product(x: Tensor, key: Tensor, out: Tensor) -> Tensor:
    """out [rows, F] = max(x keyᵀ, 0)², by the kernel and without a gradient; where `has_kernel`, all of one type."""
    from receptance.ops.products.triton import relu_square_product as kernel

    return kernel(x, key, out)
