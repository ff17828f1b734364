"""A sampler made of `sampling` (torch, any device) or `numpy_sampling`: the judge of the fast ones."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from receptance.engine.params import SamplingParams


class PlainSampler:
    """See `Sampler`. module: one of the two; weight: makes its `digit_weight`, when the first penalty asks for it."""

    def __init__(
        self,
        module: ModuleType,
        vocab: int,
        eos_id: int,
        weight: Callable[[], Any],
        *,
        columns: Callable[[list[SamplingParams]], Any] | None = None,
        masked: Callable[[Any, NDArray[np.bool_]], Any] | None = None,
    ):
        self._module, self._vocab, self._make_weight = module, vocab, weight
        self._columns = columns or (lambda params: module.ParamRows.of(params, vocab, eos_id))
        self._masked = masked or (lambda logits, allowed: np.where(allowed, logits, -np.inf))
        self._weight: Any = None
        self._params: dict[int, SamplingParams] = {}
        self._counts: dict[int, Any] = {}  # of rows with penalties: Counts of one row
        self._last: tuple[tuple[int, ...], Any] = ((), None)  # the rows of the last draw, and their columns

    def admit(self, row: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        self._params[row] = params
        self._last = ((), None)
        if params.has_penalties:
            if self._weight is None:
                self._weight = self._make_weight()
            self._counts[row] = self._module.Counts.start([prompt], self._weight)

    def free(self, row: int) -> None:
        self._params.pop(row, None)
        self._counts.pop(row, None)

    def draw(
        self, logits: Any, rows: Sequence[int], uniforms: Sequence[float], masks: Sequence[NDArray[Any] | None] | None
    ) -> list[int]:
        logits = logits[:, : self._vocab]
        if masks is not None:
            allowed = np.ones((len(rows), self._vocab), np.bool_)
            for row, mask in zip(allowed, masks):
                if mask is not None:
                    row[:] = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self._vocab]
            logits = self._masked(logits, allowed)
        drawn = [-1] * len(rows)
        for has_penalties in (False, True):  # counts are of one row each: those rows go one by one
            index = [i for i, row in enumerate(rows) if (row in self._counts) == has_penalties]
            groups = [[i] for i in index] if has_penalties else [index] if index else []
            for group in groups:
                for i, token in zip(
                    group, self._draw(logits[group], [rows[i] for i in group], [uniforms[i] for i in group])
                ):
                    drawn[i] = token
        bad = np.asarray((logits != logits).any(-1).tolist())
        return [-1 if is_bad else token for token, is_bad in zip(drawn, bad)]

    def _draw(self, logits: Any, rows: list[int], uniforms: list[float]) -> list[int]:
        if self._last[0] != tuple(rows):
            self._last = tuple(rows), self._columns([self._params[row] for row in rows])
        columns = self._last[1]
        counts = self._counts.get(rows[0])
        tokens = self._module.sample(logits, columns, uniforms, counts)
        if counts is not None:
            self._counts[rows[0]] = counts.after(tokens, columns)
        return [int(token) for token in tokens]
