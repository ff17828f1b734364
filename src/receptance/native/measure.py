"""What a model reaches on this machine, and what the machine itself can do: behind `receptance bench cpu`."""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from receptance.native.arrays import aligned
from receptance.native.binding import BLOCK, GROUP, PACKED_BYTES
from receptance.native.library import TYPES, Core, Matrix, load_core, new_team
from receptance.native.model import NativeModel

READ_BYTES = 256 << 20  # more than any cache of an ordinary machine
ROWS, COLS, TOKENS = 1024, 1024, 128  # of the product that measures arithmetic: it stays in the second-level cache


class UnsoundError(Exception):
    """The model does not give the same logits in one piece and token by token; no speed of it means anything."""


@dataclass(frozen=True)
class Limits:
    """Of this machine, with this many threads: bytes/s read from memory, and operations/s (a multiply-add is two)."""

    read: float
    float32: float
    int8: float


@dataclass(frozen=True)
class Speeds:
    """Tokens/s: one after the other, of a prompt, and of all sequences of a batch together.

    decode_bytes: of weights read for one token. active: share of the channel mix's hidden units that were not zero.
    """

    decode: float
    prefill: float
    batch: float
    decode_bytes: int
    active: float | None


def best(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of as many calls as fit into `seconds`, at least two after a first one."""
    call()
    least, end = float("inf"), time.perf_counter() + seconds
    for i in range(1_000_000):
        start = time.perf_counter()
        if i >= 2 and start > end:
            break
        call()
        least = min(least, time.perf_counter() - start)
    return least


def limits(threads: int, seconds: float = 1.0) -> Limits:
    """Measured with the core's own products. Raises NoCoreError where it is not compiled."""
    core = load_core()
    team = new_team(core, threads)
    try:
        wide = aligned(READ_BYTES)
        wide[:] = 0  # of its own pages, not all of the same one
        rows = READ_BYTES // (4 * 4096)
        read = product(core, team, threads, Matrix(rows, 4096, wide.ctypes.data, TYPES["float32"]), 1)
        seconds_of_read = best(read, seconds)
        plain = np.ones((ROWS, COLS), np.float32)
        source = Matrix(ROWS, COLS, plain.ctypes.data, TYPES["float32"])
        packed = aligned(ROWS // GROUP * (COLS // BLOCK) * PACKED_BYTES["int8"])
        core.library.receptance_pack(core.engine, team, ctypes.byref(source), packed.ctypes.data, TYPES["int8"])
        narrow = Matrix(ROWS, COLS, packed.ctypes.data, TYPES["int8"])
        operations = 2 * ROWS * COLS * TOKENS
        rates = [
            operations / best(product(core, team, threads, matrix, TOKENS), seconds) for matrix in (source, narrow)
        ]
        return Limits(READ_BYTES / seconds_of_read, *rates)
    finally:
        core.library.receptance_team_free(team)


def product(core: Core, team: int, threads: int, w: Matrix, tokens: int) -> Callable[[], NDArray[np.float32]]:
    """A call that multiplies `w` with some input."""
    x, y = np.ones((tokens, w.cols), np.float32), np.empty((tokens, w.rows), np.float32)
    scratch = aligned(core.library.receptance_multiply_bytes(core.engine, ctypes.byref(w), tokens, threads))

    def call() -> NDArray[np.float32]:
        core.library.receptance_multiply(
            core.engine, team, ctypes.byref(w), x.ctypes.data, tokens, y.ctypes.data, scratch.ctypes.data
        )
        return y

    return call


def check(model: NativeModel) -> None:
    """Raise UnsoundError unless pieces give the logits of the whole, up to the rounding of quantised inputs."""
    ids = np.arange(24) % model.config.vocab_size
    whole, _ = model.forward(ids)
    state, parts = None, []
    for token in ids:
        logits, state = model.forward([int(token)], state)
        parts.append(logits[0])
    error = float(np.sqrt(np.mean((np.stack(parts) - whole) ** 2) / np.mean(whole**2)))
    bound = 1e-3 if model.dtype in ("float32", "float16", "bfloat16") else 0.1
    if not error <= bound:
        raise UnsoundError(f"logits of the whole prompt and of its tokens differ by {error:.1e} of their size")


def speeds(model: NativeModel, prompt: int, batch: int, seconds: float = 1.0) -> Speeds:
    """The best of what fits into `seconds` for each of the three. Raises UnsoundError before any of them."""
    check(model)
    vocab = model.config.vocab_size
    ids, rows = np.arange(prompt) % vocab, np.arange(batch)[:, None] % vocab
    one, many = model.forward(ids[:2])[1], model.forward(rows)[1]
    decode = best(lambda: model.forward(ids[:1], one, last_only=True), seconds)
    active = model.active_fraction
    return Speeds(
        1 / decode,
        prompt / best(lambda: model.forward(ids, last_only=True), seconds),
        batch / best(lambda: model.forward(rows, many, last_only=True), seconds),
        model.bytes_per_token(1.0 if active is None else active),
        active,
    )
