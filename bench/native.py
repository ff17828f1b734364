"""The CPU engine beside torch: decode, prefill and batch speed for each weight type, and what quantisation costs.

First the float32 logits of both engines are compared; no speed is reported when they differ. Timings alternate
between the engines, and the best of all rounds counts. With one thread they are processor time, which other users of
the machine disturb less; with more they are wall time. `--text` measures the embedded model on held-out text.
"""

import argparse
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import lively_model, load, machine, rounded

import receptance as rc
from receptance.models import RWKV
from receptance.native import NativeModel, read_config

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
    text = json.dumps(rounded({**result, "load_after": load()}))
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
