"""The same work on several devices: a process for each, which all answer lines of one file."""

import multiprocessing
import queue
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from receptance.engine.offline import Line, answer_all
from receptance.errors import ReceptanceError

WINDOW = 128  # lines that a worker has at once


class WorkerError(ReceptanceError):
    """A worker ended before its lines were answered."""


def answer_on_workers(
    make_engines: Sequence[Callable[[], Any]], lines: Iterable[Line], write: Callable[[dict[str, Any]], None]
) -> None:
    """One process for each engine; `make_engines` are called there, and must be picklable.

    Raises WorkerError when a process dies; what it had not answered is then missing from the answers.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads and a CUDA context
    asked: Any = context.Queue(maxsize=WINDOW * len(make_engines))
    answers: Any = context.Queue()
    workers = [context.Process(target=_work, args=(make, asked, answers), daemon=True) for make in make_engines]
    for worker in workers:
        worker.start()
    try:
        open_lines = _feed(workers, asked, answers, lines, write)
        for _ in workers:
            asked.put(None)
        while open_lines:
            open_lines -= _take(workers, answers, write)
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.kill()


def _feed(workers: Any, asked: Any, answers: Any, lines: Iterable[Line], write: Any) -> int:
    """Give out all lines, writing the answers that come meanwhile. Returns how many are still to come."""
    open_lines = 0
    for line in lines:
        while True:
            try:
                asked.put(line, timeout=0.1)
                break
            except queue.Full:
                open_lines -= _take(workers, answers, write)
        open_lines += 1
        while not answers.empty():
            open_lines -= _take(workers, answers, write)
    return open_lines


def _take(workers: Any, answers: Any, write: Any) -> int:
    """Write one answer, if one comes soon. Returns how many were written."""
    try:
        write(answers.get(timeout=1))
        return 1
    except queue.Empty:
        dead = [worker.exitcode for worker in workers if worker.exitcode not in (None, 0)]
        if dead:
            raise WorkerError(
                f"a worker ended with exit code {dead[0]}; what is written is safe, run the same command again"
            ) from None
        return 0


def _work(make: Callable[[], Any], asked: Any, answers: Any) -> None:
    with make() as engine:
        answer_all(engine, iter(asked.get, None), answers.put, window=WINDOW)
