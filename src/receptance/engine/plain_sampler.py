"""A sampler made of `numpy_sampling`: the judge of the fast ones."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from receptance.engine.numpy_rows import are_broken
from receptance.engine.numpy_sampling import Counts, ParamRows, sample
from receptance.engine.params import SamplingParams


class PlainSampler:
    """See `Sampler`. weight: makes its `digit_weight`, when the first penalty asks for it."""

    def __init__(self, vocab: int, eos_id: int, weight: Callable[[], NDArray[np.float32]]):
        self._vocab, self._eos_id, self._make_weight = vocab, eos_id, weight
        self._weight: NDArray[np.float32] | None = None
        self._params: dict[int, ParamRows] = {}
        self._counts: dict[int, Counts] = {}  # of rows with penalties

    def admit(self, row: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        self._params[row] = ParamRows.of([params], self._vocab, self._eos_id)
        if params.has_penalties:
            if self._weight is None:
                self._weight = self._make_weight()
            self._counts[row] = Counts.start([list(prompt)], self._weight)

    def free(self, row: int) -> None:
        self._params.pop(row, None)
        self._counts.pop(row, None)

    def draw(
        self, logits: Any, rows: Sequence[int], uniforms: Sequence[float], masks: Sequence[NDArray[Any] | None] | None
    ) -> list[int]:
        drawn = []
        for i, (row, u) in enumerate(zip(rows, uniforms)):
            x = logits[i : i + 1, : self._vocab]
            if are_broken(x):
                drawn.append(-1)
                continue
            mask = masks[i] if masks is not None else None
            if mask is not None:
                allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self._vocab]
                x = np.where(allowed, x, -np.inf)
            params, counts = self._params[row], self._counts.get(row)
            tokens = sample(x, params, [u], counts)
            if counts is not None:
                self._counts[row] = counts.after(tokens, params)
            drawn += tokens
        return drawn
