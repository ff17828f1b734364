"""In which order a run sees its tokens: a pure function of (seed, sample number), so resuming needs no saved state."""

import math

import numpy as np

from receptance.errors import ConfigError

EPOCH = 40320  # samples in one of the community trainer's mini-epochs


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
        self._epoch = -1
        self._starts = np.empty(0, np.int64)

    def start(self, sample: int) -> int:
        """First token of sample `sample`; its inputs and targets are tokens[start : start + ctx_len + 1]."""
        epoch, index = divmod(sample, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            phase = int(rng.integers(self.ctx_len))
            self._starts, self._epoch = rng.permutation(self.per_epoch) * self.ctx_len + phase, epoch
        return int(self._starts[index])


class CubicWindows:
    """The community trainer's order: start = (φ·M·i³ mod M)·ctx_len for a "magic prime" M ≡ 2 mod 3 (docs/data.md)."""

    def __init__(self, n_tokens: int, ctx_len: int, seed: int = 0):
        """`seed` is unused: this order has none."""
        self.ctx_len = ctx_len
        self.prime = magic_prime(n_tokens, ctx_len)
        self.per_epoch = self.prime
        self._factor = int(self.prime * (math.sqrt(5) - 1) / 2)

    def start(self, sample: int) -> int:
        return (self._factor * (sample + 1) ** 3 % self.prime) * self.ctx_len


def magic_prime(n_tokens: int, ctx_len: int) -> int:
    """Largest prime ≤ n_tokens // ctx_len - 1 that leaves 2 when divided by 3, so that i → i³ visits every window."""
    slots = n_tokens // ctx_len
    for candidate in range(slots - 1, 1, -1):
        if candidate % 3 == 2 and _is_prime(candidate):
            return candidate
    raise ConfigError(f"{n_tokens} tokens are too few for windows of {ctx_len} in the cubic order")


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


ORDERS = {"shuffled": ShuffledWindows, "cubic": CubicWindows}
