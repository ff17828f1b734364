"""`load(..., engine="native")`: every container and layout, the same errors as with torch, and torch never imported."""

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from native_helpers import needs_core, random_model, tokens

import receptance as rc
from receptance.errors import CheckpointError
from receptance.models import VERSIONS
from receptance.native.binding import let_go

CLOSE = 1e-4  # of logits around 1 to 10, between two float32 engines


@pytest.mark.parametrize("format", ["pth", "safetensors", "folder", "hf"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_container_gives_the_logits_and_the_name_of_torch(version, format, tmp_path):
    model = random_model(version, dtype=torch.bfloat16)
    path = tmp_path / {"pth": "m.pth", "safetensors": "m.safetensors"}.get(format, "m")
    rc.save(model, path, format)
    native, exact = (rc.load(path, engine="native", dtype=dtype, threads=1) for dtype in (None, "float32"))
    other = rc.load(path, engine="torch", dtype="float32")
    with torch.no_grad():
        expected = other.forward(tokens(9))[0].numpy()
    assert np.abs(exact.forward(tokens(9))[0] - expected).max() <= CLOSE * max(1, np.abs(expected).max())
    assert native.fingerprint == other.fingerprint
    assert native.dtype == "bfloat16"


def test_every_float_type_is_read(tmp_path):
    for dtype in (torch.float64, torch.float32, torch.float16):
        model = random_model("7").to(dtype)
        rc.save(model, tmp_path / "m.safetensors")
        found = rc.load(tmp_path / "m.safetensors", engine="native", dtype="float32", threads=1).forward(tokens(9))[0]
        with torch.no_grad():
            expected = model.double().forward(tokens(9))[0].numpy()
        assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


def test_damage_is_named_as_with_torch(tmp_path):
    weights = dict(random_model("7").state_dict())
    for change, words in (
        (lambda w: w.pop("blocks.1.att.a1"), r"blocks\.1\.att\.a1: missing"),
        (lambda w: w.update({"blocks.1.att.g2": torch.zeros(3, 3)}), r"blocks\.1\.att\.g2: found"),
        (lambda w: w.update({"extra": torch.zeros(3)}), "unknown to RWKV-7"),
        (lambda w: w.update({"blocks.0.att.r_k": torch.zeros(3, 5)}), "head size of 5"),
    ):
        damaged = dict(weights)
        change(damaged)
        torch.save(damaged, tmp_path / "m.pth")
        for engine in ("native", "torch"):
            with pytest.raises(CheckpointError, match=words):
                rc.load(tmp_path / "m.pth", engine=engine)
    rc.save(random_model("7"), tmp_path / "m.safetensors")
    data = bytearray((tmp_path / "m.safetensors").read_bytes())
    data[-100] ^= 4
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC-32"):
        rc.load(tmp_path / "m.safetensors", engine="native")


def test_the_weights_stay_as_they_were_when_the_memory_is_given_back(tmp_path):
    """The file's pages are dropped after repacking; what is used in place is read again."""
    model = random_model("6", dtype=torch.bfloat16)
    rc.save(model, tmp_path / "m.pth")
    native = rc.load(tmp_path / "m.pth", engine="native")
    first = native.forward(tokens(20))[0]
    assert np.array_equal(native.forward(tokens(20))[0], first)


@needs_core
def test_torch_is_not_imported():
    code = (
        "import sys, receptance as rc\n"
        "model = rc.load('rwkv7-stories', engine='native')\n"
        "logits, state = model.forward([1, 2, 3])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_what_was_copied_from_a_mapped_file_leaves_memory(tmp_path):
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().split("\n")
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) << 10

    (tmp_path / "file").write_bytes(bytes(8 << 20))
    with open(tmp_path / "file", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        x = np.frombuffer(memoryview(mapped), np.uint8)[4096:]
        x.sum()
        before = resident()
        let_go(x)
        assert before - resident() > 7 << 20
        del x
