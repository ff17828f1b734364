"""The tables and pictures of docs/evidence.md, made from the results of the commands that it prints.

    python bench/evidence.py collect RUNS [RUNS …] --gpu "3 x NVIDIA H200"   # folders of runs → bench/results/evidence/
    python bench/evidence.py page                                            # → docs/evidence.md, docs/pictures/

A run's folder is RUNS/NAME with `cells`, as the commands leave it; names are those of MAKERS below. In the page, what
stands between `<!-- made: NAME -->` and `<!-- end -->` is replaced; the rest is written by people.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from receptance.evaluation import memory, plots, scaling

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE, PICTURES = ROOT / "bench/results/evidence", ROOT / "docs/evidence.md", ROOT / "docs/pictures"
Row = dict[str, Any]


# Collecting -----------------------------------------------------------------------------------------------------------


def collect(folders: Iterable[Path], gpu: str) -> None:
    """Every cell of every run, later folders over earlier ones, one file a run."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Row]] = {}
    for folder in folders:
        for cells in sorted(folder.glob("**/cells")):
            for file in sorted(cells.glob("*.json")):
                found.setdefault(cells.parent.name, {})[file.stem] = json.loads(file.read_text()) | {"gpu": gpu}
    for name, rows in found.items():
        path = RESULTS / f"{name}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        merged = {**old, **{stem: slim(row) for stem, row in rows.items()}}
        path.write_text(json.dumps(dict(sorted(merged.items()))))
        print(f"{path.relative_to(ROOT)}: {len(rows)} results, {path.stat().st_size / 1e3:.0f} kB")


def slim(row: Row) -> Row:
    """Six digits are enough of a number."""

    def short(x: Any) -> Any:
        if isinstance(x, float):
            return float(f"{x:.6g}")
        if isinstance(x, dict):
            return {key: short(y) for key, y in x.items()}
        return [short(y) for y in x] if isinstance(x, list) else x

    return {key: short(x) for key, x in row.items()}


def rows_of(name: str, order: Sequence[str] = ()) -> list[Row]:
    path = RESULTS / f"{name}.json"
    rows = list(json.loads(path.read_text()).values()) if path.exists() else []
    place = {model: i for i, model in enumerate(order)}
    return sorted(rows, key=lambda row: (place.get(row["name"], 99), row["name"], row.get("seed", 1)))


# Tables ---------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def mean(values: Sequence[float], digits: int = 3) -> str:
    """Of seeds, with their standard deviation."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


ALONE = ("RWKV-4", "RWKV-7", "LSTM")
MODELS = ("RWKV-4", "RWKV-5.2", "RWKV-6", "RWKV-7", "Transformer", "Transformer with token shift", "LSTM")


def loss_table(name: str) -> str:
    rows = rows_of(name, MODELS)
    out, texts = [], list(rows[0]["validation"])
    for row in rows:
        rate = f"{row['lr']:g}"
        if tried := row.get("search"):
            rate += " (" + ", ".join(f"{x['lr']:g}: {x['bits']:.3f}" for x in tried) + ")"
        out.append([row["name"], f"{row['parameters_without_embedding'] / 1e6:.2f}", f"{row['tokens'] / 1e6:.1f}",
                    *(f"{row['validation'][text]:.4f}" for text in texts), rate])  # fmt: skip
    head = ["model", "parameters, million", "tokens, million", *(f"{x}, bits per byte" for x in texts)]
    return table([*head, "rate (short runs: bits per byte)"], out)


def seeds_table(name: str, first: str) -> str:
    """Bits per byte by seed; the first one's are among another run's results."""
    more = rows_of(name, MODELS)
    models = list(dict.fromkeys(row["name"] for row in more))
    rows = [*(row for row in rows_of(first) if row["name"] in models), *more]
    seeds = sorted({row["seed"] for row in rows})
    body = []
    for text in rows[0]["validation"]:
        for model in models:
            by = {row["seed"]: row["validation"][text] for row in rows if row["name"] == model}
            each = (f"{by[seed]:.4f}" if seed in by else "–" for seed in seeds)
            body.append([f"{model}, {text}", *each, mean(list(by.values()), 4)])
    return table(["bits per byte", *(f"seed {seed}" for seed in seeds), "mean"], body)


def speeds() -> list[Row]:
    """Runs alone on a GPU: of speed.toml, and of bytes-40m.toml for the models that had one to themselves there."""
    alone = rows_of("speed", MODELS)
    names = {row["name"] for row in alone}
    return sorted([*alone, *(r for r in rows_of("bytes") if r["name"] in ALONE and r["name"] not in names)],
                  key=lambda row: MODELS.index(row["name"]))  # fmt: skip


def speed_table() -> str:
    return table(
        ["model", "tokens/s", "memory, GiB"],
        ([r["name"], f"{r['tokens_per_second']:,.0f}", f"{r['memory_gib']:.1f}"] for r in speeds()),
    )


def timed(rows: Sequence[Row]) -> list[Row]:
    """With the time that they take alone: some runs shared their GPU. Names may end in a rate: `RWKV-7, 1.6e-3`."""
    rate = {row["name"]: row["tokens_per_second"] for row in speeds()}
    return [
        row | {"curve": [point | {"seconds": point["tokens"] / rate[model]} for point in row["curve"]]}
        for row in rows
        if (model := row["name"].split(",")[0]) in rate
    ]


def long_table(name: str) -> str:
    rows = [row for row in rows_of(name, MODELS) if "long" in row]
    head = ["model", *(f"to {end:,}" for end in rows[0]["long"]["end"])]
    return table(head, ([row["name"], *(f"{x:.3f}" for x in row["long"]["bits"])] for row in rows))


def scores_table(name: str) -> str:
    """Models down, tests across."""
    rows = rows_of(name, MODELS)
    tests = sorted({test for row in rows for test in row["scores"]}, key=natural)
    models = list(dict.fromkeys(row["name"] for row in rows))
    state = {row["name"]: f"{row['state_bytes']:,}" for row in rows}
    body = [[m, state[m], *(mean(memory.accuracies(rows, m, test)) for test in tests)] for m in models]
    return table(["model", "state, bytes", *tests], body)


def pixels(task: str) -> tuple[str, str]:
    """How the pixels of a digits task are read, and in which order."""
    rest = task.removeprefix("permuted ").removeprefix("digits of 784 pixels").strip(", ")
    return rest or "in 256 shades", "permuted" if task.startswith("permuted") else "in order"


def digits_table(name: str) -> str:
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows_of(name, MODELS):
        read, order = pixels(row["task"])
        found.setdefault((row["name"], read), {})[order] = row["scores"][row["task"]]["accuracy"]
    orders = ("in order", "permuted")
    body = [[*key, *(f"{by[order]:.4f}" if order in by else "–" for order in orders)] for key, by in found.items()]
    return table(["model", "pixels", *orders], body)


def natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


GROUPS = ("Z2", "S3", "A5", "S5")
FOLLOWERS = ("RWKV-7, rate to 1 + w", "RWKV-7, rate to 1 + w, 1 layer", "RWKV-7, rate to 1 + w, 4 layers",
             "RWKV-7, rate to 1", "RWKV-6", "RWKV-4", "Transformer", "LSTM, 1 layer")  # fmt: skip


def groups_table(name: str) -> str:
    tables = []
    rows = rows_of(name, FOLLOWERS)
    for group in GROUPS:
        mine = [row for row in rows if row["task"].startswith(group + " ")]
        tests = sorted({test for row in mine for test in row["scores"]}, key=natural)
        body = []
        for row in mine:
            last = (f"{row['scores'][test]['last']:.3f}" for test in tests)
            body.append([row["name"], *last, f"{row['lr']:g}", f"{row['steps']:,}"])
        if mine:
            tables.append(table([group, *(test.split()[-1] for test in tests), "rate", "steps"], body))
    return "\n\n".join(tables)


def recall_table(name: str) -> str:
    rows = rows_of(name)
    tests = sorted({row["task"] for row in rows}, key=natural)
    widths = sorted({int(row["name"].rsplit(" D", 1)[1]) for row in rows})
    found = {(row["name"], row["task"]): row["scores"][row["task"]]["accuracy"] for row in rows}
    body = []
    for model in MODELS:
        cells = [found.get((f"{model} D{width}", test)) for test in tests for width in widths]
        if any(cell is not None for cell in cells):
            body.append([model, *("–" if cell is None else f"{cell:.3f}" for cell in cells)])
    short = [re.sub(r"recall of (\d+) pairs in (\d+)", r"\1 in \2", test) for test in tests]
    return table(["model", *(f"{test}, D{width}" for test in short for width in widths)], body)


def ablation_table(name: str) -> str:
    """Training loss early on (averages of some steps around), and held-out bits at the end; means of seeds."""
    rows = rows_of(name)
    names = list(dict.fromkeys(row["name"] for row in rows))
    ends = [1e6, 2e6, 4e6]
    body = []
    for model in sorted(names, key=lambda n: (n.startswith("RWKV-4"), n != "whole recipe", n)):
        mine = [row for row in rows if row["name"] == model]
        early = [mean([around(row["curve"], end) for row in mine]) for end in ends]
        body.append([model, *early, mean([next(iter(row["validation"].values())) for row in mine], 4), str(len(mine))])
    head = ["model", *(f"loss at {end / 1e6:g}M" for end in ends), "bits per byte, held out", "seeds"]
    return table(head, body)


def around(curve: Sequence[Row], tokens: float, room: float = 0.15) -> float:
    """The mean training loss within 15 % of so many tokens; the nearest one if there is none."""
    near = [point["loss"] for point in curve if abs(point["tokens"] / tokens - 1) < room]
    return statistics.mean(near or [min(curve, key=lambda point: abs(point["tokens"] - tokens))["loss"]])


def forecast_table(name: str) -> str:
    rows = rows_of(name)
    horizons = sorted({row["horizon"] for row in rows})
    body = []
    for model in dict.fromkeys(row["name"] for row in rows):
        by = [[r["mse"] for r in rows if r["name"] == model and r["horizon"] == h] for h in horizons]
        whole = f"{statistics.mean(statistics.mean(x) for x in by):.3f}" if all(by) else "–"
        body.append([model, *(mean(x) for x in by), whole])
    return table(["mean squared error", *map(str, horizons), "mean"], body)


def nodes_table(name: str) -> str:
    rows = rows_of(name)
    models = list(dict.fromkeys(row["name"] for row in rows))
    by = {m: [[row[part] for row in rows if row["name"] == m] for part in ("valid", "test")] for m in models}
    best = sorted(models, key=lambda m: -statistics.mean(by[m][1]))
    return table(["accuracy", "validation", "test"], ([m, *(mean(x) for x in by[m])] for m in best))


def tasks_table(name: str) -> str:
    rows = [row for row in rows_of(name, MODELS) if "tasks" in row]
    texts, tasks = list(rows[0]["validation"]), list(rows[0]["tasks"])
    body = [[row["name"], f"{row['parameters'] / 1e6:.1f}", *(f"{row['validation'][t]:.3f}" for t in texts),
             *(f"{row['tasks'][t]['accuracy']:.3f}" for t in tasks),
             *(f"{row['tasks'][t]['perplexity']:,.0f}" for t in tasks if t == "LAMBADA")] for row in rows]  # fmt: skip
    head = ["model", "parameters, million", *(f"{t}, bits per byte" for t in texts), *(f"{t}, accuracy" for t in tasks)]
    return table(head + [f"{t}, perplexity" for t in tasks if t == "LAMBADA"], body)


def costs_table(name: str) -> str:
    body = []
    for row in rows_of(name, MODELS):
        g, t = row["generation"], row["training"]
        peak = f"{g['peak_bytes'][-1] / 2**20:,.0f}" if g["peak_bytes"] else "–"
        grown = f"{t['peak_bytes'][-1] / 2**30:.1f}" if t["peak_bytes"] else "–"
        body.append([row["name"], f"{g['milliseconds'][0]:.2f}", f"{g['milliseconds'][-1]:.2f}", f"{g['exponent']:.2f}",
                     f"{g['state_bytes'][-1] / 2**20:,.1f}", peak, f"{t['seconds'][-1]:.2f}",
                     f"{t['time_exponent']:.2f}", grown, f"{t['memory_exponent']:.2f}"])  # fmt: skip
    return table(["model", "ms a token, first", "last", "time ∝ n^", "state, MiB", "peak beside weights, MiB",
                  "training on one longest row, s", "time ∝ n^", "memory, GiB", "memory ∝ n^"], body)  # fmt: skip


def scaling_table(name: str) -> str:
    """The laws; of too few runs for one, the runs."""
    if laws := scaling_laws(name):
        return scaling.report(laws).split("\n\n")[0]
    runs = sorted(rows_of(name), key=lambda row: (row["name"], row["parameters_without_embedding"], row["tokens"]))
    body = []
    for row in runs:
        millions = (f"{row[key] / 1e6:.1f}" for key in ("parameters_without_embedding", "tokens"))
        body.append([row["name"].split(",")[0], *millions, f"{next(iter(row['validation'].values())):.4f}"])
    return table(["model", "parameters, million", "tokens, million", "bits per byte"], body)


@cache  # seconds
def scaling_laws(name: str) -> list[Row]:
    rows = [row | {"family": row["name"].split(",")[0]} for row in rows_of(name)]  # RWKV-7, 900,000, 2,500,000
    families = dict.fromkeys(row["family"] for row in rows)
    laws = [scaling.fit([row for row in rows if row["family"] == family]) for family in families]
    return [law for law in laws if law is not None]


# Pictures -------------------------------------------------------------------------------------------------------------


def draw_recall(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against the number of pairs, a panel for each width."""
    widths = sorted({int(row["name"].rsplit(" D", 1)[1]) for row in rows})
    figure, panels = plt.subplots(1, len(widths), figsize=(2.4 + 3.2 * len(widths), 3.6), sharey=True, squeeze=False)
    for width, axes in zip(widths, panels[0]):
        for model in MODELS:
            mine = [r for r in rows if r["name"] == f"{model} D{width}"]
            points = sorted((int(r["task"].split()[2]), r["scores"][r["task"]]["accuracy"]) for r in mine)
            if points:
                axes.plot(*zip(*points), label=model, markersize=5, **plots.style(model, MODELS))
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.03, 1.03)
        plots.tidy(axes, "pairs", "accuracy" if width == widths[0] else "", f"width {width}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1 - 1.4 / figure.get_figwidth(), 1))
    plots.save(figure, path)


def draw_lengths(panels: dict[str, dict[str, list[tuple[int, float]]]], path: Path, label: str) -> None:
    """panels: title → model → (length, accuracy)."""
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    figure, axes_of = plt.subplots(1, len(panels), figsize=(2.8 + 3.1 * len(panels), 3.6), sharey=True, squeeze=False)
    for (title, curves), axes in zip(panels.items(), axes_of[0]):
        for name, points in curves.items():
            axes.plot(*zip(*sorted(points)), label=name, markersize=5, **plots.style(name, names))
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.03, 1.03)
        plots.tidy(axes, label, "accuracy" if axes is axes_of[0][0] else "", title)
    found = {name: h for axes in axes_of[0] for h, name in zip(*axes.get_legend_handles_labels())}
    figure.legend(found.values(), found.keys(), loc="center right", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1 - 2.5 / figure.get_figwidth(), 1))
    plots.save(figure, path)


def group_panels(name: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows_of(name, FOLLOWERS):
        points = [(int(test.split()[-1]), score["last"]) for test, score in row["scores"].items()]
        panels.setdefault(row["task"].split()[0], {})[row["name"]] = points
    return {group: panels[group] for group in GROUPS if group in panels}


def needle_panels(names: dict[str, str]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, title in names.items():
        for row in rows_of(name, MODELS):
            points = [(int(test.split()[-1]), score["accuracy"]) for test, score in row["scores"].items()]
            panels.setdefault(title, {})[row["name"]] = points
    return panels


def draw_ablation(rows: Sequence[Row], path: Path) -> None:
    """Training loss against tokens, means of seeds, RWKV-7 and RWKV-4 apart."""
    versions = [v for v in ("7", "4") if any(row["version"] == v for row in rows)]
    figure, panels = plt.subplots(1, len(versions), figsize=(1 + 5 * len(versions), 4), squeeze=False)
    for version, axes in zip(versions, panels[0]):
        title, mine = f"RWKV-{version}", [row for row in rows if row["version"] == version]
        names = sorted({r["name"] for r in mine}, key=lambda n: (n not in ("whole recipe", "RWKV-4"), n))
        for name in names:
            curves = [[(p["tokens"], p["loss"]) for p in r["curve"]] for r in mine if r["name"] == name]
            tokens, loss = plots.mean_curve(curves)
            look = plots.style(name, names) | {"marker": None}
            axes.plot([t / 1e6 for t in tokens], plots.smooth(loss, 0.6), label=name, **look)
        plots.focus(axes, 0.12)
        plots.tidy(axes, "million tokens", "training loss, nats", title)
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    plots.save(figure, path)


Panel = dict[str, dict[str, float]]  # line → model → value


def draw_scores(
    panels: dict[str, Panel], path: Path, published: Panel | None = None, models: Sequence[str] = MODELS
) -> None:
    """A dot for each model on a line for each test; published values, by line and name, are grey ticks."""
    names = [m for m in models if any(m in line for panel in panels.values() for line in panel.values())]
    most = max(len(panel) for panel in panels.values())
    size = (4.2 + 4.2 * len(panels), 1.5 + 0.42 * most + 0.2 * bool(published))
    figure, axes_of = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for (title, panel), axes in zip(panels.items(), axes_of[0]):
        axes.set_yticks(range(len(panel)), list(panel))
        for place, (label, values) in enumerate(panel.items()):
            for name, value in values.items():
                look = plots.style(name, models)
                axes.plot([value], [place], linestyle="none", markersize=8, label=name, **look)
            for i, (name, value) in enumerate((published or {}).get(label, {}).items()):
                axes.plot([value] * 2, [place - 0.3, place + 0.3], color="0.6", linewidth=1)
                above = i % 2 == 0  # neighbours do not cover each other
                axes.annotate(name, (value, place - 0.32 if above else place + 0.32), ha="center", fontsize=7,
                              color="0.4", va="bottom" if above else "top")  # fmt: skip
        axes.set_ylim(len(panel) - 0.5, -0.7)
        plots.tidy(axes, "", "", title)
    found = {name: h for axes in axes_of[0] for h, name in zip(*axes.get_legend_handles_labels())}
    order = [name for name in names if name in found]
    figure.legend([found[n] for n in order], order, loc="center right", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1 - 1.5 / figure.get_figwidth(), 1))
    plots.save(figure, path)


def score_panel(name: str) -> Panel:
    """test → model → accuracy, the mean of seeds."""
    rows = rows_of(name, MODELS)
    tests = sorted({test for row in rows for test in row["scores"]}, key=natural)
    models = list(dict.fromkeys(row["name"] for row in rows))
    found = {test: {model: memory.accuracies(rows, model, test) for model in models} for test in tests}
    return {test: {m: statistics.mean(x) for m, x in by.items() if x} for test, by in found.items()}


def digits_panel(name: str) -> Panel:
    found = {pixels(task)[::-1]: by for task, by in score_panel(name).items()}
    return {", ".join(key): by for key, by in sorted(found.items())}


FIRST, AFTER = "question before the story", "question after the story"
BABI = {"qa1": "one fact", "qa4": "two relations", "qa5": "three relations", "qa6": "yes or no", "qa7": "counting",
        "qa8": "lists", "qa9": "negation", "qa10": "perhaps", "qa12": "conjunction", "qa15": "deduction"}  # fmt: skip


def question_panels(name: str) -> dict[str, Panel]:
    """The mean of the tasks for both orders, and for each task what is gained by asking first."""
    gain: Panel = {}
    rows = rows_of(name, MODELS)
    of = {(row["name"], test): score["groups"] for row in rows for test, score in row["scores"].items()}
    for model in MODELS:
        first, after = of.get((model, FIRST), {}), of.get((model, AFTER), {})
        for task in sorted(first.keys() & after.keys(), key=natural):
            gain.setdefault(BABI[task], {})[model] = first[task] - after[task]
    return {"accuracy, all tasks": score_panel(name), "gained by asking first": gain}


def domain_panels(name: str) -> dict[str, Panel]:
    rows = [row for row in rows_of(name, MODELS) if "tasks" in row]
    texts, tasks = ({what: {r["name"]: r[key][what] for r in rows} for what in rows[0][key]}
                    for key in ("validation", "tasks"))  # fmt: skip
    accuracies = {task: {model: found["accuracy"] for model, found in by.items()} for task, by in tasks.items()}
    return {"bits per byte": texts, "accuracy": accuracies}


PUBLISHED = {"in order, as numbers with places, moved by up to 2": {"LSTM, Transformer": 0.989, "S4": 0.9963},
             "permuted, as numbers with places": {"LSTM": 0.9511, "Transformer": 0.979, "S4": 0.987},
             "ListOps to 2000": {"commonest": 0.174, "Transformer": 0.364, "RWKV-4": 0.5588, "S4": 0.596}}  # fmt: skip


FORECASTERS = ("RWKV-7", "RWKV-4", "DLinear", "patch Transformer", "last value")


def forecast_panel(name: str) -> Panel:
    """Horizon → model → mean squared error, the mean of seeds. The last value is far off but for exchange rates."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in sorted(rows_of(name), key=lambda row: row["horizon"]):
        if name == "exchange" or row["name"] != "last value":
            found.setdefault(str(row["horizon"]), {}).setdefault(row["name"], []).append(row["mse"])
    return {line: {model: statistics.mean(x) for model, x in by.items()} for line, by in found.items()}


def by_model(name: str) -> list[Row]:
    """One row a model and seed, in the page's order."""
    return rows_of(name, MODELS)


# The page -------------------------------------------------------------------------------------------------------------

SCALE = ("RWKV-7", "RWKV-4", "Transformer", "LSTM")
MAKERS: dict[str, Callable[[], str]] = {
    "bytes": lambda: loss_table("bytes"),
    "bytes-more": lambda: loss_table("bytes-more"),
    "bytes-seeds": lambda: seeds_table("bytes-seeds", "bytes-more"),
    "warm-up": lambda: loss_table("warm-up"),
    "speed": speed_table,
    "positions": lambda: long_table("bytes"),
    "bpe": lambda: tasks_table("bpe"),
    "ablation": lambda: ablation_table("ablation"),
    "recall": lambda: recall_table("recall"),
    "groups": lambda: groups_table("groups"),
    "needle": lambda: scores_table("needle"),
    "needle-1024": lambda: scores_table("needle-1024"),
    "costs": lambda: costs_table("costs"),
    "scaling": lambda: scaling_table("scaling"),
    "questions": lambda: scores_table("questions"),
    "digits": lambda: digits_table("digits"),
    "listops": lambda: scores_table("listops"),
    "etth1": lambda: forecast_table("etth1"),
    "exchange": lambda: forecast_table("exchange"),
    "ili": lambda: forecast_table("ili"),
    "cora": lambda: nodes_table("cora"),
}
DRAWERS: dict[str, Callable[[Path], None]] = {
    "bytes": lambda path: plots.draw_comparison(timed(by_model("bytes")), path),
    "positions": lambda path: plots.draw_long(by_model("bytes"), path),
    "warm-up": lambda path: plots.draw_comparison(by_model("warm-up"), path),
    "ablation": lambda path: draw_ablation(rows_of("ablation"), path),
    "recall": lambda path: draw_recall(rows_of("recall"), path),
    "groups": lambda path: draw_lengths(group_panels("groups"), path, "elements"),
    "needle": lambda path: draw_lengths(
        needle_panels({"needle": "trained on 256", "needle-1024": "trained on 1,024"}), path, "tokens"
    ),
    "generation": lambda path: plots.draw_positions(by_model("costs"), path),
    "training": lambda path: plots.draw_training(by_model("costs"), path),
    "scaling": lambda path: plots.draw_scaling(scaling_laws("scaling"), path),
    "bytes-more": lambda path: plots.draw_comparison(timed(by_model("bytes-more")), path),
    "bpe": lambda path: draw_scores(domain_panels("bpe"), path),
    "questions": lambda path: draw_scores(question_panels("questions"), path),
    "digits": lambda path: draw_scores({"accuracy; ticks: published": digits_panel("digits")}, path, PUBLISHED),
    "listops": lambda path: draw_scores({"accuracy; ticks: published": score_panel("listops")}, path, PUBLISHED),
    "forecast": lambda path: draw_scores(
        {
            "ETTh1, by hours ahead": forecast_panel("etth1"),
            "exchange, by days": forecast_panel("exchange"),
            "ILI, by weeks": forecast_panel("ili"),
        },
        path,
        models=FORECASTERS,
    ),
}
SOURCES = {
    "positions": "bytes",
    "generation": "costs",
    "training": "costs",
    "forecast": "etth1",
}  # results of another name


def page(text: str) -> str:
    """The page with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        name = match[1]
        there = (RESULTS / f"{SOURCES.get(name, name)}.json").exists()
        return f"<!-- made: {name} -->\n{MAKERS[name]() if there else 'Not run.'}\n<!-- end -->"

    return re.sub(r"<!-- made: (\S+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gather = commands.add_parser("collect")
    gather.add_argument("runs", nargs="+", type=Path)
    gather.add_argument("--gpu", required=True)
    commands.add_parser("page")
    given = parser.parse_args()
    if given.command == "collect":
        collect(given.runs, given.gpu)
        return
    PAGE.write_text(page(PAGE.read_text()))
    for name, draw in DRAWERS.items():
        if (RESULTS / f"{SOURCES.get(name, name)}.json").exists() and (name != "scaling" or scaling_laws(name)):
            draw(PICTURES / f"evidence-{name}")
            (PICTURES / f"evidence-{name}.svg").unlink()  # large; the tables have the numbers


if __name__ == "__main__":
    main()
