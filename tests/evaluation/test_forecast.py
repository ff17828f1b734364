"""Forecasting: windows that do not leak, models that are what they are called, errors over everything."""

import json
import lzma
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from receptance.cli import build
from receptance.errors import ConfigError
from receptance.evaluation import forecast
from receptance.evaluation.forecast import Forecaster, Forecasts, errors, learn, new_forecaster, read_forecasts, windows

CPU = torch.device("cpu")
PATCHED = ["4", "5.2", "6", "7", "patch-transformer"]


def silent(text: str) -> None:
    del text


def write(path: Path, table: np.ndarray) -> str:
    lines = ["date," + ",".join("abcdefgh"[: table.shape[1]])]
    lines += [f"day {i}," + ",".join(map(repr, map(float, row))) for i, row in enumerate(table)]
    path.write_bytes(lzma.compress("\n".join(lines).encode()))
    return str(path)


@pytest.fixture
def waves(tmp_path):
    """Two sines of different size and period, 400 rows."""
    t = np.arange(400)
    return write(tmp_path / "waves.csv.xz", np.stack([3 * np.sin(t / 3), 7 + 0.1 * np.sin(t / 2)], 1))


def test_windows_of_a_part_forecast_its_rows_and_no_others(tmp_path):
    """Rows are numbered, so that every window tells what it has seen."""
    file = write(tmp_path / "rows.csv.xz", np.stack([np.arange(200.0), -np.arange(200.0)], 1))
    found = windows(Forecasts(file, look_back=10), 5, CPU)
    mean, deviation = np.arange(140).mean(), np.arange(140).std()  # of the training rows alone
    rows = {part: (x[:, 0] * deviation + mean).round().long() for part, x in found.items()}
    for part, first, last in (("train", 10, 139), ("valid", 140, 159), ("test", 160, 199)):
        x = rows[part]
        assert x.shape[1:] == (15,)
        assert (x.diff(dim=1) == 1).all()
        assert int(x[0, 10]) == first  # the first row ahead
        assert int(x[-1, -1]) == last
        assert len(x) == last - first + 1 - 4
    assert torch.allclose(found["test"][:, 1], -found["test"][:, 0], atol=1e-5)


def test_ett_has_months_of_hours(tmp_path):
    file = write(tmp_path / "rows.csv.xz", np.arange(14_500.0)[:, None])
    found = windows(Forecasts(file, split="hours", look_back=96), 24, CPU)
    assert [len(x) for x in found.values()] == [8640 - 119, 2880 - 23, 2880 - 23]


def test_the_last_value_has_the_error_of_its_steps(tmp_path):
    """Rows that rise by one: k steps ahead the last value is k off."""
    file = write(tmp_path / "rows.csv.xz", np.arange(200.0)[:, None])
    row = learn(Forecasts(file, look_back=10), Forecaster("last", "repeat"), 4, 1, CPU, silent)
    deviation = np.arange(140).std()
    assert row["mae"] == pytest.approx(2.5 / deviation, rel=1e-5)
    assert row["mse"] == pytest.approx((1 + 4 + 9 + 16) / 4 / deviation**2, rel=1e-5)


def test_dlinear_begins_as_the_mean_and_splits_trend_from_rest():
    net = new_forecaster(Forecaster("d", "dlinear"), 40, 7, 1)
    x = torch.randn(3, 40)
    with torch.no_grad():
        for linear in (net.trend, net.rest):
            linear.bias.zero_()
        assert torch.allclose(net(x), x.mean(1, keepdim=True).expand(-1, 7), atol=1e-6)
        net.rest.weight.zero_()
        net.trend.weight.zero_()
        net.trend.weight[:, 20] = 1  # what is left is the moving average at that place
        assert torch.allclose(net(x), x[:, 8:33].mean(1, keepdim=True).expand(-1, 7), atol=1e-6)


@pytest.mark.parametrize("head", ["all", "last"])
@pytest.mark.parametrize("version", PATCHED)
@torch.no_grad()
def test_a_series_larger_and_higher_has_a_forecast_larger_and_higher(version, head):
    net = new_forecaster(Forecaster("p", version, 1, 16, head_size=8, head=head), 64, 12, 1).eval()
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(net(100 * x + 30), 100 * net(x) + 30, rtol=1e-3, atol=1e-2)
    assert (net(x).std(0) > 1e-3).all()  # it is no constant


@torch.no_grad()
def test_one_head_reads_all_patches_and_the_other_the_last():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for head, width in (("all", 8 * 16), ("last", 16)):
        net = new_forecaster(Forecaster("p", "7", 1, 16, head_size=8, head=head), 64, 12, 1).eval()
        assert net.head.in_features == width  # eight patches of 16 at every eighth place, the last one padded
        assert net(x).shape == (4, 12)


def test_errors_count_every_window():
    net, part = forecast.Repeat(3), torch.randn(11, 2, 8)
    off = part[:, :, -3:] - part[:, :, 4:5]
    assert errors(net, part, 3, batch=4) == pytest.approx((float(off.square().mean()), float(off.abs().mean())))


@pytest.mark.parametrize("version", ["7", "dlinear", "patch-transformer"])
def test_waves_are_learnt(waves, version):
    plan = Forecasts(waves, look_back=48, epochs=12, batch=16)
    last, found = (
        learn(plan, replace(Forecaster("m", version, 1, 16, dropout=0.0, lr=1e-2), head_size=16), 12, 1, CPU, silent)
        if version else learn(plan, Forecaster("last", "repeat"), 12, 1, CPU, silent)
        for version in ("repeat", version)
    )  # fmt: skip
    assert found["mse"] < 0.05 * last["mse"]


def test_the_best_pass_is_judged_and_training_ends_when_none_is_better(waves, monkeypatch):
    biases = iter([3.0, 0.5, 1.0, 2.0, 0.0])

    def one_pass(net, *others):
        with torch.no_grad():
            net.rest.bias.fill_(next(biases))

    monkeypatch.setattr(forecast, "train_pass", one_pass)
    row = learn(Forecasts(waves, look_back=48, patience=2), Forecaster("d", "dlinear"), 4, 1, CPU, silent)
    assert row["epochs"] == 4  # two without a better one after the second
    monkeypatch.setattr(forecast, "train_pass", lambda net, *others: net.rest.bias.data.fill_(0.5))
    again = learn(Forecasts(waves, look_back=48, epochs=1), Forecaster("d", "dlinear"), 4, 1, CPU, silent)
    assert (row["valid"], row["mse"]) == pytest.approx((again["valid"], again["mse"]))


CONFIG = """
file = "waves.csv.xz"
out = "out"
look_back = 32
horizons = [4, 8]
seeds = [1, 2]
epochs = 1
steps = 2
batch = 8
[[models]]
name = "RWKV-7"
n_layer = 1
n_embd = 16
[[models]]
name = "last value"
version = "repeat"
"""


def test_one_command_gives_a_table_and_runs_nothing_twice(waves):
    folder = Path(waves).parent
    (folder / "waves.toml").write_text(CONFIG)
    found = CliRunner().invoke(build("forecast"), ["forecast", str(folder / "waves.toml")], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    rows = json.loads((folder / "out/results.json").read_text())
    assert [(row["name"], row["horizon"], row["seed"]) for row in rows[:4]] == [
        ("RWKV-7", 4, 1), ("RWKV-7", 4, 2), ("RWKV-7", 8, 1), ("RWKV-7", 8, 2),
    ]  # fmt: skip
    line = next(line for line in found.stdout.splitlines() if line.startswith("| last value |"))
    last = [row["mse"] for row in rows if row["name"] == "last value"]
    assert f"{sum(last) / 4:.3f}" in line.split("|")[-2]
    assert all(math.isfinite(row["mse"]) for row in rows)
    CliRunner().invoke(build("forecast"), ["forecast", str(folder / "waves.toml")], catch_exceptions=False)
    assert json.loads((folder / "out/results.json").read_text()) == rows


@pytest.mark.parametrize(("old", "new", "match"), [
    ('version = "repeat"', 'version = "oracle"', "oracle"), ("look_back = 32", 'split = "days"', "split"),
    ("epochs = 1", "epoch = 1", "epoch"), ("n_embd", "width", "width"), ("steps = 2", 'root = "x"', "root"),
    ("n_embd = 16", 'head = "first"', "first"),
])  # fmt: skip
def test_wrong_settings_are_named(tmp_path, old, new, match):
    (tmp_path / "x.toml").write_text(CONFIG.replace(old, new))
    with pytest.raises(ConfigError, match=match):
        read_forecasts(tmp_path / "x.toml")


def test_wrong_tables_are_named(tmp_path, waves):
    with pytest.raises(ConfigError, match="too few"):
        windows(Forecasts(waves, look_back=390), 20, CPU)
    (tmp_path / "words.csv").write_text("date,a\n1,two\n")
    for name in ("words.csv", "absent.csv"):
        with pytest.raises(ConfigError, match=name):
            windows(Forecasts(str(tmp_path / name)), 4, CPU)
