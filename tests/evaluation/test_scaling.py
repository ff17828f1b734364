"""Power laws that are known are found; the ladder is what the file says."""

import json
import math
from functools import partial

import numpy as np
import pytest

from receptance.errors import ConfigError
from receptance.evaluation import scaling
from receptance.evaluation.scaling import at, fit, frontier, optimal, read_ladder, surface

SIZES = np.array([1e6, 3e6, 8e6, 2e7, 4e7])
BUDGETS = np.array([2e7, 6e7, 2e8])
LAW = (0.8, 300.0, 700.0, 0.45, 0.4)  # E, A, B, α, β
WHOLE = scaling.resampled
N, D = (x.ravel() for x in np.meshgrid(SIZES, BUDGETS, indexing="ij"))


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """Bands of a dozen samples: enough to see what they are of."""
    monkeypatch.setattr(scaling, "resampled", partial(scaling.resampled, count=12))


def runs(loss, n=N, d=D):
    return [
        {"family": "f", "parameters_without_embedding": int(p), "tokens": int(t), "validation": {"held": float(x)}}
        for p, t, x in zip(n, d, loss)
    ]


def losses(noise=0.0, seed=0):
    exact = np.array([at(LAW, p, t) for p, t in zip(N, D)])
    return exact * np.exp(noise * np.random.default_rng(seed).standard_normal(len(exact)))


def test_a_law_that_is_known_is_found():
    e, a, b, alpha, beta = surface(N, D, losses())
    assert (alpha, beta) == pytest.approx(LAW[3:], abs=0.02)
    assert e == pytest.approx(LAW[0], abs=0.03)
    found = np.array([at((e, a, b, alpha, beta), p, t) for p, t in zip(N, D)])
    assert found == pytest.approx(losses(), rel=2e-3)


def test_the_run_of_most_compute_is_predicted_from_the_others():
    """A last run that has nothing to do with the law does not move its own prediction."""
    law = fit(runs(losses()))
    held = law["held_out"]
    assert (held["parameters"], held["tokens"]) == (4e7, 2e8)
    assert held["predicted"] == pytest.approx(held["loss"], rel=3e-3)
    moved = losses()
    moved[-1] *= 1.5
    assert fit(runs(moved))["held_out"]["predicted"] == pytest.approx(held["predicted"], rel=1e-9)


def test_a_power_of_compute_is_a_line():
    law = fit(runs(5 * (6 * N * D) ** -0.07))
    assert law["compute"]["exponent"] == pytest.approx(0.07, abs=1e-9)
    assert law["compute"]["r2"] == pytest.approx(1)
    assert law["compute"]["exponent_band"] == pytest.approx([0.07, 0.07], abs=1e-9)


def test_bands_widen_with_noise():
    quiet, loud = (fit(runs(losses(noise))) for noise in (0.001, 0.02))
    wide = [law["held_out"]["band"][1] - law["held_out"]["band"][0] for law in (quiet, loud)]
    assert wide[1] > 3 * wide[0] > 0


@pytest.mark.slow
def test_nine_bands_of_ten_hold_the_run_that_they_predict(monkeypatch):
    """Which is what a band from the 5th to the 95th percentile promises; a wide enough one would hold everything."""
    monkeypatch.setattr(scaling, "resampled", WHOLE)
    found = [fit(runs(losses(0.01, seed)))["held_out"] for seed in range(16)]
    assert sum(held["band"][0] < held["loss"] < held["band"][1] for held in found) >= 12
    assert np.mean([(held["band"][1] - held["band"][0]) / held["loss"] for held in found]) < 0.06


def test_the_frontier_is_what_no_cheaper_run_beats():
    assert frontier(np.array([1.0, 2, 3, 4, 5]), np.array([3.0, 3.5, 2, 2, 1])) == [0, 2, 4]
    assert frontier(np.array([5.0, 1, 3]), np.array([1.0, 2, 2.5])) == [1, 0]


def test_the_optimal_size_is_the_minimum_at_that_compute():
    compute = np.array([1e15, 1e17])
    for c, found in zip(compute, optimal(LAW, compute)):
        tried = np.geomspace(found / 10, found * 10, 2001)
        best = tried[np.argmin([at(LAW, n, c / (6 * n)) for n in tried])]
        assert found == pytest.approx(best, rel=2e-3)
    assert np.isnan(optimal((1.0, 0.0, 5.0, 0.5, 0.5), compute)).all()  # size does not matter there


def test_few_runs_are_no_law():
    assert fit(runs(losses()[:5], N[:5], D[:5])) is None
    assert fit(runs(losses()[:6], N[:6], D[:6])) is not None


def test_a_report_is_written_with_its_numbers(tmp_path):
    rows = [row | {"lr": 1e-3} for row in runs(losses(0.01))]
    scaling.write(tmp_path, rows, lambda text: None)
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert len(found["runs"]) == 15
    assert found["laws"][0]["surface"]["a"] == pytest.approx(LAW[4] / (LAW[3] + LAW[4]), abs=0.15)
    line = (tmp_path / "report.md").read_text().splitlines()[2]
    assert line.startswith("| f | 15 | ")
    assert f"{found['laws'][0]['held_out']['predicted']:.4f}" in line


LADDER = """
sizes = [{ n_layer = 2, parameters = 40_000 }, { n_layer = 8, parameters = 640_000 }]
budgets = [1000, 3000]
[data]
train = ["text.txt"]
[optim]
lr = 1e-3
lr_final = 1e-4
[run]
out = "out"
[[models]]
name = "RWKV-7"
[[models]]
name = "LSTM"
version = "lstm"
n_layer = 3
"""


def test_a_ladder_has_every_size_with_every_budget(tmp_path):
    (tmp_path / "ladder.toml").write_text(LADDER)
    comparison, ladder = read_ladder(tmp_path / "ladder.toml")
    assert comparison.out == tmp_path / "out"
    configs = {
        (family, entry.config.model.parameters, entry.config.run.tokens): entry.config for family, entry in ladder
    }
    assert len(configs) == len(ladder) == 8
    assert len({config.run.out for config in configs.values()}) == 8
    work = [entry.config.model.parameters * entry.config.run.tokens for _, entry in ladder]
    assert work == sorted(work, reverse=True)  # the longest first
    assert configs["RWKV-7", 640_000, 1000].model.n_layer == 8
    assert configs["RWKV-7", 40_000, 1000].model.n_layer == 2
    assert configs["LSTM", 640_000, 3000].model.n_layer == 3
    wide, narrow = configs["RWKV-7", 640_000, 1000], configs["RWKV-7", 40_000, 1000]
    assert wide.optim.lr == 1e-3
    ratio = math.sqrt(math.sqrt(640_000 / 8) / math.sqrt(40_000 / 2))  # root of the ratio of widths
    assert narrow.optim.lr == pytest.approx(1e-3 * ratio)
    assert narrow.optim.lr_final == pytest.approx(1e-4 * ratio)


@pytest.mark.parametrize("broken", ["budgets = [1000, 3000]", "n_layer = 2, "])
def test_a_ladder_without_its_steps_is_refused(tmp_path, broken):
    (tmp_path / "ladder.toml").write_text(LADDER.replace(broken, ""))
    with pytest.raises(ConfigError, match="sizes"):
        read_ladder(tmp_path / "ladder.toml")
