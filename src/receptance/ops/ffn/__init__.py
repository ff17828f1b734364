"""The channel mix's activations: squared ReLU, and the sigmoid gate of RWKV-4 to 6."""

import torch
from torch import Tensor

from receptance.ops.pieces import uses_triton


def relu_square(x: Tensor, *, backend: str = "auto") -> Tensor:
    """max(x, 0)². The backward pass needs the result alone, which the product after it keeps anyway."""
    if uses_triton("ffn", x, backend):
        from receptance.ops.ffn.triton import relu_square as kernel

        return kernel(x)
    return x.relu().square()


def sigmoid_gate(gate: Tensor, x: Tensor, *, backend: str = "auto") -> Tensor:
    """σ(gate) ∘ x, both of one shape, in x's dtype."""
    if uses_triton("ffn", x, backend):
        from receptance.ops.ffn.triton import sigmoid_gate as kernel

        return kernel(gate, x)
    return torch.sigmoid(gate) * x
