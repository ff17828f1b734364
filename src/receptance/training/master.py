"""AdamW for bfloat16 weights with float32 masters: one pass reads gradients and writes moments, masters and weights.

Everything lies in flat buffers, one element of a buffer for one of another, so that a step is a handful of kernels
whatever the number of tensors. The masters are the optimiser's parameters; each is known by the model's name for it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from receptance.models import RWKV
from receptance.ops.adamw import update

ALIGNED = 128  # elements: a tensor begins at a multiple of 256 bytes, whatever product reads it
LARGE = 2**19  # elements of a tensor whose gradient is read where it lies; those of smaller ones are gathered


class MasterAdamW(AdamW):
    """AdamW over float32 masters of the weights, which it turns into `dtype` and keeps as the masters' rounded values.

    groups: those of `param_groups`, of the model's own parameters in float32. Per step: `collect`, which returns the
    gradients' norm, then `step`. `clip`, when above 0, bounds that norm; `found_inf`, when set to a float tensor, makes
    `step` leave everything as it is where it is 1, as in fused AdamW. All tensors stay where they are for good, so a
    CUDA graph can hold a step. The moments of a weight without gradient see zeros.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, clip: float = 0.0,
                 ema: bool = False, dtype: torch.dtype = torch.bfloat16):  # fmt: skip
        self.weights: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        device = self.weights[0].device
        starts, size = [], 0
        self._spans: list[tuple[int, int]] = []  # of each group
        for group in groups:
            begin = size
            for p in group["params"]:
                starts.append(size)
                size += -(-p.numel() // ALIGNED) * ALIGNED
            self._spans.append((begin, size))

        self._starts, views = starts, self._views
        kinds = ("exp_avg", "exp_avg_sq", "ema") if ema else ("exp_avg", "exp_avg_sq")
        self._state = {kind: torch.zeros(size, device=device) for kind in kinds}
        self._masters, self._rounded = torch.zeros(size, device=device), torch.zeros(size, dtype=dtype, device=device)
        inside = torch.zeros(size, dtype=torch.bool)
        for part in views(inside):
            part.fill_(True)
        self._gaps = (~inside).nonzero().squeeze(1).to(device)
        self._steps = torch.zeros(len(self.weights), device=device)
        self._gradients: list[list[tuple[int, Tensor]]] = []  # of each group, and where they begin
        self._coefficient = torch.ones((), device=device)
        self._clip = clip
        masters = [nn.Parameter(x) for x in views(self._masters)]
        with torch.no_grad():
            torch._foreach_copy_([x.detach() for x in masters], [x.detach() for x in self.weights])
        own = iter(masters)
        super().__init__(
            [{**group, "params": [next(own) for _ in group["params"]]} for group in groups],
            lr=0.0, betas=betas, eps=eps,
        )  # fmt: skip
        moments = {kind: views(flat) for kind, flat in self._state.items()}
        for i, master in enumerate(masters):
            self.state[master] = {"step": self._steps[i], **{kind: parts[i] for kind, parts in moments.items()}}
        for weight, rounded in zip(self.weights, views(self._rounded)):
            weight.data = rounded
        self.publish()

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Each weight's part of a buffer, in its shape."""
        return [flat[start : start + p.numel()].view(p.shape) for start, p in zip(self._starts, self.weights)]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights, for whoever has changed masters."""
        torch._foreach_copy_([p.detach() for p in self.weights], [x.detach() for x in self._in_order()])

    def masters(self) -> dict[str, Tensor]:
        """By the model's names."""
        return {name: x for group in self.param_groups for name, x in zip(group["names"], group["params"])}

    def _in_order(self) -> list[Tensor]:
        return [x for group in self.param_groups for x in group["params"]]

    @torch.no_grad()
    def collect(self, average: Callable[[Tensor], None] | None = None) -> Tensor:
        """Take over the weights' gradients and return the norm of all, float32, on the device.

        average: of several processes, which all call this; it makes a tensor the mean of theirs, in place.
        """
        flat = torch.empty_like(self._rounded)
        if len(self._gaps):
            flat.index_fill_(0, self._gaps, 0.0)
        given, apart = [], []
        for start, part, p in zip(self._starts, self._views(flat), self.weights):
            grad, p.grad = p.grad, None
            if grad is None:
                part.zero_()
            elif average is None and _is_large(grad):
                apart.append((start, grad.view(-1)))
            else:
                given.append((part, grad))
        torch._foreach_copy_([part for part, _ in given], [grad for _, grad in given])
        if average is not None:
            average(flat)
        self._gradients = [_pieces(flat, span, apart) for span in self._spans]
        norms = torch._foreach_norm([x for pieces in self._gradients for _, x in pieces], dtype=torch.float32)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if self._clip:
            self._coefficient = (self._clip / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update with what `collect` took over."""
        keep = torch.ones_like(self._coefficient) if self.found_inf is None else 1 - self.found_inf
        self._steps += keep
        count = self._steps[0].double()
        beta1, beta2 = self.param_groups[0]["betas"]
        first, second = 1 - torch.pow(beta1, count), (1 - torch.pow(beta2, count)).sqrt()
        gradients, self._gradients = self._gradients, []
        for group, pieces in zip(self.param_groups, gradients):
            lr = group["lr"] if isinstance(group["lr"], Tensor) else torch.full_like(keep, group["lr"])
            rate, decay = lr.double() / first, 1 - lr.double() * group["weight_decay"]
            numbers = torch.stack([x.float() for x in (keep, self._coefficient, rate, decay, 1 / second)])
            for begin, gradient in pieces:
                part = slice(begin, begin + len(gradient))
                mean, square = self._state["exp_avg"][part], self._state["exp_avg_sq"][part]
                tensors = gradient, self._masters[part], mean, square, self._rounded[part]
                update(tensors, numbers, group["betas"], group["eps"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.weights:
            p.grad = None


def _is_large(gradient: Tensor) -> bool:
    return gradient.numel() >= LARGE and gradient.numel() % ALIGNED == 0 and gradient.is_contiguous()


def _pieces(flat: Tensor, span: tuple[int, int], apart: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """A group's gradients, in order: those that lie apart, and what of `flat` lies between them."""
    here, end = span
    pieces = []
    for start, gradient in apart:
        if span[0] <= start < end:
            pieces += [(here, flat[here:start]), (start, gradient)]
            here = start + len(gradient)
    pieces.append((here, flat[here:end]))
    return [(begin, x) for begin, x in pieces if len(x)]


def widen(model: RWKV, optimizer: MasterAdamW) -> None:
    """The model in float32 again, its weights the masters' values. It is trained no further."""
    model.float()
    optimizer.publish()
