"""Layer norm and residual addition in Triton: a program normalises whole rows; two numbers a row are kept."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.shares.triton import sum_shares

TILE = 2048  # elements of a tile, at least one row
PROGRAMS = 1056  # of the backward pass, each with its share of the gradients of weight and bias


@triton.jit
def _normalise_rows(x_ptr, delta_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, mean_ptr, inverse_ptr, rows, C, eps,
                    ADD: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    row, c = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BC)
    at = row[:, None].to(tl.int64) * C + c[None, :]
    mask = (row < rows)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, x, mask=mask)
        x = x.to(tl.float32)  # as rounded: the backward pass sees this one
    mean = tl.sum(x, 1) / C
    centred = tl.where(mask, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    out = centred * inverse[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(inverse_ptr + row, inverse, mask=row < rows)


@triton.jit
def _normalise_rows_backward(x_ptr, weight_ptr, mean_ptr, inverse_ptr, g_sum_ptr, g_ptr, gx_ptr, partial_ptr,
                             rows, C, SPAN, ADD: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """SPAN rows one after the other, each in registers; the gradients of weight and bias are summed there too."""
    c = tl.arange(0, BC)
    inside = c < C
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    g_weight, g_bias = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    start = tl.program_id(0) * SPAN
    for i in range(tl.minimum(SPAN, rows - start)):
        row = (start + i).to(tl.int64)
        at = row * C + c
        mean, inverse = tl.load(mean_ptr + row), tl.load(inverse_ptr + row)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normed = tl.where(inside, (x - mean) * inverse, 0.0)
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g_weight += g * normed
        g_bias += g
        g *= weight
        gx = (g - tl.sum(g, 0) / C - normed * (tl.sum(g * normed, 0) / C)) * inverse
        if ADD:
            gx += tl.load(g_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(gx_ptr + at, gx.to(gx_ptr.dtype.element_ty), mask=inside)
    partial_ptr += tl.program_id(0) * 2 * C + c
    tl.store(partial_ptr, g_weight, mask=inside)
    tl.store(partial_ptr + C, g_bias, mask=inside)


def _sizes(c: int) -> dict[str, int]:
    width = triton.next_power_of_2(c)
    height = max(1, TILE // width)
    return {"BR": height, "BC": width, "num_warps": min(16, max(1, width * height // 256))}


def _statistics(x: Tensor) -> Tensor:
    return torch.empty(2, x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)


@torch.library.custom_op("receptance::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out, statistics, meta = torch.empty_like(x, dtype=dtype), _statistics(x), _sizes(x.shape[-1])
    rows = statistics.shape[1]
    grid = (triton.cdiv(rows, meta["BR"]),)
    _normalise_rows[grid](x, x, weight, bias, x, out, *statistics, rows, x.shape[-1], eps, ADD=False, **meta)
    return out, statistics


@_layer_norm.register_fake
def _(x, weight, bias, eps, dtype):
    return torch.empty_like(x, dtype=dtype), _statistics(x)


@torch.library.custom_op("receptance::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    total, out, statistics = torch.empty_like(x), torch.empty_like(x, dtype=dtype), _statistics(x)
    meta, rows = _sizes(x.shape[-1]), statistics.shape[1]
    grid = (triton.cdiv(rows, meta["BR"]),)
    _normalise_rows[grid](x, delta, weight, bias, total, out, *statistics, rows, x.shape[-1], eps, ADD=True, **meta)
    return total, out, statistics


@_add_norm.register_fake
def _(x, delta, weight, bias, eps, dtype):
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype), _statistics(x)


@torch.library.custom_op("receptance::layer_norm_backward", mutates_args=())
def _norm_backward(
    g: Tensor, g_sum: Tensor | None, x: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and [2, C]: of weight and bias. g_sum: what else reached x."""
    gx, c, rows = torch.empty_like(x), x.shape[-1], statistics.shape[1]
    span = triton.cdiv(rows, PROGRAMS)
    programs = triton.cdiv(rows, span)
    partial = torch.empty(programs, 2, c, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(c)
    _normalise_rows_backward[(programs,)](
        x, weight, *statistics, x if g_sum is None else g_sum, g, gx, partial, rows, c, span,
        ADD=g_sum is not None, BC=width, num_warps=min(16, max(1, width // 256)),
    )  # fmt: skip
    return gx, sum_shares(partial, torch.float32)


@_norm_backward.register_fake
def _(g, g_sum, x, weight, statistics):
    return torch.empty_like(x), torch.empty(2, x.shape[-1], dtype=torch.float32, device=x.device)


def _keep_norm(ctx, inputs, output):
    x, weight, bias, *_ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.bias_dtype = bias.dtype


def _keep_add(ctx, inputs, output):
    _, delta, weight, bias, *_ = inputs
    total, _, statistics = output
    ctx.save_for_backward(total, weight, statistics)
    ctx.bias_dtype, ctx.delta_dtype = bias.dtype, delta.dtype


def _norm_gradients(ctx, g, _):
    x, weight, statistics = ctx.saved_tensors
    gx, shares = _norm_backward(g.contiguous(), None, x, weight, statistics)
    return gx, shares[0].to(weight.dtype), shares[1].to(ctx.bias_dtype), None, None


def _add_gradients(ctx, g_sum, g, _):
    total, weight, statistics = ctx.saved_tensors
    gx, shares = _norm_backward(g.contiguous(), g_sum.contiguous(), total, weight, statistics)
    return gx, gx.to(ctx.delta_dtype), shares[0].to(weight.dtype), shares[1].to(ctx.bias_dtype), None, None


_layer_norm.register_autograd(_norm_gradients, setup_context=_keep_norm)
_add_norm.register_autograd(_add_gradients, setup_context=_keep_add)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Same contract as the plain form; the result is of `dtype` (x's by default)."""
    return _layer_norm(x.contiguous(), weight, bias, eps, dtype or x.dtype)[0]


def add_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as the plain form; the norm is of `dtype` (x's by default)."""
    return _add_norm(x.contiguous(), delta.contiguous(), weight, bias, eps, dtype or x.dtype)[:2]


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.ones(2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    vector = torch.ones(64, device="cuda", requires_grad=True)
    sum(y.sum() for y in add_norm(x, layer_norm(x, vector, vector, 1e-5), vector, vector, 1e-5)).backward()
    torch.cuda.synchronize()
