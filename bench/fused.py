"""The fused pieces on a GPU: accuracy against float64 first, then time against the byte floor and the plain forms.

    PYTHONPATH=src python bench/fused.py [PIECE ...] [--out FILE]

8 × 4,096 tokens, 1,024 channels in heads of 64, bfloat16. Each time is the median of CUDA-event times; the floor counts
every input read once and every output and gradient written once, at the copy bandwidth measured in the same run. The
loss is held against its three matrix products alone. A table, then one line of JSON. --toy: accuracy alone, with
TRITON_INTERPRET=1 on any machine.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from receptance.ops.ffn import relu_square, sigmoid_gate
from receptance.ops.ffn import triton as ffn_kernels
from receptance.ops.head_loss import head_loss
from receptance.ops.heads import norm_and_gate
from receptance.ops.heads import triton as heads_kernels
from receptance.ops.norm import add_norm, layer_norm
from receptance.ops.norm import triton as norm_kernels
from receptance.ops.prepare import decay_and_keys, keys_and_bonus, value_residual
from receptance.ops.prepare import triton as prepare_kernels
from receptance.ops.shift import norm_mix, shift_mix
from receptance.ops.shift import triton as shift_kernels

BATCH, TOKENS, WIDTH, HEAD, VOCAB = 8, 4096, 1024, 64, 65_536
MAX_ERROR = 5e-3  # relative L2 of every output and gradient on bfloat16 inputs; rounding alone costs 1.7e-3
EPS = 1e-5
Function = Callable[..., Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Piece:
    """kernel and plain form on the same tensors; shapes in letters; tensors of B·T·C touched forward and backward."""

    kernel: Function
    plain: Function
    shapes: str
    forward: float
    backward: float


def gate(function: Function) -> Function:
    return lambda y, weight, bias, g, *bonus: function(y, weight, bias, EPS, g, "plain", bonus)


def mix(function: Function) -> Function:
    return lambda x, last, *mixes: function(x, last, mixes)


def norm_mixes(function: Function, adds: bool) -> Function:
    """With a residual addition, the last tensor is what is added."""

    def call(x: Tensor, weight: Tensor, bias: Tensor, last: Tensor, *mixes: Tensor) -> list[Tensor]:
        delta, mixes = (mixes[-1], mixes[:-1]) if adds else (None, mixes)
        total, end, mixed = function(x, delta, weight, bias, EPS, last, mixes)
        return [total, end, *mixed] if adds else [end, *mixed]

    return call


def plain(function: Function) -> Function:
    """The plain form: it goes with the operators' any-device back ends."""
    return partial(function, backend="chunk")


# btc: [B, T, C]; bthn: [B, T, H, N]; btf: [B, T, 4C]; bc: [B, C]; c: [C]; hn: [H, N]; bth: [B, T, H]
PIECES = {
    "shift_mix 6": Piece(mix(shift_kernels.shift_mix), mix(plain(shift_mix)), "btc bc c c c c c c", 7, 8),
    "shift_mix 1": Piece(mix(shift_kernels.shift_mix), mix(plain(shift_mix)), "btc bc c", 2, 3),
    "norm_mix 6": Piece(
        norm_mixes(shift_kernels.norm_mix, False), norm_mixes(plain(norm_mix), False), "btc c c bc c c c c c c", 7, 8
    ),
    "add_norm_mix 1": Piece(
        norm_mixes(shift_kernels.norm_mix, True), norm_mixes(plain(norm_mix), True), "btc c c bc c btc", 4, 4
    ),
    "decay_and_keys": Piece(prepare_kernels.decay_and_keys, plain(decay_and_keys), "btc bthn btc c c c c", 7, 10),
    "keys_and_bonus": Piece(
        prepare_kernels.keys_and_bonus, plain(keys_and_bonus), "btc bthn btc bthn c c c c hn", 8, 13
    ),
    "value_residual": Piece(prepare_kernels.value_residual, plain(value_residual), "btc btc btc c", 4, 7),
    "norm_and_gate": Piece(
        gate(heads_kernels.norm_and_gate), gate(plain(norm_and_gate)), "bthn c c btc bth bthn", 4, 7
    ),
    "layer_norm": Piece(
        partial(norm_kernels.layer_norm, eps=EPS), plain(partial(layer_norm, eps=EPS)), "btc c c", 2, 3
    ),
    "add_norm": Piece(partial(norm_kernels.add_norm, eps=EPS), plain(partial(add_norm, eps=EPS)), "btc btc c c", 4, 4),
    "relu_square": Piece(ffn_kernels.relu_square, plain(relu_square), "btf", 8, 12),
    "sigmoid_gate": Piece(ffn_kernels.sigmoid_gate, plain(sigmoid_gate), "btc btc", 3, 5),
}


def draw(shapes: str, batch: int, t: int, c: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    sizes = {
        "btc": (batch, t, c), "bthn": (batch, t, c // HEAD, HEAD), "btf": (batch, t, 4 * c), "bc": (batch, c),
        "c": (c,), "hn": (c // HEAD, HEAD), "bth": (batch, t, c // HEAD),
    }  # fmt: skip
    g = torch.Generator(device).manual_seed(0)
    return [torch.randn(sizes[name], generator=g, device=device).to(dtype) for name in shapes.split()]


def outputs(function: Function, leaves: Sequence[Tensor]) -> list[Tensor]:
    out = function(*leaves)
    return [out] if isinstance(out, Tensor) else list(out)


def worst_error(piece: Piece, device: str, dtype: torch.dtype) -> float:
    """Relative L2 error of the kernels against the plain form in float64, over outputs and gradients."""
    found = []
    for function, exact in ((piece.kernel, False), (piece.plain, True)):
        inputs = draw(piece.shapes, 2, 300, 2 * HEAD, dtype, device)
        leaves = [(x.double() if exact else x).requires_grad_() for x in inputs]
        outs = outputs(function, leaves)
        g = torch.Generator(device).manual_seed(1)
        weights = [torch.randn(x.shape, generator=g, device=device).to(dtype).to(x.dtype) for x in outs]
        found.append([*outs, *torch.autograd.grad(outs, leaves, weights)])
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(*found))


def median_ms(function: Callable[[], object], rounds: int = 30) -> float:
    times = []
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")  # larger than the second-level cache
    for i in range(rounds + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end)] if i >= 5 else []
    return statistics.median(times)


def times(function: Function, leaves: list[Tensor]) -> tuple[float, float]:
    """Milliseconds forward, backward."""
    with torch.no_grad():
        forward = median_ms(lambda: function(*leaves))
    outs = outputs(function, leaves)
    grads = [torch.randn_like(x) for x in outs]
    return forward, median_ms(lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True))


def copy_bandwidth() -> float:
    """Bytes read plus written per second by a 2 GiB device copy."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) * 1e3


def measure(name: str, bandwidth: float) -> dict[str, float]:
    piece = PIECES[name]
    leaves = [x.requires_grad_() for x in draw(piece.shapes, BATCH, TOKENS, WIDTH, torch.bfloat16, "cuda")]
    forward, backward = times(piece.kernel, leaves)
    plain_forward, plain_backward = times(piece.plain, leaves)
    unit = BATCH * TOKENS * WIDTH * 2 / bandwidth * 1e3
    return {
        "forward_ms": forward, "forward_floor_ms": piece.forward * unit, "forward_plain_ms": plain_forward,
        "backward_ms": backward, "backward_floor_ms": piece.backward * unit, "backward_plain_ms": plain_backward,
    }  # fmt: skip


def loss(device: str) -> dict[str, float]:
    """Head and loss, forward and backward at once, against its three products alone."""
    n = BATCH * TOKENS
    x = torch.randn(n, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(VOCAB, WIDTH, device=device) * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(VOCAB, (n,), device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = lambda: torch.autograd.grad(head_loss(x, weight, targets, 1e-4), [x, weight])
    both = median_ms(step, 10)
    extra = torch.cuda.max_memory_allocated() - before
    rows = x.detach()[:8192]
    logits = rows @ weight.detach().T
    products = lambda: (rows @ weight.detach().T, logits @ weight.detach(), logits.T @ rows)
    return {"both_ms": both, "products_ms": median_ms(products, 10) * n / 8192, "extra_GB": extra / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("pieces", nargs="*", default=[*PIECES, "head_loss"])
    parser.add_argument("--toy", action="store_true", help="accuracy alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        sys.exit("no GPU here; --toy checks the accuracy alone")
    dtype = torch.bfloat16 if device == "cuda" else torch.float16  # the interpreter truncates to bfloat16
    bandwidth = 0.0 if options.toy else copy_bandwidth()
    result: dict[str, Any] = {
        "bench": "fused", "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None, "python": platform.python_version(),
        "shape": [BATCH, TOKENS, WIDTH], "copy_TB_per_s": bandwidth / 1e12,
    }  # fmt: skip
    for name in options.pieces:
        if name == "head_loss":
            if not options.toy:
                row = result[name] = loss(device)
                print(f"head_loss: {row['both_ms']:.2f} ms forward and backward, its products alone "
                      f"{row['products_ms']:.2f} ms; {row['extra_GB']:.2f} GB")  # fmt: skip
            continue
        error = worst_error(PIECES[name], device, dtype)
        print(f"{name}: worst relative error {error:.1e}", flush=True)
        result[name] = {"error": error}
        if not error <= MAX_ERROR:
            print(f"  not measured: above {MAX_ERROR}")
        elif not options.toy:
            row = measure(name, bandwidth)
            result[name] |= row
            for way in ("forward", "backward"):
                print(f"  {way:9}{row[way + '_ms']:8.3f} ms   floor {row[way + '_floor_ms']:.3f}   "
                      f"plain {row[way + '_plain_ms']:.3f}", flush=True)  # fmt: skip
    text = json.dumps(result)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
