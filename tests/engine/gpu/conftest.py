from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def choices_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is measured about the GPU stays with the test."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("receptance.engine.gpu.choices.cache_folder", lambda: folder)
    return folder
