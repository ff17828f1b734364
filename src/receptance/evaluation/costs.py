"""What a token costs: time and memory of writing against position, of training against the length of rows."""

import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from receptance.models import RWKV, apply_recipe
from receptance.training.config import TrainConfig
from receptance.training.loop import autocast, new_model

TIMED, PIECE = 16, 1024  # tokens written at each place; tokens read at once on the way there


@dataclass(frozen=True)
class Positions:
    """At each of `position`: milliseconds a token, seconds since the start, bytes of the state, and peak memory.

    milliseconds: of the fastest of the TIMED tokens before each place; seconds: these integrated over all positions.
    peak_bytes: the most memory while they were written, less the weights (empty on a CPU). exponent: of seconds
    against position, fitted over the last half: 1 is linear, 2 quadratic.
    """

    position: list[int]
    seconds: list[float]
    milliseconds: list[float]
    state_bytes: list[int]
    peak_bytes: list[int]
    exponent: float


@dataclass(frozen=True)
class Training:
    """A step on one row of each of `length` tokens: seconds, and peak memory less weights and gradients' (on a GPU).

    The exponents are those of the last three lengths.
    """

    length: list[int]
    seconds: list[float]
    peak_bytes: list[int]
    time_exponent: float
    memory_exponent: float | None


def fitted(x: list[int], y: list[float]) -> float:
    """e of y ∝ x^e."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else 1.0


def fresh(config: TrainConfig, dtype: torch.dtype | None) -> RWKV:
    """A model of this shape without a window; its weights do not matter."""
    config = replace(config, run=replace(config.run, ctx_len=0))
    model: RWKV = new_model(config, 256)
    apply_recipe(model, type(model).recipe(model.config, 1e-3), torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    on_gpu = torch.cuda.is_available() and config.run.device != "cpu"
    return model.to("cuda" if on_gpu else "cpu", dtype if on_gpu else None)


def wait(model: RWKV) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def memory(model: RWKV, reset: bool = False) -> int:
    """The most bytes since the last reset; 0 on a CPU, which does not tell."""
    if model.device.type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


@torch.inference_mode()
def positions(config: TrainConfig, tokens: int, points: int = 16) -> Positions:
    """Write TIMED tokens one by one before each of `points` places up to `tokens`; those between are read in pieces."""
    model = fresh(config, torch.bfloat16).eval()
    weights = memory(model, reset=True)
    marks = sorted({max(1, round(tokens * (i + 1) / points)) for i in range(points)})
    _, warm = model([1])
    for _ in range(3):
        _, warm = model([1], warm)
    del warm
    state, at, found, sizes, peaks = model.zero_state(), 0, [], [], []
    for mark in marks:
        while mark - at > TIMED:
            n = min(PIECE, mark - at - TIMED)
            _, state = model([at % 256] * n, state, last_only=True)
            at += n
        memory(model, reset=True)
        times = []
        while at < mark:
            wait(model)
            start = time.perf_counter()
            _, state = model([at % 256], state)
            wait(model)
            times.append(time.perf_counter() - start)
            at += 1
        found.append(min(times))  # whatever else the machine does only adds to it
        sizes.append(state.nbytes)
        peaks.append(memory(model) - weights)
    total, seconds, before = 0.0, [], 0
    for mark, each, last in zip(marks, found, [found[0], *found]):
        total += (mark - before) * (each + last) / 2
        before = mark
        seconds.append(total)
    half = len(marks) // 2
    on_gpu = model.device.type == "cuda"
    return Positions(
        marks, seconds, [1e3 * x for x in found], sizes, peaks if on_gpu else [], fitted(marks[half:], seconds[half:])
    )


def training(config: TrainConfig, longest: int, shortest: int = 512, repeats: int = 3) -> Training:
    """Forward and backward pass of one row, its length doubled from `shortest` to `longest`."""
    model = fresh(config, None).train()
    lengths, seconds, peaks = [], [], []
    length = min(shortest, longest)
    while length <= longest:
        row = torch.randint(0, 256, (1, length + 1), device=model.device)
        step = partial(_pass, model, config, row)
        step()
        memory(model, reset=True)
        model.zero_grad(set_to_none=True)
        base = memory(model, reset=True)
        times = []
        for _ in range(repeats):
            wait(model)
            start = time.perf_counter()
            step()
            wait(model)
            times.append(time.perf_counter() - start)
        lengths.append(length)
        seconds.append(min(times))
        peaks.append(memory(model) - base)
        length *= 2
    on_gpu = model.device.type == "cuda"
    memory_exponent = fitted(lengths[-3:], [float(x) for x in peaks[-3:]]) if on_gpu else None
    return Training(lengths, seconds, peaks if on_gpu else [], fitted(lengths[-3:], seconds[-3:]), memory_exponent)


def _pass(model: RWKV, config: TrainConfig, row: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    with autocast(config, model.device):
        loss, _ = model.loss(row[:, :-1], row[:, 1:])
    loss.backward()  # type: ignore[no-untyped-call]
