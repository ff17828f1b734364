"""`receptance compare`: models trained alike, in one report: Markdown, JSON and pictures."""

import gc
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from receptance.atomic import replacing
from receptance.baselines import load_baseline
from receptance.baselines.budget import count
from receptance.baselines.files import is_baseline
from receptance.checkpoint import load
from receptance.data import documents
from receptance.errors import ConfigError
from receptance.evaluation import grid
from receptance.evaluation.costs import positions, training
from receptance.evaluation.score import PlainScorer
from receptance.evaluation.tasks import choice_of, lambada, multiple_choice, read_rows, sample
from receptance.models import RWKV
from receptance.settings import build, read_toml
from receptance.tokenizers import tokenizer as open_tokenizer
from receptance.tokenizers.base import Tokenizer
from receptance.training.config import TrainConfig, read_config, to_json
from receptance.training.loop import autocast, new_model, train
from receptance.training.report import Reporter

Row = dict[str, Any]
SHAPE = ("version", "n_layer", "n_embd", "head_size", "parameters", "wide_rate", "kv_heads", "token_shift", "without")


@dataclass(frozen=True)
class Entry:
    """One of the models: its name in the report, which its seeds share, and its run's configuration."""

    name: str
    config: TrainConfig

    @property
    def title(self) -> str:
        return self.name + (f", seed {self.config.run.seed}" if self.config.run.seed > 1 else "")


@dataclass(frozen=True)
class Search:
    """Short runs of `tokens` at each of these learning rates; the best on the first validation text is taken."""

    lr: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class Long:
    """A text of long documents: the loss against position, up to `tokens`, of at most `rows` documents that long."""

    text: str
    tokens: int = 32_768
    rows: int = 64


@dataclass(frozen=True)
class Tasks:
    """Files to score finished models on, relative to data.root; at most `limit` rows of each (0: all)."""

    lambada: str | None = None
    choice: tuple[str, ...] = ()
    limit: int = 0


@dataclass(frozen=True)
class Comparison:
    """generation: measure time and memory of writing up to so many tokens; training: of training on rows so long.

    0: not measured. measure_only: nothing is trained.
    """

    out: Path
    entries: tuple[Entry, ...]
    generation: int = 0
    training: int = 0
    measure_only: bool = False
    search: Search | None = None
    long: Long | None = None
    tasks: Tasks | None = None


def read_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """A file of `receptance train` with [[models]], each of which may change any setting.

    If wanted, with `generation`, `seeds`, [search] and [long] (see `Comparison`).

    A model has a name, settings of [model], and others as `optim.lr = …` under [models.optim]. Raises ConfigError.
    """
    raw = read_toml(path)
    return read_models(path, raw, overrides)


def read_models(path: Path, raw: dict[str, Any], overrides: Sequence[str]) -> Comparison:
    """`read_comparison` of what is in the file at `path`, which paths are relative to."""
    raw = dict(raw)
    models, generation, training = raw.pop("models", []), raw.pop("generation", 0), raw.pop("training", 0)
    measure_only = bool(raw.pop("measure_only", False))
    seeds, tried, long = raw.pop("seeds", [None]), raw.pop("search", None), raw.pop("long", None)
    tasks = raw.pop("tasks", None)
    if not models or any(not isinstance(n, int) or n < 0 for n in (generation, training)):
        raise ConfigError(f"{path}: needs [[models]], and generation and training must be whole numbers from 0")
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
        for seed in seeds:
            folder = "".join(c if c.isalnum() or c in "-._" else "-" for c in name) + (f"-{seed}" if seed else "")
            run = [f"run.out={_toml(str(out / folder))}", *([] if seed is None else [f"run.seed={seed}"])]
            entries.append(Entry(name, read_config(None, [*common, *own, *run])))
    if long is not None:
        long = build(Long, {**long, "text": str(Path(entries[0].config.data.root) / long.get("text", ""))}, "long.")
    tried = None if tried is None else build(Search, tried, "search.")
    tasks = None if tasks is None else build(Tasks, tasks, "tasks.")
    return Comparison(out, tuple(entries), generation, training, measure_only, tried, long, tasks)


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def compare(comparison: Comparison, reporter: Reporter) -> Path:
    """Train each model, or take what is finished; write compare.json, report.md, pictures. Returns the folder.

    Processes that are given the same comparison share the work.
    """
    cells = [cell(entry, comparison, reporter) for entry in comparison.entries]
    rows = grid.run(comparison.out, cells, reporter.message)
    write(comparison.out, rows, reporter.message)
    return comparison.out


def write(out: Path, rows: Sequence[Row], tell: Callable[[str], None]) -> None:
    with replacing(out / "compare.json") as file:
        file.write(json.dumps({"models": list(rows)}, indent=1).encode())
    with replacing(out / "report.md") as file:
        file.write(report(rows).encode())
    try:
        from receptance.evaluation.plots import draw_comparison, draw_long, draw_positions, draw_training
    except ImportError:
        tell("no pictures: they need matplotlib (pip install 'receptance[plots]')")
        return
    if any("validation" in row for row in rows):
        draw_comparison([row for row in rows if "validation" in row], out / "loss")
    if any("generation" in row for row in rows):
        draw_positions(rows, out / "generation")
    if any("training" in row for row in rows):
        draw_training(rows, out / "training")
    if any("long" in row for row in rows):
        draw_long(rows, out / "long")


def cell(entry: Entry, comparison: Comparison, reporter: Reporter) -> grid.Cell:
    key = json.loads(to_json(entry.config))
    del key["run"]["out"], key["run"]["device"], key["data"]["root"]
    key |= {"search": comparison.search and asdict(comparison.search), "generation": comparison.generation,
            "training": comparison.training, "measure_only": comparison.measure_only,
            "long": comparison.long and {**asdict(comparison.long), "text": Path(comparison.long.text).name},
            "tasks": comparison.tasks and asdict(comparison.tasks)}  # fmt: skip
    return grid.Cell(entry.title, json.dumps(key, sort_keys=True), partial(make, entry, comparison, reporter))


def make(entry: Entry, comparison: Comparison, reporter: Reporter) -> Row:
    """Everything that is reported of one model."""
    found: Row = {}
    if comparison.generation:
        found["generation"] = asdict(positions(entry.config, comparison.generation))
    if comparison.training:
        free()
        found["training"] = asdict(training(entry.config, comparison.training))
    if comparison.measure_only:
        return {"name": entry.name, "seed": 1, "parameters_without_embedding": body_size(entry.config), **found}
    free()
    if comparison.search is not None:
        found["search"] = search(entry, comparison.search, comparison.out / "cells" / "search", reporter)
        entry = Entry(entry.name, at_rate(entry.config, min(found["search"], key=lambda tried: tried["bits"])["lr"]))
    if not is_finished(entry.config):
        train(entry.config, reporter)
    free()
    found = summary(entry) | found
    if comparison.long is not None:
        found["long"] = long_loss(entry.config, comparison.long)
    if comparison.tasks is not None:
        found["tasks"] = score_tasks(entry.config, comparison.tasks)
    return found


def search(entry: Entry, wanted: Search, folder: Path, reporter: Reporter) -> list[Row]:
    """For each learning rate, the bits per byte of a short run."""

    def short(lr: float) -> Row:
        out = Path(entry.config.run.out) / f"search-{lr:g}"
        config = at_rate(entry.config, lr)
        run = replace(config.run, tokens=wanted.tokens, out=str(out), valid_every=1 << 30, save_every=1 << 30)
        first = dict(list(config.data.valid.items())[:1])
        config = replace(config, run=run, data=replace(config.data, valid=first))
        train(config, reporter)
        losses = json.loads((out / "model" / "training.json").read_text())["validation"]
        shutil.rmtree(out)
        free()
        return {"lr": lr, "bits": next(iter(losses.values()))["bits_per_byte"]}

    key = json.loads(to_json(entry.config))
    del key["run"]["out"], key["run"]["tokens"], key["run"]["device"], key["data"]["root"]
    cells = [
        grid.Cell(
            f"{entry.title}, rate {lr:g}", json.dumps([key, lr, wanted.tokens], sort_keys=True), partial(short, lr)
        )
        for lr in wanted.lr
    ]
    return [row for row in grid.fill(folder, cells, reporter.message) if row is not None]


def at_rate(config: TrainConfig, lr: float) -> TrainConfig:
    """The same run at another learning rate, which falls as far."""
    return replace(config, optim=replace(config.optim, lr=lr, lr_final=lr * config.optim.lr_final / config.optim.lr))


def free() -> None:
    """Give the GPU's memory back: a run's graph holds much of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


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
    return {
        "name": entry.name,
        "seed": run.seed,
        "lr": entry.config.optim.lr,
        "version": entry.config.model.version,
        "parameters": made["parameters"],
        "parameters_without_embedding": body_size(entry.config),
        "tokens": made["tokens_seen"],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steps),
        "seconds": seconds,
        "memory_gib": max(row["memory_gib"] for row in steps) if torch.cuda.is_available() else None,
        "validation": {name: x["bits_per_byte"] for name, x in made["validation"].items()},
        "curve": curve,
        "looks": looks,
    }


def body_size(config: TrainConfig) -> int:
    """Parameters without those of embedding and head."""
    return count(new_model(config, 2, "meta"))


def report(rows: Sequence[Row]) -> str:
    """The tables in Markdown."""
    lines = ["# Comparison", ""]
    if any("validation" in row for row in rows):
        lines += [*losses([row for row in rows if "validation" in row]), "", "![loss](loss.png)", ""]
    if any("generation" in row for row in rows):
        lines += ["Writing one token after the other; cumulative time ∝ positions^e over the last half:", ""]
        lines += [
            "| model | e | ms a token, first | last | state at the end, bytes | peak memory beside the weights, MiB |"
        ]
        lines += ["|---" * 6 + "|"]
        for row in rows:
            g = row["generation"]
            peak = f"{g['peak_bytes'][-1] / 2**20:,.0f}" if g["peak_bytes"] else "–"
            lines.append(f"| {row['name']} | {g['exponent']:.2f} | {g['milliseconds'][0]:.2f} | "
                         f"{g['milliseconds'][-1]:.2f} | {g['state_bytes'][-1]:,} | {peak} |")  # fmt: skip
        lines += ["", "![generation](generation.png)", ""]
    if any("training" in row for row in rows):
        lines += ["Training on one row; time ∝ length^e, memory ∝ length^m over the last three lengths:", ""]
        lines += ["| model | e | m | longest row | seconds a step | peak memory, GiB |", "|---" * 6 + "|"]
        for row in rows:
            t = row["training"]
            peak = f"{t['peak_bytes'][-1] / 2**30:.2f}" if t["peak_bytes"] else "–"
            exponent = "–" if t["memory_exponent"] is None else f"{t['memory_exponent']:.2f}"
            lines.append(f"| {row['name']} | {t['time_exponent']:.2f} | {exponent} | {t['length'][-1]:,} | "
                         f"{t['seconds'][-1]:.3f} | {peak} |")  # fmt: skip
        lines += ["", "![training](training.png)", ""]
    if any("tasks" in row for row in rows):
        names = list(dict.fromkeys(name for row in rows for name in row.get("tasks", ())))
        lines += ["| model | " + " | ".join(f"{name}, accuracy | perplexity" for name in names) + " |"]
        lines += ["|---" * (1 + 2 * len(names)) + "|"]
        for row in rows:
            cells = [f"{row['tasks'][name]['accuracy']:.4f} | {row['tasks'][name]['perplexity']:.4g}" for name in names]
            lines.append("| " + " | ".join([row["name"], *cells]) + " |")
        lines += [""]
    if any("long" in row for row in rows):
        lines += ["Bits per byte by position in long documents, never reset:", ""]
        ends = rows[0]["long"]["end"]
        lines += ["| model | " + " | ".join(f"to {end:,}" for end in ends) + " |", "|---" * (1 + len(ends)) + "|"]
        lines += ["| " + " | ".join([row["name"], *(f"{x:.3f}" for x in row["long"]["bits"])]) + " |" for row in rows]
        lines += ["", "![loss against position](long.png)", ""]
    return "\n".join(lines)


def losses(rows: Sequence[Row]) -> list[str]:
    """What training came to; of several seeds, means and standard deviations."""
    texts = list(dict.fromkeys(name for row in rows for name in row["validation"]))
    head = ["model", "parameters", "without embedding", "tokens", "rate", *(f"{text}, bits per byte" for text in texts),
            "tokens/s", "training, s", "memory, GiB"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        row = mine[0]
        memory = "–" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}"
        cells = [name, f"{row['parameters']:,}", f"{row['parameters_without_embedding']:,}", f"{row['tokens']:,}",
                 f"{row['lr']:g}"]  # fmt: skip
        cells += [spread([row["validation"][text] for row in mine]) for text in texts]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['seconds']:.0f}", memory]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def spread(values: Sequence[float]) -> str:
    """A number, or the mean of several and their standard deviation."""
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


# Loss against position ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def long_loss(config: TrainConfig, wanted: Long, first: int = 64, chunk: int = 1024) -> Row:
    """Bits per byte between the positions `first`, twice that, … and wanted.tokens, the state never reset.

    A Transformer sees as far back as its rows were long. Raises ConfigError when no document is long enough.
    """
    model, tokenizer = trained(config)
    texts = (tokenizer.encode(text) for text in documents(Path(wanted.text)))
    rows = [ids[: wanted.tokens] for ids in texts if len(ids) >= wanted.tokens][: wanted.rows]
    if not rows:
        raise ConfigError(f"{wanted.text}: no document has {wanted.tokens:,} tokens; lower long.tokens")
    whole = torch.tensor([[tokenizer.eos_id, *ids] for ids in rows], device=model.device)
    nats = torch.zeros(len(rows), wanted.tokens)
    for part in range(0, len(rows), 16):
        state = None
        for start in range(0, wanted.tokens, chunk):
            ids = whole[part : part + 16, start : start + chunk + 1]
            with autocast(config, model.device):
                logits, state = model(ids[:, :-1], state)
            lost = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
            nats[part : part + 16, start : start + lost.shape[1]] = lost.cpu()
    n_bytes = torch.tensor([[len(tokenizer.token_bytes(i)) for i in ids] for ids in rows])
    ends = [first << i for i in range(64) if first << i < wanted.tokens] + [wanted.tokens]
    cuts = list(zip([0, *ends], ends))
    bits = [float(nats[:, a:b].sum() / n_bytes[:, a:b].sum()) / math.log(2) for a, b in cuts]
    return {"end": ends, "bits": bits, "documents": len(rows)}


def score_tasks(config: TrainConfig, wanted: Tasks) -> Row:
    """Accuracy, perplexity and so on by file, as `receptance eval` has them."""
    model, tokenizer = trained(config)
    root, scorer = Path(config.data.root), PlainScorer(model, tokenizer)
    found: Row = {}
    if wanted.lambada is not None:
        rows = sample(list(read_rows(root / wanted.lambada)), wanted.limit)
        found["LAMBADA"] = asdict(lambada(scorer, tokenizer, rows))
    for name in wanted.choice:
        rows = sample(list(read_rows(root / name)), wanted.limit)
        questions = [choice_of(row) for row in rows]
        found[name.split(".")[0]] = asdict(multiple_choice(scorer, tokenizer, questions))
    return found


def trained(config: TrainConfig) -> tuple[RWKV, Tokenizer]:
    """The finished model of a run, on its device."""
    folder = Path(config.run.out) / "model"
    device = "cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu"
    model = load_baseline(folder) if is_baseline(folder) else load(folder, dtype="float32")
    return model.to(device).eval(), open_tokenizer(folder)
