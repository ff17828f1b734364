"""A model's layers as the kernels read them, what a version's time mix has to offer, and room for activations."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from receptance.engine.gpu.choices import Choice
from receptance.engine.gpu.gemv import Matrix, Weights
from receptance.engine.gpu.products import Outputs, Projection

if TYPE_CHECKING:
    from receptance.engine.gpu.model import GpuModel
    from receptance.engine.gpu.prompts import Prompts


class TimeMix(Protocol):
    """A version's time mix between the norm and the output projection."""

    mixes: int  # made by the norm
    copies: int  # [rows, C] in Buffers.mixed, these among them
    projection: Projection

    def layer(self, block: Any, cast: "Cast") -> "TimeLayer": ...

    def buffers(self, rows: int) -> Any:
        """What it keeps beside `Buffers`."""

    def decode(self, index: int, layer: "Layer", b: "Buffers", slots: Tensor, choice: Choice) -> None:
        """From b.mixed of len(slots) rows to b.att, with layer `index` of the states stepped in place."""

    def prefill(self, index: int, layer: "Layer", prompts: "Prompts") -> None:
        """The same for the tokens of prompts."""


@dataclass(frozen=True)
class TimeLayer:
    mixes: Tensor  # [mixes, C], of the previous token
    inputs: Matrix  # of the time mix's projection [·, C]
    output: Matrix  # [C, C]
    own: Any  # the version's other weights


@dataclass(frozen=True)
class Layer:
    """One block's weights as the kernels read them."""

    ln1: tuple[Tensor, Tensor]
    ln2: tuple[Tensor, Tensor]
    time: TimeLayer
    channel_mixes: Tensor  # [1 or 2, C]
    channel: Matrix  # [F, C], with receptance [F + C, C]
    value: Matrix  # [C, F]


@dataclass(frozen=True)
class Cast:
    dtype: torch.dtype
    weights: Weights

    def __call__(self, x: Tensor) -> Tensor:
        return x.detach().to(self.dtype, copy=True).contiguous()

    def matrix(self, x: Tensor) -> Matrix:
        return Matrix.of(self(x), self.weights)


def vector(x: Tensor) -> Tensor:
    """A vector whose rounding would be felt, in float32."""
    return x.detach().flatten().to(torch.float32, copy=True)


@dataclass(frozen=True)
class Added:
    """What the next norm adds to x: delta, or delta sigmoid(gate)."""

    delta: Tensor | None = None  # [rows, C]
    gate: Tensor | None = None


NOTHING = Added()


class Buffers:
    """Activations of up to `rows` tokens."""

    def __init__(self, model: "GpuModel", rows: int):
        c = model.c

        def empty(*shape: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=model.device)

        self.rows = rows
        self.x, self.sum = empty(rows, c, dtype=torch.float32), empty(rows, c, dtype=torch.float32)
        self.normed, self.mixed = empty(rows, c), empty(model.time.copies, rows, c)
        self.att, self.delta = empty(rows, c), empty(rows, c)
        self.time = Outputs(model.time.projection, rows, model.dtype, model.device)
        self.channel = Outputs(model.channel, rows, model.dtype, model.device)
        self.own = model.time.buffers(rows)

    @property
    def key(self) -> Tensor:
        return self.channel.regions[0]

    @property
    def gate(self) -> Tensor | None:
        return self.channel.regions[1] if len(self.channel.regions) > 1 else None
