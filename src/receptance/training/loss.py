"""The reference's training loss: cross entropy whose gradient also pulls each position's largest logit towards zero."""

from typing import Any

import torch
from torch import Tensor


class _LogitPenalty(torch.autograd.Function):
    """The loss unchanged; the logits' gradient plus factor / positions · max logit, at the largest logit ("L2Wrap")."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor, factor: float) -> Tensor:
        top, index = logits.max(-1, keepdim=True)
        ctx.save_for_backward(top, index)
        ctx.factor, ctx.shape = factor / (logits.numel() // logits.shape[-1]), logits.shape
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        top, index = ctx.saved_tensors
        pull = torch.zeros(ctx.shape, dtype=top.dtype, device=top.device)
        return grad, pull.scatter_(-1, index, top * ctx.factor * grad), None  # scaled like the loss, unlike old code


def language_model_loss(logits: Tensor, targets: Tensor, logit_penalty: float = 1e-4) -> Tensor:
    """Mean cross entropy in nats of logits [B, T, V] against targets [B, T], with the logit penalty in its gradient."""
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
    if not logit_penalty:
        return loss
    return _LogitPenalty.apply(loss, logits, logit_penalty)  # type: ignore[no-untyped-call,no-any-return]
