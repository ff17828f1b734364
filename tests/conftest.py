from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference outputs and texts that lies beside the checkout on the machines that have it."""
    if not SHARED.is_dir():
        pytest.skip("the reference outputs (../shared) are not on this machine")
    return SHARED
