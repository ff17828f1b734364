"""The sampler inside the C++ core (native/csrc/sample.h): rows are drawn by all threads, penalties counted in place."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from receptance.engine.table_sampler import TableSampler
from receptance.native.library import Core


class CoreSampler(TableSampler):
    """team: gives the core's threads for a call. Logits are float32 arrays."""

    def __init__(
        self,
        core: Core,
        team: Callable[[], AbstractContextManager[int]],
        threads: int,
        vocab: int,
        eos_id: int,
        weight: Callable[[], NDArray[np.float32]],
    ):
        super().__init__(vocab, eos_id, weight)
        self._core, self._team = core, team
        self._scratch = np.empty(3 * vocab * threads, np.float32)
        self._scratch_address = self._scratch.ctypes.data

    def _place(self, array: NDArray[Any]) -> tuple[Any, int]:
        return array, array.ctypes.data

    def _draw(self, logits: NDArray[np.float32], entries: NDArray[Any]) -> list[int]:
        first = logits.ctypes.data
        entries["logits"] = first if len(entries) == 1 else first + np.arange(len(entries)) * logits.strides[0]
        with self._team() as team:
            self._core.library.receptance_sample(
                self._core.engine,
                team,
                entries.ctypes.data,
                len(entries),
                self._vocab,
                self._scratch_address,
            )
        tokens: list[int] = entries["token"].tolist()
        return tokens
