"""One update of AdamW over flat tensors: float32 masters and moments, gradients and weights in half precision."""

import torch
from torch import Tensor

from receptance.ops.pieces import uses_triton

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def update(tensors: Tensors, numbers: Tensor, betas: tuple[float, float], eps: float) -> None:
    """tensors: gradient, master, mean, square, weight, [n] each; the middle three, float32, are brought up to date in
    place, and the new master is rounded into weight.

    numbers [5], float32, on the device, so that nothing waits for it: keep (where 0 nothing changes), the gradient's
    factor (clipping), lr / (1 - beta1^t), 1 - lr · weight decay, 1 / √(1 - beta2^t).
    """
    gradient, master, mean, square, weight = tensors
    if uses_triton("adamw", master):
        from receptance.ops.adamw.triton import update as kernel

        return kernel(tensors, numbers, betas, eps)
    keep, factor, rate, decay, root = numbers.unbind()
    g = gradient.float() * factor
    new_mean = mean.lerp(g, 1 - betas[0])
    new_square = square * betas[1] + (1 - betas[1]) * g * g
    new_master = master * decay - rate * new_mean / (new_square.sqrt() * root + eps)
    for old, new in ((mean, new_mean), (square, new_square), (master, new_master)):
        old.copy_(torch.where(keep > 0, new, old))
    weight.copy_(master)
    return None
