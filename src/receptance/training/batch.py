"""A step's tokens, or a part of them: some rows, some positions."""

from typing import NamedTuple

import torch
from torch import Tensor

from receptance.data import IGNORE


class Batch(NamedTuple):
    """tokens, targets, resets (or none) [B, T]; n_targets [], how many targets the whole step counts."""

    tokens: Tensor
    targets: Tensor
    resets: Tensor | None
    n_targets: Tensor

    @classmethod
    def of(cls, tokens: Tensor, targets: Tensor, resets: Tensor | None = None) -> "Batch":
        """All of a step."""
        return cls(tokens, targets, resets, (targets != IGNORE).sum())

    @property
    def counted(self) -> Tensor:
        """Which targets count, [B, T]."""
        return self.targets != IGNORE

    def rows(self, parts: int) -> "list[Batch]":
        """Cut into `parts` of as many rows each."""
        return self._cut([x.chunk(parts) for x in self._arrays])

    def segments(self, length: int) -> "list[Batch]":
        """Cut every so many positions."""
        return self._cut([x.split(length, 1) for x in self._arrays])

    def positions(self, index: Tensor) -> "Batch":
        """Some positions of every row."""
        return self._cut([(x[:, index],) for x in self._arrays])[0]

    def is_like(self, other: "Batch") -> bool:
        """Whether `into` may copy."""
        return [x.shape for x in self._arrays] == [x.shape for x in other._arrays]

    def into(self, other: "Batch") -> None:
        """Copy the values into another batch of the same shape, in place."""
        for mine, its in zip((*self._arrays, self.n_targets), (*other._arrays, other.n_targets)):
            its.copy_(mine, non_blocking=True)

    def clone(self) -> "Batch":
        resets = None if self.resets is None else self.resets.clone()
        return Batch(self.tokens.clone(), self.targets.clone(), resets, self.n_targets.clone())

    @property
    def _arrays(self) -> list[Tensor]:
        return [self.tokens, self.targets, *([] if self.resets is None else [self.resets])]

    def _cut(self, arrays: list[tuple[torch.Tensor, ...]]) -> "list[Batch]":
        return [
            Batch(parts[0], parts[1], parts[2] if len(parts) > 2 else None, self.n_targets) for parts in zip(*arrays)
        ]
