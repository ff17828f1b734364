"""Training over several processes against one: the same losses, tokens/s, and how well the speed scales.

    torchrun --standalone --nproc-per-node 2 bench/distributed.py [--ways ddp fsdp context] [--out FILE]

On GPUs (NCCL): RWKV-7 with 24 layers of 1,024 channels, vocabulary 65,536, 8 rows of 4,096 tokens a process. --toy: a
small model, on CPUs (gloo) or anywhere. The trainer's own passes, optimiser and clipping. First a small model takes a
few steps in one process and in all of them; losses must agree, or there is no report. Then the timed steps: one process
alone with its own rows, while the others wait, and all together with as many each. Efficiency is the speed over that of
one, with weights of the same type (run.weights), times the number of processes. With `context` every row is cut into as
many pieces as there are processes, and is as many times longer. Progress goes to the standard error; then a table and
one line of JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import lively_model, machine, rounded
from torch import Tensor
from train_step import build

from receptance.models import VERSIONS
from receptance.training.batch import Batch
from receptance.training.config import ParallelConfig, RunConfig, TrainConfig
from receptance.training.distributed import Parallel
from receptance.training.loop import casts, has_masters
from receptance.training.master import MasterAdamW
from receptance.training.optim import build_optimizer, set_learning_rate
from receptance.training.passes import Passes

START = time.perf_counter()
WAYS = ("ddp", "fsdp", "context")
CHECKED = {"n_layer": 3, "n_embd": 128, "vocab": 500, "rows": 4, "tokens": 96, "steps": 5}
SAME = {"cpu": 1e-5, "cuda": 1e-4}  # of each loss, relative: float32 summed in another order, on a GPU in tf32 besides


class Trainer:
    """A model with the trainer's passes and optimiser, in this process alone or in all of them ("ddp", …)."""

    def __init__(self, way: str, options: argparse.Namespace, sizes: tuple[int, int, int], rows: int, tokens: int,
                 precision: str, weights: str = "auto"):  # fmt: skip
        vocab, n_layer, n_embd = sizes
        kind = ParallelConfig(
            "fsdp" if way == "fsdp" else "ddp", context=dist.get_world_size() if way == "context" else 1
        )
        run = RunConfig(batch_size=rows, ctx_len=tokens, precision=precision, weights=weights, cuda_graph="off")
        config = TrainConfig(run=run, parallel=kind)
        config = replace(config, optim=replace(config.optim, eps=1e-8))  # 1e-18 makes weights of rounding noise
        self.parallel = Parallel(config, torch.device(options.device))
        self.device = self.parallel.device
        torch.manual_seed(0)
        if n_embd < 1024:
            model = lively_model(options.version, vocab, n_layer, n_embd).train()
        else:  # orthogonal matrices of this size take minutes
            model = build(options.version, (options.version, n_layer, n_embd), vocab, torch.float32, str(self.device))
        self.model = self.parallel.shard(model)
        recipe = VERSIONS[options.version].recipe(self.model.config)  # type: ignore[arg-type]
        masters = has_masters(config, self.parallel, self.model)
        self.optimizer = build_optimizer(self.model, recipe, config.optim, masters=masters)
        set_learning_rate(self.optimizer, 1e-3)
        model, parallel = self.model, self.parallel  # the lambda holds no trainer, whose memory could not go at once
        self.passes = Passes(config, model, parallel, lambda: casts(config, parallel, model))
        self.has_masters = masters
        self.weights = "bfloat16" if masters or self.parallel.gathers_half else "float32"
        text = torch.randint(vocab, (rows, tokens + 1), generator=torch.Generator().manual_seed(2)).to(self.device)
        self.batch = self.parallel.share(Batch.of(text[:, :-1], text[:, 1:], None))

    def step(self) -> Tensor:
        loss = self.parallel.mean(self.passes.backward(self.batch, last=True))
        if isinstance(self.optimizer, MasterAdamW):
            self.optimizer.collect(self.parallel.average)
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def graph(self) -> Callable[[], object]:
        """`step` as one CUDA graph, communication included; all processes capture and replay it together."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.step()
        return graph.replay


@contextmanager
def alone() -> Iterator[None]:
    """A run that is set up inside is one of a single process."""
    size = os.environ.pop("WORLD_SIZE")
    try:
        yield
    finally:
        os.environ["WORLD_SIZE"] = size


def say(text: str) -> None:
    """What happens, and after how many seconds: NCCL waits in silence for a process that does not come."""
    if dist.get_rank() == 0:
        print(f"[{time.perf_counter() - START:6.1f} s] {text}", file=sys.stderr, flush=True)


def check(ways: list[str], options: argparse.Namespace) -> dict[str, float]:
    """The largest relative difference of a loss to that of one process; no report when too large."""
    sizes = CHECKED["vocab"], CHECKED["n_layer"], CHECKED["n_embd"]

    def losses(way: str) -> Tensor:
        say(f"small model: {way}")
        trainer = Trainer(way, options, sizes, CHECKED["rows"] * dist.get_world_size(), CHECKED["tokens"], "float32")
        return torch.stack([trainer.step() for _ in range(CHECKED["steps"])])

    with alone():
        expected = losses("alone")
    found = {way: float(((losses(way) - expected) / expected).abs().max()) for way in ways}
    limit = SAME[torch.device(options.device).type]
    for way, difference in found.items():
        if not difference <= limit:
            sys.exit(f"{way}: a loss is {difference:.1e} away from that of one process, allowed {limit}; no report")
    return found


def speed(trainer: Trainer, tokens: int, rounds: int, as_graph: bool) -> dict[str, float]:
    """Tokens/s by the median and the best of `rounds` steps after two, and the most memory on this device."""
    seconds, step = [], trainer.graph() if as_graph else trainer.step
    for i in range(rounds + 2):
        wait(trainer.device)
        begin = time.perf_counter()
        step()
        wait(trainer.device)
        seconds += [time.perf_counter() - begin] if i >= 2 else []
    is_gpu = trainer.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(trainer.device) / 1e9 if is_gpu else 0.0
    return {"tokens_per_s": tokens / statistics.median(seconds), "best": tokens / min(seconds), "peak_GB": peak}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean(make: Callable[[], dict[str, Any]], device: str) -> dict[str, Any]:
    """What `make` returns, measured from an empty device memory."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return make()


def measure(ways: list[str], options: argparse.Namespace) -> dict[str, Any]:
    size, rows, tokens = dist.get_world_size(), options.rows, options.tokens
    sizes = (512, 2, 64) if options.toy else (65_536, 24, 1024)
    results: dict[str, Any] = {}

    def timed(way: str, shape: tuple[int, int], weights: str = "auto") -> tuple[str, dict[str, Any]]:
        say(f"{way}: {shape[0]} rows of {shape[1]:,} tokens")

        def run() -> dict[str, Any]:
            trainer = Trainer(way, options, sizes, *shape, "auto", weights)
            return {
                "weights": trainer.weights,
                **speed(trainer, shape[0] * shape[1], options.rounds, options.graph and trainer.has_masters),
            }

        found = clean(run, options.device)
        say(f"{way}: {found['tokens_per_s']:,.0f} tokens/s, weights in {found['weights']}")
        return found["weights"], found

    alone_by_weights: dict[str, float] = {}
    if dist.get_rank() == 0:
        for kind in ("auto", "float32"):
            with alone():
                weights, found = timed("alone", (rows, tokens), kind)
            if weights not in alone_by_weights:
                alone_by_weights[weights] = found["tokens_per_s"]
                results[f"alone, {weights}"] = found
    dist.barrier()
    for way in ways:
        shape = (rows, tokens * size) if way == "context" else (rows * size, tokens)
        weights, results[way] = timed(way, shape)
        if dist.get_rank() == 0:
            results[way]["efficiency"] = results[way]["tokens_per_s"] / (size * alone_by_weights[weights])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--version", default="7", choices=["4", "5.2", "6", "7"])
    parser.add_argument("--rows", type=int, help="a process; default 8, or 4 with --toy")
    parser.add_argument("--tokens", type=int, help="a row; default 4096, or 128 with --toy")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--graph", action="store_true", help="steps with masters (not fsdp) as one CUDA graph")
    parser.add_argument("--toy", action="store_true", help="two layers of 64 channels")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        sys.exit("start this with torchrun --standalone --nproc-per-node 2 (or more)")
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cpu" and not options.toy:
        sys.exit("no GPU here; --toy runs the same at toy size")
    options.rows, options.tokens = (
        options.rows or (4 if options.toy else 8),
        options.tokens or (128 if options.toy else 4096),
    )
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    differences = check(options.ways, options)
    results = measure(options.ways, options)
    if dist.get_rank() == 0:
        gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
        for way, row in results.items():
            more = f"{row['efficiency']:7.0%}  loss within {differences[way]:.0e}" if way in differences else ""
            print(f"{way:16}{row['tokens_per_s']:12,.0f} tokens/s{row['peak_GB']:7.1f} GB a GPU{more}")
        record = {"bench": "distributed", "unit": "tokens/s", "machine": {**machine("triton"), "gpu": gpu},
                  "processes": dist.get_world_size(), "version": options.version, "toy": options.toy,
                  "graph": options.graph, "rows_a_process": options.rows, "tokens": options.tokens,
                  "loss_difference": rounded(differences),
                  "results": {way: rounded(row) for way, row in results.items()}}  # fmt: skip
        text = json.dumps(record)
        if options.out:
            options.out.write_text(text + "\n")
        print(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
