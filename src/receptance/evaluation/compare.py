"""`receptance compare`: models trained alike, in one report: Markdown, JSON and pictures."""

import json
import statistics
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from receptance.checkpoint.atomic import replacing
from receptance.errors import ConfigError
from receptance.models import RWKV, apply_recipe
from receptance.training.config import TrainConfig, read_config, to_json
from receptance.training.loop import new_model, train
from receptance.training.report import Reporter

Row = dict[str, Any]
SHAPE = ("version", "n_layer", "n_embd", "head_size", "parameters", "wide_rate", "kv_heads", "token_shift", "without")


@dataclass(frozen=True)
class Entry:
    """One of the models: its name in the report and its run's configuration."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Comparison:
    """generation: tokens written one by one to measure time and memory against position; 0: not measured."""

    out: Path
    entries: tuple[Entry, ...]
    generation: int = 0


def read_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """A file of `receptance train` with [[models]] and, if wanted, `generation`; each model may change any setting.

    A model has a name, settings of [model], and others as `optim.lr = …` under [models.optim]. Raises ConfigError.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    models, generation = raw.pop("models", []), raw.pop("generation", 0)
    if not models or not isinstance(generation, int) or generation < 0:
        raise ConfigError(f"{path}: needs [[models]], and generation must be a whole number from 0")
    common = [f"{section}.{key}={_toml(value)}" for section, values in raw.items() for key, value in values.items()]
    common += [f"data.root={_toml(str(path.resolve().parent / raw.get('data', {}).get('root', '.')))}", *overrides]
    out = Path(read_config(None, common).run.out)
    out = out if out.is_absolute() else path.resolve().parent / out
    entries: list[Entry] = []
    for model in models:
        name = str(model.get("name", ""))
        if not name or any(entry.name == name for entry in entries):
            raise ConfigError(f"{path}: each of [[models]] needs a name of its own, found {name!r}")
        own = [f"model.{key}={_toml(model[key])}" for key in SHAPE if key in model]
        sections = {key: value for key, value in model.items() if isinstance(value, Mapping)}
        if unknown := model.keys() - {"name", *SHAPE, *sections}:
            raise ConfigError(f"{path}: model {name}: unknown {sorted(unknown)}; there are name, {', '.join(SHAPE)}")
        own += [
            f"{section}.{key}={_toml(value)}" for section, values in sections.items() for key, value in values.items()
        ]
        folder = out / "".join(c if c.isalnum() or c in "-._" else "-" for c in name)
        entries.append(Entry(name, read_config(None, [*common, *own, f"run.out={_toml(str(folder))}"])))
    return Comparison(out, tuple(entries), generation)


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def compare(comparison: Comparison, reporter: Reporter) -> Path:
    """Train each model, or take what is finished; write compare.json, report.md, pictures. Returns the folder."""
    comparison.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for entry in comparison.entries:
        reporter.message(f"— {entry.name}")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if not is_finished(entry.config):
            train(entry.config, reporter)
        row = summary(entry)
        if comparison.generation:
            row["generation"] = asdict(positions(entry.config, comparison.generation))
        rows.append(row)
    with replacing(comparison.out / "compare.json") as file:
        file.write(json.dumps({"models": rows}, indent=1).encode())
    with replacing(comparison.out / "report.md") as file:
        file.write(report(rows).encode())
    try:
        from receptance.evaluation.plots import draw_comparison, draw_positions
    except ImportError:
        reporter.message("no pictures: they need matplotlib (pip install 'receptance[plots]')")
    else:
        draw_comparison(rows, comparison.out / "loss")
        if comparison.generation:
            draw_positions(rows, comparison.out / "generation")
    return comparison.out


def is_finished(config: TrainConfig) -> bool:
    """Whether the run's folder holds the model of this very configuration."""
    try:
        made = json.loads((Path(config.run.out) / "model" / "training.json").read_text())["config"]
    except (OSError, ValueError, KeyError):
        return False
    wanted = json.loads(to_json(config))
    return all(made.get(section) == wanted[section] for section in ("model", "optim")) and all(
        made.get("run", {}).get(key) == wanted["run"][key] for key in ("tokens", "ctx_len", "batch_size", "seed")
    )


def summary(entry: Entry) -> Row:
    """A finished run in numbers, with its curves; seconds are of training steps alone."""
    out, run = Path(entry.config.run.out), entry.config.run
    made = json.loads((out / "model" / "training.json").read_text())
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [row for row in log if row.get("loss") is not None]
    per_step = run.batch_size * run.ctx_len
    seconds, before, curve = 0.0, 0, []
    for row in steps:
        seconds += (row["step"] - before) * per_step / row["tokens_per_second"]
        before = row["step"]
        curve.append({"tokens": before * per_step, "seconds": seconds, "loss": row["loss"]})
    looks = [
        {"tokens": row["step"] * per_step, **{k.removesuffix("_bits_per_byte"): v for k, v in row.items()
                                              if k.endswith("_bits_per_byte")}}
        for row in log if any(k.endswith("_bits_per_byte") for k in row)
    ]  # fmt: skip
    embedding = 2 * new_model(entry.config, 2, "meta").config.n_embd  # of two ids
    body = sum(p.numel() for p in new_model(entry.config, 2, "meta").parameters()) - 2 * embedding
    return {
        "name": entry.name,
        "version": entry.config.model.version,
        "parameters": made["parameters"],
        "parameters_without_embedding": body,
        "tokens": made["tokens_seen"],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steps),
        "seconds": seconds,
        "memory_gib": max(row["memory_gib"] for row in steps) if torch.cuda.is_available() else None,
        "validation": {name: x["bits_per_byte"] for name, x in made["validation"].items()},
        "curve": curve,
        "looks": looks,
    }


def report(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    texts = list(dict.fromkeys(name for row in rows for name in row["validation"]))
    head = ["model", "parameters", "without embedding", "tokens", *(f"{text}, bits per byte" for text in texts),
            "tokens/s", "training, s", "memory, GiB"]  # fmt: skip
    lines = ["# Comparison", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        memory = "–" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}"
        cells = [
            row["name"],
            f"{row['parameters']:,}",
            f"{row['parameters_without_embedding']:,}",
            f"{row['tokens']:,}",
        ]
        cells += [f"{row['validation'][text]:.4f}" for text in texts]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['seconds']:.0f}", memory]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "![loss](loss.png)", ""]
    if any("generation" in row for row in rows):
        lines += ["Generating one token after the other, cumulative time ∝ positions^e over the last half:", ""]
        lines += ["| model | e | ms per token, first | last | state at the end, bytes |", "|---|---|---|---|---|"]
        for row in rows:
            g = row["generation"]
            lines.append(f"| {row['name']} | {g['exponent']:.2f} | {1e3 * g['first']:.2f} | {1e3 * g['last']:.2f} | "
                         f"{g['state_bytes'][-1]:,} |")  # fmt: skip
        lines += ["", "![generation](generation.png)", ""]
    return "\n".join(lines)


# Time and memory against position ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Positions:
    """At each of `position`: seconds since the start, bytes of the state. first, last: seconds a token, at the ends.

    exponent: of cumulative time against position, fitted over the last half: 1 is linear, 2 quadratic.
    """

    position: list[int]
    seconds: list[float]
    state_bytes: list[int]
    first: float
    last: float
    exponent: float


@torch.inference_mode()
def positions(config: TrainConfig, tokens: int, points: int = 32) -> Positions:
    """Feed one token at a time to a model of this shape, without a window; its weights do not matter."""
    config = replace(config, run=replace(config.run, ctx_len=0))
    model: RWKV = new_model(config, 256)
    apply_recipe(model, type(model).recipe(model.config, 1e-3), torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    on_gpu = torch.cuda.is_available() and config.run.device != "cpu"
    model = model.to("cuda" if on_gpu else "cpu").eval()

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    marks = sorted({max(1, round(tokens * (i + 1) / points)) for i in range(points)})
    for _ in range(3):
        model([1])
    state = model.zero_state()
    found: list[float] = []
    sizes: list[int] = []
    wait()
    start = time.perf_counter()
    for position in range(1, tokens + 1):
        _, state = model([position % 256], state)
        if position == marks[len(found)]:
            wait()
            found.append(time.perf_counter() - start)
            sizes.append(state.nbytes)
    half = len(marks) // 2
    exponent = float(np.polyfit(np.log(marks[half:]), np.log(found[half:]), 1)[0]) if half and len(marks) > 2 else 1.0
    last = (found[-1] - found[-2]) / (marks[-1] - marks[-2]) if len(marks) > 1 else found[-1]
    return Positions(marks, found, sizes, found[0] / marks[0], last, exponent)
