"""The WKV operators on a GPU: accuracy against float64 first, then time and memory against the byte floor.

    python bench/wkv.py [wkv4 wkv6 wkv7] [--backends cuda triton] [--out FILE]

Shapes: 65,536 tokens × 32 heads of 64, cut into 64, 16, 4 and 1 sequences (wkv4: 2,048 channels, and 8 × 4,096 tokens).
Each cell is the median of CUDA-event times over random bfloat16 inputs; the floor counts every input read once and each
output and gradient written once at the copy bandwidth measured in the same run. A table, then one JSON line.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable

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


def accuracy(op: str, backend: str) -> dict[str, float]:
    """Relative L2 errors of y and of each input's gradient against the naive form in float64."""
    inputs = draw(op, 2, 1000, 2, 64)
    gy = torch.randn_like(inputs[-1] if op == "wkv7" else inputs[2]).bfloat16()

    def run(leaves: list[Tensor], name: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        y, _ = OPS[op](*leaves, backend=name)
        return [y, *torch.autograd.grad(y, leaves, gy.to(y.dtype))]

    got, exact = run(inputs, backend), run([x.double() for x in inputs], "naive")
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact)]
    return {"y": errors[0], "gradient": max(errors[1:])}


def measure(function: Callable[[], object]) -> tuple[float, float]:
    """(median milliseconds, extra MiB at the peak)."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median"), extra


def cell(op: str, backend: str, batch: int, t: int, bandwidth: float) -> dict[str, float]:
    inputs = [x.requires_grad_() for x in draw(op, batch, t, 32, 64)]
    call = lambda: OPS[op](*inputs, backend=backend)
    with torch.no_grad():
        forward, memory = measure(call)
    y, _ = call()
    gy = torch.randn_like(y)
    both, memory_both = measure(lambda: torch.autograd.grad(call()[0], inputs, gy))
    reads, writes = TENSORS[op]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", default=list(OPS))
    parser.add_argument("--backends", nargs="*", default=["cuda", "triton"])
    parser.add_argument("--out")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    result: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(), "copy_TB_per_s": bandwidth / 1e12,
    }  # fmt: skip
    for op in arguments.ops:
        for backend in arguments.backends:
            if backend in ("cuda", "triton") and backend not in GPU_BACKENDS[op]:
                continue
            errors = accuracy(op, backend)
            print(f"{op} {backend}: y {errors['y']:.2e}, worst gradient {errors['gradient']:.2e}", flush=True)
            if not all(errors[key] <= limit for key, limit in MAX_ERROR.items()):
                print(f"  not measured: above {MAX_ERROR}")
                result[f"{op} {backend}"] = {"errors": errors}
                continue
            cells = {}
            for batch, t in SHAPES + SHORTER.get(op, []):
                row = cells[f"{batch}x{t}"] = cell(op, backend, batch, t, bandwidth)
                print(
                    f"  {batch:3d}×{t:<6d} forward {row['forward_ms']:7.3f} ms (floor {row['floor_forward_ms']:.3f})  "
                    f"both {row['both_ms']:7.3f} ms (floor {row['floor_both_ms']:.3f})  "
                    f"extra {row['extra_MiB']:6.0f} / {row['extra_both_MiB']:6.0f} MiB",
                    flush=True,
                )
            result[f"{op} {backend}"] = {"errors": errors, "cells": cells}
    line = json.dumps(result)
    print(line)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
