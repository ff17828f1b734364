import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one core a worker: more threads than cores collapse, here and in children
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before any test does it

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference outputs and texts that lies beside the checkout on the machines that have it."""
    if not SHARED.is_dir():
        pytest.skip("the reference outputs (../shared) are not on this machine")
    return SHARED


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA kernels run: on the GPU, or emulated on the CPU where there is a C++ compiler."""
    if torch.cuda.is_available():
        return
    from tests.ops import emulation

    from receptance.ops import cuda

    if emulation.COMPILER is None:
        pytest.skip("needs a GPU, or a C++ compiler for the emulation")
    monkeypatch.setattr(cuda, "load", emulation.load)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
