"""Pieces of text to tokens, in this process or in several, in order."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait

import numpy as np

from receptance.data.sources import Bad, Piece
from receptance.errors import ConfigError
from receptance.tokenizers.base import Tokenizer

BATCH = 256  # documents tokenised at a time
AHEAD = 2  # pieces per process that are read but not yet written


@dataclass(frozen=True)
class Result:
    """The documents of a piece. rows: lines seen; bad: number in the piece, from 1, and fault of each bad row."""

    tokens: np.ndarray
    sizes: np.ndarray
    rows: int
    text_bytes: int
    bad: list[tuple[int, str]]


@dataclass(frozen=True)
class Job:
    """What is done with a piece. Without skip_bad its first bad row ends it."""

    tokenizer: Tokenizer
    dtype: type
    skip_bad: bool

    def __call__(self, piece: Piece) -> Result:
        rows, bad = _Rows(piece), list[tuple[int, str]]()
        documents: list[np.ndarray] = [np.empty(0, self.dtype)]
        n_bytes = 0
        texts = rows.texts(bad, self.skip_bad)
        while batch := list(islice(texts, BATCH)):
            n_bytes += sum(len(text.encode()) for text in batch)
            for ids in self.tokenizer.encode_batch(batch):
                documents.append(np.array([*ids, self.tokenizer.eos_id], self.dtype))
        sizes = np.array([len(document) for document in documents[1:]], np.int32)
        return Result(np.concatenate(documents), sizes, rows.seen, n_bytes, bad)


class _Rows:
    def __init__(self, piece: Piece):
        self.piece, self.seen = piece, 0

    def texts(self, bad: list[tuple[int, str]], skip_bad: bool) -> Iterator[str]:
        for row in self.piece.rows():
            self.seen += 1
            if isinstance(row, Bad):
                bad.append((self.seen, row.reason))
                if not skip_bad:
                    return
            elif row:
                yield row


class Workers:
    """Some processes that tokenise. With one, the work is done in this one."""

    def __init__(self, tokenizer: Tokenizer, dtype: type, skip_bad: bool, processes: int):
        self._job, self._processes = Job(tokenizer, dtype, skip_bad), processes
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:  # spawn: a fork would copy the threads' locks of torch and tokenizers
            self._pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (self._job,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Result]]:
        """Each piece with its result, in order; only a few pieces are in memory."""
        if self._pool is None:
            yield from ((piece, self._job(piece)) for piece in pieces)
            return
        waiting: deque[tuple[Piece, Future[Result]]] = deque()
        try:
            for piece in pieces:
                waiting.append((piece, self._pool.submit(_work, piece)))
                if len(waiting) > self._processes * AHEAD:
                    yield waiting[0][0], waiting.popleft()[1].result()
            while waiting:
                yield waiting[0][0], waiting.popleft()[1].result()
        except BrokenProcessPool:
            raise ConfigError(
                "a process that tokenises was killed, perhaps for lack of memory; what was done is kept: go on with "
                "fewer processes"
            ) from None


def _begin(job: Job) -> None:
    """Set up a process of the pool."""
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only switch; the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


_job: Job


def _work(piece: Piece) -> Result:
    return _job(piece)
