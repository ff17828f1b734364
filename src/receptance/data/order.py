"""In which order a run sees its tokens: a pure function of (seed, sample number), so resuming needs no saved state.

Nothing here grows with the data: the order of 1e11 tokens costs what the order of a thousand does.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from receptance.errors import ConfigError

Int64s = npt.NDArray[np.int64]
Numbers = TypeVar("Numbers", int, npt.NDArray[Any])  # whole numbers below 2^64; arrays of uint64

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15  # SplitMix64's: 2^64 over the golden ratio
ROUNDS = 8  # of the permutation's Feistel network; 4 are provably enough against far stronger tests than training


def mix(x: Numbers) -> Numbers:
    """A random-looking value of each 64-bit value: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    x = x ^ (x >> 31)
    return x


def keyed(*key: int) -> int:
    """64 bits that depend on every number of the key."""
    value = 0
    for number in key:
        value = mix((value + number + STEP) & MASK)
    return value


class Permutation:
    """A random permutation of range(n), evaluated at single places: nothing is stored.

    Numbers are pairs (left, right) with left < a, right < b and ab just above n. Rounds add a keyed hash of one half
    to the other, modulo its size, which permutes the pairs; what lands beyond n goes round again (Black and Rogaway,
    2002).
    """

    def __init__(self, n: int, *key: int):
        self.n = n
        self._a = math.isqrt(max(n - 1, 0)) + 1
        self._b = -(-n // self._a)
        base = keyed(*key, n)
        self._keys = [mix((base + i * STEP) & MASK) for i in range(1, ROUNDS + 1)]

    def at(self, index: int) -> int:
        """Where an index of range(n) goes."""
        index = self._once(index)
        while index >= self.n:
            index = self._once(index)
        return index

    def __call__(self, indices: Iterable[int] | Int64s) -> Int64s:
        """`at` for many."""
        x = np.asarray(indices, np.uint64)
        out, going = np.empty(x.shape, np.int64), np.arange(len(x))
        while len(going):
            x = self._once(x)
            done = x < self.n
            out[going[done]] = x[done]
            x, going = x[~done], going[~done]
        return out

    def _once(self, x: Numbers) -> Numbers:
        a, b = self._a, self._b
        left, right = x // b, x % b
        for i in range(0, ROUNDS, 2):
            left = (left + mix(right ^ self._keys[i]) % a) % a
            right = (right + mix(left ^ self._keys[i + 1]) % b) % b
        x = left * b + right
        return x


class Windows(Protocol):
    """An order of windows of ctx_len tokens. per_epoch: samples that make one pass."""

    @property
    def per_epoch(self) -> int: ...
    def starts(self, samples: Sequence[int] | Int64s) -> Int64s:
        """First token of each sample; its inputs and targets are tokens[start : start + ctx_len + 1]."""


class ShuffledWindows:
    """Each epoch cuts the stream into windows of ctx_len at a fresh phase and visits them in a fresh random order.

    Sample number i is the same whatever the batch size or number of processes.
    """

    def __init__(self, n_tokens: int, ctx_len: int, seed: int):
        self.ctx_len, self.seed = ctx_len, seed
        self.per_epoch = (n_tokens - ctx_len) // ctx_len  # leaves room for any phase and for the last target
        if self.per_epoch < 1:
            raise ConfigError(
                f"{n_tokens} tokens are too few for windows of {ctx_len}; at least {2 * ctx_len} are needed"
            )

    def starts(self, samples: Sequence[int] | Int64s) -> Int64s:
        epochs, places = np.divmod(np.asarray(samples, np.int64), self.per_epoch)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            phase = keyed(self.seed, epoch) % self.ctx_len
            starts[here] = Permutation(self.per_epoch, self.seed, epoch)(places[here]) * self.ctx_len + phase
        return starts


class CubicWindows:
    """The community trainer's order: start = (φ·M·i³ mod M)·ctx_len for a "magic prime" M ≡ 2 mod 3 (docs/data.md)."""

    def __init__(self, n_tokens: int, ctx_len: int, seed: int = 0):
        """`seed` is unused: this order has none."""
        self.ctx_len = ctx_len
        self.prime = magic_prime(n_tokens, ctx_len)
        self.per_epoch = self.prime
        self._factor = int(self.prime * (math.sqrt(5) - 1) / 2)

    def starts(self, samples: Sequence[int] | Int64s) -> Int64s:
        numbers = [(self._factor * (int(i) + 1) ** 3 % self.prime) * self.ctx_len for i in samples]  # beyond 64 bits
        return np.array(numbers, np.int64)


def magic_prime(n_tokens: int, ctx_len: int) -> int:
    """Largest prime ≤ n_tokens // ctx_len - 1 that leaves 2 when divided by 3, so that i → i³ visits every window."""
    slots = n_tokens // ctx_len
    for candidate in range(slots - 1, 1, -1):
        if candidate % 3 == 2 and _is_prime(candidate):
            return candidate
    raise ConfigError(f"{n_tokens} tokens are too few for windows of {ctx_len} in the cubic order")


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


ORDERS: dict[str, type[ShuffledWindows] | type[CubicWindows]] = {"shuffled": ShuffledWindows, "cubic": CubicWindows}
