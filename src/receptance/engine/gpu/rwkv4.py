"""RWKV-4's time mix on a GPU: after the projections of k, v and r, an elementwise kernel."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from receptance.engine.gpu.choices import Choice
from receptance.engine.gpu.gemv import WRITE
from receptance.engine.gpu.layers import Buffers, Cast, Layer, TimeLayer, vector
from receptance.engine.gpu.model import GpuModel
from receptance.engine.gpu.products import Part, Projection
from receptance.ops import wkv4

if TYPE_CHECKING:
    from receptance.engine.gpu.prompts import Prompts


@dataclass(frozen=True)
class Weights:
    decay: Tensor  # float32 [C], logarithm per step
    bonus: Tensor  # float32 [C]


class TimeMix4:
    """See `TimeMix`."""

    mixes = copies = 3

    def __init__(self, gpu: GpuModel):
        self.gpu, c = gpu, gpu.c
        self.projection = Projection(tuple(Part(c, i, i) for i in range(3)), (c, c, c))
        self._kernels = gpu.load("wkv4.cu", CHANNELS=c)

    def layer(self, block: Any, cast: Cast) -> TimeLayer:
        att = block.att
        mixes = [1 - x.reshape(1, -1) for x in (att.time_mix_k, att.time_mix_v, att.time_mix_r)]
        inputs = torch.cat([att.key.weight, att.value.weight, att.receptance.weight])
        own = Weights(-vector(att.time_decay).exp(), vector(att.time_first))
        return TimeLayer(cast(torch.cat(mixes)), cast.matrix(inputs), cast.matrix(att.output.weight), own)

    def buffers(self, rows: int) -> None:
        return None

    def _project(self, layer: Layer, b: Buffers, rows: int) -> None:
        c = self.gpu.c
        kvr = b.time.flat.view(3, b.rows, c)[:, :rows]
        torch.bmm(b.mixed[:, :rows], layer.time.inputs.full.view(3, c, c).transpose(1, 2), out=kvr)

    def decode(self, index: int, layer: Layer, b: Buffers, slots: Tensor, choice: Choice) -> None:
        gpu, own, batch = self.gpu, layer.time.own, len(slots)
        if choice.few or choice.has_gemm:
            x = b.mixed[0, :batch]
            gpu.project(layer.time.inputs, x, b.time.flat, WRITE, choice, projection=self.projection)
        else:
            self._project(layer, b, batch)
        state = (gpu.state[name][index] for name in ("num", "den", "exp"))
        self._kernels.wkv4_step(
            (-(-gpu.c // 256), batch), 256, *b.time.regions, own.decay, own.bonus, *state, slots, b.att, chained=True
        )

    def prefill(self, index: int, layer: Layer, prompts: "Prompts") -> None:
        gpu, own, b, c = self.gpu, layer.time.own, prompts.b, self.gpu.c
        self._project(layer, b, b.rows)
        k, v, r = b.time.regions
        shape, size, lengths = (prompts.n, prompts.t, c), prompts.n * prompts.t, None
        if prompts.is_ragged:
            if prompts.own is None:  # one row more, for padding behind the prompts
                place = prompts.place.long()
                zeros = torch.zeros(2, size + 1, c, dtype=gpu.dtype, device=gpu.device)
                prompts.own = zeros, place.where(place >= 0, size)
            padded, place = prompts.own
            k, v = (to.index_copy_(0, place, x)[:size] for to, x in zip(padded, (k, v)))
            lengths = prompts.lengths
        pools = [gpu.state[name][index] for name in ("num", "den", "exp")]
        num, den, exp = (pool[prompts.slots] for pool in pools)
        y, end = wkv4(own.decay, k.view(shape), v.view(shape), own.bonus, (num, den, exp), lengths=lengths)
        for pool, x in zip(pools, end):
            pool.index_copy_(0, prompts.slots, x)
        self._kernels.wkv4_finish((-(-c // 256), b.rows), 256, y, r, prompts.place, b.att, chained=True)
