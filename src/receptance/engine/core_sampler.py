"""The sampler inside the C++ core (native/csrc/sample.h): rows are drawn by all threads, penalties counted in place."""

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from receptance.engine.numpy_sampling import Counts
from receptance.engine.params import SamplingParams
from receptance.errors import ConfigError
from receptance.native.library import Core, SampleRow

ROW = np.dtype(SampleRow)


class CoreSampler:
    """See `Sampler`. team: gives the core's threads; weight: makes `digit_weight` when a first penalty asks for it."""

    def __init__(
        self,
        core: Core,
        team: Callable[[], int],
        threads: int,
        vocab: int,
        eos_id: int,
        weight: Callable[[], NDArray[np.float32]],
    ):
        self._core, self._team, self._vocab, self._eos_id = core, team, vocab, eos_id
        self._make_weight, self._weight = weight, np.zeros(0, np.float32)
        self._table = np.zeros(64, ROW)
        self._held: dict[int, list[NDArray[Any]]] = {}  # what the table's addresses point to
        self._scratch = np.empty(3 * vocab * threads, np.float32)

    def admit(self, row: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        if row >= len(self._table):
            self._table = np.concatenate([self._table, np.zeros(len(self._table), ROW)])
            return self.admit(row, params, prompt)
        pairs = list(params.bias_pairs)
        if pairs and pairs[-1][0] >= self._vocab:
            raise ConfigError(
                f"logit_bias has token id {pairs[-1][0]}, but the vocabulary's ids are 0 to {self._vocab - 1}"
            )
        if params.ignore_eos:
            pairs.append((self._eos_id, -math.inf))
        ids = np.array([token for token, _ in pairs], np.int32)
        values = np.array([value for _, value in pairs], np.float32)
        held: list[NDArray[Any]] = [ids, values]
        entry = np.zeros((), ROW)
        entry["bias_ids"], entry["bias_values"], entry["biases"] = ids.ctypes.data, values.ctypes.data, len(ids)
        entry["top_p"] = params.top_p if params.top_p < 1 else 2.0
        entry["top_k"] = min(params.top_k or self._vocab, self._vocab)
        entry["temperature"], entry["min_p"] = params.temperature, params.min_p
        if params.has_penalties:
            if not len(self._weight):
                self._weight = self._make_weight()
            occurrence, seen = np.zeros(self._vocab, np.float32), np.zeros(self._vocab, np.uint8)
            seen[[token for token in set(prompt) if token < self._vocab]] = Counts.PROMPT
            held += [occurrence, seen]
            entry["occurrence"], entry["seen"] = occurrence.ctypes.data, seen.ctypes.data
            entry["weight"], entry["count_digits"] = self._weight.ctypes.data, params.penalize_digits
            entry["presence"], entry["frequency"] = params.presence_penalty, params.frequency_penalty
            entry["repetition"], entry["decay"] = params.repetition_penalty, params.penalty_decay
        self._table[row] = entry
        self._held[row] = held
        return None

    def free(self, row: int) -> None:
        self._held.pop(row, None)

    def draw(
        self,
        logits: NDArray[np.float32],
        rows: Sequence[int],
        uniforms: Sequence[float],
        masks: Sequence[NDArray[Any] | None] | None,
    ) -> list[int]:
        entries = self._table[rows if isinstance(rows, np.ndarray) else list(rows)]
        entries["logits"] = logits.ctypes.data + np.arange(len(rows)) * logits.strides[0]
        entries["uniform"] = uniforms
        if masks is not None:
            entries["mask"] = [0 if mask is None else mask.ctypes.data for mask in masks]
        self._core.library.receptance_sample(
            self._core.engine,
            self._team(),
            entries.ctypes.data_as(ctypes.c_void_p),
            len(rows),
            self._vocab,
            self._scratch.ctypes.data,
        )
        tokens: list[int] = entries["token"].tolist()
        return tokens
