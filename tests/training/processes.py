"""Several processes of one gloo group, forked from a server that has torch imported already."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def _enter(function: Callable[..., None], rank: int, size: int, store: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        function(*arguments)
    except BaseException:
        Path(f"{store}.{rank}.error").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()


def run(size: int, function: Callable[..., None], folder: Path, *arguments: object, timeout: float = 120) -> None:
    """Call function(*arguments) in `size` processes that form a group; AssertionError with the first traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch._dynamo", "torch.distributed.checkpoint", "fsspec", "receptance.training", "pytest"]
    )
    store = folder / f"store-{time.monotonic_ns()}"
    workers = [
        context.Process(target=_enter, args=(function, rank, size, str(store), arguments), daemon=True)
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + timeout
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        if any(worker.exitcode not in (None, 0) for worker in workers):
            time.sleep(1)  # let the others write down what they saw
            break
        time.sleep(0.02)
    stuck = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for worker in workers:
        worker.kill()
        worker.join()
    errors = [path.read_text() for path in sorted(folder.glob(f"{store.name}.*.error"))]
    assert not errors, "\n".join(errors)
    assert not stuck, f"ranks {stuck} did not end"
