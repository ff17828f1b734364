"""Pictures for papers, as PNG and SVG (extra [plots])."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
    """Training loss against tokens and against time, and held-out bits per byte against tokens."""
    names = [row["name"] for row in rows]
    figure, (by_tokens, by_time, held) = plt.subplots(1, 3, figsize=(13, 4))
    for row in rows:
        look = style(row["name"], names) | {"marker": None}
        curve = row["curve"]
        losses = smooth([point["loss"] for point in curve])
        by_tokens.plot([point["tokens"] / 1e6 for point in curve], losses, label=row["name"], **look)
        by_time.plot([point["seconds"] for point in curve], losses, **look)
        looks = row["looks"]
        texts = [name for name in looks[0] if name != "tokens"] if looks else []
        for text in texts[:1]:
            points = [(x["tokens"] / 1e6, x[text]) for x in looks if text in x]
            held.plot(*zip(*points), markersize=4, **style(row["name"], names))
            tidy(held, "million tokens", f"bits per byte, {text}", "held out")
    tidy(by_tokens, "million tokens", "loss, nats per token", "training, against tokens")
    tidy(by_time, "seconds of training", "", "training, against time")
    by_tokens.legend(frameon=False, fontsize=9)
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
    """Cumulative time and size of the state against position."""
    names = [row["name"] for row in rows]
    figure, (times, memory) = plt.subplots(1, 2, figsize=(10, 4))
    for row in rows:
        g, look = row["generation"], style(row["name"], names) | {"markersize": 3}
        times.plot(g["position"], g["seconds"], label=f"{row['name']}, exponent {g['exponent']:.2f}", **look)
        memory.plot(g["position"], [x / 2**20 for x in g["state_bytes"]], **look)
    tidy(times, "position", "seconds since the start", "writing one token after the other")
    tidy(memory, "position", "state or cache, MiB", "memory beside the weights")
    memory.set_yscale("log")
    times.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    save(figure, path)
