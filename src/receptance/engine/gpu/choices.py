"""How a step of so many rows is made: measured on the user's GPU, once, and kept in the user's cache folder.

One file for each GPU, version of everything below and shape of model: {"key": …, "steps": {rows: choice}}.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from receptance.atomic import replacing
from receptance.errors import CheckpointError
from receptance.ops.cuda import cache_folder

PREFIX = "choices-"
WARM, TIMED = 3, 9  # replays of a step before it is timed, and of which the median counts


@dataclass(frozen=True, order=True)
class Choice:
    """own: products by `gemv`, else by cuBLAS. few: the time mix applies its low-rank maps itself, else they are
    products of their own."""

    own: bool
    few: bool


class Choices:
    """Those made for one kind of model on one GPU. A file that is damaged counts as none."""

    def __init__(self, key: Mapping[str, str | int | bool]):
        self.key = dict(key)
        name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.file = cache_folder() / f"{PREFIX}{name[:32]}.json"
        self._made = read(self.file)[1]

    def get(self, rows: int) -> Choice | None:
        return self._made.get(rows)

    def put(self, rows: int, choice: Choice) -> None:
        """What other processes have added meanwhile stays. Where the folder cannot be written, they measure anew."""
        self._made = {**read(self.file)[1], **self._made, rows: choice}
        steps = {str(n): asdict(x) for n, x in sorted(self._made.items())}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as part:
                part.write((json.dumps({"key": self.key, "steps": steps}, indent=1) + "\n").encode())
        except (OSError, CheckpointError):
            pass


def read(file: Path) -> tuple[dict[str, str | int | bool], dict[int, Choice]]:
    """A file's key and choices; nothing for one that is missing or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        steps = {int(rows): Choice(**{k: bool(v) for k, v in x.items()}) for rows, x in found["steps"].items()}
        return dict(found["key"]), steps
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}, {}


def kept(gpu: str) -> dict[str, list[int]]:
    """Of a GPU's name: for each model's shape, the numbers of rows for which there are choices of this version."""
    found: dict[str, list[int]] = {}
    for file in sorted(cache_folder().glob(f"{PREFIX}*.json")):
        key, steps = read(file)
        if steps and key.get("gpu") == gpu and key.get("kernels") == kernels():
            found[str(key.get("model"))] = sorted({*found.get(str(key.get("model")), []), *steps})
    return found


@cache
def kernels() -> str:
    """Stands for the sources of all kernels that a choice is between."""
    files = sorted(x for x in Path(__file__).parent.iterdir() if x.suffix in (".cu", ".cuh", ".py"))
    return hashlib.sha256(b"".join(x.read_bytes() for x in files)).hexdigest()[:16]


def versions(device: torch.device) -> dict[str, str | int | bool]:
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "kernels": kernels(),
    }


def fastest(candidates: Sequence[Choice], step: Callable[[Choice], object]) -> Choice:
    """Of these, timed as CUDA graphs of `step`, by turns; a later one must be two per cent faster than those before."""
    graphs = []
    stream = torch.cuda.Stream()
    for candidate in candidates:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(candidate)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step(candidate)
        graphs.append(graph)
    times: list[list[float]] = [[] for _ in graphs]
    for turn in range(WARM + TIMED):
        for graph, mine in zip(graphs, times):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= WARM:
                mine.append(begin.elapsed_time(end))
    medians = [statistics.median(x) for x in times]
    best = 0
    for i, median in enumerate(medians):
        if median < 0.98 * medians[best]:
            best = i
    return candidates[best]
