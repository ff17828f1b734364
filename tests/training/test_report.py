"""Rows, trackers, early stop and the two models that a run with averaged weights leaves."""

import json
import math
import sys
import types

import pytest
from test_runs import Listener, configure

import receptance as rc
from receptance.errors import ConfigError
from receptance.training import train
from receptance.training.evaluate import evaluate
from receptance.training.loop import set_up
from receptance.training.report import Log, should_stop


def test_a_row_that_is_not_finite_is_still_json(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    log.write({"step": 1, "loss": math.nan})
    log.write({"step": 2, "loss": 2.5})
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": None}, {"step": 2, "loss": 2.5}]
    (row,) = Log(tmp_path / "log.jsonl", 1).rows
    assert math.isnan(row["loss"])


def test_rows_that_find_the_disk_full_are_written_with_a_later_one(tmp_path):
    path, messages = tmp_path / "log.jsonl", []
    log = Log(path, 0, message=messages.append)
    log.write({"step": 1})
    path.rename(tmp_path / "aside")
    path.mkdir()  # nothing can be written here
    log.write({"step": 2})
    log.write({"step": 3})
    path.rmdir()
    (tmp_path / "aside").rename(path)
    with open(path, "a") as file:
        file.write('{"st')  # what a full disk still took
    log.write({"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    (message,) = messages
    assert "log.jsonl: could not be written" in message


def test_the_log_is_never_half_rewritten(tmp_path, monkeypatch):
    log = Log(tmp_path / "log.jsonl", 0)
    for step in (1, 2, 3):
        log.write({"step": step})
    before = (tmp_path / "log.jsonl").read_text()
    monkeypatch.setattr("os.replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        Log(tmp_path / "log.jsonl", 2)
    assert (tmp_path / "log.jsonl").read_text() == before


@pytest.mark.parametrize(
    "looks,stops",
    [
        ([3, 2, 1], False),
        ([3, 2, 2, 2], True),
        ([3, 1, 2, 2], True),
        ([3, 1, 2], False),
        ([3, 1, 2, 0.9], False),
        ([1, 1], False),
        ([1, math.nan, math.nan], True),
        ([math.nan, 2, 1], False),
    ],
)
def test_a_run_stops_after_as_many_looks_without_improvement_as_allowed(tmp_path, looks, stops):
    run = set_up(configure(tmp_path, "run.early_stop=2"), Listener())
    log = Log(tmp_path / "log.jsonl", 0)
    for i, value in enumerate(looks):
        log.write({"step": 10 * i, "loss": 1.0})
        log.write({"step": 10 * i, "held_bits_per_byte": value})
    assert should_stop(run, log) is stops
    assert should_stop(run, Log(log.path, 1000)) is stops  # as a resumed run reads it


def test_an_early_stop_leaves_a_model_and_stays_stopped(tmp_path):
    hostile = ("run.early_stop=1", "run.valid_every=2", "optim.lr=3.0", "optim.lr_final=3.0", "optim.grad_clip=0")
    listener = Listener()
    folder = train(configure(tmp_path, *hostile), listener)
    (ended,) = [text for text in listener.messages if "no improvement in 1 looks" in text]
    steps = int(ended.split()[1].rstrip(":"))
    assert steps < 20
    report = json.loads((folder / "training.json").read_text())
    assert report["tokens_seen"] == steps * 8 * 32
    again = Listener()
    train(configure(tmp_path, *hostile), again)
    assert again.rows == []
    assert ended in again.messages


def test_an_early_stop_with_keep_best_leaves_the_best_model_and_stays_stopped(tmp_path):
    hostile = ("run.early_stop=1", "run.valid_every=2", "optim.lr=3.0", "optim.lr_final=3.0", "optim.grad_clip=0",
               "run.keep_best=held", "run.save_dtype=bfloat16")  # fmt: skip
    overrides = ('data.valid={held="text.txt"}', *hostile)
    listener = Listener()
    folder = train(configure(tmp_path, *overrides), listener)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    looks = {}
    for row in rows:
        if "held_bits_per_byte" in row:
            looks.setdefault(row["step"], row["held_bits_per_byte"])
    best = min(looks, key=lambda step: looks[step])
    assert best < max(looks), "the run got worse before it stopped"
    assert any(f"the model is that of step {best}" in text for text in listener.messages)
    report = json.loads((folder / "training.json").read_text())
    assert report["tokens_seen"] == best * 8 * 32
    assert report["validation"]["held"]["bits_per_byte"] == pytest.approx(looks[best], rel=2e-2)
    first = (folder / "model.safetensors").read_bytes()
    again = Listener()
    train(configure(tmp_path, *overrides), again)
    assert again.rows == []
    assert (folder / "model.safetensors").read_bytes() == first


def test_averaged_weights_are_validated_and_saved_beside_the_last_ones(tmp_path):
    config = configure(tmp_path, "optim.ema=0.9", "optim.dropout=0.0")
    folder = train(config, Listener())
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum("held_ema_bits_per_byte" in row for row in rows) == 2
    run = set_up(config, Listener())
    for name in ("model", "model-ema"):
        report = json.loads((folder.parent / name / "training.json").read_text())["validation"]["held"]
        found = evaluate(rc.load(folder.parent / name), run.tokenizer, run.valid["held"], config.run.valid_tokens)
        assert found.bits_per_byte == pytest.approx(report["bits_per_byte"], rel=1e-6)
    a, b = rc.load(folder).state_dict(), rc.load(folder.parent / "model-ema").state_dict()
    assert not a["head.weight"].equal(b["head.weight"])


def test_tensorboard_gets_the_rows(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    listener = Listener()
    train(configure(tmp_path, "run.tensorboard=true"), listener)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == {row["step"]: pytest.approx(row["loss"], rel=1e-6) for row in listener.rows}
    assert [event.step for event in events.Scalars("held_bits_per_byte")] == [10, 20]


@pytest.mark.parametrize("setting,package", [("run.tensorboard=true", "tensorboard"), ("run.wandb=stories", "wandb")])
def test_a_missing_tracker_is_named_before_the_run_starts(tmp_path, monkeypatch, setting, package):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if package == "tensorboard" else package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'receptance\[{package}\]'"):
        train(configure(tmp_path, setting), Listener())


def test_weights_and_biases_get_the_rows_under_one_id(tmp_path, monkeypatch):
    """By a stand-in: which calls the real one gets."""
    calls = []

    class Run:
        id = "abc123"

        def define_metric(self, name, step_metric):
            calls.append(("define", name, step_metric))

        def log(self, row):
            calls.append(("log", row))

        def finish(self):
            calls.append(("finish",))

    def init(**settings):
        calls.append(("init", settings))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    listener = Listener()
    for _ in "12":  # the second one finds the run finished
        train(configure(tmp_path, "run.wandb=stories", "run.wandb_mode=offline", "run.tokens=1024"), listener)
    first, second = (call[1] for call in calls if call[0] == "init")
    assert (first["project"], first["name"], first["mode"], first["id"]) == ("stories", "run", "offline", None)
    assert (second["id"], second["resume"]) == ("abc123", "allow")
    assert first["config"]["model"]["n_layer"] == 2
    losses = [call[1]["loss"] for call in calls if call[0] == "log" and "loss" in call[1]]
    assert losses == [row["loss"] for row in listener.rows]
    assert [call[0] for call in calls].count("finish") == 2
    assert calls[-1] == ("finish",)


def test_weights_and_biases_itself_takes_the_rows_offline(tmp_path):
    pytest.importorskip("wandb")
    train(configure(tmp_path, "run.wandb=stories", "run.wandb_mode=offline", "run.tokens=1024"), Listener())
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert record.stat().st_size > 0
