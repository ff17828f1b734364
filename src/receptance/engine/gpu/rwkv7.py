"""RWKV-7's time mix on a GPU.

r, k, v and the low-rank maps' inner vectors are one product; the maps' second halves, what is done to keys and values,
the state, group norm, bonus and gate are one kernel.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from receptance.engine.gpu.choices import Choice
from receptance.engine.gpu.gemv import NONE, SIGMOID, TANH, WRITE
from receptance.engine.gpu.layers import Buffers, Cast, Layer, TimeLayer
from receptance.engine.gpu.model import STEP_THREADS, GpuModel
from receptance.engine.gpu.products import Part, Piece, Projection
from receptance.ops import wkv7

if TYPE_CHECKING:
    from receptance.engine.gpu.prompts import Prompts

R, K, V, W, A, G = range(6)  # order of the mixes; the last four feed the low-rank maps
TOKENS, TURNS = 16, 2  # of a block around the operator on prompts, at a time; times, behind it


@dataclass(frozen=True)
class Weights:
    """inputs: the low-rank maps' first halves v, w, a, g, zeros up to the largest rank P."""

    rkv: Tensor  # [3, C, C], in × out
    first_halves: Tensor  # [4, C, P], in × out
    low_rank: Tensor  # [4, P, C]: their second halves
    second_halves: Tensor  # the same, each [C, rank], one behind the other
    vectors: tuple[Tensor, ...]  # w0, a0, v0, k_k, k_a, r_k, ln_x weight and bias


class Own:
    def __init__(self, rows: int, c: int, rank: int, dtype: torch.dtype, device: torch.device):
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.inner, self.low, self.v_first = empty(4 * rows * rank), empty(4, rows, c), empty(rows, c)


class TimeMix7:
    """See `TimeMix`."""

    mixes = copies = 6

    def __init__(self, gpu: GpuModel):
        self.gpu, config = gpu, gpu.config
        self.c, self.n = gpu.c, config.head_size
        self.h = self.c // self.n
        self.ranks = (config.value_rank, config.decay_rank, config.rate_rank, config.gate_rank)
        self.activations = NONE, TANH, NONE, SIGMOID  # of the low-rank maps' inner vectors: v, w, a, g
        parts = [Part(self.c, mix, i) for i, mix in enumerate((R, K, V))]
        first = 0
        for rank, mix, activation in zip(self.ranks, (V, W, A, G), self.activations):
            parts.append(Part(rank, mix, 3, activation, first, max(self.ranks)))
            first += rank
        self.projection = Projection(tuple(parts), (self.c, self.c, self.c, sum(self.ranks)))
        names = "RANK_V", "RANK_W", "RANK_A", "RANK_G", "RANK_ROWS", "STEP_THREADS"
        half = {} if gpu.state_dtype == torch.float32 else {"HALF_STATE": 1}
        self.macros = {"HEAD": self.n, **dict(zip(names, (*self.ranks, max(self.ranks), STEP_THREADS))), **half}
        self._kernels = gpu.load("wkv7.cu", **self.macros)
        self.heads_eps = 64e-5

    def layer(self, block: Any, cast: Cast) -> TimeLayer:
        att, c = block.att, self.c
        self.heads_eps = att.ln_x.eps
        if hasattr(att, "v0"):
            v0, v1, v2 = att.v0.data, att.v1.data, att.v2.data
        else:  # the first layer's are never used
            zero = att.w0.new_zeros
            v0, v1, v2 = zero(1, 1, c), zero(c, self.ranks[0]), zero(self.ranks[0], c)
        firsts, seconds = (v1, att.w1, att.a1, att.g1), (v2, att.w2, att.a2, att.g2)
        padded = max(self.ranks)
        pad = torch.nn.functional.pad
        rkv = att.receptance.weight, att.key.weight, att.value.weight
        mixes = att.x_r, att.x_k, att.x_v, att.x_w, att.x_a, att.x_g
        vectors = att.w0, att.a0, v0, att.k_k, att.k_a, att.r_k, att.ln_x.weight, att.ln_x.bias
        inputs = cast.matrix(torch.cat([*rkv, *(pad(x.T, (0, 0, 0, padded - x.shape[1])) for x in firsts)]))
        own = Weights(
            rkv=inputs.full[: 3 * c].view(3, c, c).transpose(1, 2),
            first_halves=inputs.full[3 * c :].view(4, -1, c).transpose(1, 2),
            low_rank=cast(torch.stack([pad(x, (0, 0, 0, padded - x.shape[0])) for x in seconds])),
            second_halves=cast(torch.cat([x.T.reshape(-1) for x in seconds])),
            vectors=tuple(cast(x.flatten()) for x in vectors),
        )
        return TimeLayer(cast(torch.cat([x.reshape(1, c) for x in mixes])), inputs, cast.matrix(att.output.weight), own)

    def buffers(self, rows: int) -> Own:
        return Own(rows, self.c, max(self.ranks), self.gpu.dtype, self.gpu.device)

    def decode(self, index: int, layer: Layer, b: Buffers, slots: Tensor, choice: Choice) -> None:
        gpu, time, batch, c = self.gpu, layer.time, len(slots), self.c
        own: Weights = time.own
        state = gpu.state["wkv"][index]
        rkv, hidden = b.time.flat[: 3 * b.rows * c].view(3, b.rows, c), b.time.regions[3]
        rest = b.own.v_first, int(index == 0), state, slots, *own.vectors, self.heads_eps, b.att
        threads, is_by_us = 4 * self.n, choice.few or choice.has_gemm
        if is_by_us:
            gpu.project(time.inputs, b.mixed[0, :batch], b.time.flat, WRITE, choice, projection=self.projection)
        if choice.few:
            grid = self.h, batch
            self._kernels.wkv7_step(grid, threads, rkv, b.rows * c, hidden, own.low_rank, *rest, chained=True)
            return
        if is_by_us:
            gpu.products.many(own.second_halves, hidden[:batch], b.own.low, WRITE, pieces=self._second_pieces(b.rows))
        else:
            with gpu.beside():
                self._low_rank(own, b, batch)
            torch.bmm(b.mixed[: V + 1, :batch], own.rkv, out=rkv[:, :batch])
            gpu.join()
        grid = self.h, gpu.shares(batch, self.h, threads)
        self._kernels.wkv7_step_many(
            grid, threads, rkv, b.rows * c, b.own.low, b.rows * c, *rest, batch, chained=is_by_us
        )

    def _second_pieces(self, rows: int) -> tuple[Piece, ...]:
        """From the inner vectors to b.own.low."""
        c, firsts = self.c, (0, *accumulate(self.ranks))
        return tuple(
            Piece(c, rank, c * first, first, i * rows * c, c) for i, (rank, first) in enumerate(zip(self.ranks, firsts))
        )

    def _low_rank(self, own: Weights, b: Buffers, rows: int) -> None:
        """b.own.low: the low-rank maps of the last four mixes."""
        inner = b.own.inner[: 4 * rows * max(self.ranks)].view(4, rows, -1)
        torch.bmm(b.mixed[V:, :rows], own.first_halves, out=inner)
        self.gpu.activate(inner, self.activations)
        torch.bmm(inner, own.low_rank, out=b.own.low[:, :rows])

    def prefill(self, index: int, layer: Layer, prompts: "Prompts") -> None:
        gpu, own, b = self.gpu, layer.time.own, prompts.b
        shape, grid, threads = (prompts.n, prompts.t, self.h, self.n), (self.h, -(-b.rows // TOKENS)), 256
        if prompts.own is None:  # padding is zeros, which leave the state alone: e^0, and nothing written
            prompts.own = (
                torch.zeros(6, *shape, dtype=gpu.dtype, device=gpu.device),
                torch.empty(b.rows, self.h, device=gpu.device),
            )
        inputs, bonuses = prompts.own
        rkv = b.time.flat[: 3 * b.rows * self.c].view(3, b.rows, self.c)
        torch.bmm(b.mixed[: V + 1], own.rkv, out=rkv)
        self._low_rank(own, b, b.rows)
        self._kernels.wkv7_prepare(
            grid, threads, rkv, b.rows * self.c, b.own.low, b.own.v_first, int(index == 0), *own.vectors[:6],
            prompts.place, inputs, inputs.stride(0), bonuses, b.rows, chained=True,
        )  # fmt: skip
        pool = gpu.state["wkv"][index]
        r, w, k, v, erase, write = inputs.unbind(0)
        y, end = wkv7(r, w, k, v, erase, write, pool[prompts.slots].float())
        pool.index_copy_(0, prompts.slots, end.to(pool.dtype))
        self._kernels.wkv7_finish(
            (self.h, -(-b.rows // (TOKENS * TURNS))), threads, y, v, b.own.low[3], bonuses, prompts.place,
            *own.vectors[6:], self.heads_eps, b.att, b.rows, chained=True,
        )  # fmt: skip
