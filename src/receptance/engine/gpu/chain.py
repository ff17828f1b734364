"""A whole decoding step of RWKV-7 for few rows in one launch (chain7.cu), bit for bit what the separate kernels give."""

import struct
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from receptance.engine.gpu.model import ADD, DEPTH, LOGITS, RELU_SQUARE, SHARED_BYTES, WARPS, WRITE, GpuModel
from receptance.engine.gpu.rwkv7 import TimeMix7

ROWS = 8  # of one tile of activations
PRODUCT = struct.Struct("5P10i")  # gemv::Product
MODEL = struct.Struct("13P3i2f")  # Model
STATIC_BYTES = 32 * 1024  # of a block, beside the ring, the sums and the products


class Chain7:
    """The step for up to 8 · batch_tiles rows. Built on the first use; None of `of` where the GPU is too small."""

    def __init__(self, gpu: GpuModel, time: TimeMix7, batch_tiles: int):
        self.gpu = gpu
        layers, b = gpu.layers, gpu.rows
        count = 4 * len(layers) + 1
        sums = WARPS * 16 * (8 * batch_tiles + 1) * 4
        products = PRODUCT.size * count
        free = gpu.shared_bytes - STATIC_BYTES - sums - products
        depth = min(12, free // (WARPS * 1024))
        if depth < DEPTH:
            raise ValueError("a ring of weights does not fit this GPU's shared memory")
        ring = WARPS * depth * 1024
        self.shared = ring + sums + products
        self.grid = gpu.processors
        program = gpu.load(
            "chain7.cu", GEMV_WARPS=WARPS, ROW_TILES=1, BATCH_TILES=batch_tiles, DEPTH=depth, WIDTH=gpu.c,
            GEMV_BYTES=ring + sums, **time.macros,
        )  # fmt: skip
        self._kernel = program.chain7
        self.counts = torch.zeros(7 * len(layers) + 2, dtype=torch.int32, device=gpu.device)
        self._products = self._place(self._pack_products(time))
        self._layers = self._place(b"".join(self._pack_layer(i) for i in range(len(layers))))
        pointers = (
            self._products, self._layers, gpu.table, *gpu.ln_out, b.x, b.mixed, b.time.flat, b.time.regions[3],
            b.own.v_first, b.att, b.normed, self.counts,
        )  # fmt: skip
        sizes = b.rows * gpu.c, time.h, len(layers), gpu.eps, time.heads_eps
        self._model = self._place(MODEL.pack(*(x.data_ptr() for x in pointers), *sizes))

    def _place(self, data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.gpu.device)

    def _pack_products(self, time: TimeMix7) -> bytes:
        gpu, b, c, f = self.gpu, self.gpu.rows, self.gpu.c, self.gpu.f
        tasks = gpu.tasks(time.projection, 16)
        key: tuple[int, ...]
        packed, first = b"", 0

        def product(weight: Tensor, x: Tensor, out: Tensor, *numbers: int, tasks: Tensor | None = None) -> None:
            nonlocal packed, first
            columns, activation, stride, mode = numbers
            tiles = len(weight) // 16 if tasks is None else len(tasks)
            pointers = weight.data_ptr(), 0 if tasks is None else tasks.data_ptr(), x.data_ptr(), out.data_ptr(), 0
            packed += PRODUCT.pack(*pointers, columns, activation, columns, stride, mode, tiles, first, 0, 0, 0)
            first = (first + tiles) % self.grid

        for layer in gpu.layers:
            product(layer.time.inputs, b.mixed, b.time.flat, c, 0, 0, WRITE, tasks=tasks)
            product(layer.time.output, b.att, b.x, c, 0, c, ADD)
            product(layer.channel, b.mixed, b.key, c, RELU_SQUARE, f, WRITE)
            product(layer.value, b.key, b.x, f, 0, c, ADD)
        product(gpu.head, b.normed, gpu.logits, c, 0, gpu.logits.stride(0), LOGITS)
        return packed

    def _pack_layer(self, index: int) -> bytes:
        layer, state = self.gpu.layers[index], self.gpu.state
        own: Any = layer.time.own
        states = (state[name][index] for name in ("att_shift", "ffn_shift", "wkv"))
        before = *layer.ln1, layer.time.mixes, own.low_rank, *own.vectors, *layer.ln2, layer.channel_mixes
        pointers = [x.data_ptr() for x in chain(before, states)]
        return struct.pack(f"{len(pointers)}P", *pointers)

    def run(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """`GpuModel.decode`."""
        self.counts.zero_()
        self._kernel(
            (self.grid,), 32 * WARPS, self._model, tokens, slots, len(tokens), shared=self.shared, together=True
        )
        return self.gpu.logits[: len(tokens)]
