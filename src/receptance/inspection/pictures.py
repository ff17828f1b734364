"""Static pictures of a recording, as PNG and SVG (extra [plots])."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from receptance.evaluation.plots import save, tidy
from receptance.inspection.attribution import Attribution
from receptance.inspection.measures import Lens, Measured, shares_of_the_past
from receptance.inspection.record import Recording
from receptance.inspection.trace import Trace


def draw_all(
    recording: Recording, attribution: Attribution, measured: Measured, words: list[str], folder: Path
) -> list[str]:
    """Every picture that a recording has; the names of the files, without suffix. words: the tokens as text."""
    draw_decay(recording, measured, folder / "decay")
    draw_shift(recording, folder / "shift")
    draw_state(recording, measured, folder / "state")
    draw_strengths(recording, measured, folder / "strengths")
    draw_lens(measured.lens, words, folder / "lens")
    draw_attribution(attribution, words, folder / "attribution")
    return ["decay", "shift", "state", "strengths", "lens", "attribution"]


def _layers(recording: Recording) -> list[int]:
    return [i for i, layer in enumerate(recording.layers) if layer.read is not None]


def _shade(i: int, n: int) -> tuple[float, ...]:
    shade: tuple[float, ...] = plt.get_cmap("viridis")(0.05 + 0.85 * i / max(n - 1, 1))
    return shade


def draw_decay(recording: Recording, measured: Measured, path: Path) -> None:
    """The decay spectrum of each layer, the half-lives that follow from it, and how far back its heads read."""
    figure, (spectrum, lives, far) = plt.subplots(1, 3, figsize=(13, 4))
    layers = _layers(recording)
    for i in layers:
        colour, decay = _shade(i, len(recording.layers)), measured.decay[i].exp().sort().values
        at = torch.linspace(0, 1, len(decay))
        spectrum.plot(at, decay, color=colour, label=f"layer {i}")
        lives.plot(at, measured.lives[i].sort().values, color=colour)
        found = measured.reach[i].flatten()
        far.scatter([i] * len(found), found, s=8 if len(found) > 64 else 18, color=colour, alpha=0.6, linewidths=0)
    lives.set_yscale("log")
    far.set_yscale("log")
    tidy(spectrum, "channels, sorted (share)", "decay a token", "what is kept from token to token")
    tidy(lives, "channels, sorted (share)", "tokens", "half-life")
    text = "mean distance of what heads read" if recording.layers[layers[-1]].matrix else "mean age of what is held"
    tidy(far, "layer", "tokens", text)
    _layer_bar(figure, spectrum, len(recording.layers))
    figure.tight_layout()
    save(figure, path)


def _layer_bar(figure: Figure, axes: Axes, n: int) -> None:
    if n <= 12:
        axes.legend(frameon=False, fontsize=8)
        return
    scale = ScalarMappable(Normalize(0, n - 1), "viridis")
    figure.colorbar(scale, ax=axes, label="layer")


def draw_shift(recording: Recording, path: Path) -> None:
    """Of each token-shift mix: the share of the previous token, all channels, by layer."""
    tables = [shares_of_the_past(block) for block in recording.model.blocks]
    names = list(dict.fromkeys(name for table in tables for name in table))
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.5 * rows), squeeze=False, sharey=True)
    for axes in panels.flat[len(names) :]:
        axes.axis("off")
    for name, axes in zip(names, panels.flat):
        for i, table in enumerate(tables):
            if name in table:
                values = table[name].sort().values.cpu()
                axes.plot(torch.linspace(0, 1, len(values)), values, color=_shade(i, len(tables)), label=f"layer {i}")
        tidy(axes, "channels, sorted", "", name)
    panels[0][0].set_ylabel("share of the previous token")
    _layer_bar(figure, panels[0][0], len(tables))
    figure.tight_layout()
    save(figure, path)


def draw_state(recording: Recording, measured: Measured, path: Path) -> None:
    """Norm and effective rank of the state along the text, mean over heads."""
    layers = _layers(recording)
    with_rank = recording.layers[layers[0]].matrix
    figure, panels = plt.subplots(1, 2 if with_rank else 1, figsize=(10 if with_rank else 5.5, 4), squeeze=False)
    for i in layers:
        found, colour = measured.held[i], _shade(i, len(recording.layers))
        panels[0][0].plot(found.positions, found.norm.mean(-1), color=colour, label=f"layer {i}")
        if found.rank is not None:
            panels[0][1].plot(found.positions, found.rank.mean(-1), color=colour)
    tidy(panels[0][0], "position", "Frobenius norm" if with_rank else "norm", "how much the state holds")
    if with_rank:
        n = recording.layers[layers[0]].inputs["k"].shape[-1]
        tidy(panels[0][1], "position", f"effective rank, of {n}", "how many things it holds")
    _layer_bar(figure, panels[0][0], len(recording.layers))
    figure.tight_layout()
    save(figure, path)


def _heat(axes: Axes, values: Tensor, title: str, *, signed: bool = False, most: float | None = None) -> None:
    top = most if most is not None else float(values.abs().max()) or 1.0
    bottom, colours = (-top, "RdBu_r") if signed else (0.0, "viridis")
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=bottom, vmax=top, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, pad=0.01)
    axes.set_ylabel("layer")
    axes.set_title(title, loc="left", fontsize=10)


def _words(axes: Axes, words: list[str], most: int = 80) -> None:
    """Tokens under the columns, when there is room for them."""
    if len(words) <= most:
        axes.set_xticks(range(len(words)), [shown(word) for word in words], rotation=90, fontsize=7)
    else:
        axes.set_xlabel("position")


def shown(word: str) -> str:
    return word.replace("\n", "⏎").replace(" ", "·").replace("$", r"\$")


def _wide(words: list[str]) -> float:
    return min(max(6.0, 2.5 + 0.17 * len(words)), 16.0)


def draw_strengths(recording: Recording, measured: Measured, path: Path) -> None:
    """How much each token writes into each layer's state and removes from it, mean over heads."""
    written, removed = (
        torch.stack([x.mean(-1) for x in found.values()]) for found in (measured.written, measured.removed)
    )
    figure, (above, below) = plt.subplots(2, 1, figsize=(12, 5.5), sharex=True)
    first = recording.layers[_layers(recording)[0]]
    _heat(
        above, written, "written: |key| × |value|" if first.matrix else "written: share of the new token", signed=False
    )
    title = "removed: in-context rate along the key" if "a" in first.inputs else "decayed: mean share"
    _heat(below, removed, title if first.matrix else "share of the past that the new token replaces")
    below.set_xlabel("position")
    figure.tight_layout()
    save(figure, path)


def draw_lens(lens: Lens, words: list[str], path: Path, last: int = 24) -> None:
    """What each layer would answer after each of the last tokens."""
    first = max(0, len(words) - last)
    figure, axes = plt.subplots(figsize=(_wide(words[first:]) + 2, 1.2 + 0.3 * len(lens.final)))
    _heat(axes, lens.final[:, first:], "logit lens: chance of the model's own answer after each layer", most=1.0)
    _words(axes, words[first:])
    figure.tight_layout()
    save(figure, path)


def draw_attribution(attribution: Attribution, words: list[str], path: Path, last: int = 48) -> None:
    """What each token of the past gave to the logit of the last target, by layer."""
    parts = attribution.past[-1]  # [L, T]
    first = max(0, len(words) - last)
    figure, axes = plt.subplots(figsize=(_wide(words[first:]), 1.6 + 0.3 * len(parts)))
    _heat(axes, parts[:, first:], "given to the likeliest next token's logit, through each layer's state", signed=True)
    _words(axes, words[first:])
    figure.tight_layout()
    save(figure, path)


def draw_trace(found: Trace, words: list[str], subject: range, path: Path) -> None:
    """Log-probability of the answer that comes back with one vector, or one memory, put back."""
    marked = [f"*{word}" if i in subject else word for i, word in enumerate(words)]
    tables = [(found.hidden, "vector put back")] + ([(found.memory, "memory put back")] if found.memory.numel() else [])
    figure, panels = plt.subplots(1, len(tables), figsize=(len(tables) * _wide(words), 2.2 + 0.25 * len(found.hidden)))
    lost = max(found.clean - found.corrupted, 1e-6)
    for axes, (values, title) in zip(panels if len(tables) > 1 else [panels], tables):
        _heat(
            axes, (values - found.corrupted) / lost, f"{title}: share of the answer that returns", signed=True, most=1.0
        )
        _words(axes, marked[: values.shape[1]])
    figure.suptitle(
        f"log-probability of the answer: {found.clean:.2f}, with noise on * {found.corrupted:.2f}", fontsize=10
    )
    figure.tight_layout()
    save(figure, path)
