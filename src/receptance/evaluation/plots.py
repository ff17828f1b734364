"""Pictures for papers, as PNG and SVG (extra [plots])."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
MARKS = "osD^vP*Xhd"


def save(figure: Figure, path: Path) -> None:
    """`path`.png and `path`.svg; the same numbers give the same files."""
    figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
    with plt.rc_context({"svg.hashsalt": "receptance"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


def style(name: str, names: Sequence[str]) -> dict[str, Any]:
    i = list(names).index(name)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)]}


def tidy(axes: Axes, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left", fontsize=10)
    if axes.get_xscale() == "linear" and not axes.get_xticklabels()[0].get_rotation():
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_memory(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy by test, one line a model; tests of one kind share a panel."""
    from receptance.evaluation.memory import accuracy

    names = list(dict.fromkeys(row["name"] for row in rows))
    tests = list(dict.fromkeys(test for row in rows for test in row["scores"]))
    kinds = list(dict.fromkeys(_kind(test) for test in tests))
    figure, panels = plt.subplots(1, len(kinds), figsize=(2.2 + 3.6 * len(kinds), 3.8), squeeze=False, sharey=True)
    for kind, axes in zip(kinds, panels[0]):
        mine = [test for test in tests if _kind(test) == kind]
        for name in names:
            found = {test: score for row in rows if row["name"] == name for test, score in row["scores"].items()}
            points = [(i, accuracy(test, found[test])) for i, test in enumerate(mine) if test in found]
            if points:
                axes.plot(*zip(*points), label=name, markersize=5, **style(name, names))
        axes.set_xticks(range(len(mine)), [test.removeprefix(kind).strip() for test in mine], rotation=20)
        axes.set_ylim(-0.03, 1.03)
        tidy(axes, "", "accuracy" if kind == kinds[0] else "", kind)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1 - 2.2 / figure.get_figwidth(), 1))
    save(figure, path)


def _kind(test: str) -> str:
    return test.rsplit(" over ", 1)[0] if " over " in test else test.split(" ", 1)[0]


def draw_comparison(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training loss against tokens and against time, and held-out bits per byte against tokens; means of seeds."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, (by_tokens, by_time, held) = plt.subplots(1, 3, figsize=(13, 4))
    for name in names:
        mine = [row for row in rows if row["name"] == name]
        look = style(name, names) | {"marker": None}
        tokens, losses = mean_curve([[(p["tokens"], p["loss"]) for p in row["curve"]] for row in mine])
        losses = smooth(losses)
        by_tokens.plot([x / 1e6 for x in tokens], losses, label=name, **look)
        seconds = [point["seconds"] for point in mine[0]["curve"]][: len(losses)]
        by_time.plot(seconds, losses, **look)
        texts = [text for text in mine[0]["looks"][0] if text != "tokens"] if mine[0]["looks"] else []
        for text in texts[:1]:
            looks = ([(x["tokens"], x[text]) for x in row["looks"] if x.get(text) is not None] for row in mine)
            at, bits = mean_curve(list(looks))
            held.plot([x / 1e6 for x in at], bits, markersize=4, **style(name, names))
            tidy(held, "million tokens", f"bits per byte, {text}", "held out")
    for axes, skip in ((by_tokens, 0.1), (by_time, 0.1), (held, 0.0)):
        focus(axes, skip)
    tidy(by_tokens, "million tokens", "loss, nats per token", "training, against tokens")
    tidy(by_time, "seconds of training", "", "training, against time")
    by_tokens.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    save(figure, path)


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """The mean over seeds where all of them have a point."""
    shared = [x for x, _ in curves[0] if all(any(x == other for other, _ in curve) for curve in curves)]
    return shared, [sum(dict(curve)[x] for curve in curves) / len(curves) for x in shared]


def focus(axes: Axes, skip: float) -> None:
    """Leave out the first steps' fall, which hides all that follows."""
    curves = [np.asarray(line.get_ydata(), float) for line in axes.get_lines()]
    late = [float(y) for curve in curves for y in curve[int(skip * len(curve)) :]]
    if late:
        room = 0.05 * (max(late) - min(late)) + 1e-3
        axes.set_ylim(min(late) - room, max(late) + room)


def draw_long(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bits per byte against position in long documents."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for row in rows:
        if "long" in row:
            axes.plot(
                row["long"]["end"], row["long"]["bits"], label=row["name"], markersize=4, **style(row["name"], names)
            )
    axes.set_xscale("log", base=2)
    tidy(axes, "position, tokens", "bits per byte", "long documents, the state never reset")
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    save(figure, path)


def smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """An average that forgets, without the bias of its start."""
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        found.append(total / weight)
    return found


def draw_positions(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Cumulative time, time of a token, and memory against position."""
    names = [row["name"] for row in rows]
    figure, (times, each, memory) = plt.subplots(1, 3, figsize=(13, 4))
    for row in rows:
        g, look = row["generation"], style(row["name"], names) | {"markersize": 3}
        times.plot(g["position"], g["seconds"], label=f"{row['name']}, exponent {g['exponent']:.2f}", **look)
        each.plot(g["position"], g["milliseconds"], **look)
        memory.plot(g["position"], [x / 2**20 for x in g["peak_bytes"] or g["state_bytes"]], **look)
    tidy(times, "position", "seconds since the start", "writing one token after the other")
    tidy(each, "position", "milliseconds a token", "")
    measured = any(row["generation"]["peak_bytes"] for row in rows)
    tidy(memory, "position", "MiB", "peak memory beside the weights" if measured else "state or cache")
    memory.set_yscale("log")
    for axes in (times, each):
        axes.set_ylim(0)
    times.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    save(figure, path)


def draw_training(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time and peak memory of a training step on one row, against its length."""
    names = [row["name"] for row in rows]
    figure, (times, memory) = plt.subplots(1, 2, figsize=(10, 4))
    for row in rows:
        t, look = row["training"], style(row["name"], names) | {"markersize": 4}
        times.plot(t["length"], t["seconds"], label=f"{row['name']}, exponent {t['time_exponent']:.2f}", **look)
        if t["peak_bytes"]:
            label = f"{row['name']}, exponent {t['memory_exponent']:.2f}"
            memory.plot(t["length"], [x / 2**30 for x in t["peak_bytes"]], label=label, **look)
    for axes in (times, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    tidy(times, "tokens in the row", "seconds a step", "training on one row")
    tidy(memory, "tokens in the row", "GiB", "peak memory beside the weights")
    times.legend(frameon=False, fontsize=9)
    if any(row["training"]["peak_bytes"] for row in rows):
        memory.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    save(figure, path)


def draw_scaling(laws: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss against compute with the line through the best runs, and the compute-optimal size."""
    names = [law["family"] for law in laws]
    figure, (losses, sizes) = plt.subplots(1, 2, figsize=(11.5, 4.4))
    for law in laws:
        look = style(law["family"], names)
        colour, line = look["color"], law["compute"]
        points = law["points"]
        for size in sorted({p["parameters"] for p in points}):
            mine = sorted((p["compute"], p["loss"]) for p in points if p["parameters"] == size)
            losses.plot(*zip(*mine), color=colour, alpha=0.35, linewidth=0.8)
        best = [p for p in points if p["frontier"]]
        rest = [p for p in points if not p["frontier"]]
        losses.scatter([p["compute"] for p in rest], [p["loss"] for p in rest], s=12, color=colour, alpha=0.35)
        losses.scatter(
            [p["compute"] for p in best], [p["loss"] for p in best], s=26, color=colour, marker=look["marker"]
        )
        ends = [min(p["compute"] for p in points), max(p["compute"] for p in points)]
        label = f"{law['family']}: C^-{line['exponent']:.3f}, r² {line['r2']:.3f}"
        losses.plot(
            ends, [math.exp(line["intercept"]) * x ** -line["exponent"] for x in ends], "--", color=colour, label=label
        )
        held = law["held_out"]
        compute = 6 * held["parameters"] * held["tokens"]
        low, high = (abs(edge - held["predicted"]) for edge in held["band"])
        losses.errorbar([compute * 1.15], [held["predicted"]], [[low], [high]], color=colour, marker="x", capsize=3)
        optimum = law["optimum"]
        sizes.plot(
            optimum["compute"],
            optimum["parameters"],
            color=colour,
            label=f"{law['family']}: C^{law['surface']['a']:.2f}",
        )
        sizes.fill_between(optimum["compute"], *optimum["band"], color=colour, alpha=0.15, linewidth=0)
        sizes.scatter(
            [p["compute"] for p in best], [p["parameters"] for p in best], s=20, color=colour, marker=look["marker"]
        )
    for axes in (losses, sizes):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=9)
    for ticks in (losses.yaxis.set_major_formatter, losses.yaxis.set_minor_formatter):
        ticks(FuncFormatter(lambda value, _: f"{value:.3g}"))
    tidy(losses, "compute 6ND, FLOP", "bits per byte, held out", "x: the largest run as predicted without it")
    tidy(sizes, "compute 6ND, FLOP", "parameters", "compute-optimal size, with the best runs")
    figure.tight_layout()
    save(figure, path)
