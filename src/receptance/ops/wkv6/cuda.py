"""RWKV-5 and 6's WKV in CUDA C++ (wkv6.cu) for half-precision inputs: states in registers, tf32 tensor cores.

Where heads x batch do not fill the GPU, rows are cut into segments: their ends are made first, each from nothing,
then chained. For the backward pass the forward one saves the state before every 16th token, in bfloat16: of what the
gradients are made of only the readings of these states are rounded so, and the gradients are rounded once more anyway.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from receptance.ops import cuda

SOURCE = Path(__file__).with_name("wkv6.cu")
ELEMENTS = {torch.float32: "float", torch.bfloat16: "Bf16", torch.float16: "Half"}
HEADS = (32, 64, 128)  # sizes
WIDEST_SHARED = 225 * 1024  # bytes, for heads of 128
TWO_AT_ONCE = 112 * 1024  # of which a data centre's GPU runs two blocks on a multiprocessor
CHUNK = 16  # tokens, as in wkv6.cu
BLOCKS = 528  # four for each of an H100's multiprocessors, as many as run at once
SHORTEST_SEGMENT = 256  # tokens


def fits(r: Tensor) -> bool:
    """Whether the kernels take inputs like r: heads of 128 need the shared memory of a data centre's GPU."""
    if r.dtype not in (torch.bfloat16, torch.float16) or r.shape[-1] not in HEADS:
        return False
    return r.shape[-1] < HEADS[-1] or _shared_bytes(r) >= WIDEST_SHARED


def _shared_bytes(r: Tensor) -> int:
    """What a block may have where r is; 0 with older versions of torch, and no bound on a CPU, where tests emulate."""
    if not r.is_cuda:
        return 2**20
    return int(getattr(torch.cuda.get_device_properties(r.device), "shared_memory_per_block_optin", 0))


class _Run:
    """What the kernels of one call share."""

    def __init__(self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, gy: Tensor | None, resets: Tensor | None):
        r, w, k, v = (cuda.aligned(x) for x in (r, w, k, v))
        gy = None if gy is None else cuda.aligned(gy)
        batch, t, h, n = r.shape
        length = max(SHORTEST_SEGMENT, -(-t // (max(1, BLOCKS // (batch * h)) * CHUNK)) * CHUNK)
        self.segments = -(-t // length)
        self.grid, self.threads = (batch * self.segments * h,), 2 * n
        self.states = (batch, self.segments, h, n, n)
        self.inputs = r, w, k, v, u, gy, resets, 0 if w.stride(1) == 0 else h * n, t, h, self.segments, length
        tile, warps = CHUNK * n, n // 16
        self.shared = 2 * (tile * 6 + tile * w.element_size()) + 8 * tile + warps * 1024 + 4 * n
        self.shared_saving = self.shared + 2 * n * n
        tiles, for_values = 2 * (tile * 8 + tile * w.element_size() + 2 * n * n) + warps * 4160, 4 * n * n + 8 * tile
        is_roomy = tiles + 2 * for_values <= TWO_AT_ONCE and _shared_bytes(r) >= WIDEST_SHARED
        buffers = 2 if is_roomy else 1
        self.shared_gradients = tiles + buffers * for_values
        self.program = cuda.load(
            SOURCE, ELEMENT=ELEMENTS[r.dtype], DECAY=ELEMENTS[w.dtype], HEAD=n, RESETS=int(resets is not None),
            VALUES_BUFFERS=buffers,
        )  # fmt: skip

    def starts(self, first: Tensor | None, is_backward: bool) -> Tensor | None:
        """The state before each segment, or the gradient after each: [B, segments, H, N, N]; first [B, H, N, N].

        None is zeros.
        """
        if self.segments == 1:
            return first
        ends = self.inputs[0].new_empty(self.states, dtype=torch.float32)
        decays = self.inputs[0].new_empty(self.states[:-1], dtype=torch.float32)
        kernel = self.program.backward_ends if is_backward else self.program.forward_ends
        batch, _, h, n, _ = self.states
        grid = (batch * (self.segments - 1) * h,)
        kernel(grid, self.threads, *self.inputs, ends, decays, shared=self.shared)
        self.program.chain((batch * h * n * n // 256,), 256, ends, decays, first, h, self.segments, int(is_backward))
        return ends


def _saved(r: Tensor, is_saving: bool) -> Tensor:
    batch, t, h, n = r.shape
    return r.new_empty(batch, -(-t // CHUNK) if is_saving else 0, h, n, n, dtype=torch.bfloat16)


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, resets: Tensor | None, is_saving: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, the states before every 16th token."""
    with torch.cuda.device_of(r):
        run = _Run(r, w, k, v, u, None, resets)
        y, end, saved = torch.empty_like(v), torch.empty_like(state), _saved(r, is_saving)
        starts = run.starts(state, False)
        keep, shared = (saved, run.shared_saving) if is_saving else (None, run.shared)
        run.program.forward(run.grid, run.threads, *run.inputs, starts, y, keep, end, shared=shared)
    return y, end, saved


def _backward(
    gy: Tensor,
    g_end: Tensor | None,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    resets: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w, k, v, u and the initial state; g_end: of the final one, None is zeros."""
    with torch.cuda.device_of(r):
        run = _Run(r, w, k, v, u, gy, resets)
        gr, gk, gv = torch.empty_like(r), torch.empty_like(r), torch.empty_like(r)
        g_start = u.new_empty(r.shape[0], *r.shape[2:], r.shape[3])
        gw = r.new_empty(r.shape, dtype=w.dtype)  # w itself may be an expanded constant
        gu = r.new_empty(run.states[:-1], dtype=torch.float32)
        ends = run.starts(g_end, True)
        out = gr, gk, gv, gw, gu, g_start
        run.program.gradients(run.grid, run.threads, *run.inputs, saved, ends, *out, shared=run.shared_gradients)
        return gr, gw, gk, gv, gu.sum((0, 1)), g_start


# Operators for torch.compile. Called directly the functions take a tenth of a millisecond less.
_forward_op = torch.library.custom_op("receptance::wkv6_cuda", _forward, mutates_args=())
_backward_op = torch.library.custom_op("receptance::wkv6_cuda_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(r, w, k, v, u, state, resets, is_saving):
    return torch.empty_like(v), torch.empty_like(state), _saved(r, is_saving)


@_backward_op.register_fake
def _(gy, g_end, r, w, k, v, u, resets, saved):
    return (
        torch.empty_like(r), r.new_empty(r.shape, dtype=w.dtype), torch.empty_like(r), torch.empty_like(r),
        torch.empty_like(u), u.new_empty(r.shape[0], *r.shape[2:], r.shape[3]),
    )  # fmt: skip


class _WKV6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor,
                resets: Tensor | None, is_saving: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        run = _forward_op if torch.compiler.is_compiling() else _forward
        y, end, saved = run(r, w, k, v, u, state, resets, is_saving)
        ctx.save_for_backward(r, w, k, v, u, resets, saved)
        ctx.set_materialize_grads(False)
        return y, end

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gy: Tensor | None, g_end: Tensor | None) -> tuple[Tensor | None, ...]:
        run = _backward_op if torch.compiler.is_compiling() else _backward
        gy = torch.zeros_like(ctx.saved_tensors[3]) if gy is None else gy.contiguous()
        g_end = None if g_end is None else g_end.contiguous()
        gr, gw, gk, gv, gu, g_start = run(gy, g_end, *ctx.saved_tensors)
        return gr, gw, gk, gv, gu, g_start, None, None


def wkv6(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as the naive form for k of bfloat16 or float16 and heads of 32, 64 or 128; float32 inside.

    r and v are taken in k's precision. w may have float32's, and be an expanded constant (RWKV-5), which is not copied.
    A log-decay below -18 counts as -18, and its gradient is 0. Other inputs are refused.
    """
    if not fits(k):
        raise TypeError(
            f"the CUDA form of wkv6 takes half precision and heads of {HEADS}, found {k.dtype} and heads of "
            f"{k.shape[-1]}; use backend='triton' or 'chunk'"
        )
    r, v = r.to(k.dtype), v.to(k.dtype)
    w = w if w.dtype in (torch.float32, r.dtype) else w.float()
    w = w if w.stride()[:2] == (0, 0) and w[0, 0].is_contiguous() else w.contiguous()
    resets = None if resets is None else resets.contiguous()
    u, state = u.float().contiguous(), state.float().contiguous()
    is_saving = torch.is_grad_enabled() and any(x.requires_grad for x in (r, w, k, v, u, state))
    args = r.contiguous(), w, k.contiguous(), v.contiguous(), u, state, resets, is_saving
    y, end = _WKV6.apply(*args)  # type: ignore[no-untyped-call]
    return y, end


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    u, state = torch.zeros(1, 64, device="cuda"), torch.zeros(1, 1, 64, 64, device="cuda")
    wkv6(x, x.float(), x, x, u, state)[0].sum().backward()
    torch.cuda.synchronize()
