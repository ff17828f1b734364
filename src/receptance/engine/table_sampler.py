"""What the samplers of the C++ core and of the GPU share: a table with a row for each text, which their code reads."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from receptance.engine.numpy_sampling import Counts
from receptance.engine.params import SamplingParams
from receptance.native.library import SampleRow

ROW = np.dtype(SampleRow)
BYTES = np.dtype((np.void, ROW.itemsize))  # a row as a whole: numpy copies a structure field by field


class TableSampler(ABC):
    """See `Sampler`. weight: makes `digit_weight` when a first penalty asks for it."""

    def __init__(self, vocab: int, eos_id: int, weight: Callable[[], NDArray[np.float32]]):
        self._vocab, self._eos_id, self._weight = vocab, eos_id, weight
        self._placed_weight: tuple[Any, int] | None = None
        self._table = np.zeros(64, ROW)
        self._new: dict[int, tuple[SamplingParams, Sequence[int]]] = {}  # of which nothing was drawn yet
        self._held: dict[int, list[Any]] = {}  # what the table's addresses point to

    @abstractmethod
    def _place(self, array: NDArray[Any]) -> tuple[Any, int]:
        """The array where this sampler's code runs: its owner, and the address."""

    def admit(self, row: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Raises ConfigError for a bias on an id beyond the vocabulary."""
        params.check_bias(self._vocab)
        while row >= len(self._table):
            self._table = np.concatenate([self._table, np.zeros(len(self._table), ROW)])
        self._new[row] = params, prompt

    def free(self, row: int) -> None:
        self._held.pop(row, None)
        self._new.pop(row, None)

    def _enter(self, row: int) -> None:
        params, prompt = self._new.pop(row)
        held = self._held[row] = []
        entry = np.zeros((), ROW)

        def place(name: str, array: NDArray[Any]) -> None:
            owner, entry[name] = self._place(array)
            held.append(owner)

        pairs = [*params.bias_pairs, *([(self._eos_id, -math.inf)] if params.ignore_eos else [])]
        entry["biases"] = len(pairs)
        if pairs:
            place("bias_ids", np.array([token for token, _ in pairs], np.int32))
            place("bias_values", np.array([value for _, value in pairs], np.float32))
        entry["top_p"] = params.top_p if params.top_p < 1 else 2.0
        entry["top_k"] = min(params.top_k or self._vocab, self._vocab)
        entry["temperature"], entry["min_p"] = params.temperature, params.min_p
        if params.has_penalties:
            if self._placed_weight is None:
                self._placed_weight = self._place(self._weight())
            seen = np.zeros(self._vocab, np.uint8)
            seen[[token for token in set(prompt) if token < self._vocab]] = Counts.PROMPT
            place("occurrence", np.zeros(self._vocab, np.float32))
            place("seen", seen)
            entry["weight"], entry["count_digits"] = self._placed_weight[1], params.penalize_digits
            entry["presence"], entry["frequency"] = params.presence_penalty, params.frequency_penalty
            entry["repetition"], entry["decay"] = params.repetition_penalty, params.penalty_decay
        self._table[row] = entry

    def entries(
        self, rows: Sequence[int], uniforms: Sequence[float], masks: Sequence[NDArray[Any] | None] | None
    ) -> tuple[NDArray[Any], list[Any]]:
        """The rows of the table for one draw [n], and owners of memory that must live until it is done."""
        if self._new:
            for row in rows:
                if row in self._new:
                    self._enter(row)
        entries = self._table.view(BYTES)[list(rows)].view(ROW)
        entries["uniform"] = uniforms
        held = []
        for i, mask in enumerate(masks or ()):
            if mask is not None:
                owner, entries["mask"][i] = self._place(mask)
                held.append(owner)
        return entries, held

    def draw(
        self,
        logits: Any,
        rows: Sequence[int],
        uniforms: Sequence[float],
        masks: Sequence[NDArray[Any] | None] | None,
    ) -> list[int]:
        entries, held = self.entries(rows, uniforms, masks)
        tokens = self._draw(logits, entries)
        del held
        return tokens

    @abstractmethod
    def _draw(self, logits: Any, entries: NDArray[Any]) -> list[int]: ...
