"""WKV's CUDA kernels, forward and backward, under NVIDIA's compute-sanitizer: small shapes that take each of them.

    python bench/sanitize.py [memcheck racecheck synccheck initcheck] [--cases wkv7-segments …] [--jobs N] [--out DIR]

Heads of every size, float16 and bfloat16, rows that end inside a chunk, documents, rows whole and in segments, few
heads and many. One line a run, and status 1 if a tool reports anything; --out keeps what it said.
racecheck's reports of WKV-7 change from run to run; docs/log.md says why they are held to be wrong.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from wkv import OPS, draw

from receptance.ops.wkv6 import cuda as cuda6
from receptance.ops.wkv7 import cuda as cuda7

TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]
LIMIT = 300  # seconds a run


def documents(t: int) -> torch.Tensor:
    """First, adjacent, last and border tokens of chunks begin one."""
    resets = torch.zeros(1, t, dtype=torch.bool)
    resets[0, [0, 5, 6, 15, 16, 47]] = True
    return resets.cuda()


def both_ways(op: str, t: int, size: int, dtype: torch.dtype, resets: torch.Tensor | None) -> None:
    """Results of one head (wkv4: so many channels) and their gradients, also of the end state."""
    inputs = [x.to(dtype) if x.dtype == torch.bfloat16 else x for x in draw(op, 1, t, 1, size)]
    if op != "wkv4":
        inputs.append(torch.randn(1, 1, size, size, device="cuda"))
    leaves = [x.requires_grad_() for x in inputs]
    y, end = OPS[op](*leaves, resets=resets, backend="cuda")
    results = [x for x in (y, *(end if isinstance(end, tuple) else [end])) if x.requires_grad]
    torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])


def run4() -> None:
    for t, channels, dtype in [(129, 6, torch.float32), (70, 64, torch.bfloat16)]:
        for resets in (None, documents(t)):
            both_ways("wkv4", t, channels, dtype, resets)


def run6(n: int, in_segments: bool) -> None:
    cuda6.SHORTEST_SEGMENT = 48 if in_segments else 10**6
    both_ways("wkv6", 100, n, torch.bfloat16, None)
    both_ways("wkv6", 100, n, torch.float16, documents(100))


def run7(kind: str) -> None:
    cuda7.MIN_SEGMENT = 3 if kind == "segments" else 10**6
    if kind == "many":
        cuda7.ALONE = 0
    t = 120 if kind == "segments" else 70
    both_ways("wkv7", t, 64, torch.bfloat16, None)
    both_ways("wkv7", t, 64, torch.float16, documents(t))


CASES: dict[str, Callable[[], None]] = {"wkv4": run4}
CASES |= {
    f"wkv6-{n}-{kind}": partial(run6, n, kind == "segments") for n in (32, 64, 128) for kind in ("rows", "segments")
}
CASES |= {f"wkv7-{kind}": partial(run7, kind) for kind in ("few", "many", "segments")}


def sanitize(run: tuple[str, str], out: Path | None) -> bool:
    tool, case = run
    # autograd's thread has no current context at its first launch, which the launch takes care of: no error of a call
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    if tool in ("memcheck", "initcheck"):
        command += ["--report-api-errors", "no"]
    process = subprocess.run(
        [*command, sys.executable, __file__, "--run", case], capture_output=True, text=True, errors="replace",
        timeout=LIMIT,
    )  # fmt: skip
    said = process.stdout + process.stderr
    ok = process.returncode == 0 and f"done {case}" in said
    summary = next((line for line in said.splitlines() if "SUMMARY" in line), f"status {process.returncode}")
    print(f"{'ok  ' if ok else 'BAD '} {tool:9s} {case:18s} {summary.strip('= ')}", flush=True)
    if out:
        (out / f"{tool}-{case}.txt").write_text(said)
    return ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="*", default=TOOLS)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--jobs", type=int, default=1, help="runs beside each other")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", choices=CASES, help="the case itself, without a sanitizer")
    arguments = parser.parse_args()
    if arguments.run:
        CASES[arguments.run]()
        torch.cuda.synchronize()
        print(f"done {arguments.run}", flush=True)
        os._exit(0)  # threads of autograd may abort a process that is being watched at its end
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    runs = [(tool, case) for tool in arguments.tools for case in arguments.cases]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(partial(sanitize, out=arguments.out), runs))
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
