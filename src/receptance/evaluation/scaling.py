"""`receptance scaling`: a ladder of sizes and budgets, power laws through its losses, the optimal frontier."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from receptance.atomic import replacing
from receptance.errors import ConfigError
from receptance.evaluation import grid
from receptance.evaluation.compare import Comparison, Entry, cell, read_models
from receptance.settings import read_toml
from receptance.training.report import Reporter

Floats = NDArray[np.float64]
Row = dict[str, Any]
RESAMPLED, BAND = 200, (5, 95)  # bootstrap samples; percentiles of a band
EXPONENTS = np.arange(0.05, 2.0, 0.05)  # that the surface is first searched over
FINER = 6  # searches around the best one, each in a third of the steps
LEAST = 6  # runs of a family that are worth a fit


@dataclass(frozen=True)
class Size:
    n_layer: int
    parameters: int


def read_ladder(path: Path, overrides: Sequence[str] = ()) -> tuple[Comparison, list[tuple[str, Entry]]]:
    """A file of `receptance compare` with `sizes` (n_layer, parameters) and `budgets` of tokens; each family with each.

    optim.lr is that of the widest size; the others' is larger by the root of the ratio of widths, estimated from
    parameters and layers. optim.warmup_steps is that of the longest run, shorter ones have the same share. A family's
    own n_layer stays. Returns (family, entry) pairs. Raises ConfigError.
    """
    raw = read_toml(path)
    try:
        sizes = [Size(**size) for size in raw.pop("sizes")]
        budgets = [int(tokens) for tokens in raw.pop("budgets")]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: needs sizes, a list of {{n_layer, parameters}}, and budgets, of tokens ({error})"
        ) from None
    comparison = read_models(path, raw, overrides)
    widths = [math.sqrt(size.parameters / size.n_layer) for size in sizes]
    families = {model["name"]: model for model in raw["models"]}
    ladder = []
    for entry in comparison.entries:
        for size, width in zip(sizes, widths):
            for tokens in budgets:
                factor, share = math.sqrt(max(widths) / width), tokens / max(budgets)
                config, folder = entry.config, f"{Path(entry.config.run.out).name}-{size.parameters}-{tokens}"
                layers = config.model.n_layer if "n_layer" in families[entry.name] else size.n_layer
                config = replace(
                    config,
                    model=replace(config.model, parameters=size.parameters, n_layer=layers),
                    optim=replace(
                        config.optim,
                        lr=config.optim.lr * factor,
                        lr_final=config.optim.lr_final * factor,
                        warmup_steps=round(config.optim.warmup_steps * share),
                    ),
                    run=replace(config.run, tokens=tokens, out=str(comparison.out / folder)),
                )
                ladder.append((entry.name, Entry(f"{entry.name}, {size.parameters:,}, {tokens:,}", config)))
    ladder.sort(key=lambda pair: -pair[1].config.model.parameters * pair[1].config.run.tokens)  # the longest first
    return comparison, ladder


def scaling(path: Path, overrides: Sequence[str], reporter: Reporter) -> Path:
    """Every run that has no result yet; then scaling.json, report.md and the picture. Processes share the work."""
    comparison, ladder = read_ladder(path, overrides)
    out = comparison.out
    cells = [cell(entry, comparison, reporter) for _, entry in ladder]
    grid.fill(out / "cells", cells, reporter.message)
    rows = []
    for (family, _), made in zip(ladder, cells):
        rows += [{**row, "family": family} for row in grid.finished(out / "cells", [made])]
    write(out, rows, reporter.message)
    return out


def write(out: Path, rows: Sequence[Row], tell: Callable[[str], None]) -> None:
    """rows: as `compare` makes them, with their `family`."""
    laws = [law for family in dict.fromkeys(row["family"] for row in rows)
            if (law := fit([row for row in rows if row["family"] == family])) is not None]  # fmt: skip
    slim = [
        {key: row[key] for key in ("family", "parameters_without_embedding", "tokens", "validation", "lr")}
        for row in rows
    ]
    with replacing(out / "scaling.json") as file:
        file.write(json.dumps({"runs": slim, "laws": laws}, indent=1).encode())
    with replacing(out / "report.md") as file:
        file.write(report(laws).encode())
    try:
        from receptance.evaluation.plots import draw_scaling
    except ImportError:
        tell("no picture: that needs matplotlib (pip install 'receptance[plots]')")
    else:
        if laws:
            draw_scaling(laws, out / "scaling")


def report(laws: Sequence[Row]) -> str:
    lines = ["| family | runs | L ∝ C^-e on the frontier: e | r² | held out: found | predicted | off | α | β | E | "
             "parameters ∝ C^a: a |", "|---" * 11 + "|"]  # fmt: skip
    for law in laws:
        line, surface, held = law["compute"], law["surface"], law["held_out"]
        lines.append(
            f"| {law['family']} | {len(law['points'])} | {line['exponent']:.4f} {_band(line['exponent_band'])} | "
            f"{line['r2']:.4f} | {held['loss']:.4f} | {held['predicted']:.4f} {_band(held['band'])} | "
            f"{held['predicted'] / held['loss'] - 1:+.2%} | {surface['alpha']:.2f} {_band(surface['alpha_band'])} | "
            f"{surface['beta']:.2f} {_band(surface['beta_band'])} | {surface['E']:.3f} | {surface['a']:.2f} |"
        )
    return "\n".join([*lines, "", "![scaling](scaling.png)", ""])


def _band(band: Sequence[float]) -> str:
    return f"({band[0]:.3f} to {band[1]:.3f})"


# The fits ------------------------------------------------------------------------------------------------------------


def fit(rows: Sequence[Row]) -> Row | None:
    """The laws through a family's runs: losses in bits per byte of the first validation text. None: too few runs.

    compute: log L = c - e log C through the runs that no cheaper run beats, with r² and a bootstrap band.
    surface: L = E + A N^-α + B D^-β through all runs (Hoffmann et al., 2022, approach 3), and the frontier that
    follows: N ∝ C^a with a = β / (α + β). held_out: the run of most compute, predicted by the surface without it; the
    band is for one new run, with the noise of the others.
    """
    n = np.array([row["parameters_without_embedding"] for row in rows], float)
    d = np.array([row["tokens"] for row in rows], float)
    loss = np.array([next(iter(row["validation"].values())) for row in rows])
    if len(rows) < LEAST:
        return None
    compute = 6 * n * d
    best = frontier(compute, loss)
    x, y = np.log(compute[best]), np.log(loss[best])
    slope, intercept = np.polyfit(x, y, 1)
    left = y - (slope * x + intercept)
    total = float(((y - y.mean()) ** 2).sum())
    rng = np.random.default_rng(0)
    slopes, enlarged = [], left * math.sqrt(len(left) / max(1, len(left) - 2))
    for _ in range(RESAMPLED):  # of residuals: a few points cannot lose any
        slopes.append(np.polyfit(x, slope * x + intercept + rng.choice(enlarged, len(left)), 1)[0])
    last = int(np.argmax(compute))
    rest = np.arange(len(rows)) != last
    samples = resampled(n, d, loss, rng)
    without_last = resampled(n[rest], d[rest], loss[rest], rng)
    e, a, b, alpha, beta = surface(n, d, loss)
    ranges = np.geomspace(compute.min(), compute.max(), 24)
    law = surface(n[rest], d[rest], loss[rest])
    predicted, noise = at(law, n[last], d[last]), residuals(law, n[rest], d[rest], loss[rest])
    likely = [at(s, n[last], d[last]) * math.exp(rng.choice(noise)) for s in without_last]
    optimum = [optimal(s, ranges) for s in samples]
    return {
        "family": rows[0]["family"],
        "points": [{"parameters": int(p), "tokens": int(t), "compute": float(c), "loss": float(z),
                    "frontier": i in best}
                   for i, (p, t, c, z) in enumerate(zip(n, d, compute, loss))],
        "compute": {"exponent": -slope, "intercept": intercept, "exponent_band": band([-s for s in slopes]),
                    "r2": 1 - float((left**2).sum()) / total if total else 1.0},
        "surface": {"E": e, "A": a, "B": b, "alpha": alpha, "beta": beta, "a": beta / (alpha + beta),
                    "alpha_band": band([s[3] for s in samples]), "beta_band": band([s[4] for s in samples])},
        "held_out": {"parameters": int(n[last]), "tokens": int(d[last]), "loss": float(loss[last]),
                     "predicted": predicted, "band": band(likely)},
        "optimum": {"compute": ranges.tolist(), "parameters": optimal((e, a, b, alpha, beta), ranges).tolist(),
                    "band": np.percentile(optimum, BAND, axis=0).tolist()},
    }  # fmt: skip


def frontier(compute: Floats, loss: Floats) -> list[int]:
    """The runs that are better than every run of no more compute."""
    found: list[int] = []
    for i in np.argsort(compute, kind="stable"):
        if not found or loss[i] < loss[found[-1]]:
            found.append(int(i))
    return found


Surface = tuple[float, float, float, float, float]


def surface(n: Floats, d: Floats, loss: Floats) -> Surface:
    """(E, A, B, α, β) of L = E + A N^-α + B D^-β, none of them negative: least squares of relative errors.

    For each pair of exponents the rest is linear; of the seven sets of terms that may be there, the best is taken.
    """
    scale_n, scale_d = float(np.exp(np.log(n).mean())), float(np.exp(np.log(d).mean()))
    alphas, betas, step = EXPONENTS, EXPONENTS, EXPONENTS[1] - EXPONENTS[0]
    for _ in range(1 + FINER):
        first, second = np.meshgrid(alphas, betas)
        e, a, b, alpha, beta = _best(first.ravel(), second.ravel(), n / scale_n, d / scale_d, loss)
        around = np.arange(-3, 4) * (step := step / 3)
        alphas, betas = (np.maximum(x + around, 1e-3) for x in (alpha, beta))
    return e, a * scale_n**alpha, b * scale_d**beta, alpha, beta


def _best(alphas: Floats, betas: Floats, n: Floats, d: Floats, loss: Floats) -> Surface:
    """Of these pairs of exponents."""
    terms = [np.ones((len(alphas), len(n))), n ** -alphas[:, None], d ** -betas[:, None]]
    columns = np.stack(terms, 1) / loss  # [pairs, 3, runs]
    gram, wanted = columns @ columns.transpose(0, 2, 1) + 1e-12 * np.eye(3), columns.sum(2)
    best = math.inf, (0.0, 0.0, 0.0, 1.0, 1.0)
    for used in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        weights = np.zeros((len(alphas), 3))
        weights[:, used] = np.linalg.solve(gram[:, used][:, :, used], wanted[:, used, None])[..., 0]
        errors = ((np.einsum("pc,pcr->pr", weights, columns) - 1) ** 2).sum(1)
        errors[(weights < 0).any(1)] = math.inf
        i = int(np.argmin(errors))
        if errors[i] < best[0]:
            (e, a, b), alpha, beta = weights[i].tolist(), float(alphas[i]), float(betas[i])
            best = float(errors[i]), (e, a, b, alpha, beta)
    return best[1]


def resampled(
    n: Floats, d: Floats, loss: Floats, rng: np.random.Generator, count: int = RESAMPLED // 2
) -> list[Surface]:
    """Surfaces through the fitted losses with residuals drawn again, enlarged by what the fit took of them."""
    law = surface(n, d, loss)
    fitted = np.array([at(law, *place) for place in zip(n, d)])
    left = residuals(law, n, d, loss)
    return [surface(n, d, fitted * np.exp(rng.choice(left, len(left)))) for _ in range(count)]


def residuals(law: Surface, n: Floats, d: Floats, loss: Floats) -> Floats:
    """Of log losses, as large as those of new runs: the law's numbers have taken as many degrees of freedom."""
    left = np.log(loss / np.array([at(law, *place) for place in zip(n, d)]))
    found: Floats = left * math.sqrt(len(left) / max(1, len(left) - len(law)))
    return found


def at(law: Surface, n: float, d: float) -> float:
    e, a, b, alpha, beta = law
    return float(e + a * n**-alpha + b * d**-beta)


def optimal(law: Surface, compute: Floats) -> Floats:
    """The parameters that are best for so much compute, C = 6 N D (Hoffmann et al., 2022, equation 4)."""
    _, a, b, alpha, beta = law
    if not (a > 0 and b > 0):
        return np.full_like(compute, np.nan)
    scale = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    found: Floats = scale * (compute / 6) ** (beta / (alpha + beta))
    return found


def band(values: Sequence[float]) -> list[float]:
    return [float(x) for x in np.percentile(values, BAND)]
