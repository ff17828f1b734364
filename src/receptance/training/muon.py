"""Muon for the hidden matrices, AdamW for everything else, as one optimiser.

K. Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024). The update's scale is that of J. Liu et
al., "Muon is scalable for LLM training" (2025): its root mean square equals AdamW's, so learning rate and weight decay
carry over. Our own, because torch.optim.Muon, missing in older versions, takes neither a learning rate on the
device, which a CUDA graph needs, nor a flag to skip an update; and here the matrices of one shape go together.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0: any singular value ends between 0.7 and 1.2
ITERATIONS = 5
RMS = 0.2  # of AdamW's update, measured


class MuonAdamW(AdamW):
    """Groups with `muon` true get Muon, with Nesterov momentum `muon_momentum`; the others AdamW.

    `found_inf`, when set to a float tensor, makes `step` leave everything as it is where it is 1, as in fused AdamW.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        every = self.param_groups
        try:
            self.param_groups = [group for group in every if not group["muon"]]
            super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group["muon"]:
                params = [p for p in group["params"] if p.grad is not None]
                for shape in sorted({tuple(p.shape) for p in params}):
                    self._update([p for p in params if tuple(p.shape) == shape], group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """One step for matrices of one shape."""
        gradient = torch.stack([p.grad for p in params])  # type: ignore[misc]  # [n, rows, cols]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        keep = gradient.new_ones(())
        if self.found_inf is not None:
            keep = 1 - self.found_inf
            gradient = torch.where(keep > 0, gradient, 0)  # it may be NaN, which no factor removes
        beta = group["muon_momentum"]
        momentum = torch.stack(buffers)
        momentum = momentum.lerp(gradient, (1 - beta) * keep)
        torch._foreach_copy_(buffers, list(momentum.unbind()))
        update = orthogonalised(gradient.lerp(momentum, beta))
        rate = group["lr"] * keep
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        update = update * (rate * RMS * max(params[0].shape) ** 0.5)
        torch._foreach_sub_(params, list(update.unbind()))


def orthogonalised(x: Tensor) -> Tensor:
    """U Vᵀ, about, of the singular value decomposition U S Vᵀ of each of x [n, rows, cols], by Newton-Schulz.

    In bfloat16 on a GPU, where it is fast and precise enough; in float32 elsewhere. Returned in x's type.
    """
    a, b, c = NEWTON_SCHULZ
    y: Tensor = x.bfloat16() if x.is_cuda else x
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        y = y.mT
    y = y / (torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True) + 1e-7)  # singular values at most 1
    for _ in range(ITERATIONS):
        square = y @ y.mT
        y = a * y + (b * square + c * square @ square) @ y
    y = y.mT if is_tall else y
    return y.to(x.dtype)
