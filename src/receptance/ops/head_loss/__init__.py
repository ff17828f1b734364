"""Head and training loss in one: cross entropy and logit penalty in blocks of rows, never holding [B·T, V]."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from receptance.ops.pieces import compute_dtype, uses_triton

# Elements of one block of logits. 8,192 rows of the usual vocabulary keep a GPU busy; 1 GiB in bfloat16.
BLOCK = {"cuda": 2**29, "cpu": 2**24}


def head_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    logit_penalty: float = 0.0,
    *,
    token_weights: Tensor | None = None,
    total: Tensor | float | None = None,
    rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Σ weightᵢ·nllᵢ / total of the logits x @ weightᵀ against the targets, in nats; a float32 (or float64) scalar.

    x [..., C]; weight [V, C]; targets [...]; token_weights [...], numbers or a mask: a position of weight 0 may hold
    any target. total: the sum of token_weights by default, so that the loss is their mean (0 where nothing counts); a
    run that spreads a batch over several calls passes the batch's own. logit_penalty: the reference's "L2Wrap", which
    adds penalty·max(logits) to the gradient of each position's largest logit, weighted as its loss is, and leaves
    the value alone. rows: positions per block.

    Gradients of x and weight are made in the same pass, because the logits are there; what is kept for the backward
    pass is their size, and weight's is summed over the blocks in float32. Products run in autocast's dtype.
    """
    dtype = compute_dtype(x)
    n = targets.numel()
    targets = targets.reshape(n)
    if token_weights is None:
        count: Tensor | float = float(n)
    else:
        token_weights = token_weights.reshape(n).to(torch.float64 if dtype == torch.float64 else torch.float32)
        count = token_weights.sum()
        count = torch.where(count == 0, torch.ones_like(count), count)
        targets = torch.where(token_weights == 0, torch.zeros_like(targets), targets)
    rows = rows or max(1, BLOCK.get(x.device.type, BLOCK["cpu"]) // weight.shape[0])
    learns = torch.is_grad_enabled()
    loss: Tensor = _head_loss(
        x.reshape(n, x.shape[-1]),
        weight,
        targets,
        token_weights,
        logit_penalty,
        dtype,
        rows,
        uses_triton("head_loss", x, backend),
        learns and x.requires_grad,
        learns and weight.requires_grad,
    )[0]
    return loss / (count if total is None else total)


def module_loss(
    x: Tensor,
    head: nn.Module,
    targets: Tensor,
    n_vocab: int,
    logit_penalty: float = 0.0,
    *,
    token_weights: Tensor | None = None,
    total: Tensor | float | None = None,
    rows: int | None = None,
) -> Tensor:
    """`head_loss` with any module for a head, [n, C] → [n, n_vocab], whose logits are made twice, block by block."""
    n = targets.numel()
    x, targets = x.reshape(n, x.shape[-1]), targets.reshape(n)
    weights = torch.ones_like(targets) if token_weights is None else token_weights.reshape(n)
    weights = weights.to(torch.promote_types(x.dtype, torch.float32))
    if total is None:
        total = torch.where(weights.sum() == 0, torch.ones_like(weights[0]), weights.sum())
    targets = torch.where(weights == 0, torch.zeros_like(targets), targets)
    rows = rows or max(1, BLOCK.get(x.device.type, BLOCK["cpu"]) // n_vocab)

    def of_block(x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        z = head(x)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        losses = nn.functional.cross_entropy(z, targets, reduction="none")
        if logit_penalty:
            pull = z.max(1).values.square() * (logit_penalty / 2)
            losses = losses + (pull - pull.detach())  # a gradient and no value
        return (losses * weights).sum()

    blocks = zip(x.split(rows), targets.split(rows), weights.split(rows))
    parts: list[Tensor] = [checkpoint(of_block, *block, use_reentrant=False) for block in blocks]
    return torch.stack(parts).sum() / total


@torch.library.custom_op("receptance::head_loss", mutates_args=())
def _head_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    logit_penalty: float,
    dtype: torch.dtype,
    rows: int,
    triton: bool,
    x_learns: bool,
    weight_learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of losses, and its gradients with respect to x [n, C] and weight [V, C] (empty if unwanted)."""
    exact = torch.promote_types(dtype, torch.float32)
    if triton:
        from receptance.ops.head_loss.triton import softmax_gradient_
    else:
        softmax_gradient_ = plain_softmax_gradient_
    with torch.autocast(x.device.type, enabled=False):
        matrix = weight.to(dtype)
        gx = x.new_empty(x.shape if x_learns else 0, dtype=dtype)
        gw = x.new_zeros(weight.shape if weight_learns else 0, dtype=exact)
        losses = x.new_empty(len(x), dtype=exact)
        buffer = x.new_empty((min(rows, len(x)), len(weight)), dtype=dtype)  # one: two would be the step's peak
        for first in range(0, len(x), rows):
            block = slice(first, first + rows)
            part = x[block].to(dtype)
            logits = torch.mm(part, matrix.T, out=buffer[: len(part)])
            weights = None if token_weights is None else token_weights[block]
            losses[block] = softmax_gradient_(logits, targets[block], weights, logit_penalty, x_learns or weight_learns)
            if x_learns:
                torch.mm(logits, matrix, out=gx[block])
            if weight_learns:  # float32: a sum over blocks in bfloat16 would drop what later blocks add
                _add_product_(gw, logits.T, part)
        return losses.sum(), gx, gw


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; on a GPU in one pass over `total`, without rounding the product to a's precision first."""
    if total.is_cuda and total.dtype == torch.float32 and a.dtype != torch.float32 and _products_in_float32(a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
    else:
        total += a @ b


@cache
def _products_in_float32(dtype: torch.dtype) -> bool:
    """Whether this torch multiplies half-precision matrices into a float32 sum (from 2.8 on)."""
    a, total = torch.ones(16, 16, dtype=dtype, device="cuda"), torch.ones(16, 16, device="cuda")
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
    except (TypeError, RuntimeError):
        return False
    return bool(total[0, 0] == 17)


@_head_loss.register_fake
def _(x, weight, targets, token_weights, logit_penalty, dtype, rows, triton, x_learns, weight_learns):  # type: ignore[no-untyped-def]
    exact = torch.promote_types(dtype, torch.float32)
    gx = x.new_empty(x.shape if x_learns else 0, dtype=dtype)
    gw = x.new_empty(weight.shape if weight_learns else 0, dtype=exact)
    return x.new_empty((), dtype=exact), gx, gw


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, *_ = inputs
    _, gx, gw = output
    ctx.save_for_backward(gx, gw)
    ctx.dtypes, ctx.learns = (x.dtype, weight.dtype), inputs[-2:]
    ctx.mark_non_differentiable(gx, gw)


def _scale(ctx, grad, *_):  # type: ignore[no-untyped-def]
    gradients = [
        (g * grad).to(dtype) if learns else None for g, dtype, learns in zip(ctx.saved_tensors, ctx.dtypes, ctx.learns)
    ]
    return *gradients, *[None] * 8


_head_loss.register_autograd(_scale, setup_context=_keep)


def plain_softmax_gradient_(
    logits: Tensor, targets: Tensor, weights: Tensor | None, logit_penalty: float, gradient: bool
) -> Tensor:
    """Each row's weighted loss [n]; with `gradient`, `logits` [n, V] become the gradient of their sum."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_sum = z.logsumexp(1, keepdim=True)
    wanted = targets[:, None]
    loss = (log_sum - z.gather(1, wanted)).squeeze(1)
    if gradient:
        top, index = z.max(1, keepdim=True)
        g = z.sub_(log_sum).exp_() if z is not logits else (z - log_sum).exp_()
        g.scatter_add_(1, wanted, -torch.ones_like(top))
        g.scatter_add_(1, index, top * logit_penalty)
        logits.copy_(g if weights is None else g * weights[:, None])
    return loss if weights is None else loss * weights
