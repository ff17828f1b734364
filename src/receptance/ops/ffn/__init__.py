"""The channel mix's activations: squared ReLU, and the sigmoid gate of RWKV-4 to 6."""

from typing import Any

import torch
from torch import Tensor

from receptance.ops.pieces import uses_triton


def relu_square(x: Tensor, *, backend: str = "auto") -> Tensor:
    """max(x, 0)². The backward pass needs the result alone, which the product after it keeps anyway."""
    if uses_triton("ffn", x, backend):
        from receptance.ops.ffn.triton import relu_square as kernel

        return kernel(x)
    result: Tensor = ReluSquare.apply(x)  # type: ignore[no-untyped-call]
    return result


class ReluSquare(torch.autograd.Function):
    """A third of the passes over memory that ReLU and square take one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu()
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return torch.addcmul(y.new_zeros(()), y, g, value=2)  # in one pass


def sigmoid_gate(gate: Tensor, x: Tensor, *, backend: str = "auto") -> Tensor:
    """σ(gate) ∘ x, both of one shape, in x's dtype."""
    if uses_triton("ffn", x, backend):
        from receptance.ops.ffn.triton import sigmoid_gate as kernel

        return kernel(gate, x)
    return torch.sigmoid(gate) * x
