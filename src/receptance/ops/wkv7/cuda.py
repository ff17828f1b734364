"""RWKV-7's WKV on tensor cores, in CUDA C++: heads of 64, half precision. The kernels and their algebra: wkv7.cu.

A block walks along one row and head. Where batch × heads leave the GPU idle, rows are cut into segments: a first pass
finds what each segment's inputs write and its linear map S → S P, `wkv7_join` the segments' start states.

Kept for the backward pass, beside the inputs: the state before every 16 tokens, float16 in units of a power of two, and
the segments' ends and maps.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from receptance.ops.cuda import Program, load

HEAD, CHUNK, TEAM = 64, 16, 128  # threads of a team
# of shared memory
BYTES = {"FORWARD_BYTES": 63_488, "BACKWARD_BYTES": 181_376, "BACKWARD_MAPS_BYTES": 97_536}
JOIN_BYTES = 4 * (HEAD * (HEAD + 1) + 16 * HEAD)
BLOCKS = 264  # that keep a large GPU busy
MIN_SEGMENT = 8  # chunks
SOURCE = Path(__file__).with_name("wkv7.cu")


def program(dtype: torch.dtype) -> Program:
    macros = {"FLOAT16": 1} if dtype == torch.float16 else {}
    return load(SOURCE, **BYTES, **macros)


@dataclass(frozen=True)
class Cut:
    """How a row of T tokens is cut: `segments` of `length` chunks, the last one perhaps shorter."""

    heads: int
    t: int
    h: int

    @property
    def chunks(self) -> int:
        return -(-self.t // CHUNK)

    @property
    def length(self) -> int:
        wanted = max(1, BLOCKS // self.heads)
        return min(self.chunks, max(MIN_SEGMENT, -(-self.chunks // wanted)))

    @property
    def segments(self) -> int:
        return -(-self.chunks // self.length)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.t, self.h, self.chunks, self.length


def _join(kernels: Program, cut: Cut, maps: Tensor, parts: Tensor, stride: int, first: Tensor, reverse: bool) -> Tensor:
    """Every segment's start state [heads, segments, N, N] (its end's gradient, if reverse) from the first one's."""
    starts = torch.empty((cut.heads, cut.segments, HEAD, HEAD), dtype=torch.float32, device=first.device)
    square = HEAD * HEAD
    linear = maps[:, :, 1]
    kernels.wkv7_join(
        (cut.heads, HEAD // 16), TEAM, linear, 2 * square, parts, stride * square, first, starts, cut.segments,
        int(reverse), shared=JOIN_BYTES,
    )  # fmt: skip
    return starts


def forward(
    inputs: list[Tensor], resets: Tensor | None, state: Tensor, is_saving: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(y, end state, what `backward` needs besides: states, units, ends, maps) of contiguous r, w, k, v, a, b."""
    batch, t, h, n = inputs[0].shape
    cut, kernels, device = Cut(batch * h, t, h), program(inputs[0].dtype), state.device
    grid = cut.heads, cut.segments
    new = lambda *shape, dtype=torch.float32: torch.empty((cut.heads, *shape), dtype=dtype, device=device)
    y, ends = torch.empty_like(inputs[3]), new(cut.segments, n, n)
    maps = new(cut.segments if cut.segments > 1 else 0, 2, n, n)
    starts = state
    if cut.segments > 1:
        kernels.wkv7_forward_maps(
            grid, 3 * TEAM, *inputs, resets, maps, *cut.shape, shared=BYTES["FORWARD_BYTES"]
        )  # fmt: skip
        starts = _join(kernels, cut, maps, maps, 2, state, reverse=False)
    states = new(cut.chunks, n, n, dtype=torch.float16) if is_saving else None
    units = new(cut.chunks) if is_saving else None
    kernels.wkv7_forward(
        grid, 2 * TEAM, *inputs, resets, starts, y, ends, states, units, *cut.shape, shared=BYTES["FORWARD_BYTES"]
    )  # fmt: skip
    end = ends[:, -1].reshape(state.shape).clone()
    return y, end, [states, units, ends, maps] if states is not None and units is not None else []


def backward(
    inputs: list[Tensor], resets: Tensor | None, kept: list[Tensor], gy: Tensor, g_end: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The gradients of (r, w, k, v, a, b) and of the start state."""
    batch, t, h, n = inputs[0].shape
    cut, kernels = Cut(batch * h, t, h), program(inputs[0].dtype)
    grid = cut.heads, cut.segments
    states, units, ends, maps = kept
    new = lambda: torch.empty((cut.heads, cut.segments, n, n), dtype=torch.float32, device=gy.device)
    g_ends = g_end
    if cut.segments > 1:
        parts = new()
        kernels.wkv7_backward_maps(
            grid, 2 * TEAM, *inputs, gy, resets, parts, *cut.shape, shared=BYTES["BACKWARD_MAPS_BYTES"]
        )  # fmt: skip
        g_ends = _join(kernels, cut, maps, parts, 1, g_end, reverse=True)
    grads, g_starts = [torch.empty_like(x) for x in inputs], new()
    kernels.wkv7_backward(
        grid, 3 * TEAM, *inputs, gy, resets, states, units, ends, g_ends, *grads, g_starts, *cut.shape,
        shared=BYTES["BACKWARD_BYTES"],
    )  # fmt: skip
    return grads, g_starts[:, 0].reshape(g_end.shape).clone()


class _WKV7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
                resets: Tensor | None, is_saving: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        inputs = [r, w, k, v, a, b]
        y, end, kept = forward(inputs, resets, state, is_saving)
        ctx.save_for_backward(*inputs, resets, *kept)
        return y, end

    @staticmethod
    def backward(ctx: Any, gy: Tensor, g_end: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, resets, states, units, ends, maps = ctx.saved_tensors
        kept = [states, units, ends, maps]
        grads, g_start = backward(inputs, resets, kept, gy.contiguous(), g_end.contiguous())
        return *grads, g_start, None, None


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as the naive form for heads of 64, all inputs bfloat16 or all float16; the state is float32.

    Log-decays of RWKV-7's range, (-0.6066, 0]: a chunk's decays must stay within float16.
    """
    inputs = [x.contiguous() for x in (r, w, k, v, a, b, state)]
    is_saving = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, end = _WKV7.apply(*inputs, resets, is_saving)  # type: ignore[no-untyped-call]
    return y, end


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.zeros(1, 2, 1, HEAD, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    wkv7(x, x, x, x, x, x, torch.zeros(1, 1, HEAD, HEAD, device="cuda"))[0].sum().backward()
    torch.cuda.synchronize()
