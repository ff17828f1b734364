"""A whole decoding step for few rows in one launch (chain.cuh), bit for bit what the separate kernels give."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from receptance.engine.gpu.gemv import (
    ADD,
    GATED,
    LOGITS,
    RELU_SQUARE,
    WARPS,
    WRITE,
    ring_bytes,
    sums_bytes,
)

if TYPE_CHECKING:
    from receptance.engine.gpu.model import GpuModel

PRODUCT = struct.Struct("6P8i")  # gemv::Product
MODEL = struct.Struct("9P4ifi")  # chain::Model
LEAST_DEPTH, MOST_DEPTH = 4, 12  # steps of 32 columns that a warp's ring has room for
SYSTEM_BYTES = 1024  # of shared memory, of each block
PIECES = 9  # of a layer, at most


@dataclass(frozen=True)
class Product:
    """See gemv::Product. tasks: None, or one for each 16 rows of the matrix."""

    weight: Tensor
    x: Tensor
    out: Tensor
    mode: int
    activation: int = 0
    tasks: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class TimePart:
    """What a version's time mix brings along. products: of each layer, those before the channel mix's."""

    source: str
    macros: dict[str, int]
    products: Sequence[Sequence[Product]]
    layers: Sequence[Sequence[Tensor | None]]  # the fields of the source's Layer
    tensors: Sequence[Tensor | None]  # of its Model
    numbers: bytes  # behind them
    shared_bytes: int  # of a block, static


def _pointers(tensors: Sequence[Tensor | None]) -> bytes:
    return struct.pack(f"{len(tensors)}P", *(0 if x is None else x.data_ptr() for x in tensors))


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in bytes that are 128 too large, and each row's scale, float32."""
    x = weight.float()
    scales = x.abs().amax(1) / 127
    q = (x / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
    return (q + 128).to(torch.uint8), scales


class Chain:
    """The step for up to 8 · batch_tiles rows. fits: whether the GPU has room for it."""

    def __init__(self, gpu: "GpuModel", own: TimePart, batch_tiles: int):
        self.gpu, self.grid, self.threads = gpu, gpu.processors, 32 * WARPS
        b, layers = gpu.rows, gpu.layers
        tasks = None if b.gate is None else gpu.tasks(gpu.channel, 16)
        products: list[Product] = []
        for layer, before in zip(layers, own.products):
            key = b.key if tasks is None else b.channel.flat
            products += [
                *before,
                Product(layer.channel, b.mixed[0], key, WRITE, RELU_SQUARE, tasks),
                Product(layer.value, b.key, b.x, ADD if b.gate is None else GATED, gate=b.gate),
            ]
        products.append(Product(gpu.head, b.normed, gpu.logits, LOGITS))
        sums, table = 2 * sums_bytes(batch_tiles), PRODUCT.size * len(products)
        free = gpu.shared_bytes - SYSTEM_BYTES - own.shared_bytes - sums - table
        depth = min(MOST_DEPTH, free // ring_bytes(1))
        self.fits = depth >= LEAST_DEPTH
        if not self.fits:
            return
        self.shared = ring_bytes(depth) + sums + table
        program = gpu.load(
            own.source, GEMV_WARPS=WARPS, ROW_TILES=1, BATCH_TILES=batch_tiles, DEPTH=depth, IS_CHAIN=1,
            WEIGHT_BITS=8 if gpu.int8 else 16, WIDTH=gpu.c, GEMV_BYTES=ring_bytes(depth) + sums, **own.macros,
        )  # fmt: skip
        self._kernel = getattr(program, own.source.removesuffix(".cu"))
        self._counts = torch.zeros(PIECES * len(layers) + 2, dtype=torch.int32, device=gpu.device)
        norms = b""
        for i, x in enumerate(layers):
            states = gpu.state["att_shift"][i], gpu.state["ffn_shift"][i]
            norms += _pointers([*x.ln1, x.time.mixes, *x.ln2, x.channel_mixes, *states])
        self._held = [self._place(x) for x in (self._pack(products), norms, b"".join(map(_pointers, own.layers)))]
        tensors = *self._held[:2], gpu.table, *gpu.ln_out, b.x, b.mixed, b.normed, self._counts
        numbers = b.rows * gpu.c, len(layers), gpu.time.mixes, len(layers[0].channel_mixes), gpu.eps, 0
        model = MODEL.pack(*(x.data_ptr() for x in tensors), *numbers)
        self._model = self._place(model + _pointers([self._held[2], *own.tensors]) + own.numbers)

    def _place(self, data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.gpu.device)

    def _pack(self, products: Sequence[Product]) -> bytes:
        packed, first = b"", 0
        self._matrices: list[Tensor | None] = []
        for p in products:
            tiles = len(p.weight) // 16 if p.tasks is None else len(p.tasks)
            columns = p.weight.shape[1]
            stride = p.out.stride(0) if p.out.dim() > 1 else 0
            weight, scales = quantised(p.weight) if self.gpu.int8 else (p.weight, None)
            self._matrices += [weight, scales]
            packed += _pointers([weight, scales, p.tasks, p.x, p.out, p.gate])
            packed += struct.pack("8i", columns, p.activation, columns, stride, p.mode, tiles, first, 0)
            first = (first + tiles) % self.grid
        return packed

    def run(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """`GpuModel.decode`."""
        self._counts.zero_()
        args: Any = self._model, tokens, slots, len(tokens)
        self._kernel((self.grid,), self.threads, *args, shared=self.shared, together=True)
        return self.gpu.logits[: len(tokens)]
