"""Decoding and prefill of `GpuModel` on random weights of the official shapes: tokens/s, and the fraction of the roof.

    python bench/engine_gpu.py [--models 1.5B …] [--batches 1 8 …] [--no-prefill] [--out FILE]

Refuses to report when logits differ from the model's in float32 by more than a bound and than plain torch's in float16
do. The roof of decoding is the time that the weights and the states take at this card's measured copy speed; a step is
one CUDA graph, drawing with top_p included. Ends in one JSON line.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from receptance.engine.gpu.gemv import Matrix
from receptance.engine.gpu.model import GEMV_ROWS, GpuModel
from receptance.engine.gpu.sampler import GpuSampler
from receptance.engine.gpu.stepper import Stepper
from receptance.engine.params import SamplingParams
from receptance.models import RWKV, RWKV4, RWKV6, RWKV7

SHAPES = {"0.1B": (12, 768), "0.4B": (24, 1024), "1.5B": (24, 2048), "2.9B": (32, 2560), "7.2B": (32, 4096)}
VERSIONS = {"v4": RWKV4, "v6": RWKV6, "v7": RWKV7}
VOCAB = 65536
WORST, WORST_8_BITS = 2.5e-3, 0.15  # relative error of logits


def random_model(name: str) -> RWKV:
    """float32 on the GPU, every matrix of norm about 1."""
    shape, _, version = name.partition("-")
    kind = VERSIONS[version or "v7"]
    with torch.device("meta"):
        model = kind(kind.Config.make(VOCAB, *SHAPES[shape]), device="meta")
    model = model.to_empty(device="cuda").requires_grad_(False)
    g = torch.Generator("cuda").manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.dim() == 1:
            p.fill_(1.0)
        elif name.endswith("bias"):
            p.zero_()
        elif p.dim() == 2 and "r_k" not in name:
            p.normal_(0, (p.shape[0] if name[-2:] in ("1", "2") else p.shape[1]) ** -0.5, generator=g)
        elif name.endswith("_maa_w2"):  # a map, as small as the recipe makes it: larger ones make a chaotic model
            p.uniform_(-0.01, 0.01, generator=g)
        elif "time_decay" in name and p.dim() != 2:  # as slow as a model's, so that states and their norms are not tiny
            p.uniform_(-6, -1, generator=g)
        elif any(x in name for x in (".x_", "_maa_", "_mix_")):
            p.uniform_(0, 1, generator=g)
        else:
            p.normal_(0, 0.3, generator=g)
        p.copy_(p.half())  # the rounding of weights is not what is measured
    return model


def copy_speed() -> float:
    """Bytes read and written per second by a copy of 4 GB."""
    x = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    seconds = time_of(lambda: y.copy_(x), 5)
    return 2 * x.numel() / seconds


def time_of(function, repeats: int) -> float:
    """Median seconds of a call."""
    function()
    times = []
    for _ in range(repeats):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        function()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) / 1e3)
    return statistics.median(times)


def logit_error(model: RWKV, fast: GpuModel, batch: int = 5, steps: int = 4) -> float:
    g = torch.Generator("cuda").manual_seed(1)
    tokens = torch.randint(VOCAB, (batch, 16 + steps), device="cuda", generator=g)
    worst = 0.0
    state = None
    for i in range(batch):
        fast.reset(i)
    slots = torch.arange(batch, dtype=torch.int32, device="cuda")
    for i in range(-1, steps):
        part = tokens[:, :16] if i < 0 else tokens[:, 16 + i : 17 + i]
        expected, state = model.forward(part, state, last_only=True, backend="naive")
        if i < 0:
            got = fast.prefill(part.reshape(-1), list(range(0, 16 * batch + 1, 16)), list(range(batch)))
        else:
            got = fast.decode(part[:, 0].contiguous(), slots)
        worst = max(worst, float((got.float() - expected).norm() / expected.norm()))
    return worst


def plain_error(model: RWKV) -> float:
    """What rounding to float16 makes of these weights in plain torch."""
    tokens = torch.randint(VOCAB, (5, 20), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    expected, _ = model.forward(tokens, last_only=True, backend="naive")
    got, _ = copy.deepcopy(model).half().forward(tokens, last_only=True, backend="naive")
    return float((got.float() - expected).norm() / expected.norm())


def step_bytes(fast: GpuModel, batch: int) -> int:
    """Weights once, states in and out."""
    copies = "second_halves", "decay_second"  # of what is counted, in another order
    items = [z for y in fast.layers for z in vars(y.time.own).items()]
    own = [x for name, x in items if isinstance(x, torch.Tensor) and name not in copies]
    matrices = [x for y in fast.layers for x in (y.time.inputs, y.time.output, y.channel, y.value)] + [fast.head]
    matrices += [x for y in fast.layers for x in vars(y.time.own).values() if isinstance(x, Matrix)]
    if fast.weights != "full" and batch <= GEMV_ROWS:
        unread = {x.full.untyped_storage().data_ptr() for x in matrices}
        own = [x for x in own if x.untyped_storage().data_ptr() not in unread]
        used = [x for y in matrices for x in (y.numbers, y.scales)]
    else:
        used = [y.full for y in matrices]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in [*used, *own]}
    weights = sum(storages.values())  # views of one storage count once
    return weights + 2 * batch * sum(x[:, 0].nbytes for x in fast.state.values())


def profile(function, rows: int) -> None:
    with torch.profiler.profile() as p:
        function()
        torch.cuda.synchronize()
    total = {}
    for event in p.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            n, us = total.get(event.name, (0, 0.0))
            total[event.name] = n + 1, us + event.device_time_total
    for name, (n, us) in sorted(total.items(), key=lambda x: -x[1][1])[:rows]:
        print(f"    {us:9.1f} us {n:4d} x {us / n:8.2f}  {name[:70]}", flush=True)


def decoding(fast: GpuModel, batch: int, speed: float, details: bool) -> dict[str, float]:
    sampler = GpuSampler(VOCAB, 0, lambda: np.ones(VOCAB, np.float32), fast.device)
    stepper, rows = Stepper(fast, sampler), list(range(batch))
    for row in rows:
        sampler.admit(row, SamplingParams(top_p=0.8), [])
    stepper.step(rows, rows, sampler.entries(rows, [0.5] * batch, None)[0])
    uniforms = torch.rand(batch, dtype=torch.float64, device="cuda")
    seconds = time_of(lambda: stepper.again(uniforms), 20)
    if details:
        profile(lambda: stepper.again(uniforms), 12)
    floor = step_bytes(fast, batch) / speed
    return {"ms": round(seconds * 1e3, 4), "tok_s": round(batch / seconds), "fraction": round(floor / seconds, 3)}


def prefilling(fast: GpuModel, n: int, t: int, details: bool) -> dict[str, float]:
    tokens = torch.randint(VOCAB, (n * t,), device="cuda")
    starts, slots = list(range(0, n * t + 1, t)), list(range(n))
    for i in slots:
        fast.reset(i)
    seconds = time_of(lambda: fast.prefill(tokens, starts, slots), 5)
    if details:
        profile(lambda: fast.prefill(tokens, starts, slots), 14)
    return {"ms": round(seconds * 1e3, 3), "tok_s": round(n * t / seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), help="a size, or size-version: 1.5B-v6")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256, 1024])
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--profile", action="store_true", help="the longest kernels of each case")
    parser.add_argument("--weights", default="full", help="full, int8 or float8: the matrices of a step of few rows")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    speed = copy_speed()
    report: dict = {"device": torch.cuda.get_device_name(), "copy_tb_s": round(speed / 1e12, 2), "models": {}}
    for name in args.models:
        batches = [x for x in args.batches if x <= (256 if name == "7.2B" else 1024)]
        with torch.inference_mode():
            model = random_model(name)
            fast = GpuModel(model, slots=max(16, *batches), most_rows=max(16, *batches), weights=args.weights)
            error = logit_error(model, fast)
            plain = plain_error(model) if error >= WORST else 0.0
        if not error < (WORST_8_BITS if args.weights != "full" else max(WORST, plain)):
            raise SystemExit(
                f"{name}: logits differ by {error:.1e} from float32, plain torch's by {plain:.1e}; no figures"
            )
        del model
        torch.cuda.empty_cache()
        errors = {"logit_error": round(error, 6), "plain_error": round(plain, 6)}
        rows = report["models"][name] = {**errors, "decode": {}, "prefill": {}}
        print(name, f"logit error {error:.2e} (plain torch {plain:.1e})", flush=True)
        for batch in batches:
            rows["decode"][batch] = decoding(fast, batch, speed, args.profile)
            print(name, batch, rows["decode"][batch], flush=True)
        if max(batches) >= 256 and "-" not in name and args.weights == "full":
            fast = None
            with torch.inference_mode():
                model = random_model(name)
                fast = GpuModel(model, slots=max(batches), most_rows=max(batches), state_dtype=torch.float16)
                rows["logit_error_half_state"] = round(logit_error(model, fast, 3, 64), 6)
            del model
            for batch in [x for x in batches if x >= 64]:
                rows["decode"][f"{batch}, half state"] = decoding(fast, batch, speed, False)
                print(name, batch, "half state", rows["decode"][f"{batch}, half state"], flush=True)
        for n, t in [] if args.no_prefill else [(1, 1024), (1, 4096), (8, 1024)]:
            rows["prefill"][f"{n}x{t}"] = prefilling(fast, n, t, args.profile)
            print(name, f"{n}x{t}", rows["prefill"][f"{n}x{t}"], flush=True)
        del fast
        torch.cuda.empty_cache()
    line = json.dumps(report)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
