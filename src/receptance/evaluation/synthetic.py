"""Tests of memory and state, made by rule: associative recall, needles, copying, groups. Every example is new."""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from receptance.data import IGNORE
from receptance.errors import ConfigError

Ids = NDArray[np.int64]


TESTED = 512  # rows of a test whose examples are made by rule


@dataclass(frozen=True)
class Reading:
    """How rows of numbers are read: through a linear map.

    mean, deviation: of the numbers. places: each place adds a vector of its own, which is learnt.
    """

    mean: float
    deviation: float
    places: bool = False


class Task(Protocol):
    """examples: `n` rows of tokens and targets [n, length], targets IGNORE where nothing is asked.

    held: other rows, to choose a learning rate and an end by; test: those that are reported, of kinds `groups`.
    reading: where tokens are numbers, not symbols. moves [K, length]: of the rows that are learnt from, the places
    whose tokens may stand in the places' stead, one of K ways for a row; place `length` holds 0.
    """

    reading: Reading | None = None
    moves: Ids | None = None

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def length(self) -> int: ...
    def examples(self, n: int, rng: np.random.Generator) -> tuple[Ids, Ids]: ...

    def held(self, n: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        return self.examples(n, rng)

    def test(self, rng: np.random.Generator) -> tuple[Ids, Ids]:
        return self.examples(TESTED, rng)

    def groups(self) -> list[str]:
        """The kind of each row of `test`, where rows have one."""
        return []


def choose(rng: np.random.Generator, n: int, count: int, take: int, weights: Ids | None = None) -> Ids:
    """[n, take] different numbers below `count` in each row, drawn one after another with the given odds."""
    if weights is None and take * take <= 4 * count:  # rows are drawn again until they have no number twice: few times
        found = rng.integers(0, count, (n, take))
        while len(again := np.flatnonzero((np.diff(np.sort(found, axis=1), axis=1) == 0).any(1))):
            found[again] = rng.integers(0, count, (len(again), take))
        return found
    odds = np.zeros(count) if weights is None else np.log(weights)
    # the largest of log-odds plus Gumbel noise are a draw without replacement
    return np.argsort(-(odds + rng.gumbel(size=(n, count))), axis=1)[:, :take]


@dataclass(frozen=True)
class Recall(Task):
    """Multi-query associative recall (Arora et al., Zoology, 2023): pairs of key and value, then every key once more.

    A key stands again at place 2·pairs + 2g, the gaps g different and drawn with odds (g + 1)^(power - 1); the value is
    asked for there. Other places hold 0, or with `noise` any token.
    """

    length: int = 64
    pairs: int = 4
    vocab_size: int = 8192
    power: float = 0.01
    noise: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.length // 4 or self.pairs >= self.vocab_size // 2:
            raise ConfigError(
                f"{self.pairs} pairs do not fit: expected at most length/4 = {self.length // 4} and fewer than "
                f"vocab_size/2 = {self.vocab_size // 2}"
            )

    @property
    def name(self) -> str:
        return f"recall of {self.pairs} pairs in {self.length}"

    def examples(self, n: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        half = self.vocab_size // 2
        keys = 1 + choose(rng, n, half - 1, self.pairs)
        values = half + choose(rng, n, self.vocab_size - half, self.pairs)
        places = (self.length - 2 * self.pairs) // 2
        odds = np.arange(1, places + 1) ** (self.power - 1.0)
        at = 2 * self.pairs + 2 * choose(rng, n, places, self.pairs, odds)  # type: ignore[arg-type]
        tokens = (
            rng.integers(0, self.vocab_size, (n, self.length)) if self.noise else np.zeros((n, self.length), np.int64)
        )
        targets = np.full((n, self.length), IGNORE)
        tokens[:, 0 : 2 * self.pairs : 2], tokens[:, 1 : 2 * self.pairs : 2] = keys, values
        np.put_along_axis(tokens, at, keys, 1)
        np.put_along_axis(targets, at, values, 1)
        return tokens, targets


@dataclass(frozen=True)
class Needle(Task):
    """One value behind a mark somewhere in filler; at the end the mark again, and the value is asked for.

    distance: tokens between the value and the question; 0: any. Ids: 0 the mark, then values, then filler.
    """

    length: int = 128
    values: int = 32
    filler: int = 32
    distance: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.distance <= self.length - 3 or self.length < 3:
            raise ConfigError(f"a distance of {self.distance} does not fit into {self.length} tokens")

    @property
    def name(self) -> str:
        return f"needle in {self.length}" + (f" at distance {self.distance}" if self.distance else "")

    @property
    def vocab_size(self) -> int:
        return 1 + self.values + self.filler

    def examples(self, n: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        tokens = 1 + self.values + rng.integers(0, self.filler, (n, self.length))
        value = 1 + rng.integers(0, self.values, n)
        if self.distance:
            at = np.full(n, self.length - 2 - self.distance)
        else:
            at = rng.integers(1, self.length - 1, n)  # of the value
        rows = np.arange(n)
        tokens[rows, at - 1], tokens[rows, at], tokens[:, -1] = 0, value, 0
        targets = np.full((n, self.length), IGNORE)
        targets[:, -1] = value
        return tokens, targets


@dataclass(frozen=True)
class Copying(Task):
    """`symbols` random symbols, a mark (id 0), and the same again, all of it asked for."""

    symbols: int = 16
    alphabet: int = 16

    @property
    def name(self) -> str:
        return f"copying {self.symbols}"

    @property
    def vocab_size(self) -> int:
        return 1 + self.alphabet

    @property
    def length(self) -> int:
        return 2 * self.symbols

    def examples(self, n: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        text = 1 + rng.integers(0, self.alphabet, (n, self.symbols))
        tokens = np.concatenate([text, np.zeros((n, 1), np.int64), text[:, :-1]], 1)
        return tokens, np.concatenate([np.full((n, self.symbols), IGNORE), text], 1)


@dataclass(frozen=True)
class Group(Task):
    """State tracking: random elements of a group, and at each place the product of all so far is asked for.

    group: "Z2" (parity), any "Zn", "S3", "S4", "S5", "A4" or "A5" (permutations, all or the even ones).
    """

    group: str = "S3"
    length: int = 64

    def __post_init__(self) -> None:
        kind, number = self.group[:1], self.group[1:]
        if kind not in ("Z", "S", "A") or not number.isdigit() or not 2 <= int(number) <= (64 if kind == "Z" else 5):
            raise ConfigError(f"group {self.group!r} is unknown; there are Z2 to Z64, S2 to S5, A2 to A5")

    @property
    def name(self) -> str:
        return f"{self.group} over {self.length}"

    @cached_property
    def table(self) -> Ids:
        """[size, size]: the number of a·b, b being done first."""
        n = int(self.group[1:])
        if self.group[0] == "Z":
            return np.add.outer(np.arange(n), np.arange(n)) % n
        elements = [p for p in itertools.permutations(range(n)) if self.group[0] == "S" or is_even(p)]
        number = {p: i for i, p in enumerate(elements)}
        return np.array([[number[tuple(a[b[i]] for i in range(n))] for b in elements] for a in elements])

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    def examples(self, n: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        tokens = rng.integers(0, len(self.table), (n, self.length))
        targets = tokens.copy()
        for t in range(1, self.length):
            targets[:, t] = self.table[tokens[:, t], targets[:, t - 1]]
        return tokens, targets


def is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0
