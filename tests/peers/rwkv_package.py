"""The `rwkv` package in a process of its own: environment variables that act at its import choose its version."""

import contextlib
import io
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

Parts = list[Any]  # the package's state: a flat list of arrays


class Package:
    """One loaded model."""

    def __init__(self, path: Path, version: str):
        # the JIT would only cost compilation; RWKV-7 ignores the switch
        environment = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int(version == "7"))}
        start = (environment, str(path.with_suffix("")))
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_start, initargs=start)

    def run(self, tokens: list[int], state: Parts | None = None) -> tuple[torch.Tensor, Parts]:
        """All logits [T, V] and the state after them. Its own one-token path when there is one token."""
        logits, state = self._pool.submit(_run, tokens, state).result()
        return torch.from_numpy(logits).view(len(tokens), -1), state

    def close(self) -> None:
        self._pool.shutdown()


# In the other process

_model: Any = None


def _start(environment: dict[str, str], path: str) -> None:
    global _model
    os.environ.update(environment)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):  # it greets
        from rwkv.model import RWKV  # type: ignore[import-untyped]

        _model = RWKV(model=path, strategy="cpu fp32")


def _run(tokens: list[int], state: Parts | None) -> tuple["np.ndarray[Any, Any]", Parts]:
    given = None if state is None else [torch.from_numpy(part.copy()) for part in state]  # it writes into the list
    logits, after = _model.forward(tokens, given, full_output=True)
    return logits.numpy(), [part.numpy() for part in after]
