"""What length costs: training steps at fixed tokens per step, and exact gradients through rows longer than memory.

    python bench/long_context.py [--versions 4 6 7] [--out FILE]           # on a GPU: 0.4B, up to 1M tokens
    python bench/long_context.py --device cpu                              # a small model, up to 16,384 tokens

Two tables. "rows": forward, loss, backward and AdamW over the same number of tokens, cut into fewer and longer rows;
time and memory per token should not change. "segments": one row of T tokens with `exact_backward`; memory should grow
by a state per segment alone. First the segments' gradients are compared with the plain ones, or there is no report. It
ends in one line of JSON.
"""

import argparse
import json
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from measure import Row, lively_model, load, machine, rounded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from receptance.models import RWKV, VERSIONS, State
from receptance.training.batch import Batch
from receptance.training.config import OptimConfig
from receptance.training.optim import build_optimizer, set_learning_rate
from receptance.training.segments import exact_backward, spacing

TOLERANCE = 1e-9  # of each gradient by its norm, in float64
LONGEST_CHECK = 512  # tokens of a segment there
SHAPES = {"cpu": (256, 2, 64), "cuda": (65_536, 24, 1024)}  # vocabulary, layers, width
ROWS = {"cpu": (4_096, [256, 1_024, 4_096]), "cuda": (131_072, [1_024, 4_096, 16_384, 65_536, 131_072])}
LENGTHS = {"cpu": (512, [2_048, 4_096, 8_192, 16_384]), "cuda": (16_384, [65_536, 262_144, 1_048_576])}


class Live(TorchDispatchMode):
    """Bytes of all storages that operations make, as long as they live; `peak` is their most. For the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self._sizes = 0, 0, dict[int, int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class Trainer:
    """One model, one optimiser, steps on random tokens."""

    def __init__(self, version: str, device: str, states: str):
        vocab, layers, width = SHAPES[device]
        self.device, self.states = device, states
        self.half = device == "cuda"  # bfloat16
        self.model: RWKV = lively_model(version, vocab, layers, width).to(device).train()
        self.model.activation_checkpointing = device == "cuda"
        self.optimizer = build_optimizer(self.model, VERSIONS[version].recipe(self.model.config), OptimConfig())
        set_learning_rate(self.optimizer, 1e-5)

    def autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16) if self.half else nullcontext()

    def data(self, rows: int, t: int) -> Batch:
        generator = torch.Generator().manual_seed(t)
        text = torch.randint(SHAPES[self.device][0], (rows, t + 1), generator=generator).to(self.device)
        return Batch.of(text[:, :-1], text[:, 1:])

    def loss(self, batch: Batch, state: State | None) -> tuple[Tensor, State]:
        with self.autocast():
            return self.model.loss(batch.tokens, batch.targets, state, total=batch.n_targets)

    def advance(self, batch: Batch, state: State | None) -> State:
        with self.autocast():
            return self.model.hidden(batch.tokens, state, lengths=None, resets=None, backend="auto")[1]

    def plain(self, batch: Batch) -> None:
        self.loss(batch, None)[0].backward()  # type: ignore[no-untyped-call]

    def segmented(self, batch: Batch, length: int) -> None:
        every = spacing(self.states, -(-batch.tokens.shape[1] // length))
        exact_backward(self.advance, self.loss, batch, length, keep_every=every, offload=self.states == "cpu")

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measured(self, work: Callable[[], None]) -> tuple[float, int]:
        """Seconds, and the peak in bytes of what is not weights and optimiser. On a CPU the two are measured apart."""
        if self.device == "cpu":
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
            with Live() as live:
                work()
            return seconds, live.peak
        before = torch.cuda.memory_allocated()
        work()  # warm
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def check(trainer: Trainer, length: int) -> float:
    """The largest difference of a gradient of the segments from the plain one, as a share of its norm.

    In float64: deep models of random weights, RWKV-6 above all, make a thousand times more of what others round.
    """
    length = min(length, LONGEST_CHECK)
    batch = trainer.data(1, 2 * length + length // 2)
    found = []
    half, trainer.half = trainer.half, False
    trainer.model.double()
    for work in (lambda: trainer.plain(batch), lambda: trainer.segmented(batch, length)):
        work()
        found.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
        trainer.optimizer.zero_grad(set_to_none=True)
    trainer.half = half
    trainer.model.float()
    plain, segmented = found
    worst = max(float((segmented[n] - x).norm() / x.norm().clamp(min=1e-9)) for n, x in plain.items())
    if not worst <= TOLERANCE or plain.keys() != segmented.keys():
        sys.exit(f"gradients in segments differ from the plain ones by {worst:.1e} of their norm; no report")
    return worst


def by_rows(trainer: Trainer, n_tokens: int, lengths: list[int]) -> dict[str, Row]:
    results: dict[str, Row] = {}
    for t in lengths:
        batch = trainer.data(n_tokens // t, t)

        def work(batch: Batch = batch) -> None:
            trainer.plain(batch)
            trainer.update()

        seconds, peak = trainer.measured(work)
        results[str(t)] = {"us_per_token": 1e6 * seconds / n_tokens, "bytes_per_token": peak / n_tokens}
    first = results[str(lengths[0])]
    for result in results.values():
        for key in ("us_per_token", "bytes_per_token"):
            result[f"{key}_ratio"] = result[key] / first[key]
    return results


def by_segments(trainer: Trainer, length: int, lengths: list[int]) -> dict[str, Row]:
    results: dict[str, Row] = {}
    for t in lengths:
        batch = trainer.data(1, t)

        def work(batch: Batch = batch) -> None:
            trainer.segmented(batch, length)
            trainer.update()

        seconds, peak = trainer.measured(work)
        results[str(t)] = {"us_per_token": 1e6 * seconds / t, "peak_mib": peak / 2**20}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--versions", nargs="+", default=["4", "6", "7"], choices=["4", "5.0", "5.1", "5.2", "6", "7"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--states", choices=["device", "cpu", "sqrt"], default="device", help="run.segment_states")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    device = options.device
    about: dict[str, object] = {**machine("triton"), "load_before": load(), "device": device}
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    segment = LENGTHS[device][0]
    results: dict[str, dict[str, Any]] = {}
    for version in options.versions:
        trainer = Trainer(version, device, options.states)
        state = trainer.model.zero_state(1).nbytes
        result: dict[str, Any] = {"difference": check(trainer, segment // 4), "state_mib": state / 2**20}
        result["rows"] = by_rows(trainer, *ROWS[device])
        result["segments"] = by_segments(trainer, *LENGTHS[device])
        results[version] = result
        print(f"RWKV-{version}, gradients in segments within {result['difference']:.1e} of the plain ones")
        print(f"{'row of':>12}{'us/token':>12}{'of first':>10}{'bytes/token':>14}{'of first':>10}")
        for t, r in result["rows"].items():
            print(f"{int(t):12,}{r['us_per_token']:12.2f}{r['us_per_token_ratio']:10.2f}"
                  f"{r['bytes_per_token']:14,.0f}{r['bytes_per_token_ratio']:10.2f}")  # fmt: skip
        print(f"{'in segments':>12}{'us/token':>12}{'peak MiB':>12}{'of it states':>14}")
        for t, r in result["segments"].items():
            kept = result["state_mib"] * (int(t) // segment - 1)
            print(f"{int(t):12,}{r['us_per_token']:12.2f}{r['peak_mib']:12.1f}{kept:14.1f}")
        del trainer
        if device == "cuda":
            torch.cuda.empty_cache()
    about["load_after"] = load()
    shape = dict(zip(("vocab", "layers", "width"), SHAPES[device])) | {"segment": segment, "states": options.states}
    line = {"bench": "long_context", "machine": about, "shape": shape, "results": results}
    text = json.dumps(rounded(line))
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
