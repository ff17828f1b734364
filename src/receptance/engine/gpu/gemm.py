"""How the kernel of gemm.cuh is cut for a product."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from receptance.engine.gpu.products import Piece

STEP = 64  # columns
MOST_SPLIT, LEAST_STEPS = 8, 12  # blocks that share a tile, and of each of these
RING_BYTES, DEEP_RING_BYTES, MOST_DEPTH = 96 * 1024, 192 * 1024, 10  # two blocks on a multiprocessor, or one


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


def shape(pieces: "Sequence[Piece]", rows: int, processors: int) -> Shape:
    """As measured on an H100 for 16 to 256 rows and matrices of 768 to 16,384: within a few per cent of the best.

    One block on each multiprocessor at most, whose ring is deep, for it hides what memory takes; but two where there
    are many tiles, or where clusters of four and more would leave multiprocessors unused.
    """
    batch = next((n for n in (16, 32, 64) if rows <= n), 128)

    def tiles(groups: int) -> int:
        return sum(-(-x.rows // (64 * groups)) for x in pieces) * -(-rows // batch)

    groups = 2 if batch == 128 and 4 * tiles(2) >= 3 * processors else 1
    steps, split = max(-(-x.columns // STEP) for x in pieces), 1
    while split < MOST_SPLIT and 2 * split * tiles(groups) <= processors and steps >= 2 * split * LEAST_STEPS:
        split *= 2
    many = split > 2 or (batch < 128 and tiles(groups) >= 2 * processors)
    ring = RING_BYTES if many else DEEP_RING_BYTES
    return Shape(groups, batch, min(MOST_DEPTH, ring // ((64 * groups + batch) * 128)), split)
