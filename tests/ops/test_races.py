"""What threads of a block do to the same memory is ordered by barriers, under the thread sanitizer in the emulation.

It follows what happens before what, whatever the order of a run, though for each eight bytes it remembers only four
accesses. Blocks run one after another, so what passes between them is not judged. To run after changes to barriers.
"""

import shutil
from pathlib import Path

import pytest
import torch
from tests.ops import emulation, test_wkv4_cuda, test_wkv6_cuda, test_wkv7_cuda
from tests.ops.races import Recorder

from receptance.ops import cuda
from receptance.ops.wkv6 import cuda as cuda6
from receptance.ops.wkv7 import cuda as cuda7

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA tensors are not for the emulation"),
    pytest.mark.skipif(emulation.COMPILER is None or shutil.which("setarch") is None, reason="needs a C++ compiler"),
]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(cuda, "load", recorder.load)
    return recorder


def documents(t: int) -> torch.Tensor:
    resets = torch.zeros(1, t, dtype=torch.bool)
    resets[0, [0, 5, 6, 15, 16, 47]] = True
    return resets


def test_wkv4(recorder, tmp_path):
    test_wkv4_cuda.results(test_wkv4_cuda.wkv4, test_wkv4_cuda.draw(1, 129, 6))
    reports = recorder.reports(tmp_path)
    assert set(reports) == {"forward", "backward"}
    assert not any(reports.values()), reports


def test_wkv6_and_its_segments(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda6, "SHORTEST_SEGMENT", 48)
    inputs = test_wkv6_cuda.draw(1, 100, 1, 64)
    for resets in (None, documents(100)):
        test_wkv6_cuda.results(cuda6.wkv6, inputs, resets)
    reports = recorder.reports(tmp_path)
    assert set(reports) == {"forward", "forward_ends", "backward_ends", "chain", "gradients"}
    assert not any(reports.values()), reports


def test_wkv7_and_its_segments(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda7, "MIN_SEGMENT", 4)
    inputs, kernels = test_wkv7_cuda.draw(1, 120, 1), ["forward", "forward_few", "backward"]
    for alone in (0, cuda7.ALONE):
        monkeypatch.setattr(cuda7, "ALONE", alone)
        for resets in (None, documents(120)):
            test_wkv7_cuda.results(cuda7.wkv7, inputs, resets)
    reports = recorder.reports(tmp_path)
    assert set(reports) == {f"wkv7_{x}" for x in [*kernels, "forward_maps", "join", "backward_maps"]}
    assert not any(reports.values()), reports


def test_a_barrier_left_out_is_found(recorder, tmp_path, monkeypatch):
    text = cuda7.SOURCE.read_text()
    barrier = "      team_barrier(team());\n      fetch_chunk(chunk + 2);\n"
    assert text.count(barrier) == 1
    source = Path(tmp_path, "broken.cu")
    source.write_text(text.replace(barrier, "      fetch_chunk(chunk + 2);\n"))
    monkeypatch.setattr(cuda7, "SOURCE", source)
    with torch.no_grad():
        cuda7.wkv7(*test_wkv7_cuda.draw(1, 50, 1))
    assert recorder.reports(tmp_path)["wkv7_forward_few"]
