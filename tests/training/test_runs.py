"""Whole runs: they learn, resume exactly, survive damage and refuse to mix configurations."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import receptance as rc
from receptance.errors import CheckpointError, ConfigError
from receptance.training import read_config, train
from receptance.training.evaluate import evaluate
from receptance.training.loop import set_up

TEXT = "\n".join(f"{i} plus {j} is {i + j}." for i in range(40) for j in range(40))


class Listener:
    def __init__(self):
        self.messages, self.rows = [], []

    def message(self, text):
        self.messages.append(text)

    def step(self, row):
        self.rows.append(row)


def configure(folder, *overrides):
    (folder / "text.txt").write_text(TEXT)
    base = [
        'data.train=["text.txt"]', "data.tokenizer=byte", "model.n_layer=2", "model.n_embd=32", "model.head_size=16",
        "run.ctx_len=32", "run.batch_size=8", "run.tokens=5120", "run.log_every=1", "run.save_every=5",
        "run.valid_every=10", "optim.lr=3e-3", "optim.dropout=0.1", f"run.out={folder / 'run'}", "run.device=cpu",
    ]  # fmt: skip
    return read_config(None, [*base, f"data.root={folder}", 'data.valid={held="text.txt"}', *overrides])


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_a_run_learns_and_leaves_a_model_that_loads(tmp_path, version):
    config = configure(tmp_path, f"model.version={version}", "run.tokens=15360", "optim.dropout=0.0")
    listener = Listener()
    folder = train(config, listener)
    assert listener.rows[0]["loss"] > 5
    assert listener.rows[-1]["loss"] < listener.rows[0]["loss"] - 1.5
    model, tok = rc.load(folder), rc.tokenizer(folder)
    assert model.config.version == version
    report = json.loads((folder / "training.json").read_text())
    again = evaluate(model, tok, set_up(config, listener).valid["held"], config.run.valid_tokens)
    assert again.bits_per_byte == pytest.approx(report["validation"]["held"]["bits_per_byte"], rel=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    whole = train(configure(tmp_path / "one"), Listener())
    config = configure(tmp_path / "two")
    train(config, Listener())
    checkpoints = sorted((tmp_path / "two" / "run" / "checkpoints").iterdir())
    shutil.rmtree(checkpoints[-1])  # as if killed after the one before
    listener = Listener()
    resumed = train(config, listener)
    assert any("continuing from step 15" in text for text in listener.messages)
    a, b = rc.load(whole).state_dict(), rc.load(resumed).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    logs = [(tmp_path / name / "run" / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [[row["loss"] for row in map(json.loads, log) if "loss" in row] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 20


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    config = configure(tmp_path)
    train(config, Listener())
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(content)
    listener = Listener()
    train(config, listener)
    assert any("does not match its checksum" in text and "falling back" in text for text in listener.messages)
    assert any("continuing from step 15" in text for text in listener.messages)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(tmp_path, name):
    config = configure(tmp_path, "data.tokenizer=bpe", "data.vocab_size=300")
    train(config, Listener())
    for file in (tmp_path / "run" / "checkpoints").glob(f"*/{name}"):
        file.write_bytes(file.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = replace(config, data=replace(config.data, vocab_size=310))
    for wish in (config, other) if name == "manifest.json" else (config,):
        with pytest.raises(CheckpointError, match=r"no checkpoint is intact .*step-00000020.*move this folder away"):
            train(wish, Listener())
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_another_configuration_does_not_touch_a_run(tmp_path):
    train(configure(tmp_path), Listener())
    before = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(ConfigError, match=r"optim\.lr = 0\.003.*0\.01"):
        train(configure(tmp_path, "optim.lr=1e-2"), Listener())
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == before


def test_a_finished_run_is_not_replaced_by_another_when_its_checkpoints_are_gone(tmp_path):
    train(configure(tmp_path), Listener())
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match=r"optim\.lr = 0\.003.*0\.01"):
        train(configure(tmp_path, "optim.lr=1e-2"), Listener())


@pytest.mark.parametrize("name", ["data", "tokenizer", "config.json", "model", "log.jsonl"])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, name):
    """`--out .` beside one's own folder data, or a run in a model's folder."""
    mine = tmp_path / "run" / name
    if "." not in name:
        mine.mkdir(parents=True)
        mine /= "mine.json"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text('{"vocab_size": 1}')
    with pytest.raises(ConfigError, match=f"holds {name}, which is not a run's; choose another run.out"):
        set_up(configure(tmp_path), Listener())
    assert mine.read_text() == '{"vocab_size": 1}'


def test_text_prepared_for_other_settings_is_not_reused(tmp_path):
    set_up(configure(tmp_path), Listener())
    (tmp_path / "other.txt").write_text("Something else entirely. " * 200)
    run = set_up(configure(tmp_path, 'data.train=["other.txt"]'), Listener())
    assert run.tokenizer.decode(run.data.sources[0].tokens.tokens[:9].tolist()) == "Something"


@pytest.mark.parametrize(
    "override,message",
    [
        ("run.device=gpu", r"run\.device = 'gpu' cannot be used"),
        ("run.device=cuda:77", "'cuda:77' cannot be used"),
        ("run.device=meta", "'meta' cannot be used"),
        ("run.device=hpu", "'hpu' cannot be used"),
        ("run.device=vulkan", r"'vulkan' cannot be used here: [^.]*aten::empty\.[^.]*$"),
    ],
)
def test_an_unknown_device_is_named(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        set_up(configure(tmp_path, override), Listener())


def test_a_new_vocabulary_for_an_old_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"mean nothing to some\.pth"):
        set_up(configure(tmp_path, "model.init=some.pth", "data.tokenizer=bpe"), Listener())


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    rows = []
    for accumulate in (1, 4):
        folder = tmp_path / str(accumulate)
        folder.mkdir()
        listener = Listener()
        train(configure(folder, f"run.accumulate={accumulate}", "optim.dropout=0.0"), listener)
        rows.append([row["loss"] for row in listener.rows])
    assert rows[0] == pytest.approx(rows[1], rel=2e-4)


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_runs import Listener, configure
from receptance.training import train
train(configure(Path(sys.argv[1])), Listener())
"""


def test_kill_minus_nine_loses_nothing(tmp_path):
    """Killed several times at arbitrary moments, the run still ends with the weights of the uninterrupted one."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    whole = rc.load(train(configure(tmp_path / "one"), Listener())).state_dict()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "two"), str(__file__).rsplit("/", 1)[0]]
    log = tmp_path / "two" / "run" / "log.jsonl"
    for steps, moment in ((3, 0.0), (7, 0.01), (12, 0.02), (16, 0.005)):
        process = subprocess.Popen(command)
        while not log.exists() or log.read_text().count("loss") < steps:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    end = rc.load(train(configure(tmp_path / "two"), Listener())).state_dict()
    assert all(torch.equal(whole[key], end[key]) for key in whole)
