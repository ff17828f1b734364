"""Long rows with one answer at the end: ListOps, digits pixel by pixel, questions about stories."""

import gzip
import lzma
import multiprocessing
import os
import random
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from receptance.data import IGNORE
from receptance.errors import ConfigError
from receptance.evaluation.synthetic import Ids, Reading, Task


def at_end(tokens: Ids, answers: Ids) -> tuple[Ids, Ids]:
    """Targets of rows [n, T] that ask once, at the last token."""
    targets = np.full(tokens.shape, IGNORE)
    targets[:, -1] = answers
    return tokens, targets


# ListOps -------------------------------------------------------------------------------------------------------------

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
CLOSE = 10 + len(OPERATORS)  # ids: the digits 0 to 9, the operators, the closing bracket, padding
PADDING = CLOSE + 1
PIECE = 2000  # rows that a process makes at a time


@dataclass(frozen=True)
class ListOps(Task):
    """Nested operations on digits, by the rules of the Long Range Arena (Tay et al., 2021); the value is asked for.

    A node above `depth` is a digit with probability 0.75, else MIN, MAX, MED (the median, cut to a whole number) or SM
    (the sum modulo 10) of two to ten nodes. Expressions of shortest < tokens < length are kept (theirs: 500, 2000).
    """

    length: int = 2000
    shortest: int = 500
    depth: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.shortest < self.length - 1 or self.depth < 2:
            raise ConfigError(
                f"no expression has between {self.shortest} and {self.length} tokens at depth {self.depth}"
            )

    @property
    def name(self) -> str:
        return f"ListOps to {self.length}"

    @property
    def vocab_size(self) -> int:
        return PADDING + 1

    def examples(self, n: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        tokens, answers = _listops(self, n, int(rng.integers(2**62)))
        return tokens.astype(np.int64), answers.astype(np.int64)

    def test(self, rng: np.random.Generator) -> tuple[Ids, Ids]:
        return self.examples(2000, rng)


@cache
def _listops(task: ListOps, n: int, seed: int) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Tokens [n, length], padded behind, and targets. Many rows are made by several processes, with the same result."""
    sizes = [min(PIECE, n - start) for start in range(0, n, PIECE)]
    jobs = [(task, size, seed + i) for i, size in enumerate(sizes)]
    if len(jobs) > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(_listops_rows, *zip(*jobs)))
    else:
        parts = [_listops_rows(*job) for job in jobs]
    tokens = np.full((n, task.length), PADDING, np.int8)
    targets = np.full((n, task.length), IGNORE, np.int8)
    for i, (row, value) in enumerate(row for part in parts for row in part):
        tokens[i, : len(row)] = row
        targets[i, len(row) - 1] = value
    return tokens, targets


def _listops_rows(task: ListOps, n: int, seed: int) -> list[tuple[list[int], int]]:
    rng = random.Random(seed)
    rows: list[tuple[list[int], int]] = []
    while len(rows) < n:
        row: list[int] = []
        value = grow(rng, row, 1, task)
        if task.shortest < len(row) < task.length:
            rows.append((row, value))
    return rows


def grow(rng: random.Random, row: list[int], level: int, task: ListOps) -> int:
    """Append a random node's tokens to `row` and return its value. Stops early once the row is too long to be kept."""
    if level >= task.depth or rng.random() > 0.25:
        row.append(digit := rng.randrange(10))
        return digit
    operator = rng.randrange(len(OPERATORS))
    row.append(10 + operator)
    values = []
    for _ in range(rng.randint(2, 10)):
        if len(row) >= task.length:
            return 0
        values.append(grow(rng, row, level + 1, task))
    row.append(CLOSE)
    return apply(operator, values)


def apply(operator: int, values: list[int]) -> int:
    if operator == 2:
        ordered, half = sorted(values), len(values) // 2
        return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2
    return (min(values), max(values), 0, sum(values) % 10)[operator]


# Digits --------------------------------------------------------------------------------------------------------------

VALIDATION = 5000  # of the 60,000 training images, the last ones
MEAN, DEVIATION = 0.13, 0.31  # of a pixel, white being 1


@dataclass(frozen=True)
class Digits(Task):
    """MNIST pixel by pixel; the digit is asked for at the last pixel.

    root: the folder with the four IDX files, plain, .gz or .xz. permuted: one fixed order of the pixels (seed 92916).
    side: 28; 14 or 7 take means of blocks, for rows that a laptop can learn. shades: steps of grey, of equal width.
    read: "tokens", each shade a symbol of its own, so that with fewer a model learns more of each, or "numbers",
    through a linear map, to which with `places` each place adds a vector of its own. shift: images that are learnt
    from move by up to so many pixels each way, anew in each pass.
    """

    root: str = "."
    permuted: bool = False
    side: int = 28
    shades: int = 256
    read: str = "tokens"
    places: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        if self.read not in ("tokens", "numbers"):
            raise ConfigError(f"read must be tokens or numbers, found {self.read!r}")
        if self.places and self.read != "numbers":
            raise ConfigError('places are for digits that are read as numbers (read = "numbers")')
        if self.side not in (28, 14, 7):
            raise ConfigError(f"side {self.side}: images are 28 wide, or reduced to 14 or 7")
        if not 10 <= self.shades <= 256:
            raise ConfigError(f"{self.shades} shades: from 10 (answers are tokens too) to 256")

    @property
    def name(self) -> str:
        shades = f" in {self.shades} shades" if self.shades < 256 else ""
        read = (" as numbers" if self.read == "numbers" else "") + (" with places" if self.places else "")
        moved = f", moved by up to {self.shift}" if self.shift else ""
        return ("permuted " if self.permuted else "") + f"digits of {self.length} pixels" + shades + read + moved

    @property
    def vocab_size(self) -> int:
        return self.shades

    @property
    def length(self) -> int:
        return self.side**2

    @property
    def order(self) -> Ids:
        """The pixel at each place."""
        places = np.arange(self.length)
        return np.random.default_rng(92_916).permutation(self.length) if self.permuted else places

    @property
    def reading(self) -> Reading | None:  # type: ignore[override]
        return Reading(MEAN * self.shades, DEVIATION * self.shades, self.places) if self.read == "numbers" else None

    @property
    def moves(self) -> Ids | None:  # type: ignore[override]
        if not self.shift:
            return None
        place = np.full((self.side + 2 * self.shift,) * 2, self.length)  # of each pixel; around the image: none
        inside = slice(self.shift, self.shift + self.side)
        place[inside, inside].flat[self.order] = np.arange(self.length)
        ways = [place[y : y + self.side, x : x + self.side].ravel()[self.order]
                for y in range(2 * self.shift + 1) for x in range(2 * self.shift + 1)]  # fmt: skip
        return np.stack(ways)

    def examples(self, n: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        return self._rows("train", rng.permutation(60_000 - VALIDATION)[:n])

    def held(self, n: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        return self._rows("train", 60_000 - VALIDATION + rng.permutation(VALIDATION)[:n])

    def test(self, rng: np.random.Generator) -> tuple[Ids, Ids]:
        return self._rows("t10k", np.arange(10_000))

    def _rows(self, part: str, index: Ids) -> tuple[Ids, Ids]:
        images, labels = (
            _idx(Path(self.root), f"mnist-{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
        )
        k = 28 // self.side
        blocks = images[index].reshape(-1, self.side, k, self.side, k)
        pixels = blocks.mean((2, 4)).astype(np.int64).reshape(len(index), -1) * self.shades // 256
        return at_end(pixels[:, self.order], labels[index].astype(np.int64))


@cache
def _idx(root: Path, name: str) -> NDArray[np.uint8]:
    """An IDX file of bytes."""
    names = {name: open, f"{name}.gz": gzip.open, f"{name}.xz": lzma.open}
    path = next((root / file for file in names if (root / file).exists()), None)
    if path is None:
        raise ConfigError(f"{root}: found none of {', '.join(names)}; give the folder with MNIST's files as root")
    with names[path.name](path, "rb") as file:  # type: ignore[operator]
        data: bytes = file.read()
    if data[:3] != b"\0\0\x08" or data[3] not in (1, 3):
        raise ConfigError(f"{path}: not an IDX file of bytes")
    shape = tuple(np.frombuffer(data, ">i4", data[3], 4))
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


# Questions -----------------------------------------------------------------------------------------------------------

WORDS = re.compile(r"[a-z0-9,']+|[?.]")


@dataclass(frozen=True)
class Questions(Task):
    """bAbI (Weston et al., 2015) word by word: a story, a question, one answer.

    first: whether the question comes before the story, or after it. root: babi_en_en10k.tar.xz or a folder that holds
    it. tasks: their numbers; (): all. size: "en" or "en-10k". Stories of more than `length` words are left out.
    """

    root: str = "."
    first: bool = False
    tasks: tuple[int, ...] = ()
    size: str = "en-10k"
    length: int = 256

    @property
    def name(self) -> str:
        return "question before the story" if self.first else "question after the story"

    @property
    def vocab_size(self) -> int:
        return len(self._data.words)

    @property
    def _data(self) -> "Stories":
        return _stories(self.root, self.size, tuple(self.tasks))

    def examples(self, n: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        return self._rows([row for i, row in enumerate(self._data.train) if i % 20], n, rng)

    def held(self, n: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        return self._rows(self._data.train[::20], n, rng)

    def test(self, rng: np.random.Generator) -> tuple[Ids, Ids]:
        return self._rows(self._data.test, len(self._data.test), None)

    def groups(self) -> list[str]:
        """The task of each row of `test`."""
        return [row.task for row in self._data.test if len(row.story) + len(row.question) <= self.length]

    def _rows(self, rows: list["Row"], n: int, rng: np.random.Generator | None) -> tuple[Ids, Ids]:
        rows = [row for row in rows if len(row.story) + len(row.question) <= self.length]
        order = np.arange(len(rows)) if rng is None else rng.permutation(len(rows))
        tokens = np.zeros((min(n, len(rows)), self.length), np.int64)
        targets = np.full(tokens.shape, IGNORE)
        for i, place in enumerate(order[:n]):
            row = rows[place]
            text = row.question + row.story if self.first else row.story + row.question
            tokens[i, : len(text)] = text
            targets[i, len(text) - 1] = row.answer
        return tokens, targets


@dataclass(frozen=True)
class Row:
    task: str
    story: list[int]
    question: list[int]
    answer: int


@dataclass(frozen=True)
class Stories:
    words: dict[str, int]
    train: list[Row]
    test: list[Row]


@cache
def _stories(root: str, size: str, tasks: tuple[int, ...]) -> Stories:
    path = Path(root)
    path = path / "babi_en_en10k.tar.xz" if path.is_dir() else path
    if not path.exists():
        raise ConfigError(f"{path}: no such file; give bAbI's archive, or its folder, as root")
    words: dict[str, int] = {"": 0}
    parts: dict[str, list[Row]] = {"train": [], "test": []}
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            named = re.search(rf"/{size}/qa(\d+)_.*_(train|test)\.txt$", member.name)
            file = archive.extractfile(member) if named and (not tasks or int(named[1]) in tasks) else None
            if named and file:
                parts[named[2]] += _questions(f"qa{named[1]}", file.read().decode(), words)
    known = {row.task for row in parts["train"]}
    if not known:
        raise ConfigError(f"{path}: holds no tasks {list(tasks) or ''} of size {size!r}")
    return Stories(words, parts["train"], [row for row in parts["test"] if row.task in known])


def _questions(task: str, text: str, words: dict[str, int]) -> Iterator[Row]:
    """Every question of a file, with its story so far."""

    def ids(part: str) -> list[int]:
        return [words.setdefault(word, len(words)) for word in WORDS.findall(part.lower())]

    story: list[int] = []
    for line in text.splitlines():
        number, rest = line.split(" ", 1)
        if number == "1":
            story = []
        if "\t" in rest:
            question, answer, *_ = rest.split("\t")
            yield Row(task, story[:], ids(question), ids(answer)[0])
        else:
            story += ids(rest)
