"""The CPU engine beside other people's packages in float32: `rwkv` for every version, transformers for RWKV-4.

Random weights of the 0.1B shape (12 layers of 768). First all logits are compared, and no speed is reported when they
differ. Engines take turns; the best of all rounds counts. One thread: processor time; more: wall time.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import installed, lively_model, load, machine, rounded
from rwkv_package import Package

import receptance as rc
from receptance.checkpoint.save import save
from receptance.models import RWKV

LAYERS, WIDTH, DECODE = 12, 768, 16
VOCAB = {"4": 50277}  # the others: 65,536
AGREE = 1e-3  # largest difference of logits, relative to the largest


class Native:
    def __init__(self, path: Path, threads: int, dtype: str | None = None):
        self.model = rc.load(path, dtype=dtype, engine="native", threads=threads)

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.asarray(self.model.forward(ids)[0])

    def seconds(self, ids: list[int], clock: Callable[[], float]) -> dict[str, float]:
        state: Any = None

        def prefill() -> None:
            nonlocal state
            state = self.model.forward(ids, last_only=True)[1]

        def decode() -> None:
            nonlocal state
            for token in ids[:DECODE]:
                state = self.model.forward([token], state, last_only=True)[1]

        return {"prefill": taken(prefill, clock), "decode": taken(decode, clock)}


class Transformers:
    def __init__(self, folder: Path):
        from transformers import RwkvConfig, RwkvForCausalLM

        config = RwkvConfig.from_pretrained(folder, rescale_every=0)
        self.model = RwkvForCausalLM.from_pretrained(folder, config=config).eval()

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> np.ndarray:
        return np.asarray(self.model(torch.tensor([ids])).logits[0].numpy())

    @torch.inference_mode()
    def seconds(self, ids: list[int], clock: Callable[[], float]) -> dict[str, float]:
        state: Any = None

        def prefill() -> None:
            nonlocal state
            state = self.model(torch.tensor([ids]), use_cache=True).state

        def decode() -> None:
            nonlocal state
            for token in ids[:DECODE]:
                state = self.model(torch.tensor([[token]]), state=state, use_cache=True).state

        return {"prefill": taken(prefill, clock), "decode": taken(decode, clock)}


class TheirPackage:
    def __init__(self, path: Path, version: str, threads: int):
        self.package = Package(path, version, threads)

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.asarray(self.package.logits(ids).numpy())

    def seconds(self, ids: list[int], _clock: Callable[[], float]) -> dict[str, float]:
        phases = self.package.time_phases(ids, DECODE)
        return {name: phases[name].seconds for name in ("prefill", "decode")}


def taken(call: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def beside(version: str, threads: int, rounds: int, prompt: int, dtypes: list[str]) -> dict[str, dict[str, float]]:
    """Tokens/s of each engine; of ours in the weights' own type, float32, and in `dtypes`, with what those change."""
    clock = time.process_time if threads == 1 else time.perf_counter
    model: RWKV = lively_model(version, VOCAB.get(version, 65536), LAYERS, WIDTH)
    ids = list(range(5, 5 + prompt))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        save(model, path)
        engines: dict[str, Native | Transformers | TheirPackage] = {"receptance": Native(path, threads)}
        if Package.available():
            engines["rwkv"] = TheirPackage(path, version, threads)
        if version == "4":
            save(model, Path(folder) / "hf", format="hf")
            engines["transformers"] = Transformers(Path(folder) / "hf")
        engines |= {f"receptance {dtype}": Native(path, threads, dtype) for dtype in dtypes}
        expected = engines["receptance"].logits(ids[:32])
        differences: dict[str, float] = {}
        for name, engine in engines.items():
            difference = float(np.abs(engine.logits(ids[:32]) - expected).max() / np.abs(expected).max())
            differences[name] = difference
            if not difference <= AGREE and name.removeprefix("receptance ") not in dtypes:
                raise SystemExit(f"RWKV-{version}: logits of {name} differ by {difference:.1e}; no speed is reported")
        best: dict[str, dict[str, float]] = {name: {} for name in engines}
        for _ in range(rounds):
            for name, engine in engines.items():
                for work, seconds in engine.seconds(ids, clock).items():
                    rate = (prompt if work == "prefill" else DECODE) / seconds
                    best[name][work] = max(best[name].get(work, 0), rate)
        if isinstance(their := engines.get("rwkv"), TheirPackage):
            their.package.__exit__(None, None, None)
    for name, row in best.items():
        row["difference"] = differences[name]
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--versions", nargs="+", default=["4", "5.2", "6", "7"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--dtypes", nargs="*", default=[], help="ours in these types too: float16 int8 int4")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    packages = {name: installed(name) for name in ("rwkv", "transformers", "torch")}
    result: dict[str, object] = {"bench": "native_peers", "machine": machine(), "packages": packages, "load": load()}
    tables = {}
    for version in options.versions:
        tables[version] = beside(version, options.threads, options.rounds, options.prompt, options.dtypes)
        ours = tables[version]["receptance"]
        for name, row in tables[version].items():
            to = ", ".join(f"{work} {row[work]:.1f} ({ours[work] / row[work]:.2f} x)" for work in ("prefill", "decode"))
            print(f"RWKV-{version} {name:20} {to}, logits {row['difference']:.0e} off", flush=True)
    result |= {"threads": options.threads, "prompt": options.prompt, "tokens_per_s": tables}
    text = json.dumps(rounded(result))
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
