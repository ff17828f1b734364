"""What the benchmarks share: the machine in words, its measured limits, and weights that are not degenerate."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from receptance.models import RWKV, VERSIONS, apply_recipe

Row = dict[str, float]
CALM = 0.05  # a sample counts as undisturbed while others use less than this share of the cores


def machine(*packages: str) -> dict[str, object]:
    """Processor, cores, threads, versions of the packages and the time of day."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("receptance", "torch", "numpy", *packages)},
    }


def load() -> list[float]:
    """How many processes wanted a core over the last 1, 5 and 15 minutes; this benchmark is one or two of them."""
    return [round(x, 2) for x in os.getloadavg()]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Sample:
    """One timing. others: the share of all cores that other processes used meanwhile (0 where that is unknown)."""

    seconds: float
    others: float


def busy_seconds() -> float:
    """Processor time of all processes together; where the system does not tell, of this one."""
    if not (stat := Path("/proc/stat")).exists():
        return time.process_time()
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def timed(function: Callable[[], object]) -> Sample:
    busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
    function()
    wall = time.perf_counter() - start
    others = busy_seconds() - busy - (time.process_time() - own)
    return Sample(wall, max(0.0, others) / wall / (os.cpu_count() or 1))


def n_calm(samples: list[Sample]) -> int:
    return sum(sample.others < CALM for sample in samples)


def undisturbed(samples: list[Sample]) -> list[float]:
    """Seconds of the samples that had the machine to themselves; of all of them when no two had."""
    calm = [sample.seconds for sample in samples if sample.others < CALM]
    return calm if len(calm) > 1 else [sample.seconds for sample in samples]


class Peaks:
    """The best seen of what the machine can do; `look` is cheap enough to repeat between the rounds of a benchmark."""

    def __init__(self) -> None:
        self.flops_per_s = 0.0  # of a float32 matrix product
        self.bytes_per_s = 0.0  # read, by a sum or by a matrix-vector product
        self._a, self._b, self._product = (torch.randn(2048, 2048) for _ in range(3))
        self._matrix, self._vector, self._out = torch.ones(2**15, 2**12), torch.ones(2**12), torch.empty(2**15)

    def look(self) -> None:
        product = min(timed(lambda: torch.mm(self._a, self._b, out=self._product)).seconds for _ in range(3))
        reads: list[Callable[[], Tensor]] = [
            self._matrix.sum,
            lambda: torch.mv(self._matrix, self._vector, out=self._out),
        ]
        read = min(timed(read).seconds for read in reads for _ in range(2))
        self.flops_per_s = max(self.flops_per_s, 2 * 2048**3 / product)
        self.bytes_per_s = max(self.bytes_per_s, self._matrix.nbytes / read)


@torch.no_grad()
def lively_model(name: str, vocab_size: int, n_layer: int, n_embd: int) -> RWKV:
    """A model by its recipe, plus noise: the recipe's zeros alone would hide whole branches from a comparison."""
    cls = VERSIONS[name]
    config = cls.Config.make(vocab_size, n_layer, n_embd)
    model: RWKV = cls(config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    apply_recipe(model, cls.recipe(config), generator)  # type: ignore[arg-type]
    for parameter in model.parameters():
        fan_in = max(parameter.shape) if parameter.dim() > 1 and min(parameter.shape) > 1 else 100
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5 * fan_in**-0.5)
    return model.eval()


def matrix_elements(model: RWKV) -> tuple[int, int]:
    """Elements of the weight matrices that multiply every token's vector: in the blocks, in the head."""
    blocks = [p for p in model.blocks.parameters() if p.dim() > 1 and min(p.shape) > 1]
    return sum(p.numel() for p in blocks), model.head.weight.numel()


def rounded(value: Any) -> Any:
    """Floats to four digits, so that a line of JSON stays readable."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
