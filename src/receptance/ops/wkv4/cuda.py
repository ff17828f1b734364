"""RWKV-4's WKV in CUDA C++ (wkv4.cu): one kernel forward, one backward, each at one reading of its inputs.

Bytes per element with 16-bit inputs: forward 6, backward 10, and 2 for the states that the one saves for the other.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from receptance.ops import cuda
from receptance.ops.wkv4.naive import State4

SOURCE = Path(__file__).with_name("wkv4.cu")
ELEMENTS = {torch.float32: "float", torch.bfloat16: "Bf16", torch.float16: "Half"}
WARPS, GROUP, FORWARD, BACKWARD = 8, 8, 16, 8  # as in wkv4.cu; the last two: tokens of a warp


def fits(k: Tensor) -> bool:
    """Whether the kernels take inputs like k."""
    return k.dtype in ELEMENTS


def _program(k: Tensor, resets: Tensor | None) -> cuda.Program:
    c, blocks = k.shape[2], 2 if k.dtype == torch.float32 else 3
    return cuda.load(
        SOURCE, ELEMENT=ELEMENTS[k.dtype], CHANNELS=c, VECTOR=2 - c % 2, RESETS=int(resets is not None),
        FORWARD_BLOCKS=blocks,
    )  # fmt: skip


def _grid(k: Tensor, tokens: int) -> tuple[int, int]:
    """Chunks of a row, blocks; tokens: of a warp."""
    batch, t, c = k.shape
    chunks = -(-t // (tokens * WARPS))
    return chunks, chunks * batch * -(-c // (32 * (2 - c % 2)))


def _work(k: Tensor, chunks: int, words: int) -> Tensor:
    """What chunks and groups of chunks will publish."""
    rows = chunks * words + -(-chunks // GROUP)
    return torch.full((rows, k.shape[0] * k.shape[2]), -1, dtype=torch.int64, device=k.device)


def _cuts(resets: Tensor, length: int) -> Tensor:
    """[B, chunks]: whether a document begins inside each chunk."""
    return torch.nn.functional.pad(resets, (0, -resets.shape[1] % length)).view(len(resets), -1, length).any(-1)


def _saved(k: Tensor, is_saving: bool) -> Tensor:
    """(average, log-weight) before every 8th token: [B, T/8, C, 2]."""
    blocks = -(-k.shape[1] // BACKWARD) if is_saving else 0
    return k.new_empty(k.shape[0], blocks, k.shape[2], 2, dtype=torch.float32)


def _forward(
    w: Tensor, k: Tensor, v: Tensor, u: Tensor, num: Tensor, den: Tensor, exp: Tensor, lengths: Tensor | None,
    resets: Tensor | None, is_saving: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state, and what the backward pass needs of the states."""
    with torch.cuda.device_of(k):
        batch, t, _ = k.shape
        chunks, blocks = _grid(k, FORWARD)
        y, saved = torch.empty_like(k), _saved(k, is_saving)
        end = torch.empty_like(num), torch.empty_like(num), torch.empty_like(num)
        cuts = None if resets is None else _cuts(resets, FORWARD * WARPS)
        kernel = _program(k, resets).forward
        kernel(
            (blocks,), 32 * WARPS, w, k, v, u, num, den, exp, lengths, resets, cuts, _work(k, chunks, 1), y,
            saved if is_saving else None, *end, t, batch,
        )  # fmt: skip
    return y, *end, saved


def _backward(
    gy: Tensor, g_num: Tensor | None, g_den: Tensor | None, w: Tensor, k: Tensor, v: Tensor, u: Tensor, den: Tensor,
    lengths: Tensor | None, resets: Tensor | None, saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of k, v, w and u [2, C], num, den. g_num, g_den: of the final state, whose den is 1; None is zeros."""
    with torch.cuda.device_of(k):
        batch, t, c = k.shape
        chunks, blocks = _grid(k, BACKWARD)
        gk, gv = torch.empty_like(k), torch.empty_like(k)
        g_num0, g_den0 = torch.empty_like(den), torch.empty_like(den)
        shares = k.new_empty(2, chunks * batch, c, dtype=torch.float32)
        kernel = _program(k, resets).backward
        kernel(
            (blocks,), 32 * WARPS, w, k, v, u, gy, den, g_num, g_den, lengths, resets, saved, _work(k, chunks, 2),
            gk, gv, shares[0], shares[1], g_num0, g_den0, t, batch,
        )  # fmt: skip
        return gk, gv, shares.sum(1), g_num0, g_den0


# Operators for torch.compile. Called directly the functions take a tenth of a millisecond less.
_forward_op = torch.library.custom_op("receptance::wkv4_cuda", _forward, mutates_args=())
_backward_op = torch.library.custom_op("receptance::wkv4_cuda_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(w, k, v, u, num, den, exp, lengths, resets, is_saving):
    return torch.empty_like(k), *(torch.empty_like(num) for _ in range(3)), _saved(k, is_saving)


@_backward_op.register_fake
def _(gy, g_num, g_den, w, k, v, u, den, lengths, resets, saved):
    return torch.empty_like(k), torch.empty_like(k), torch.stack([w, u]), torch.empty_like(den), torch.empty_like(den)


class _WKV4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, k: Tensor, v: Tensor, u: Tensor, num: Tensor, den: Tensor, exp: Tensor,
                lengths: Tensor | None, resets: Tensor | None, is_saving: bool) -> tuple[Tensor, ...]:  # fmt: skip
        run = _forward_op if torch.compiler.is_compiling() else _forward
        y, *end, saved = run(w, k, v, u, num, den, exp, lengths, resets, is_saving)
        ctx.save_for_backward(w, k, v, u, den, lengths, resets, saved)
        ctx.mark_non_differentiable(end[2])
        ctx.set_materialize_grads(False)
        return y, *end

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gy: Tensor | None, *g_end: Tensor | None) -> tuple[Tensor | None, ...]:
        run = _backward_op if torch.compiler.is_compiling() else _backward
        gy = torch.zeros_like(ctx.saved_tensors[1]) if gy is None else gy.contiguous()
        g_num, g_den = (None if g is None else g.contiguous() for g in g_end[:2])
        gk, gv, shared, g_num0, g_den0 = run(gy, g_num, g_den, *ctx.saved_tensors)
        return shared[0], gk, gv, shared[1], g_num0, g_den0, None, None, None, None


def wkv4(
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: State4,
    lengths: Tensor | None,
    resets: Tensor | None = None,
) -> tuple[Tensor, State4]:
    """Same contract as the naive form, but k and v may stay in half precision; everything else is float32.

    y and the gradients past a row's length are 0; the state's den returns as 1. float64 is refused.
    """
    if torch.float64 in (k.dtype, v.dtype):
        raise TypeError('the CUDA form of wkv4 computes in float32; for float64 inputs use backend="chunk"')
    if k.dtype != v.dtype:
        k, v = k.float(), v.float()
    w, u, num, den, exp = (x.float().contiguous() for x in (w, u, *state))
    lengths = None if lengths is None else lengths.int()
    resets = None if resets is None else resets.contiguous()
    is_saving = torch.is_grad_enabled() and any(x.requires_grad for x in (w, k, v, u, num, den))
    args = w, k.contiguous(), v.contiguous(), u, num, den, exp.detach(), lengths, resets, is_saving
    y, num, den, exp = _WKV4.apply(*args)  # type: ignore[no-untyped-call]
    return y, (num, den, exp)


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.zeros(1, 2, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    w = torch.zeros(32, device="cuda")
    zero = torch.zeros(1, 32, device="cuda")
    wkv4(w, x, x, w, (zero, zero, zero), None)[0].sum().backward()
    torch.cuda.synchronize()
