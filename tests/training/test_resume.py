"""Checkpoints on a bad disk: whatever fails, the ones before stay, and nothing half-written is ever taken for whole."""

import builtins
import errno
import json
import math
import os
import pickle
import random
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from test_runs import Listener, configure
from test_segments import lively

import receptance as rc
from receptance.errors import CheckpointError
from receptance.models import VERSIONS
from receptance.training import train
from receptance.training.config import OptimConfig
from receptance.training.optim import build_optimizer
from receptance.training.resume import Checkpoints, folders
from receptance.training.shards import METADATA, shard_names


class Alone:
    """One process; `is_sharded` writes with DCP all the same."""

    def __init__(self, is_sharded=False):
        self.is_sharded, self.is_first, self.size = is_sharded, True, 1

    def agree(self, value, group=None):
        return value


def pair(seed=0):
    """A model and an optimiser with moments."""
    model = lively("7", torch.float32)
    recipe = VERSIONS["7"].recipe(model.config)
    optimizer = build_optimizer(model, recipe, OptimConfig())
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()
    return model, optimizer


def contents(model, optimizer):
    moments = {f"{i} {k}": x for i, s in enumerate(optimizer.state.values()) for k, x in s.items()}
    return {**model.state_dict(), **moments}


def assert_equal(pair, expected):
    found = contents(*pair)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def saved(checkpoints, step, seed, **more):
    model, optimizer = pair(seed)
    checkpoints.save(step, model, optimizer, "{}", **more)
    return contents(model, optimizer)


class FullDisk:
    """Lets `allowed` operations on files pass and fails all later ones; counts them."""

    def __init__(self, monkeypatch, code):
        self.allowed, self.count, self.code = 10**9, 0, code
        for name in ("fsync", "replace", "mkdir"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        opened = builtins.open

        def open_(path, mode="r", *rest, **named):
            file = opened(path, mode, *rest, **named)
            if "w" in mode:
                file.write = self.wrap(file.write, file)
            return file

        monkeypatch.setattr("receptance.training.resume.open", open_, raising=False)

    def wrap(self, function, file=None):
        def wrapped(*arguments, **named):
            self.count += 1
            if self.count > self.allowed:
                if file is not None:  # half of it arrives
                    function(bytes(arguments[0])[: len(arguments[0]) // 2])
                raise OSError(self.code, os.strerror(self.code))
            return function(*arguments, **named)

        return wrapped


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path, monkeypatch, code):
    """At every single operation in turn."""
    checkpoints = Checkpoints(tmp_path, Alone())
    first = saved(checkpoints, 1, seed=1)
    second = pair(2)
    save = lambda: checkpoints.save(2, *second, "{}")
    with monkeypatch.context() as patch:
        disk = FullDisk(patch, code)
        save()
        operations = disk.count
        shutil.rmtree(checkpoints.root / "step-00000002")
        assert operations > 60  # a write for each tensor among them
        for allowed in range(operations - 1):
            disk.allowed, disk.count = allowed, 0
            with pytest.raises(CheckpointError, match=r"step-00000002: the checkpoint could not be written"):
                save()
            disk.allowed = 10**9
            for folder in folders(checkpoints.root)[:-1]:  # complete when only the last sync after the rename failed
                assert (folder / "manifest.json").exists()
                shutil.rmtree(folder)
            assert [path.name for path in checkpoints.root.iterdir()] == ["step-00000001"]
    other = pair(3)
    assert checkpoints.load(*other).step == 1
    assert_equal(other, first)


@contextmanager
def files_at_most(size):
    """The kernel itself cuts every file off there, with a short write and then an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("is_sharded", [False, True], ids=["files", "shards"])
def test_a_file_cut_short_by_the_system_leaves_the_checkpoint_before(tmp_path, is_sharded):
    checkpoints = Checkpoints(tmp_path, Alone(is_sharded))
    first = saved(checkpoints, 1, seed=1)
    sizes = {path.stat().st_size for path in (checkpoints.root / "step-00000001").rglob("*") if path.is_file()}
    assert len(sizes) >= 3
    for size in sorted({0, 1, *(s - 1 for s in sizes), *(s // 2 for s in sizes)}):
        with files_at_most(size), pytest.raises(CheckpointError, match="could not be written"):
            saved(checkpoints, 2, seed=2)
        assert [path.name for path in checkpoints.root.iterdir()] == ["step-00000001"]
    other = pair(3)
    assert checkpoints.load(*other).step == 1
    assert_equal(other, first)
    saved(checkpoints, 2, seed=2)
    assert checkpoints.load(*other).step == 2


@pytest.mark.parametrize("is_sharded", [False, True], ids=["files", "shards"])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path, is_sharded):
    checkpoints = Checkpoints(tmp_path, Alone(is_sharded))
    first = saved(checkpoints, 1, seed=1, notes={"seen": 5})
    saved(checkpoints, 2, seed=2)
    files = [path for path in (checkpoints.root / "step-00000002").rglob("*") if path.is_file()]
    draw = random.Random(1)
    for path in files:
        content = path.read_bytes()
        place = draw.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        other = pair(3)
        restored = checkpoints.load(*other)
        assert (restored.step, restored.notes) == (1, {"seen": 5})
        assert "falling back to the one before it" in restored.warnings[0]
        assert_equal(other, first)
        path.write_bytes(content)
    files[0].unlink()
    assert checkpoints.load(*pair()).step == 1


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, Alone(), keep=2)
    for step, score in enumerate([3.0, 1.0, None, 2.0, None, 1.5], 1):
        if score is not None:
            assert checkpoints.is_best(score) == (score in (3.0, 1.0))
        saved(checkpoints, step, seed=step, score=score)
    assert [folder.name[-1] for folder in folders(checkpoints.root)] == ["6", "5", "2"]


def test_a_damaged_best_is_written_anew_when_its_score_is_reached_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, Alone())
    for step, score in enumerate([3.0, 1.0], 1):
        saved(checkpoints, step, seed=step, score=score)
    (checkpoints.root / "step-00000002" / "model.safetensors").write_bytes(b"")
    resumed = Checkpoints(tmp_path, Alone())
    assert resumed.load(*pair()).step == 1
    assert resumed.is_best(1.0)
    saved(resumed, 2, seed=2, score=1.0)
    assert not resumed.is_best(1.0)
    assert resumed.load(*pair(), best=True).step == 2


def test_a_score_that_is_no_number_does_not_cost_the_best(tmp_path):
    """A run that goes wrong after its best look."""
    checkpoints = Checkpoints(tmp_path, Alone(), keep=2)
    for step, score in enumerate([3.0, 1.0, math.nan, math.nan, math.inf], 1):
        saved(checkpoints, step, seed=step, score=score)
    assert [folder.name[-1] for folder in folders(checkpoints.root)] == ["5", "4", "2"]
    assert checkpoints.is_best(0.5)
    assert not checkpoints.is_best(math.nan)
    assert checkpoints.load(*pair(), best=True).step == 2


def test_a_checkpoint_in_the_background_is_of_the_moment_it_was_asked_for(tmp_path):
    checkpoints = Checkpoints(tmp_path, Alone(), in_background=True)
    model, optimizer = pair(1)
    expected = {name: x.clone() for name, x in contents(model, optimizer).items()}
    checkpoints.save(1, model, optimizer, "{}")
    with torch.no_grad():
        for x in contents(model, optimizer).values():
            x.zero_()
    checkpoints.wait()
    other = pair(3)
    assert checkpoints.load(*other).step == 1
    assert_equal(other, expected)
    with files_at_most(1):
        checkpoints.save(2, model, optimizer, "{}")
        with pytest.raises(CheckpointError, match="could not be written"):
            checkpoints.wait()
    checkpoints.wait()  # told once


@pytest.mark.parametrize("is_sharded", [False, True], ids=["files", "shards"])
def test_a_checkpoint_of_another_model_is_named(tmp_path, is_sharded):
    checkpoints = Checkpoints(tmp_path, Alone(is_sharded))
    saved(checkpoints, 1, seed=1)
    other = lively("6", torch.float32)
    with pytest.raises(CheckpointError, match=r"not this model's: blocks\.0\.att"):
        checkpoints.load(other, build_optimizer(other, VERSIONS["6"].recipe(other.config), OptimConfig()))


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("bomb",))


@pytest.mark.parametrize("content", [pickle.dumps(Bomb()), b"", b"garbage", pickle.dumps([1])])
def test_a_table_of_contents_runs_no_code(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match="not the table of a checkpoint"):
        shard_names(tmp_path)
    assert not (tmp_path / "bomb").exists()


def test_a_disk_that_is_full_for_a_while_does_not_end_the_run(tmp_path, monkeypatch):
    ordinary, calls = Checkpoints._write, []

    def full(self, step, *rest):
        calls.append(step)
        if step in (5, 15):
            raise CheckpointError(f"step {step}: the checkpoint could not be written")
        ordinary(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "_write", full)
    listener = Listener()
    config = configure(tmp_path, 'data.valid={held="text.txt"}', "run.save_in_background=true", "run.keep_best=held")
    folder = train(config, listener)
    assert calls == [5, 10, 15, 20]
    assert sum("the ones before it are intact, going on" in text for text in listener.messages) == 2
    assert rc.load(folder).config.version == "7"
    manifest = json.loads((tmp_path / "run/checkpoints/step-00000010/manifest.json").read_text())
    assert manifest["score"] > 0
