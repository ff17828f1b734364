"""`receptance memory`: a grid from one file; every example configuration is accepted."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from receptance.cli import build
from receptance.errors import ConfigError
from receptance.evaluation.compare import read_comparison
from receptance.evaluation.memory import read_trials

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIG = """
out = "out"
[train]
steps = 2
batch = 4
[[tasks]]
task = "group"
group = "Z2"
length = 6
test_lengths = [9]
[[tasks]]
task = "copying"
symbols = 4
train = {steps = 3}
[[models]]
name = "seven"
version = 7
n_layer = 1
n_embd = 16
head_size = 8
wide_rate = true
[[models]]
version = "transformer"
n_layer = 1
n_embd = 16
head_size = 8
"""


def test_a_grid_is_run_once_and_reported(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "memory.toml").write_text(CONFIG)
    found = CliRunner().invoke(build("memory"), ["memory", str(tmp_path / "memory.toml")], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["name"] for row in rows] == ["seven", "transformer D16"] * 2
    assert [row["steps"] for row in rows] == [2, 2, 3, 3]
    assert set(rows[0]["scores"]) == {"Z2 over 6", "Z2 over 9"}
    assert "| seven | " in found.stdout
    assert (tmp_path / "out/memory.png").stat().st_size > 1000
    again = CliRunner().invoke(build("memory"), ["memory", str(tmp_path / "memory.toml")], catch_exceptions=False)
    assert json.loads((tmp_path / "out/results.json").read_text()) == rows
    assert again.stdout == found.stdout


@pytest.mark.parametrize(("old", "new", "match"), [
    ("version = 7", "version = 9", "version '9'"), ('task = "copying"', 'task = "singing"', "singing"),
    ("steps = 2", "stepps = 2", "stepps"), ("symbols = 4", "symbol = 4", "copying"), ('out = "out"', "x = 1", "'x'"),
    ("wide_rate", "wider", "seven"),
])  # fmt: skip
def test_wrong_settings_are_named(tmp_path, old, new, match):
    (tmp_path / "memory.toml").write_text(CONFIG.replace(old, new, 1))
    with pytest.raises(ConfigError, match=match):
        read_trials(tmp_path / "memory.toml")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("memory/*.toml")), ids=lambda path: path.stem)
def test_examples_of_memory_are_accepted(path):
    trials = read_trials(path)[1]
    assert len(trials) >= 3
    assert len({trial.task for trial in trials}) <= len(trials)  # tasks are keys of the examples that models share


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("compare/*.toml")), ids=lambda path: path.stem)
def test_examples_of_comparisons_are_accepted(path):
    assert len(read_comparison(path).entries) >= 3
