"""Rows of ctx_len tokens out of a token file: windows of the stream, or whole documents packed side by side.

A document is learnt as it is scored: the end-of-document token stands before it, and each of its tokens, its end among
them, is predicted. So the first position of a document is the end-of-document token of the one before it.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from receptance.data.binidx import BinIdx
from receptance.data.order import Int64s, Permutation, Windows
from receptance.errors import ConfigError

IGNORE = -100  # the target of a position that is padding; what torch's cross entropy leaves out


@dataclass(frozen=True)
class Rows:
    """inputs, targets [B, T]; resets [B, T] marks first tokens of documents, None: the state is never reset."""

    inputs: Int64s
    targets: Int64s
    resets: npt.NDArray[np.bool_] | None


class Packing(Protocol):
    """per_epoch: samples that make one pass over the data."""

    @property
    def per_epoch(self) -> int: ...
    def rows(self, samples: Sequence[int] | Int64s) -> Rows: ...


class Contiguous:
    """Windows of the stream, cut wherever they fall. with_resets: the documents in them do not see each other."""

    def __init__(self, data: BinIdx, ctx_len: int, order: Windows, with_resets: bool):
        self.data, self.ctx_len, self.order, self.with_resets = data, ctx_len, order, with_resets
        self.per_epoch = order.per_epoch
        if with_resets:
            _require_stream(data)

    def rows(self, samples: Sequence[int] | Int64s) -> Rows:
        starts = self.order.starts(samples)
        tokens = np.stack([self.data.tokens[s : s + self.ctx_len + 1] for s in starts.tolist()]).astype(np.int64)
        resets = np.stack([self._resets(s) for s in starts.tolist()]) if self.with_resets else None
        return Rows(tokens[:, :-1], tokens[:, 1:], resets)

    def _resets(self, start: int) -> npt.NDArray[np.bool_]:
        """The last token of each document in the window, from which the next one is predicted."""
        first, last = np.searchsorted(self.data.starts, [start + 1, start + self.ctx_len + 1])
        resets = np.zeros(self.ctx_len, np.bool_)
        resets[self.data.starts[first:last] - 1 - start] = True
        return resets


class Documents:
    """Whole documents, packed by length so that rows are nearly full; each epoch in a fresh combination and order.

    A document of n tokens takes n positions. A longer one than ctx_len is cut into full rows, which start from an empty
    state, and a rest. Rests and short documents are packed by best fit over the histogram of their lengths (after
    Krell et al., 2021, "Efficient sequence packing without cross-contamination"): a few patterns of lengths, each used
    many times. Which document fills a place of a pattern is drawn anew for each epoch, so no list of rows is kept: the
    memory is 8 bytes a document.
    """

    def __init__(self, data: BinIdx, ctx_len: int, seed: int, eos_id: int):
        self.data, self.ctx_len, self.seed, self.eos_id = data, ctx_len, seed, eos_id
        full, rest = np.divmod(data.sizes, ctx_len)
        self._long = np.flatnonzero(full)
        self._full_before = np.concatenate([[0], np.cumsum(full[self._long])])  # full rows before each long document's
        self._by_rest = np.argsort(rest, kind="stable")
        lengths, firsts, counts = np.unique(rest[self._by_rest], return_index=True, return_counts=True)
        self._groups = {int(n): (int(i), int(m)) for n, i, m in zip(lengths, firsts, counts) if n}
        patterns = best_fit({n: m for n, (_, m) in self._groups.items()}, ctx_len)
        self._patterns = [_Pattern(lengths) for lengths, _ in patterns]
        used = dict.fromkeys(self._groups, 0)
        for pattern, (_, times) in zip(self._patterns, patterns):
            for length in pattern.lengths:
                pattern.offsets.append(used[length])
                used[length] += times
        self._packed_before = np.cumsum([0, *(times for _, times in patterns)])
        self.per_epoch = int(self._full_before[-1] + self._packed_before[-1])

    @property
    def filled(self) -> float:
        """Share of positions that are not padding."""
        return float(self.data.sizes.sum()) / (self.per_epoch * self.ctx_len)

    def rows(self, samples: Sequence[int] | Int64s) -> Rows:
        shape = (len(samples), self.ctx_len)
        rows = Rows(np.full(shape, self.eos_id), np.full(shape, IGNORE), np.zeros(shape, np.bool_))
        for i, sample in enumerate(samples):
            self._fill(rows, i, int(sample))
        return rows

    def _fill(self, rows: Rows, i: int, sample: int) -> None:
        assert rows.resets is not None
        at = 0
        for document, start, length in self._pieces(sample):
            tokens = self.data[document]
            rows.inputs[i, at + (start == 0) : at + length] = tokens[max(start - 1, 0) : start + length - 1]
            rows.targets[i, at : at + length] = tokens[start : start + length]
            rows.resets[i, at] = True
            at += length

    def _pieces(self, sample: int) -> list[tuple[int, int, int]]:
        """(document, first target, length) of all that stands in a row."""
        epoch, place = divmod(sample, self.per_epoch)
        row = Permutation(self.per_epoch, self.seed, epoch).at(place)
        n_full = int(self._full_before[-1])
        if row < n_full:
            k = int(np.searchsorted(self._full_before, row, "right")) - 1
            return [(int(self._long[k]), (row - int(self._full_before[k])) * self.ctx_len, self.ctx_len)]
        k = int(np.searchsorted(self._packed_before, row - n_full, "right")) - 1
        use = row - n_full - int(self._packed_before[k])
        pieces = []
        for length, offset in zip(self._patterns[k].lengths, self._patterns[k].offsets):
            first, count = self._groups[length]
            drawn = Permutation(count, self.seed, epoch, length).at(offset + use)
            document = int(self._by_rest[first + drawn])
            pieces.append((document, int(self.data.sizes[document]) - length, length))
        return pieces


class _Pattern:
    """Lengths that stand in one row, and which documents of each length its first use takes."""

    def __init__(self, lengths: tuple[int, ...]):
        self.lengths = lengths
        self.offsets: list[int] = []


def best_fit(counts: dict[int, int], capacity: int) -> list[tuple[tuple[int, ...], int]]:
    """Pack counts[length] items of each length: patterns of lengths that sum to at most `capacity`, with their uses.

    Longest first, each into the fullest row that has room. Equal rows are handled together, so the cost grows with the
    number of lengths and not of items.
    """
    free: dict[int, list[tuple[tuple[int, ...], int]]] = {0: []}  # room left → rows that have it
    rooms: list[int] = []  # sorted keys with rows

    def put(pattern: tuple[int, ...], times: int) -> None:
        room = capacity - sum(pattern)
        if room not in free or not free[room]:
            free.setdefault(room, [])
            insort(rooms, room)
        free[room].append((pattern, times))

    for length in sorted(counts, reverse=True):
        left = counts[length]
        while left:
            i = bisect_left(rooms, length)
            if i == len(rooms):
                each = min(capacity // length, left)  # open rows that hold as many of this length as fit
                put((length,) * each, left // each)
                left %= each
                continue
            room = rooms[i]
            pattern, times = free[room].pop()
            if not free[room]:
                del rooms[i]
            each = min(room // length, -(-left // times))
            taken = min(times, left // each)
            put(pattern + (length,) * each, taken)
            if taken < times:
                put(pattern, times - taken)
            left -= taken * each
    return sorted(entry for entries in free.values() for entry in entries)


def _require_stream(data: BinIdx) -> None:
    if (np.diff(data.starts) < 0).any():
        raise ConfigError(f"{data.prefix}: its documents do not lie in the order of the index; use contiguous packing")
