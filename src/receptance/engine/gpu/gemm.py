"""How the kernel of gemm.cuh is cut for a product."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from receptance.engine.gpu.products import Piece

STEP = 64  # columns
MOST_SPLIT = 8  # blocks of a cluster
RING_BYTES = 96 * 1024  # two such blocks fit on a multiprocessor
LARGE_RING_BYTES = 192 * 1024


@dataclass(frozen=True)
class Shape:
    """groups, batch, depth, split: the macros of gemm.cuh."""

    groups: int
    batch: int
    depth: int
    split: int

    @property
    def rows(self) -> int:
        return 64 * self.groups

    @property
    def threads(self) -> int:
        return 128 * self.groups

    @property
    def shared(self) -> int:
        ring, sums = self.depth * (self.rows + self.batch) * 128, self.batch * (self.rows + 4) * 4
        return max(ring, sums) + 1024

    @property
    def macros(self) -> dict[str, int]:
        return {
            "GROUPS": self.groups, "BATCH": self.batch, "DEPTH": self.depth, "CLUSTER": self.split,
            "SHARED_BYTES": self.shared,
        }  # fmt: skip


def depth(groups: int, batch: int) -> int:
    ring = RING_BYTES if batch <= 64 else LARGE_RING_BYTES
    return ring // ((64 * groups + batch) * 128)


def shape(pieces: "Sequence[Piece]", rows: int, processors: int) -> Shape:
    batch = next((n for n in (16, 32, 64, 128) if rows <= n), 256)
    groups = 2
    tiles = sum(-(-x.rows // (64 * groups)) for x in pieces) * -(-rows // batch)
    steps = max(-(-x.columns // STEP) for x in pieces)
    most = processors * (2 if batch <= 64 else 1)
    split = 1
    while split < MOST_SPLIT and 2 * split * tiles < most and steps >= 4 * split:
        split *= 2
    return Shape(groups, batch, depth(groups, batch), split)
