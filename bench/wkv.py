"""The WKV operators on a GPU: accuracy against float64 first, then time and memory against the byte floor.

    python bench/wkv.py [wkv4 wkv6 wkv7] [--backends cuda triton] [--peers] [--out FILE]

Shapes: 65,536 tokens × 32 heads of 64, cut into 64, 16, 4 and 1 sequences (wkv4: 2,048 channels, and 8 × 4,096 tokens).
Each cell is the median of CUDA-event times over random bfloat16 inputs, replayed as a CUDA graph, so that a slow host
does not count; the floor counts every input read once and each output and gradient written once at the copy bandwidth
measured in the same run. A table, then one JSON line. --peers (called one by one; they take much longer than the host):
flash-linear-attention's chunked forms too (`fla-core` must be installed) and torch's causal attention, 16 heads of 128.
A form above the limits of accuracy is not measured; a peer is, with its errors beside it.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from receptance.ops import GPU_BACKENDS, wkv4, wkv6, wkv7

OPS = {"wkv4": wkv4, "wkv6": wkv6, "wkv7": wkv7}
SHAPES = [(64, 1024), (16, 4096), (4, 16384), (1, 65536)]
SHORTER = {"wkv4": [(8, 4096)]}
TENSORS = {"wkv4": (3, 6), "wkv6": (5, 9), "wkv7": (7, 13)}  # bfloat16 tensors touched: forward, backward
MAX_ERROR = {"y": 2.1e-3, "gradient": 2.5e-3}


def draw(op: str, batch: int, t: int, heads: int, size: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, device="cuda")
    if op == "wkv4":
        c = heads * size
        return [-rand(c).exp(), rand(batch, t, c).bfloat16(), rand(batch, t, c).bfloat16(), rand(c)]
    shape = (batch, t, heads, size)
    if op == "wkv6":
        r, k, v = (rand(*shape).bfloat16() for _ in range(3))
        return [r, -(rand(*shape) - 2).exp(), k, v, rand(heads, size)]
    kk = torch.nn.functional.normalize(rand(*shape), dim=-1)
    r, k, v = (rand(*shape).bfloat16() for _ in range(3))
    w = (-0.6065 * torch.sigmoid(rand(*shape))).bfloat16()
    return [r, w, k, v, (-kk).bfloat16(), (kk * torch.sigmoid(rand(*shape))).bfloat16()]


@cache
def tune_less() -> None:
    """Leave four choices to a tuned kernel of those imported from here on: trying all takes minutes a shape."""
    tuner = triton.autotune

    def autotune(configs: list[Any], **options: Any) -> Any:
        return tuner(configs[:: max(1, len(configs) // 4)][:4], **options)

    triton.autotune = autotune


def peer(op: str, inputs: list[Tensor]) -> Tensor:
    """flash-linear-attention's chunked form."""
    tune_less()
    if op == "wkv7":
        from fla.ops.rwkv7 import chunk_rwkv7

        return chunk_rwkv7(*inputs, lower_bound=-0.61)[0]
    from fla.ops.rwkv6 import chunk_rwkv6

    r, w, k, v, u = inputs
    return chunk_rwkv6(r, k, v, w.to(r.dtype), u.to(r.dtype), scale=1.0)[0]


def run(op: str, backend: str, inputs: list[Tensor]) -> Tensor:
    return peer(op, inputs) if backend == "fla" else OPS[op](*inputs, backend=backend)[0]


def attention(batch: int, t: int, bandwidth: float) -> dict[str, float]:
    """Causal attention of 16 heads of 128, as torch chooses it."""
    q, k, v = (torch.randn(batch, 16, t, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    attend = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True)
    return times(attend, [q, k, v], (4, 7), bandwidth, replays=True)


def accuracy(op: str, backend: str) -> dict[str, float]:
    """Relative L2 errors of y and of each input's gradient against the naive form in float64."""
    inputs = draw(op, 2, 1000, 2, 64)
    gy = torch.randn_like(inputs[-1] if op == "wkv7" else inputs[2]).bfloat16()

    def results(leaves: list[Tensor], name: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        y = run(op, name, leaves)
        return [y, *torch.autograd.grad(y, leaves, gy.to(y.dtype))]

    got, exact = results(inputs, backend), results([x.double() for x in inputs], "naive")
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact)]
    return {"y": errors[0], "gradient": max(errors[1:])}


def measure(function: Callable[[], object], replays: bool) -> tuple[float, float]:
    """(median milliseconds, extra MiB at the peak). Graphs of autograd that are alive would break the capture."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    if replays:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        function = graph.replay
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median"), extra


def cell(op: str, backend: str, batch: int, t: int, bandwidth: float) -> dict[str, float]:
    inputs = [x.requires_grad_() for x in draw(op, batch, t, 32, 64)]
    return times(lambda: run(op, backend, inputs), inputs, TENSORS[op], bandwidth, replays=backend != "fla")


def times(
    call: Callable[[], Tensor], inputs: list[Tensor], tensors: tuple[int, int], bandwidth: float, replays: bool
) -> dict[str, float]:
    with torch.no_grad():
        forward, memory = measure(call, replays)
        y = call()
    gy = torch.randn_like(y)
    both, memory_both = measure(lambda: torch.autograd.grad(call(), inputs, gy), replays)
    reads, writes = tensors
    size = y.numel() * 2
    return {
        "forward_ms": forward, "both_ms": both, "floor_forward_ms": reads * size / bandwidth * 1e3,
        "floor_both_ms": (reads + writes) * size / bandwidth * 1e3, "extra_MiB": memory, "extra_both_MiB": memory_both,
    }  # fmt: skip


def copy_bandwidth() -> float:
    """Bytes read plus written per second by a 2 GiB device copy."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.numel() * 2 / ms * 1e3


def report(batch: int, t: int, row: dict[str, float]) -> dict[str, float]:
    print(
        f"  {batch:3d}×{t:<6d} forward {row['forward_ms']:7.3f} ms (floor {row['floor_forward_ms']:.3f})  "
        f"both {row['both_ms']:7.3f} ms (floor {row['floor_both_ms']:.3f})  "
        f"extra {row['extra_MiB']:6.0f} / {row['extra_both_MiB']:6.0f} MiB",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", default=list(OPS))
    parser.add_argument("--backends", nargs="*", default=["cuda", "triton"])
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(), "copy_TB_per_s": bandwidth / 1e12,
    }  # fmt: skip
    for op in arguments.ops:
        for backend in [*arguments.backends, *(["fla"] if arguments.peers and op != "wkv4" else [])]:
            if backend in ("cuda", "triton") and backend not in GPU_BACKENDS[op]:
                continue
            errors = accuracy(op, backend)
            print(f"{op} {backend}: y {errors['y']:.2e}, worst gradient {errors['gradient']:.2e}", flush=True)
            result[f"{op} {backend}"] = entry = {"errors": errors, "cells": {}}
            if backend != "fla" and not all(errors[key] <= limit for key, limit in MAX_ERROR.items()):
                print(f"  not measured: above {MAX_ERROR}")
                continue
            for batch, t in SHAPES + SHORTER.get(op, []):
                entry["cells"][f"{batch}x{t}"] = report(batch, t, cell(op, backend, batch, t, bandwidth))
    if arguments.peers:
        print("attention, 16 heads of 128:")
        cells = {f"{batch}x{t}": report(batch, t, attention(batch, t, bandwidth)) for batch, t in SHAPES}
        result["attention"] = {"cells": cells}
    line = json.dumps(result)
    print(line)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
