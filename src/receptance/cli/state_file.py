"""Writing a state where the user asked for it, with the errors that a path can cause."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from receptance.errors import ReceptanceError

if TYPE_CHECKING:
    from receptance.engine.protocols import Model, State


def check_target(path: Path) -> None:
    """Refuse a path that cannot be written before minutes of work are spent on what should go there."""
    if not path.parent.is_dir():
        raise ReceptanceError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ReceptanceError(f"{path}: nothing can be written into the folder {path.parent}")
    if path.exists() and not path.is_file():  # replacing a device or a pipe would remove it
        raise ReceptanceError(f"{path}: is not a regular file; name a file for the state")


def save_state(state: "State", path: Path, model: "Model") -> None:
    check_target(path)
    state.save(path, model)
