"""The CPU engine beside torch: decode, prefill and batch speed for each weight type, and what quantisation costs.

First the float32 logits of both engines are compared; no speed is reported when they differ. Timings alternate
between the engines, and the best of all rounds counts. With one thread they are processor time, which other users of
the machine disturb less; with more they are wall time. `--text` measures the embedded model on held-out text.

`--gguf FILE... --llama FOLDER` runs the tools of llama.cpp in that folder (llama-bench, llama-batched-bench) and this
engine in turns on each file, in wall time: best and median of all rounds, and the ratios of both.
"""

import argparse
import json
import lzma
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import lively_model, load, machine, rounded

import receptance as rc
from receptance.models import RWKV
from receptance.native import NativeModel, read_config
from receptance.native.measure import limits

SHAPES = {"0.1b": (12, 768), "0.4b": (24, 1024), "1.5b": (24, 2048), "small": (4, 512)}
VOCAB = 65536
DTYPES = ("float32", "bfloat16", "int8", "int4")
AGREE = 1e-4  # largest difference of float32 logits, relative to the largest logit
PREFILL, BATCH = 256, 16


def native_models(model: RWKV, threads: int) -> dict[str, NativeModel]:
    weights = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    config = read_config(model.config.version, {name: x.shape for name, x in weights.items()})
    return {dtype: NativeModel(weights, config, "", dtype=dtype, threads=threads) for dtype in DTYPES}


def works(model: RWKV | NativeModel) -> dict[str, tuple[int, Callable[[], object]]]:
    """What is timed: tokens it takes in, and the call."""
    as_ids = torch.tensor if isinstance(model, RWKV) else np.array
    prompt, rows = as_ids(list(range(PREFILL))), as_ids([[i] for i in range(BATCH)])
    one, many = model.forward(prompt[:2])[1], model.forward(rows)[1]
    return {
        "decode": (1, lambda: model.forward(prompt[:1], one, last_only=True)),
        "prefill": (PREFILL, lambda: model.forward(prompt, last_only=True)),
        "batch": (BATCH, lambda: model.forward(rows, many, last_only=True)),
    }


@torch.inference_mode()
def speeds(model: RWKV, threads: int, rounds: int) -> tuple[float, dict[str, dict[str, float]]]:
    """Largest relative difference of logits; tokens/s of each engine and work."""
    natives = native_models(model, threads)
    ids = list(range(40))
    expected = model.forward(ids)[0].numpy()
    difference = float(np.abs(natives["float32"].forward(ids)[0] - expected).max() / np.abs(expected).max())
    if difference > AGREE:
        raise SystemExit(f"the engines differ by {difference:.1e} of the largest logit: no speed is reported")
    clock = time.process_time if threads == 1 else time.perf_counter
    todo = {name: works(m) for name, m in {"torch float32": model, **natives}.items()}
    best: dict[str, dict[str, float]] = {name: {} for name in todo}
    for _ in range(rounds):
        for name, calls in todo.items():
            for work, (tokens, call) in calls.items():
                for _ in range(4 if work == "decode" else 1):
                    start = clock()
                    call()
                    best[name][work] = max(best[name].get(work, 0), tokens / (clock() - start))
    return difference, best


def theirs(folder: Path, file: Path, threads: int, prompt: int, decode: int) -> dict[str, float]:
    """Tokens/s of llama.cpp, one run of each kind."""
    common = ["-m", str(file), "-t", str(threads)]
    bench = [str(folder / "llama-bench"), *common, "-p", str(prompt), "-n", str(decode), "-r", "1", "-o", "json"]
    found = json.loads(subprocess.run(bench, capture_output=True, check=True, text=True).stdout)
    row = {"prefill" if run["n_prompt"] else "decode": float(run["avg_ts"]) for run in found}
    together = [str(folder / "llama-batched-bench"), *common, "-npp", "1", "-ntg", "4", "-npl", str(BATCH)]
    together += ["-c", "1024", "--output-format", "jsonl"]
    lines = subprocess.run(together, capture_output=True, check=True, text=True).stdout.splitlines()
    row["batch"] = next(float(json.loads(line)["speed_tg"]) for line in lines if line.startswith("{"))
    return row


def ours(model: NativeModel, prompt: int, decode: int) -> dict[str, float]:
    """The same of this engine. The states of several sequences change in place, as there and in the batched engine."""
    ids, rows, ones = np.arange(prompt) + 5, np.arange(BATCH, dtype=np.int32), np.ones(BATCH, np.int32)
    state, pool = model.forward(ids[:2])[1], model.zero_state(BATCH)

    def rate(tokens: int, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return tokens / (time.perf_counter() - start)

    def write() -> None:
        after = state
        for i in range(decode):
            after = model.forward(ids[i : i + 1], after, last_only=True)[1]

    def write_many(steps: int = 4) -> None:
        for _ in range(steps):
            model.forward_rows(rows + 7, ones, pool, rows, rows)

    write_many(1)
    return {
        "decode": rate(decode, write),
        "prefill": rate(prompt, lambda: model.forward(ids, last_only=True)),
        "batch": rate(4 * BATCH, write_many),
    }


def beside(folder: Path, file: Path, threads: int, rounds: int, sizes: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Of each kind of work: best and median of both, and our share of the read bandwidth in decode."""
    model = rc.load(file, engine="native", threads=threads)
    assert isinstance(model, NativeModel)
    samples = [(ours(model, *sizes), theirs(folder, file, threads, *sizes)) for _ in range(rounds)]
    found: dict[str, dict[str, float]] = {}
    for work in samples[0][0]:
        row = found[work] = {}
        for name, many in (("ours", [x[work] for x, _ in samples]), ("llama.cpp", [x[work] for _, x in samples])):
            row[f"{name} best"], row[f"{name} median"] = max(many), statistics.median(many)
        for kind in ("best", "median"):
            row[f"ratio {kind}"] = row[f"ours {kind}"] / row[f"llama.cpp {kind}"]
    active = 1.0 if model.active_fraction is None else model.active_fraction
    read = limits(threads, 0.5).read
    reached = found["decode"]["ours best"] * model.bytes_per_token(active) / read
    found["decode"] |= {"bytes per token": model.bytes_per_token(active), "read": read, "reached": reached}
    found["batch"]["to one"] = found["batch"]["ours best"] / found["decode"]["ours best"]
    return found


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def held_out(path: Path, n: int) -> list[int]:
    """n + 1 ids of the embedded model's tokenizer, documents apart."""
    text = (lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()).decode()
    documents = [json.loads(line)["text"] for line in text.splitlines()] if ".jsonl" in path.name else [text]
    tok, ids = rc.tokenizer("rwkv7-stories"), []
    for document in documents:
        if len(ids) > n:
            break
        ids += [tok.eos_id, *tok.encode(document[:200_000])]
    return ids[: n + 1]


def quality(path: Path, n: int) -> dict[str, dict[str, float]]:
    """The embedded model on n held-out tokens, against its float32 logits."""
    ids = held_out(path, n)
    found: dict[str, dict[str, float]] = {}
    reference = np.empty(0)
    for dtype in ("float32", "int8", "int4"):
        model, state, parts = rc.load("rwkv7-stories", engine="native", dtype=dtype), None, []
        for start in range(0, len(ids) - 1, 1000):
            logits, state = model.forward(ids[start : min(start + 1000, len(ids) - 1)], state)
            parts.append(log_softmax(logits))
        p = np.concatenate(parts)
        row = {"nats": float(-p[np.arange(len(p)), ids[1:]].mean())}
        if dtype == "float32":
            reference = p
        else:
            row["perplexity_change"] = float(np.expm1(row["nats"] - found["float32"]["nats"]))
            row["greedy_agreement"] = float((p.argmax(-1) == reference.argmax(-1)).mean())
            row["kl"] = float((np.exp(reference) * (reference - p)).sum(-1).mean())
        found[dtype] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=[*SHAPES, "none"], default="0.1b")
    parser.add_argument("--version", default="7", choices=["4", "5.2", "6", "7"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=10_000, help="of each text")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="files to read beside llama.cpp")
    parser.add_argument("--llama", type=Path, help="the folder of llama-bench and llama-batched-bench")
    parser.add_argument("--sizes", type=int, nargs=2, default=(PREFILL, 32), metavar=("PROMPT", "DECODE"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, object] = {"bench": "native", "machine": {**machine(), "load_before": load()}}
    if options.shape != "none":
        model = lively_model(options.version, VOCAB, *SHAPES[options.shape])
        difference, best = speeds(model, options.threads, options.rounds)
        print(f"RWKV-{options.version} {options.shape}, {options.threads} threads; logits differ by {difference:.1e}")
        print(
            f"{'tokens/s':16}{'decode':>10}{'prefill':>10}{f'batch of {BATCH}':>14}   decode, prefill, batch to torch"
        )
        for name, row in best.items():
            to = ", ".join(f"{row[work] / best['torch float32'][work]:.2f}" for work in row)
            print(f"{name:16}{row['decode']:10.1f}{row['prefill']:10.1f}{row['batch']:14.1f}   {to}")
        clock = "processor" if options.threads == 1 else "wall"
        result["speed"] = {"version": options.version, "shape": options.shape, "clock": clock, "tokens_per_s": best}
    for path in options.text:
        rows = quality(path, options.tokens)
        result.setdefault("quality", {})[path.name] = rows  # type: ignore[attr-defined]
        for dtype, row in rows.items():
            print(f"{path.name:36}{dtype:10}" + "  ".join(f"{key} {value:.5f}" for key, value in row.items()))
    for path in options.gguf:
        table = beside(options.llama, path, options.threads, options.rounds, tuple(options.sizes))
        result.setdefault("gguf", {})[path.name] = table  # type: ignore[attr-defined]
        for work, row in table.items():
            print(f"{path.name:20}{work:9}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    text = json.dumps(rounded({**result, "load_after": load()}))
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
