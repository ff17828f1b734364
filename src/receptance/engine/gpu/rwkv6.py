"""RWKV-5's and 6's time mix on a GPU: projections, then one kernel for the state, group norm and gate.

RWKV-6's mixes depend on the token: before the projections, a low-rank map of one mix makes the other five.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from receptance.engine.gpu.choices import Choice
from receptance.engine.gpu.gemv import TANH, WRITE, Matrix
from receptance.engine.gpu.layers import Buffers, Cast, Layer, TimeLayer, vector
from receptance.engine.gpu.model import STEP_THREADS, GpuModel
from receptance.engine.gpu.products import Part, Piece, Projection
from receptance.ops import wkv6

if TYPE_CHECKING:
    from receptance.engine.gpu.prompts import Prompts

TOKENS = 16  # of a block around the operator on prompts
SAME, MIXED, BEFORE, R, K, V, G, W = range(8)  # of RWKV-6's mixed rows; the first three are the norm's


@dataclass(frozen=True)
class Weights:
    decay: Tensor  # float32 [C]; its exponential is minus the logarithm of the decay per step
    bonus: Tensor  # float32 [C]
    norm: tuple[Tensor, Tensor]
    projections: Tensor  # [3 to 4, C, C], in × out


@dataclass(frozen=True)
class Weights6(Weights):
    mix_in: Matrix  # [5 P, C]
    mix_out: Tensor  # [5, P, C], in the order R, K, V, G, W
    mix_base: Tensor  # [5, C]
    decay_in: Tensor  # [C, Q], in × out
    decay_out: Tensor  # [Q, C]
    second_halves: Tensor  # [5, C, P]: mix_out
    decay_second: Tensor  # [C, Q]: decay_out


class TimeMix5:
    """See `TimeMix`. The layouts 5.0 (without a gate), 5.1 and 5.2."""

    first_mix, decay_rank, mix_rank = 0, 0, 0

    def __init__(self, gpu: GpuModel):
        self.gpu, config = gpu, gpu.config
        self.c, self.n = gpu.c, config.head_size
        self.h = self.c // self.n
        self.count = 3 if config.version == "5.0" else 4
        self.mixes = self.copies = self.count
        self.projection = self._projection()
        self._load()

    def _projection(self) -> Projection:
        parts = tuple(Part(self.c, self.first_mix + i, i) for i in range(self.count))
        return Projection(parts, (self.c,) * self.count)

    def _load(self) -> None:
        half = {} if self.gpu.state_dtype == torch.float32 else {"HALF_STATE": 1}
        sizes = {"RANK_MIX": self.mix_rank or 32, "RANK_DECAY": self.decay_rank or 32, "STEP_THREADS": STEP_THREADS}
        self.macros = {"HEAD": self.n, **sizes, **half, **({"HAS_MIX": 1} if self.mix_rank else {})}
        self._kernels = self.gpu.load("wkv6.cu", **self.macros)
        self.heads_eps = 64e-5

    def _stack(self, att: Any) -> list[Tensor]:
        self.heads_eps = att.ln_x.eps
        return [getattr(att, name).weight for name in ("receptance", "key", "value", "gate")[: self.count]]

    def _weights(self, att: Any, cast: Cast, inputs: Tensor) -> Weights:
        bonus = vector(att.time_first).exp() if hasattr(att, "time_first") else vector(att.time_faaaa)

        def wide(x: Tensor) -> Tensor:  # of one number a head in 5.0 and 5.1
            return x.repeat_interleave(self.c // len(x))

        projections = inputs[: self.count * self.c].view(self.count, self.c, self.c).transpose(1, 2)
        norm = cast(att.ln_x.weight), cast(att.ln_x.bias)
        return Weights(wide(vector(att.time_decay)), wide(bonus), norm, projections)

    def layer(self, block: Any, cast: Cast) -> TimeLayer:
        att = block.att
        mixes = torch.cat([1 - getattr(att, f"time_mix_{x}").reshape(1, -1) for x in "rkvg"[: self.count]])
        inputs = cast.matrix(torch.cat(self._stack(att)))
        own = self._weights(att, cast, inputs.full)
        return TimeLayer(cast(mixes), inputs, cast.matrix(att.output.weight), own)

    def buffers(self, rows: int) -> Any:
        return None

    def _gate(self, b: Buffers) -> Tensor | None:
        return b.time.regions[3] if self.count == 4 else None

    def _project(self, layer: Layer, b: Buffers, rows: int) -> None:
        c, n = self.c, self.count
        out = b.time.flat[: n * b.rows * c].view(n, b.rows, c)[:, :rows]
        torch.bmm(b.mixed[self.first_mix : self.first_mix + n, :rows], layer.time.own.projections, out=out)

    def decode(self, index: int, layer: Layer, b: Buffers, slots: Tensor, choice: Choice) -> None:
        batch, own = len(slots), layer.time.own
        is_by_us = choice.few or choice.has_gemm
        if is_by_us:
            x = b.mixed[0, :batch]
            self.gpu.project(layer.time.inputs, x, b.time.flat, WRITE, choice, projection=self.projection)
        else:
            self._project(layer, b, batch)
        if choice.few:
            self._step(index, own, b, slots)
        else:
            self._step_many(index, own, b, slots, chained=is_by_us)

    def _step_inputs(self, index: int, own: Weights, b: Buffers, slots: Tensor) -> tuple[Any, ...]:
        state = self.gpu.state["wkv"][index]
        return (
            *b.time.regions[:3], self._gate(b), state, slots, own.decay, own.bonus, *own.norm, self.heads_eps, b.att,
        )  # fmt: skip

    def _step(
        self, index: int, own: Weights, b: Buffers, slots: Tensor, hidden: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:  # fmt: skip
        """hidden [B, Q] and weight [Q, C]: their product is added to `decay`."""
        inputs = self._step_inputs(index, own, b, slots)
        self._kernels.wkv6_step((self.h, len(slots)), 4 * self.n, *inputs, hidden, weight, chained=True)

    def _step_many(
        self, index: int, own: Weights, b: Buffers, slots: Tensor, low: Tensor | None = None, *, chained: bool
    ) -> None:
        """low [B, C]: what is added to `decay`."""
        rows, threads = len(slots), 4 * self.n
        grid = self.h, self.gpu.shares(rows, self.h, threads)
        inputs = self._step_inputs(index, own, b, slots)
        self._kernels.wkv6_step_many(grid, threads, *inputs, low, rows, chained=chained)

    def prefill(self, index: int, layer: Layer, prompts: "Prompts") -> None:
        self._project(layer, prompts.b, prompts.b.rows)
        self._operator(index, layer.time.own, prompts, None)

    def _operator(self, index: int, own: Weights, prompts: "Prompts", low: Tensor | None) -> None:
        gpu, b = self.gpu, prompts.b
        grid, threads = (self.h, -(-b.rows // TOKENS)), 256
        if prompts.own is None:  # padding is zeros, which leave the state alone: e^0, and nothing written
            shape = prompts.n, prompts.t, self.h, self.n
            prompts.own = (
                torch.zeros(3, *shape, dtype=gpu.dtype, device=gpu.device),
                torch.zeros(shape, device=gpu.device),
            )
        inputs, decays = prompts.own
        self._kernels.wkv6_prepare(
            grid, threads, *b.time.regions[:3], low, own.decay, prompts.place, inputs, inputs.stride(0), decays,
            b.rows, chained=True,
        )  # fmt: skip
        pool = gpu.state["wkv"][index]
        y, end = wkv6(
            inputs[0], decays, inputs[1], inputs[2], own.bonus.view(self.h, self.n), pool[prompts.slots].float()
        )
        pool.index_copy_(0, prompts.slots, end.to(pool.dtype))
        self._kernels.wkv6_finish(
            grid, threads, y, self._gate(b), prompts.place, *own.norm, self.heads_eps, b.att, b.rows, chained=True
        )


class TimeMix6(TimeMix5):
    """See `TimeMix`."""

    first_mix = R

    def __init__(self, gpu: GpuModel):
        self.gpu, config = gpu, gpu.config
        self.c, self.n, self.count = gpu.c, config.head_size, 4
        self.h = self.c // self.n
        self.mixes, self.copies = 3, 8
        self.mix_rank, self.decay_rank = config.mix_rank, config.decay_rank
        projections = self._projection()
        self.projection = Projection(
            (*projections.parts, Part(self.decay_rank, W, 4, TANH)), (*projections.regions, self.decay_rank)
        )
        self._load()

    def layer(self, block: Any, cast: Cast) -> TimeLayer:
        att, c = block.att, self.c
        # of the norm's three mixes one is this token and one the previous
        mixes = torch.stack([torch.zeros_like(att.time_maa_x), att.time_maa_x, torch.ones_like(att.time_maa_x)])
        order = [3, 1, 2, 4, 0]  # of w, k, v, r, g
        inputs = cast.matrix(torch.cat([*self._stack(att), att.time_decay_w1.T]))
        mix_in = att.time_maa_w1.T.reshape(5, -1, c)[order]
        base = [getattr(att, f"time_maa_{x}").reshape(1, c) for x in "rkvgw"]
        own = Weights6(
            **vars(self._weights(att, cast, inputs.full)),
            mix_in=cast.matrix(mix_in.reshape(-1, c)),
            mix_out=cast(att.time_maa_w2[order]),
            mix_base=cast(torch.cat(base)),
            decay_in=inputs.full[4 * c :].T,
            decay_out=cast(att.time_decay_w2),
            second_halves=cast(att.time_maa_w2[order].transpose(1, 2)),
            decay_second=cast(att.time_decay_w2.T),
        )
        return TimeLayer(cast(mixes.view(3, c)), inputs, cast.matrix(att.output.weight), own)

    def buffers(self, rows: int) -> Any:
        """The mixes' inner vectors [rows, 5 P], and the maps' outputs [5, rows, C] and [rows, C]."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.gpu.dtype, device=self.gpu.device)

        return empty(rows, 5 * self.mix_rank), empty(5, rows, self.c), empty(rows, self.c)

    def _mix(self, own: Weights6, b: Buffers, rows: int) -> None:
        """b.mixed[R:] by cuBLAS."""
        inner, low, _ = b.own
        torch.mm(b.mixed[MIXED, :rows], own.mix_in.full.T, out=inner[:rows])
        self.gpu.activate(inner[None, :rows], [TANH])
        torch.bmm(inner[:rows].view(rows, 5, -1).transpose(0, 1), own.mix_out, out=low[:, :rows])
        self._mix_many(own, b, rows)

    def _mix_many(self, own: Weights6, b: Buffers, rows: int) -> None:
        groups = rows * self.c // 8
        self._kernels.wkv6_mix_many(
            (-(-groups // 256), 5), 256, b.own[1], own.mix_base, b.mixed, b.rows * self.c, groups, self.c, chained=True
        )

    def _low_decay(self, own: Weights6, b: Buffers, rows: int) -> Tensor:
        hidden, low = b.time.regions[4][:rows], b.own[2][:rows]
        torch.mm(b.mixed[W, :rows], own.decay_in, out=hidden)
        self.gpu.activate(hidden[None], [TANH])
        return torch.mm(hidden, own.decay_out, out=low)

    def decode(self, index: int, layer: Layer, b: Buffers, slots: Tensor, choice: Choice) -> None:
        batch, own, gpu = len(slots), layer.time.own, self.gpu
        if not choice.few and not choice.has_gemm:
            self._mix(own, b, batch)
            with gpu.beside():
                low = self._low_decay(own, b, batch)
            self._project(layer, b, batch)
            gpu.join()
            self._step_many(index, own, b, slots, low, chained=False)
            return
        inner, outer, low = b.own[0][:batch], b.own[1], b.own[2][:batch]
        gpu.project(own.mix_in, b.mixed[MIXED, :batch], inner, WRITE, choice, activation=TANH)
        if choice.few:
            self._kernels.wkv6_mix(
                (self.h, batch), 4 * self.n, inner, own.mix_out, own.mix_base, b.mixed, b.rows * self.c, chained=True
            )
        else:
            gpu.products.many(own.second_halves, inner, outer, WRITE, pieces=self._second_pieces(b.rows))
            self._mix_many(own, b, batch)
        gpu.project(layer.time.inputs, b.mixed[0, :batch], b.time.flat, WRITE, choice, projection=self.projection)
        if choice.few:
            self._step(index, own, b, slots, b.time.regions[4], own.decay_out)
        else:
            gpu.products.many(own.decay_second, b.time.regions[4][:batch], low, WRITE)
            self._step_many(index, own, b, slots, low, chained=True)

    def _second_pieces(self, rows: int) -> tuple[Piece, ...]:
        """From the inner vectors to what the maps make of them."""
        c, rank = self.c, self.mix_rank
        return tuple(Piece(c, rank, i * c * rank, i * rank, i * rows * c, c) for i in range(5))

    def prefill(self, index: int, layer: Layer, prompts: "Prompts") -> None:
        b, own = prompts.b, layer.time.own
        self._mix(own, b, b.rows)
        self._project(layer, b, b.rows)
        self._operator(index, own, prompts, self._low_decay(own, b, b.rows))
