"""Learning rate and weight decay at each step, as the reference trainers compute them."""

import math


def learning_rate(
    step: int,
    total: float,
    *,
    lr: float,
    lr_final: float,
    warmup_steps: int,
    kind: str = "cosine",
    decay_fraction: float = 0.2,
    decay_shape: str = "linear",
    warmup_floor: float = 0.01,
) -> float:
    """Learning rate of 0-based `step` in a run of `total` steps.

    "cosine" is the reference's schedule by tokens, "exponential" its schedule by steps, whose progress counts the step
    being taken ("linear" is what that becomes when a rate is 0). Warm-up multiplies the rate by warmup_floor..1: 0.01
    in the v5 to v7 trainers, 0.2 in v4neo.
    "wsd" (warm-up, stable, decay): constant until the last decay_fraction of the run, then down to lr_final in a line
    or, "1-sqrt", steeply at first (A. Hägele et al., "Scaling laws and compute-optimal training beyond fixed training
    durations", 2024).
    """
    floor = warmup_floor + (1 - warmup_floor) * step / warmup_steps if step < warmup_steps else 1.0
    if kind == "wsd":
        first = total * (1 - decay_fraction)
        done = max(step - first, 0.0) / (total - first) if total > first else 0.0
        return floor * (lr + (lr_final - lr) * (done if decay_shape == "linear" else math.sqrt(done)))
    return floor * _decayed(step, total, lr, lr_final, warmup_steps, kind)


def _decayed(step: int, total: float, lr: float, lr_final: float, warmup_steps: int, kind: str) -> float:
    done = progress(step, total, warmup_steps, kind)
    if kind == "cosine":
        ratio = lr_final / lr
        return lr * ((0.5 + ratio / 2) + (0.5 - ratio / 2) * math.cos(math.pi * done))
    if kind == "linear" or lr == 0 or lr_final == 0:
        return lr + (lr_final - lr) * done
    return lr * math.exp(math.log(lr_final / lr) * done)


def progress(step: int, total: float, warmup_steps: int, kind: str) -> float:
    """How much of the run is behind, 0 to 1, as `kind` counts it."""
    taken = step - warmup_steps + (0 if kind == "cosine" else 1)
    return min(max(taken / (total - warmup_steps), 0.0), 1.0) if total > warmup_steps else 1.0


def weight_decay(done: float, first: float, last: float | None) -> float:
    """Weight decay after `done` of the run: constant, or moving exponentially from `first` to `last`."""
    if last is None or last <= 0 or first <= 0:
        return first
    return first * math.exp(math.log(last / first) * done)
