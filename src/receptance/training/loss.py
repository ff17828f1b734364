"""The reference's training loss: cross entropy whose gradient also pulls each position's largest logit towards zero."""

from typing import Any

import torch
from torch import Tensor

from receptance.data import IGNORE


class _LogitPenalty(torch.autograd.Function):
    """The loss unchanged; the logits' gradient plus factor / positions · max logit, at the largest logit ("L2Wrap").

    Positions that are padding neither count nor are pulled.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor, targets: Tensor, factor: float) -> Tensor:
        top, index = logits.max(-1, keepdim=True)
        valid = (targets != IGNORE).unsqueeze(-1)
        ctx.save_for_backward(top * valid * (factor / valid.sum().to(top.dtype)), index)
        ctx.shape = logits.shape
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        top, index = ctx.saved_tensors
        pull = torch.zeros(ctx.shape, dtype=top.dtype, device=top.device)
        return grad, pull.scatter_(-1, index, top * grad), None, None  # scaled like the loss, unlike old code


def language_model_loss(logits: Tensor, targets: Tensor, logit_penalty: float = 1e-4) -> Tensor:
    """Mean cross entropy in nats of logits [B, T, V] against targets [B, T], with the logit penalty in its gradient.

    Targets that are IGNORE are left out.
    """
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE)
    if not logit_penalty:
        return loss
    return _LogitPenalty.apply(loss, logits, targets, logit_penalty)  # type: ignore[no-untyped-call,no-any-return]
