"""A save that fails leaves what was there before, and nothing else."""

import errno
import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import assert_same, tiny_model, tiny_weights

from receptance import atomic
from receptance.checkpoint import load, save
from receptance.errors import CheckpointError

FORMATS = {"pth": "model.pth", "safetensors": "model.safetensors", "folder": "model", "hf": "model"}


class FailingFile(io.FileIO):
    """A file whose nth write fails."""

    def __init__(self, path: Path, mode: str, failure: BaseException, after: int) -> None:
        super().__init__(path, mode)
        self.failure, self.left = failure, after

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise self.failure
        return super().write(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_at_any_write_leaves_the_previous_file(format, number, tmp_path, monkeypatch):
    path = tmp_path / FORMATS[format]
    save(tiny_weights(), path, format=format)
    before = contents(tmp_path)
    other = {name: tensor + 1 for name, tensor in tiny_weights().items()}
    for after in (0, 1, 2, 5, 20, 50):
        failing = partial(FailingFile, failure=OSError(number, os.strerror(number)), after=after)
        monkeypatch.setattr(atomic, "open", failing, raising=False)
        with pytest.raises(CheckpointError, match="could not be written") as error:
            save(other, path, format=format)
        assert str(path) in str(error.value)
        assert contents(tmp_path) == before
        monkeypatch.undo()
        assert_same(load(path).state_dict(), tiny_weights())


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupt_leaves_the_previous_file(format, tmp_path, monkeypatch):
    path = tmp_path / FORMATS[format]
    save(tiny_weights(), path, format=format)
    before = contents(tmp_path)
    monkeypatch.setattr(atomic, "open", partial(FailingFile, failure=KeyboardInterrupt(), after=3), raising=False)
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        save(tiny_weights(), path, format=format)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_sync_or_rename_leaves_the_previous_file(call, weights, tmp_path, monkeypatch):
    save(weights, tmp_path / "model.pth")
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match="input/output error"):
        save({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "model.pth")
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_the_file_is_on_disk_before_it_takes_its_name(weights, tmp_path, monkeypatch):
    events = []

    def recorded(call: str, real: Callable[..., None], *args: object) -> None:
        events.append(call)
        real(*args)

    for call in ("fsync", "replace"):
        monkeypatch.setattr(os, call, partial(recorded, call, getattr(os, call)))
    save(weights, tmp_path / "model.safetensors")
    assert events == ["fsync", "replace", "fsync"]


def test_a_loaded_model_survives_its_file_being_replaced(weights, tmp_path):
    save(weights, tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors")
    save({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    assert_same(model.state_dict(), weights)
    save(model, tmp_path / "model.safetensors")  # onto itself
    assert_same(load(tmp_path / "model.safetensors").state_dict(), weights)


def test_training_a_loaded_model_does_not_touch_the_file(weights, tmp_path):
    save(weights, tmp_path / "model.pth")
    before = contents(tmp_path)
    model = load(tmp_path / "model.pth", dtype="bfloat16")
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model([1, 2, 3])[0].float().sum().backward()
    optimizer.step()
    assert not torch.equal(model.emb.weight, weights["emb.weight"])
    assert contents(tmp_path) == before


def test_saved_files_are_readable_by_others(tmp_path):
    old = os.umask(0o022)
    try:
        save(tiny_model("7"), tmp_path / "model.pth")
    finally:
        os.umask(old)
    assert (tmp_path / "model.pth").stat().st_mode & 0o777 == 0o644


def test_what_is_no_model_is_not_written(weights, tmp_path):
    del weights["ln_out.bias"]
    with pytest.raises(CheckpointError, match=r"ln_out\.bias: missing"):
        save(weights, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="no RWKV"):
        save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tiny_model("7"), tmp_path / "absent" / "model.pth")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be made a folder"):
        save(tiny_model("7"), tmp_path / "file", format="folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
