"""The models that ship inside the package: folders of `assets`, known by name."""

from os import PathLike
from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"


def embedded_models() -> list[str]:
    """Their names."""
    return sorted(config.parent.name for config in ASSETS.glob("*/config.json"))


def resolve(name_or_path: str | PathLike[str]) -> Path:
    """The folder of the embedded model of that name, unless a file or folder of that name exists; else the path."""
    path = Path(name_or_path)
    if not path.exists() and str(name_or_path) in embedded_models():
        return ASSETS / path
    return path
