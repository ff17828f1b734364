"""`receptance bench cpu`: the report adds up, and an unsound model gets none."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import receptance as rc
from receptance.cli import build
from receptance.native import NoCoreError, load_core, measure

QUICK = ["--prompt", "20", "--batch", "3", "--seconds", "0.05", "--threads", "1"]


def has_core() -> bool:
    try:
        load_core()
    except NoCoreError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_core(), reason="the C++ core is not compiled here")


def test_the_report_has_speeds_limits_and_what_of_them_is_reached():
    result = CliRunner().invoke(build(), ["bench", "cpu", *QUICK, "--dtype", "int8", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["model"]["dtype"] == "int8"
    assert report["machine"]["threads"] == 1
    speeds, limits = report["tokens_per_s"], report["limits"]
    assert min(*speeds.values(), *limits.values(), *report["seconds"].values()) > 0
    expected = speeds["decode"] * report["sizes"]["bytes_per_token"] / limits["read"]
    assert report["reached"]["decode"] == pytest.approx(expected)
    assert report["peak_memory_bytes"] > 10 * 2**20


def test_the_table_names_each_figure():
    result = CliRunner().invoke(build(), ["bench", "cpu", *QUICK])
    assert result.exit_code == 0, result.output
    for words in ("decode", "prefill of 20", "3 sequences at once", "GB/s", "first token", "peak memory"):
        assert words in result.stdout


def test_bytes_of_a_token_are_those_of_the_matrices():
    model = rc.load("rwkv7-stories", engine="native", dtype="int8", threads=1)
    elements = model.n_matrix_elements
    assert 8.5 / 8 * elements <= model.bytes_per_token() <= 1.2 * elements  # low-rank maps keep 16 bits
    f, c, layers = model.config.dim_ffn, model.config.n_embd, model.config.n_layer
    assert model.bytes_per_token() - model.bytes_per_token(0.0) == layers * f * c * 34 // 32


def test_a_model_that_depends_on_how_a_prompt_is_cut_gets_no_speed(monkeypatch):
    model = rc.load("rwkv7-stories", engine="native", threads=1)
    measure.check(model)
    true = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, state=None: (true(ids)[0], state))  # forgets
    with pytest.raises(measure.UnsoundError, match="differ by"):
        measure.check(model)


def test_limits_are_those_of_real_work(monkeypatch):
    monkeypatch.setattr(measure, "READ_BYTES", 16 << 20)
    found = measure.limits(1, 0.01)
    assert all(np.isfinite(x) and x > 1e7 for x in (found.read, found.float32, found.int8))


@pytest.mark.parametrize("wrong", [["--prompt", "1"], ["--batch", "0"], ["--seconds", "0"]])
def test_sizes_that_measure_nothing_are_refused(wrong):
    result = CliRunner().invoke(build(), ["bench", "cpu", *wrong])
    assert result.exit_code == 1
    assert "must be at least" in result.output


def test_only_the_wanted_verb_is_imported():
    assert [command.name for command in build("run").registered_commands] == ["run"]
    assert len(build().registered_commands) > 5
    assert [group.name or group.typer_instance.info.name for group in build("bench").registered_groups] == ["bench"]
