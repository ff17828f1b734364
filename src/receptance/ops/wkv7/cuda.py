"""RWKV-7's WKV on tensor cores, in CUDA C++: heads of 64, half precision. The kernels and their algebra: wkv7.cu.

A block walks along one row and head. Where batch × heads leave the GPU idle, rows are cut into segments: a first pass
finds what inputs write and the linear maps S → S P, `wkv7_join` the segments' start states. That pass needs no last
segment (backward: no first one), and two of its blocks fit on a multiprocessor: it cuts rows into finer pieces.

Kept for the backward pass, beside the inputs: the state before every 16 tokens, float16 in units of a power of two,
their triangular inverses, and the segments' ends and maps.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from receptance.ops import cuda
from receptance.ops.custom import custom_operator

HEAD, CHUNK, TEAM = 64, 16, 128  # threads of a team
# of shared memory
BYTES = {"FORWARD_BYTES": 77_824, "FORWARD_FEW_BYTES": 96_000, "BACKWARD_BYTES": 207_520, "BACKWARD_MAPS_BYTES": 85_824}
JOIN_BYTES = 4 * (HEAD * (HEAD + 1) + 16 * HEAD)
ALONE = 132  # blocks that have a multiprocessor of a large GPU each
MIN_SEGMENT = 8  # chunks
SOURCE = Path(__file__).with_name("wkv7.cu")


def program(dtype: torch.dtype) -> cuda.Program:
    macros = {"FLOAT16": 1} if dtype == torch.float16 else {}
    return cuda.load(SOURCE, **BYTES, **macros)


@dataclass(frozen=True)
class Cut:
    """How a row of T tokens is cut: `segments` of `length` chunks, the last perhaps shorter; for maps, in pieces."""

    heads: int
    t: int
    h: int

    @property
    def chunks(self) -> int:
        return -(-self.t // CHUNK)

    @property
    def length(self) -> int:
        wanted = ALONE // self.heads
        if wanted < 2:
            return self.chunks
        return min(self.chunks, max(MIN_SEGMENT, -(-self.chunks // wanted)))

    @property
    def segments(self) -> int:
        return -(-self.chunks // self.length)

    @property
    def piece(self) -> int:
        """Chunks of a block that finds maps: two blocks fit on a multiprocessor."""
        return max(-(-MIN_SEGMENT // 2), -(-(self.segments - 1) * self.length // max(1, 2 * ALONE // self.heads)))

    @property
    def pieces(self) -> int:
        return (self.chunks - 1) // self.piece + (self.chunks - 1) // self.length + 1

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.t, self.h, self.chunks, self.length, self.piece


def _join(kernels: cuda.Program, cut: Cut, maps: Tensor, parts: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    """Every segment's start state [heads, segments, N, N] (its end's gradient, if reverse) from the first one's.

    None is zeros.
    """
    starts = torch.empty((cut.heads, cut.segments, HEAD, HEAD), dtype=torch.float32, device=parts.device)
    kernels.wkv7_join(
        (cut.heads, HEAD // 16), TEAM, maps, parts, first, starts, int(reverse), *cut.shape[2:], shared=JOIN_BYTES
    )
    return starts


def _kept(cut: Cut, like: Tensor, is_saving: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the states before every chunk, their units, the chunks' inverses, the segments' maps (of what inputs
    write, then P)."""
    heads, n = cut.heads if is_saving else 0, HEAD
    states = like.new_empty((heads, cut.chunks, n, n), dtype=torch.float16)
    maps = like.new_empty((cut.heads if cut.segments > 1 else 0, cut.pieces, 2, n, n), dtype=torch.float32)
    inverses = like.new_empty((heads, cut.chunks, CHUNK, CHUNK), dtype=torch.float16)
    return states, like.new_empty((heads, cut.chunks), dtype=torch.float32), inverses, maps


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None,
    is_saving: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the end state; the states, units, inverses, segments' ends and maps that the backward pass needs."""
    batch, t, h, n = r.shape
    inputs = r, w, k, v, a, b
    cut, kernels = Cut(batch * h, t, h), program(r.dtype)
    grid, y = (cut.heads, cut.segments), torch.empty_like(v)
    states, units, inverses, maps = _kept(cut, r, is_saving)
    ends = state.new_empty((cut.heads, cut.segments, n, n))
    starts = state
    if cut.segments > 1:
        blocks = cut.heads, -(-(cut.segments - 1) * cut.length // cut.piece)
        kernels.wkv7_forward_maps(blocks, 3 * TEAM, *inputs, resets, maps, *cut.shape, shared=BYTES["FORWARD_BYTES"])
        starts = _join(kernels, cut, maps, maps, state, reverse=False)
    keep = (states, units, inverses) if is_saving else (None, None, None)
    if cut.heads * cut.segments <= ALONE:
        walk, threads, shared = kernels.wkv7_forward_few, 3 * TEAM, BYTES["FORWARD_FEW_BYTES"]
    else:
        walk, threads, shared = kernels.wkv7_forward, 2 * TEAM, BYTES["FORWARD_BYTES"]
    walk(grid, threads, *inputs, resets, starts, y, ends, *keep, *cut.shape, shared=shared)
    return y, ends[:, -1].reshape(state.shape).clone(), states, units, inverses, ends, maps


def _fake(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None,
    is_saving: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, t, h, n = r.shape
    cut = Cut(batch * h, t, h)
    states, units, inverses, maps = _kept(cut, r, is_saving)
    ends = state.new_empty((cut.heads, cut.segments, n, n))
    return torch.empty_like(v), torch.empty_like(state), states, units, inverses, ends, maps


def _backward(
    gradients: tuple[Any, ...], inputs: tuple[Tensor, ...], others: tuple[Tensor | None, ...],
    kept: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of r, w, k, v, a, b and of the start state. That of the end state may be None."""
    (gy, g_end), (*tensors, state), (resets,), (states, units, inverses, ends, maps) = gradients, inputs, others, kept
    batch, t, h, _ = gy.shape
    cut, kernels = Cut(batch * h, t, h), program(gy.dtype)
    grid, g_ends = (cut.heads, cut.segments), g_end
    if cut.segments > 1:
        parts = torch.empty_like(maps)
        blocks = cut.heads, (cut.chunks - 1) // cut.piece - cut.length // cut.piece + 1
        kernels.wkv7_backward_maps(
            blocks, 3 * TEAM, *tensors, gy, resets, inverses, parts, *cut.shape, shared=BYTES["BACKWARD_MAPS_BYTES"]
        )  # fmt: skip
        g_ends = _join(kernels, cut, maps, parts, g_end, reverse=True)
    grads, g_starts = [torch.empty_like(x) for x in tensors], torch.empty_like(ends)
    kernels.wkv7_backward(
        grid, 3 * TEAM, *tensors, gy, resets, states, units, inverses, ends, g_ends, *grads, g_starts, *cut.shape,
        shared=BYTES["BACKWARD_BYTES"],
    )  # fmt: skip
    first = g_starts[:, 0].reshape(state.shape)
    return *grads, first if cut.segments == 1 else first.clone()


_operator = custom_operator("wkv7_cuda", _forward, _backward, _fake, n_inputs=7, n_outputs=2, fills=False)


def fits(k: Tensor) -> bool:
    """Whether the kernels take inputs like k [B, T, H, N]."""
    return k.dtype in (torch.bfloat16, torch.float16) and k.shape[-1] == HEAD


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as the naive form for heads of 64 and k in half precision, to which the others are rounded.

    The state is float32. Log-decays of RWKV-7's range, (-0.6066, 0]: a chunk's decays must stay within float16.
    """
    if not fits(k):
        raise TypeError(
            f"the CUDA form of wkv7 takes half precision and heads of {HEAD}, found {k.dtype} and heads of "
            f"{k.shape[-1]}; use backend='triton' or 'chunk'"
        )
    inputs = [cuda.aligned(x.to(k.dtype)) for x in (r, w, k, v, a, b)]
    resets = None if resets is None else resets.contiguous()
    y, end = _operator(*inputs, state.float().contiguous(), resets)[:2]
    return y, end


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.zeros(1, 2, 1, HEAD, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    wkv7(x, x, x, x, x, x, torch.zeros(1, 1, HEAD, HEAD, device="cuda"))[0].sum().backward()
    torch.cuda.synchronize()
