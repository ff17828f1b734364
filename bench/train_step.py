"""A whole training step on a GPU: forward, loss, backward, clipping and the trainer's AdamW, at 32,768 tokens a step.

    PYTHONPATH=src python bench/train_step.py [--models v7-0.4B v7-0.1B v4-0.17B] [--out FILE]

Vocabulary 65,536. `master`: bfloat16 weights with float32 masters in the optimiser; `autocast`: float32 weights and
products in bfloat16. Loss and gradients of a small model on the GPU must first agree with float32 on the CPU, or there
is no report. Each cell: tokens/s by the median of CUDA-event times, MFU (6 × parameters of matrix products × tokens ÷
time ÷ 989 TFLOP/s), peak memory, GPU time by group of kernels in one profiled step (the head's products count as GEMM).
`graph` replays the step as one CUDA graph. A table, then one line of JSON. --toy runs it all at toy size on any device.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import Row, lively_model, machine, matrix_elements, rounded
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from receptance.models import RWKV, VERSIONS
from receptance.ops import BACKENDS
from receptance.ops.pieces import CUDA, PIECES
from receptance.training.config import OptimConfig
from receptance.training.master import MasterAdamW
from receptance.training.optim import build_optimizer, set_learning_rate

VOCAB = 65_536
PEAK_FLOPS = 989e12  # dense bfloat16 of an H100 or H200
MODELS = {"v7-0.4B": ("7", 24, 1024), "v7-0.1B": ("7", 12, 768), "v4-0.17B": ("4", 12, 768)}
SHAPES = [(8, 4096), (32, 1024)]
TOY = {"v7-toy": ("7", 2, 64), "v4-toy": ("4", 2, 64)}
LOGIT_PENALTY, CLIP = 1e-4, 1.0
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of loss and gradients (by their joint norm) against float32 on a CPU


@dataclass
class Step:
    """One training step on a fixed batch."""

    model: RWKV
    optimizer: Optimizer
    inputs: Tensor
    targets: Tensor
    autocast: bool
    backend: str

    def __call__(self) -> Tensor:
        device = self.inputs.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            loss, _ = self.model.loss(self.inputs, self.targets, logit_penalty=LOGIT_PENALTY, backend=self.backend)
        loss.backward()  # type: ignore[no-untyped-call]
        if isinstance(self.optimizer, MasterAdamW):
            self.optimizer.collect()
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def optimizer_of(model: RWKV, masters: bool) -> Optimizer:
    """The trainer's."""
    recipe = type(model).recipe(model.config)  # type: ignore[attr-defined]
    optimizer = build_optimizer(model, recipe, OptimConfig(grad_clip=CLIP), masters=masters)
    set_learning_rate(optimizer, 1e-4)
    for group in optimizer.param_groups:
        group["capturable"] = model.device.type == "cuda"
    return optimizer


@torch.no_grad()
def build(sizes: tuple[str, int, int], vocab: int, dtype: torch.dtype, device: str) -> RWKV:
    """Vectors by the recipe, matrices of plain noise: orthogonal ones of this size take minutes and cost the same."""
    version, n_layer, n_embd = sizes
    cls = VERSIONS[version]
    config = cls.Config.make(vocab, n_layer, n_embd)
    model: RWKV = cls(config, device=device, dtype=torch.float32)  # type: ignore[call-arg,arg-type]
    recipe = cls.recipe(config)  # type: ignore[arg-type]
    for key, parameter in model.named_parameters():
        init = recipe[key].init
        if isinstance(init, Tensor):
            parameter.copy_(init.reshape(parameter.shape))
        else:
            parameter.normal_(std=0.5 * max(parameter.shape) ** -0.5)
    return model.to(dtype).train()


def check(version: str, device: str, backend: str) -> Row:
    """Loss and gradients of a small model on this device against float32 on the CPU; no report when too far."""
    row: Row = {}
    tokens = torch.randint(500, (2, 131), generator=torch.Generator().manual_seed(3))
    reference = lively_model(version, 500, 3, 128).train()

    def gradients(model: RWKV, tokens: Tensor, backend: str) -> tuple[float, Tensor]:
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:], logit_penalty=LOGIT_PENALTY, backend=backend)
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return loss.item(), torch.cat([g.flatten().double().cpu() for g in found if g is not None])

    loss, exact = gradients(reference, tokens, "chunk")
    for name, tolerance in TOLERANCE.items():
        model = lively_model(version, 500, 3, 128).train().to(device, getattr(torch, name))
        got, found = gradients(model, tokens.to(device), backend)
        row[f"{name}_loss"] = abs(got - loss) / loss
        row[f"{name}_gradients"] = float((found - exact).norm() / exact.norm())
        wrong = {key: value for key, value in row.items() if not value <= tolerance and key.startswith(name)}
        if wrong:
            sys.exit(
                f"RWKV-{version} on {device}: {wrong} away from float32 on the CPU, allowed {tolerance}; no report"
            )
    return row


def timed(function: Callable[[], object], device: str, rounds: int) -> list[float]:
    """Seconds of each call."""
    seconds = []
    for _ in range(rounds):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - begin)
    return seconds


def kernel_groups() -> dict[str, str]:
    """Name of a kernel of ours → group."""
    groups, special = {}, {"head_loss": "loss", "adamw": "optimiser", "products": "GEMM"}
    for path in CUDA.values():
        source = Path(str(import_module(path).SOURCE)).read_text()
        groups |= dict.fromkeys(re.findall(r"__global__ void(?: __launch_bounds__\(.*?\))?\s+(\w+)\(", source), "WKV")
    if find_spec("triton") is None:
        return groups
    import triton

    for piece, path in PIECES.items():
        group = "WKV" if piece in BACKENDS else special.get(piece, "fused")
        for value in vars(import_module(path)).values():
            if isinstance(value, triton.runtime.JITFunction):
                groups[value.fn.__name__] = group
    return groups


def group_of(kernel: str, ours: dict[str, str]) -> str:
    if kernel in ours:
        return ours[kernel]
    low = kernel.lower()
    if any(word in low for word in ("gemm", "nvjet", "cutlass", "xmma", "splitk", "addmm", "aten::mm", "aten::bmm")):
        return "GEMM"
    if any(word in low for word in ("adam", "_update", "multi_tensor", "foreach", "lpnorm")):
        return "optimiser"
    return "other"


def breakdown(step: Callable[[], object], device: str, n_kernels: int) -> dict[str, Any]:
    """Milliseconds by group in one step, the largest kernels of the group "other", and of all, with their calls."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as prof:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    ours, groups, other = (
        kernel_groups(),
        dict.fromkeys(("GEMM", "WKV", "fused", "loss", "optimiser", "other"), 0.0),
        {},
    )
    kernels: dict[str, tuple[float, int]] = {}
    for event in prof.key_averages():
        if device == "cuda" and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        if event.key.startswith("Optimizer."):  # a range around kernels that are counted themselves
            continue
        ms = (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e3
        group = group_of(event.key, ours)
        groups[group] += ms
        kernels[event.key[:80]] = ms, event.count
        if group == "other":
            other[event.key[:80]] = ms
    largest = dict(sorted(other.items(), key=lambda item: -item[1])[:8])
    top = dict(sorted(kernels.items(), key=lambda item: -item[1][0])[:n_kernels])
    result: dict[str, Any] = {"groups_ms": groups, "other_ms": largest}
    if n_kernels:
        result["kernels_ms"] = {kernel: ms for kernel, (ms, _) in top.items()}
        result["kernel_calls"] = {kernel: calls for kernel, (_, calls) in top.items()}
    return result


def measure(name: str, sizes: tuple[str, int, int], batch: int, t: int, options: argparse.Namespace) -> dict[str, Any]:
    device, vocab = options.device, options.vocab
    result: dict[str, Any] = {}
    for precision in options.precision:
        model = build(sizes, vocab, torch.float32, device)
        model.recompute = None if options.recompute == "auto" else options.recompute == "on"
        tokens = torch.randint(vocab, (batch, t + 1), device=device)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        optimizer = optimizer_of(model, precision == "master")
        step = Step(model, optimizer, inputs, targets, precision == "autocast", options.backend)
        del optimizer
        first = float(step())
        timed(step, device, 2)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            if options.memory:
                step()
                model.spare.limit = max(0, int(options.memory * 1e9) - torch.cuda.max_memory_allocated())
                step()
                torch.cuda.reset_peak_memory_stats()
        cell: dict[str, Any] = {"first_loss": first}
        cell["eager"] = report(model, timed(step, device, options.rounds), batch * t)
        cell["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
        cell |= breakdown(step, device, options.kernels)
        if device == "cuda" and options.graph:
            graph, loss = capture(step)
            cell["graph"] = report(model, timed(graph.replay, device, options.rounds), batch * t)
            cell["graph"]["last_loss"] = float(loss)
            del graph
        result[precision] = cell
        line(f"{name} {batch}×{t} {precision}", cell)
        del step, model
        if device == "cuda":
            torch.cuda.empty_cache()
    return result


def capture(step: Step) -> tuple["torch.cuda.CUDAGraph", Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph, loss


def report(model: RWKV, seconds: list[float], tokens: int) -> Row:
    median = statistics.median(seconds)
    flops = 6 * sum(matrix_elements(model)) * tokens
    return {"ms": median * 1e3, "tokens_per_s": tokens / median, "MFU": flops / median / PEAK_FLOPS}


def line(name: str, cell: dict[str, Any]) -> None:
    for way in ("eager", "graph"):
        if way in cell:
            row = cell[way]
            print(
                f"{name + ' ' + way:34}{row['ms']:9.1f} ms {row['tokens_per_s'] / 1e3:9.1f} k tokens/s  "
                f"MFU {row['MFU']:5.1%}  peak {cell['peak_GB']:5.1f} GB"
            )
    print("   ", "  ".join(f"{group} {ms:.1f}" for group, ms in cell["groups_ms"].items()), "ms")
    for kernel, ms in cell["other_ms"].items():
        print(f"      {ms:8.2f} ms  {kernel}", flush=True)
    if "kernels_ms" in cell:
        print(f"    the {len(cell['kernels_ms'])} largest of all:")
    for kernel, ms in cell.get("kernels_ms", {}).items():
        print(f"      {ms:8.2f} ms {cell['kernel_calls'][kernel]:6} calls  {kernel}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *TOY])
    parser.add_argument("--precision", nargs="+", default=["master", "autocast"], choices=["master", "autocast"])
    parser.add_argument("--shapes", nargs="+", help="batch x tokens, like 8x4096")
    parser.add_argument("--recompute", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--memory", type=float, default=0, help="GB that a step may take, as run.memory")
    parser.add_argument("--backend", help="of the operators (auto)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-graph", dest="graph", action="store_false")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="list the N largest, say 25")
    parser.add_argument("--toy", action="store_true", help="two layers of 64 channels, 2 x 48 tokens, 512 ids")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.backend = options.backend or "auto"
    options.vocab = 512 if options.toy else VOCAB
    if options.device == "cpu" and not options.toy:
        sys.exit("no GPU here; --toy runs the same at toy size")
    known = TOY if options.toy else MODELS
    shapes = [(2, 48)] if options.toy else SHAPES
    if options.shapes:
        shapes = [(int(b), int(t)) for b, t in (shape.split("x") for shape in options.shapes)]
    torch.manual_seed(0)
    about: dict[str, Any] = {**machine("triton"), "gpu": None}
    if options.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    results: dict[str, Any] = {}
    for name in options.models or known:
        version = known[name][0]
        difference = check(version, options.device, options.backend)
        print(f"RWKV-{version} against float32 on the CPU: " + ", ".join(f"{k} {v:.1e}" for k, v in difference.items()))
        results[name] = {"difference": difference}
        for batch, t in shapes:
            results[name][f"{batch}x{t}"] = measure(name, known[name], batch, t, options)
    record = {"bench": "train_step", "machine": about, "vocab": options.vocab, "recompute": options.recompute,
              "memory": options.memory, "backend": options.backend}  # fmt: skip
    text = json.dumps(nested(record | {"results": results}))
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


def nested(value: Any) -> Any:
    return {k: nested(v) for k, v in value.items()} if isinstance(value, dict) else rounded(value)


if __name__ == "__main__":
    main()
