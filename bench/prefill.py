"""Prefill against token-by-token decoding on the CPU in float32, beside the `rwkv` package on the same weights.

`python bench/prefill.py [--versions 4 5.2 6 7] [--out FILE]` measures models of the 0.1B shape and ends in one line of
JSON. Logits must agree first, prefill with decoding and ours with the package's, or there is no report.
docs/benchmarks.md has the protocol.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import Peaks, Row, Sample, lively_model, load, machine, matrix_elements, n_calm, rounded, undisturbed
from rwkv_package import PHASES, Package, time_phases
from torch import Tensor

import receptance
from receptance.models import RWKV

VOCAB, LAYERS, WIDTH = 65_536, 12, 768
TOLERANCE = 1e-3  # absolute, of logits whose standard deviation is about 1
TARGET = 8.0


class Ours:
    """The calls that generation makes."""

    def __init__(self, model: RWKV):
        self.model = model

    @torch.inference_mode()
    def forward(self, tokens: list[int], state: Any, everything: bool) -> tuple[Tensor, Any]:
        return self.model.forward(torch.tensor([tokens]), state, last_only=not everything)

    def logits(self, tokens: list[int]) -> Tensor:
        return self.forward(tokens, None, True)[0][0]  # [T, V]

    def decoded(self, tokens: list[int]) -> Tensor:
        """The same token by token."""
        state, rows = None, []
        for token in tokens:
            row, state = self.forward([token], state, False)
            rows.append(row[0])
        return torch.stack(rows)

    def time_phases(self, tokens: list[int], n_decode: int) -> dict[str, Sample]:
        return time_phases(self.forward, tokens, n_decode)


def check(name: str, found: Tensor, expected: Tensor) -> float:
    """The largest difference; no report when it is too large."""
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE:  # also when it is not a number
        sys.exit(f"{name}: logits differ by {difference:.1e}, more than {TOLERANCE:.0e}; no report")
    return difference


def check_alive(logits: Tensor, tokens: list[int], other: Tensor) -> float:
    """The logits' standard deviation; no report when they are flat or forget the context (`other`: another one)."""
    if not 0.2 < (spread := float(logits.std())) < 5 or float((logits[-1] - other[-1]).abs().max()) < 0.01 * spread:
        sys.exit(f"the model is degenerate (logits vary by {spread:.2g} over {len(tokens)} tokens); no report")
    return spread


def measure(version: str, options: argparse.Namespace, folder: Path, peaks: Peaks) -> dict[str, Any]:
    """One version: how far logits differ, the speeds of each phase, what each has to read and compute."""
    path = folder / "model.pth"
    receptance.save(lively_model(version, VOCAB, LAYERS, WIDTH), path)
    ours = Ours(receptance.load(path))
    tokens = torch.randint(VOCAB, (options.tokens,), generator=torch.Generator().manual_seed(2)).tolist()

    logits = ours.logits(tokens)
    spread = check_alive(logits, tokens, ours.logits([*tokens[-16:-1], 0, tokens[-1]]))
    n = min(32, len(tokens))
    result: dict[str, Any] = {
        "logit_std": spread,
        "difference_decode": check("decode", ours.decoded(tokens[:n]), logits[:n]),
    }
    with contextlib.ExitStack() as stack:
        runners: dict[str, Ours | Package] = {"ours": ours}
        if Package.available():
            package = stack.enter_context(Package(path, version, torch.get_num_threads()))
            result["difference_rwkv"] = check("the rwkv package", logits, package.logits(tokens))
            runners["rwkv"] = package
        samples: dict[str, dict[str, list[Sample]]] = {who: {phase: [] for phase in PHASES} for who in runners}
        deadline = 0.0
        for i in range(1000):
            peaks.look()
            for who, runner in runners.items():  # taking turns, so that both meet the same machine
                for phase, sample in runner.time_phases(tokens, options.decode).items():
                    samples[who][phase] += [sample] if i else []  # the first round warms up
            enough = min(n_calm(x) for phases in samples.values() for x in phases.values()) >= options.rounds
            if i > 1 and (enough or time.monotonic() > deadline):
                break
            deadline = deadline or time.monotonic() + options.seconds
    counts = {"prefill": len(tokens), "prefill_all": len(tokens), "decode": min(options.decode, len(tokens))}
    result |= {who: summary(phases, counts) for who, phases in samples.items()}
    blocks, head = matrix_elements(ours.model)
    weight_bytes = sum(p.nbytes for p in ours.model.parameters()) - ours.model.emb.weight.nbytes
    return result | {"block_elements": blocks, "head_elements": head, "weight_bytes": weight_bytes}


def summary(samples: dict[str, list[Sample]], counts: dict[str, int]) -> dict[str, Row]:
    """Tokens/s of each phase and decode over prefill, by medians and by minima; how many samples were undisturbed."""
    out: dict[str, Row] = {}
    for name, of in (("median", statistics.median), ("best", min)):
        time = {phase: of(undisturbed(samples[phase])) / counts[phase] for phase in PHASES}
        ratios = {"ratio": time["decode"] / time["prefill"], "ratio_all": time["decode"] / time["prefill_all"]}
        out[name] = {phase: 1 / time[phase] for phase in PHASES} | ratios
    calm = {phase: float(n_calm(samples[phase])) for phase in PHASES}
    return out | {"samples": calm | {"taken": float(len(samples["decode"]))}}


def verdict(ours: dict[str, Row]) -> str:
    if min(ours["samples"].values()) < 2:
        return "undecided: others kept the machine busy"
    return "met" if min(ours[of]["ratio"] for of in ("median", "best")) >= TARGET else "missed"


def limits(result: dict[str, Any], n_tokens: int, peaks: Peaks) -> Row:
    """Tokens/s that the machine allows, and the fraction our best round reaches.

    Decode: every weight (of the embedding one row) is read once. Prefill: the products of the weight matrices.
    """
    blocks, head = result["block_elements"], result["head_elements"]
    allowed = {
        "prefill": peaks.flops_per_s / (2 * (blocks + head / n_tokens)),
        "prefill_all": peaks.flops_per_s / (2 * (blocks + head)),
        "decode": peaks.bytes_per_s / result["weight_bytes"],
    }
    best = result["ours"]["best"]
    return allowed | {f"{phase}_fraction": best[phase] / allowed[phase] for phase in PHASES}


def table(results: dict[str, dict[str, Any]]) -> None:
    print(f"{'tokens/s':24}{'prefill':>10}{'all logits':>12}{'decode':>10}{'ratio':>9}{'all':>8}")
    for version, result in results.items():

        def line(label: str, row: Row, form: str, suffix: str = "", end: str = "") -> None:
            cells = [f"{row[phase + suffix]:{form}}" for phase in PHASES]
            print(f"RWKV-{version:4} {label:14}{cells[0]:>10}{cells[1]:>12}{cells[2]:>10}{end}")  # noqa: B023

        whos = [who for who in ("ours", "rwkv") if who in result]
        for who in whos:
            for of in ("median", "best"):
                row = result[who][of]
                line(f"{who} {of}", row, ".1f", end=f"{row['ratio']:8.1f}x{row['ratio_all']:7.1f}x")
            counts = result[who]["samples"]
            line(f"{who} calm", counts, ".0f", end=f"   rounds of {counts['taken']:.0f}")
        line("limit", result["limits"], ".1f")
        line("ours reaches", result["limits"], ".0%", "_fraction")
        peer = f", to the rwkv package {result['difference_rwkv']:.1e}" if "rwkv" in whos else ""
        print(f"RWKV-{version:4} largest logit difference: to decoding {result['difference_decode']:.1e}{peer}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--versions", nargs="+", default=["4", "7"], choices=["4", "5.0", "5.1", "5.2", "6", "7"])
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt")
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded in each round")
    parser.add_argument("--rounds", type=int, default=5, help="undisturbed rounds wanted")
    parser.add_argument("--seconds", type=float, default=60, help="a version's rounds end at the latest then")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about: dict[str, object] = {**machine("rwkv"), "load_before": load()}
    peaks = Peaks()
    results = {}
    for version in options.versions:
        with tempfile.TemporaryDirectory() as folder:
            results[version] = measure(version, options, Path(folder), peaks)
    for result in results.values():
        result["limits"] = limits(result, options.tokens, peaks)
    about |= {"load_after": load(), "flops_per_s": peaks.flops_per_s, "bytes_per_s": peaks.bytes_per_s}
    table(results)
    print(f"best float32 product {peaks.flops_per_s / 1e9:.0f} GFLOP/s, best read {peaks.bytes_per_s / 1e9:.1f} GB/s")
    met = {version: verdict(result["ours"]) for version, result in results.items()}
    print(f"target: prefill at least {TARGET:.0f}x decode, per token: {met}")
    shape = {"layers": LAYERS, "width": WIDTH, "vocab": VOCAB, "dtype": "float32"}
    protocol = {"tokens": options.tokens, "decode": options.decode}
    line = {"bench": "prefill", "unit": "tokens/s", "machine": about, "shape": shape, "protocol": protocol}
    text = json.dumps(rounded({**line, "target_ratio": TARGET, "target": met, "results": results}))
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
