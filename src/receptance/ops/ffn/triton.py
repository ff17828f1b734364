"""The channel mix's activations in Triton, elementwise over flat tensors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8  # two times 16 bytes of bfloat16 a thread


@triton.jit
def _place(n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < n


@triton.jit
def _relu_square(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at, mask = _place(n, BLOCK)
    x = tl.maximum(tl.load(x_ptr + at, mask=mask).to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + at, (x * x).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _relu_square_backward(y_ptr, g_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at, mask = _place(n, BLOCK)
    y, g = tl.load(y_ptr + at, mask=mask).to(tl.float32), tl.load(g_ptr + at, mask=mask).to(tl.float32)
    tl.store(out_ptr + at, (2.0 * tl.sqrt(y) * g).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate(gate_ptr, x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at, mask = _place(n, BLOCK)
    s = tl.sigmoid(tl.load(gate_ptr + at, mask=mask).to(tl.float32))
    x = tl.load(x_ptr + at, mask=mask).to(tl.float32)
    tl.store(out_ptr + at, (s * x).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_backward(gate_ptr, x_ptr, g_ptr, g_gate_ptr, gx_ptr, n, BLOCK: tl.constexpr):
    at, mask = _place(n, BLOCK)
    s = tl.sigmoid(tl.load(gate_ptr + at, mask=mask).to(tl.float32))
    x, g = tl.load(x_ptr + at, mask=mask).to(tl.float32), tl.load(g_ptr + at, mask=mask).to(tl.float32)
    tl.store(g_gate_ptr + at, (g * x * s * (1.0 - s)).to(g_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(gx_ptr + at, (g * s).to(gx_ptr.dtype.element_ty), mask=mask)


def _run(kernel, *tensors: Tensor) -> None:
    n = tensors[0].numel()
    kernel[(triton.cdiv(n, BLOCK),)](*tensors, n, BLOCK=BLOCK, num_warps=WARPS)


@torch.library.custom_op("receptance::relu_square", mutates_args=())
def _relu_square_op(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _run(_relu_square, x, out)
    return out


@torch.library.custom_op("receptance::relu_square_backward", mutates_args=())
def _relu_square_backward_op(y: Tensor, g: Tensor) -> Tensor:
    out = torch.empty_like(y)
    _run(_relu_square_backward, y, g, out)
    return out


@torch.library.custom_op("receptance::sigmoid_gate", mutates_args=())
def _gate_op(gate: Tensor, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _run(_gate, gate, x, out)
    return out


@torch.library.custom_op("receptance::sigmoid_gate_backward", mutates_args=())
def _gate_backward_op(gate: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    g_gate, gx = torch.empty_like(gate), torch.empty_like(x)
    _run(_gate_backward, gate, x, g, g_gate, gx)
    return g_gate, gx


_relu_square_op.register_fake(lambda x: torch.empty_like(x))
_relu_square_backward_op.register_fake(lambda y, g: torch.empty_like(y))
_gate_op.register_fake(lambda gate, x: torch.empty_like(x))
_gate_backward_op.register_fake(lambda gate, x, g: (torch.empty_like(gate), torch.empty_like(x)))
_relu_square_op.register_autograd(
    lambda ctx, g: _relu_square_backward_op(*ctx.saved_tensors, g.contiguous()),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)
_gate_op.register_autograd(
    lambda ctx, g: _gate_backward_op(*ctx.saved_tensors, g.contiguous()),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def relu_square(x: Tensor) -> Tensor:
    """Same contract as the plain form."""
    return _relu_square_op(x.contiguous())


def sigmoid_gate(gate: Tensor, x: Tensor) -> Tensor:
    """Same contract as the plain form."""
    return _gate_op(gate.contiguous(), x.contiguous())


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.ones(8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    sigmoid_gate(x, relu_square(x)).sum().backward()
    torch.cuda.synchronize()
