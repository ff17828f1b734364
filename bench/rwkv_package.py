"""The `rwkv` package in a process of its own: environment variables that act at its import choose its version."""

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from measure import Sample, timed

# tokens, state, whether all logits → logits, state
Forward = Callable[[list[int], Any, bool], tuple[torch.Tensor, Any]]
PHASES = ("prefill", "prefill_all", "decode")


def time_phases(forward: Forward, tokens: list[int], n_decode: int) -> dict[str, Sample]:
    """Prefill with all logits, prefill with the last ones, and decoding that goes on from there."""
    state: Any = None

    def prefill() -> None:
        nonlocal state
        state = forward(tokens, None, False)[1]

    def decode() -> None:
        nonlocal state
        for token in tokens[:n_decode]:
            state = forward([token], state, False)[1]

    everything = timed(lambda: forward(tokens, None, True))
    return {"prefill": timed(prefill), "prefill_all": everything, "decode": timed(decode)}


class Package:
    """A context manager around the process; `available` says whether the package is installed."""

    def __init__(self, path: Path, version: str, threads: int):
        environment = {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int(version == "7"))}
        start = (environment, str(path.with_suffix("")), threads)
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_start, initargs=start)

    @staticmethod
    def available() -> bool:
        return importlib.util.find_spec("rwkv") is not None

    def __enter__(self) -> "Package":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """All logits [T, V]."""
        return torch.from_numpy(self._pool.submit(_logits, tokens).result())

    def time_phases(self, tokens: list[int], n_decode: int) -> dict[str, Sample]:
        return self._pool.submit(_time_phases, tokens, n_decode).result()


# In the other process -------------------------------------------------------------------------------------------------

_model: Any = None


def _start(environment: dict[str, str], path: str, threads: int) -> None:
    global _model
    os.environ.update(environment)
    torch.set_num_threads(threads)
    with contextlib.redirect_stdout(io.StringIO()):  # it greets
        from rwkv.model import RWKV  # type: ignore[import-untyped]

        _model = RWKV(model=path, strategy="cpu fp32")


def _forward(tokens: list[int], state: Any, everything: bool) -> tuple[torch.Tensor, Any]:
    result: tuple[torch.Tensor, Any] = _model.forward(tokens, state, full_output=everything)
    return result


def _logits(tokens: list[int]) -> "np.ndarray[Any, np.dtype[np.float32]]":
    return _forward(tokens, None, True)[0].numpy()


def _time_phases(tokens: list[int], n_decode: int) -> dict[str, Sample]:
    return time_phases(_forward, tokens, n_decode)
