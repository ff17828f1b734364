"""Products of a step's rows with weights, by our kernels: `gemv` for few rows, `gemm` for dozens to hundreds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from receptance.engine.gpu import gemm, gemv
from receptance.engine.gpu.gemv import NONE, Matrix
from receptance.ops import cuda

if TYPE_CHECKING:
    from receptance.engine.gpu.model import GpuModel

SHARED_BYTES = 227 * 1024  # of a multiprocessor
GEMV_BLOCKS = 2  # of `gemv`, whose registers fill a multiprocessor


@dataclass(frozen=True)
class Part:
    """Rows of a stacked matrix that read one mix, and where their products go: a region's columns from `column` on."""

    rows: int
    mix: int
    region: int
    activation: int = NONE
    column: int = 0
    padded: int = 0  # rows that it takes in the matrix, if not `rows`


@dataclass(frozen=True)
class Piece:
    """A rectangle of weights, and offsets: of its first weight, of what it reads, of what it writes."""

    rows: int
    columns: int
    weight: int
    input: int
    output: int
    stride: int  # from one row's outputs to the next's
    activation: int = NONE
    row: int = 0  # of the matrix


@dataclass(frozen=True)
class Projection:
    """A stacked matrix with several inputs and outputs. regions: widths of the outputs [rows, width]."""

    parts: tuple[Part, ...]
    regions: tuple[int, ...]

    def pieces(self, c: int, rows: int) -> tuple[Piece, ...]:
        """For buffers of `rows` rows."""
        pieces, from_row = [], 0
        for part in self.parts:
            start = rows * sum(self.regions[: part.region])
            pieces.append(
                Piece(
                    part.rows, c, from_row * c, part.mix * rows * c, start + part.column, self.regions[part.region],
                    part.activation, from_row,
                )
            )  # fmt: skip
            from_row += part.padded or part.rows
        return tuple(pieces)


class Outputs:
    """The regions of a projection, in one allocation: a launch writes all of them."""

    def __init__(self, projection: Projection, rows: int, dtype: torch.dtype, device: torch.device):
        self.flat = torch.empty(rows * sum(projection.regions), dtype=dtype, device=device)
        self.regions: list[Tensor] = []
        first = 0
        for width in projection.regions:
            self.regions.append(self.flat[first : first + rows * width].view(rows, width))
            first += rows * width


class Products:
    """Those of one model on one GPU."""

    def __init__(self, gpu: "GpuModel"):
        self.gpu = gpu
        self._gemv = {x: self._load_gemv(*x) for x in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4))}
        self._gemm: dict[gemm.Shape, cuda.Kernel] = {}
        self._tables: dict[tuple[Sequence[Piece], int, bool], Tensor] = {}

    @cached_property
    def has_gemm(self) -> bool:
        device = self.gpu.device
        return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)

    def _load_gemv(self, row_tiles: int, batch_tiles: int) -> tuple[cuda.Kernel, int]:
        """The kernel and the bytes of shared memory that it needs."""
        gpu, depth = self.gpu, gemv.DEPTH
        ring, sums = gemv.ring_bytes(depth, row_tiles), gemv.sums_bytes(batch_tiles, row_tiles)
        kind = {} if gpu.weights != "float8" else {"FLOAT8": 1}
        program = gpu.load(
            "gemv.cu", GEMV_WARPS=gemv.WARPS, ROW_TILES=row_tiles, BATCH_TILES=batch_tiles, DEPTH=depth,
            WEIGHT_BITS=16 if gpu.weights == "full" else 8, SHARED_BYTES=ring + sums, **kind,
        )  # fmt: skip
        return program.gemv_product, ring + sums

    def _tasks(self, pieces: Sequence[Piece], tile: int, for_gemm: bool = False) -> Tensor:
        """What each tile of rows of the matrix does, see Task in gemv.cuh and gemm.cuh: [tasks, 5] of 64 bits."""
        key = pieces, tile, for_gemm
        if key not in self._tables:
            tasks = [
                [x.weight + i * x.columns, x.input, x.output + i, x.columns | x.activation << 32,
                 x.stride | (min(tile, x.rows - i) if for_gemm else x.row + i) << 32]
                for x in pieces for i in range(0, x.rows, tile)
            ]  # fmt: skip
            self._tables[key] = torch.tensor(tasks).to(self.gpu.device)
        return self._tables[key]

    def few(
        self, matrix: Matrix, x: Tensor, out: Tensor, mode: int, *, activation: int = NONE,
        projection: Projection | None = None, gate: Tensor | None = None,
    ) -> None:  # fmt: skip
        """gemv: out [B, rows] of a matrix [rows, C] and x [B, C]; or what the projection says, B = len(x)."""
        gpu = self.gpu
        batch, rows, columns = len(x), *matrix.full.shape
        if projection is not None and len(projection.parts) == 1:
            (part,) = projection.parts
            activation, projection, out = part.activation, None, out.view(-1, part.rows)
        batch_tiles = next((n for n in (1, 2, 4) if batch <= 8 * n), 8)
        is_even = rows % 32 == 0 and (projection is None or all(x.rows % 32 == 0 for x in projection.parts))
        row_tiles = 2 if batch_tiles in (2, 4) and is_even and rows // 32 >= 2 * gpu.processors else 1
        kernel, shared = self._gemv[row_tiles, batch_tiles]
        tasks = None if projection is None else self._tasks(projection.pieces(gpu.c, gpu.most_rows), 16 * row_tiles)
        tiles = rows // (16 * row_tiles) if tasks is None else len(tasks)
        blocks = min(tiles, gpu.processors * min(GEMV_BLOCKS, SHARED_BYTES // (shared + 1024)))
        weight = matrix.full if matrix.numbers is None else matrix.numbers
        kernel(
            (blocks, -(-batch // (8 * batch_tiles))), 32 * gemv.WARPS, weight, matrix.scales, tasks, columns,
            activation, x, x.stride(0), out, out.stride(0), gate, batch, mode, tiles, shared=shared, chained=True,
        )  # fmt: skip

    def many(
        self, weight: Tensor, x: Tensor, out: Tensor, mode: int, *, activation: int = NONE,
        pieces: Sequence[Piece] | None = None, gate: Tensor | None = None,
    ) -> None:  # fmt: skip
        """gemm: the same for many rows; pieces: of the weights, all alike without."""
        if pieces is None:
            rows, columns = weight.shape
            pieces = (Piece(rows, columns, 0, 0, 0, out.stride(0), activation),)
        shape = gemm.shape(pieces, len(x), self.gpu.processors)
        if shape not in self._gemm:
            self._gemm[shape] = self.gpu.load("gemm.cu", **shape.macros).gemm_product
        tasks = self._tasks(pieces, shape.rows, True)
        self._gemm[shape](
            (shape.split * len(tasks), -(-len(x) // shape.batch)), shape.threads, weight, tasks, x, x.stride(0), out,
            gate, len(x), mode, shared=shape.shared, chained=True, cluster=shape.split,
        )  # fmt: skip
