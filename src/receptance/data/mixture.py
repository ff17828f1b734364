"""Several sources in fixed shares: which source a sample comes from, as a function of its number alone."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from receptance.errors import ConfigError


@dataclass(frozen=True)
class _Node:
    """left gets `left_share` of every `share` samples; a leaf has a source instead."""

    share: int
    left_share: int = 0
    source: int = 0
    left: "_Node | None" = None
    right: "_Node | None" = None

    def left_before(self, samples: int) -> int:
        """How many of the first so many samples go left: the nearest whole number, so never off by more than ½."""
        return (2 * samples * self.left_share + self.share) // (2 * self.share)


class Mixture:
    """Sources get samples in exact proportion to whole-number weights, spread as evenly as can be.

    A tree of two-way splits (Huffman's, so that rare sources lie deep), each of which rounds to the nearest sample. Of
    any first n samples a source with share p gets n·p within 1, or a little more in the rarest branches; of any n in a
    row, within twice that. Nothing is stored or counted: `locate` is a function of the number.
    """

    def __init__(self, weights: Sequence[int]):
        if not weights or min(weights) < 1:
            raise ConfigError(f"weights = {list(weights)}: each must be above 0; leave a source out instead")
        self.weights = list(weights)
        heap = [(weight, i, _Node(weight, source=i)) for i, weight in enumerate(weights)]
        heapq.heapify(heap)
        for tie in range(len(weights), 2 * len(weights) - 1):
            (light, _, right), (heavy, _, left) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (light + heavy, tie, _Node(light + heavy, heavy, left=left, right=right)))
        self._root = heap[0][2]

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, how many earlier samples came from it)."""
        node: _Node | None = self._root
        while node is not None and node.left is not None:
            before = node.left_before(sample)
            goes_left = node.left_before(sample + 1) > before
            node, sample = (node.left, before) if goes_left else (node.right, sample - before)
        assert node is not None
        return node.source, sample

    def count(self, source: int, samples: int) -> int:
        """How many of the first so many samples come from a source."""
        return self._count(self._root, source, samples) or 0

    def _count(self, node: _Node, source: int, samples: int) -> int | None:
        if node.left is None or node.right is None:
            return samples if node.source == source else None
        before = node.left_before(samples)
        found = self._count(node.left, source, before)
        return self._count(node.right, source, samples - before) if found is None else found
