"""The channel mix's activations: squared ReLU, and the sigmoid gate of RWKV-4 to 6."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from receptance.ops.pieces import compute_dtype, uses_triton


def relu_square(x: Tensor, *, backend: str = "auto") -> Tensor:
    """max(x, 0)². The backward pass needs the result alone, which the product after it keeps anyway."""
    if uses_triton("ffn", x, backend):
        from receptance.ops.ffn.triton import relu_square as kernel

        return kernel(x)
    return x.relu().square()


def relu_square_products(x: Tensor, key: Tensor, value: Tensor, *, backend: str = "auto") -> Tensor:
    """max(x keyᵀ, 0)² valueᵀ, [..., C] → [..., D], with key [F, C] and value [D, F].

    The kernels square a product while it is still in float32, so that it is rounded once, not twice; the same goes for
    the gradient behind it. They need a Hopper GPU, half precision and many rows, and torch.compile, which cannot look
    into them, does not get them.
    """
    if uses_triton("ffn", x, backend) and not torch.compiler.is_compiling():
        from receptance.ops.ffn.product import fits
        from receptance.ops.ffn.product import relu_square_products as kernel

        dtype = compute_dtype(x)
        x = x.to(dtype)
        if fits(x, key) and uses_triton("products", x, backend):
            return kernel(x, key.to(dtype), value.to(dtype))
    return linear(relu_square(linear(x, key), backend=backend), value)


def sigmoid_gate(gate: Tensor, x: Tensor, *, backend: str = "auto") -> Tensor:
    """σ(gate) ∘ x, both of one shape, in x's dtype."""
    if uses_triton("ffn", x, backend):
        from receptance.ops.ffn.triton import sigmoid_gate as kernel

        return kernel(gate, x)
    return torch.sigmoid(gate) * x
