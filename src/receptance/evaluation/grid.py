"""A grid of small runs: one file of results each, so that any number of processes can share the work."""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from receptance.atomic import replacing
from receptance.errors import ConfigError
from receptance.settings import build, read_toml

Row = dict[str, Any]
Plan = TypeVar("Plan")


def read_plan(cls: type[Plan], path: Path, overrides: Mapping[str, str], versions: Sequence[str]) -> Plan:
    """A TOML file with [[models]], of these versions, and a `file` of data.

    overrides: of `out` and `root`, the folder of `file`. Raises ConfigError.
    """
    found: Any = build(cls, {"file": "", **read_toml(path)}, f"{path}: ")
    if not found.models:
        raise ConfigError(f"{path}: needs [[models]]")
    for model in found.models:
        if model.version not in versions:
            raise ConfigError(f"{path}: unknown version {model.version!r}; there are {', '.join(versions)}")
    folder = path.resolve().parent
    file, out = folder / overrides.get("root", ".") / found.file, folder / overrides.get("out", found.out)
    return replace(found, file=str(file), out=str(out))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Cell:
    """name: for people. key: everything that the result depends on; another key is another file. make: the work."""

    name: str
    key: str
    make: Callable[[], Row]

    def file(self, folder: Path) -> Path:
        plain = "".join(c if c.isalnum() or c in "-._" else "-" for c in self.name)
        return folder / f"{plain[:80]}-{hashlib.sha256(self.key.encode()).hexdigest()[:8]}.json"


def fill(folder: Path, cells: Iterable[Cell], tell: Callable[[str], None]) -> list[Row | None]:
    """The result of each cell. What has one is not made again; what another process is at is left to it (None).

    A process that dies leaves nothing behind: its cell is free again, its other results stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_fill_one(cell, cell.file(folder), tell) for cell in cells]


def _fill_one(cell: Cell, path: Path, tell: Callable[[str], None]) -> Row | None:
    lock = path.with_suffix(".lock")
    if not path.exists():
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            if not path.exists():
                tell(f"— {cell.name}")
                row = cell.make()
                with replacing(path) as target:
                    target.write(json.dumps({"cell": cell.name, **row}, indent=1).encode())
            with suppress(FileNotFoundError):
                lock.unlink()
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    return found


def finished(folder: Path, cells: Iterable[Cell]) -> list[Row]:
    """The results that there are, in the cells' order."""
    files = (cell.file(folder) for cell in cells)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def run(out: Path, cells: Sequence[Cell], tell: Callable[[str], None]) -> list[Row]:
    """`fill` in the folder `cells` of `out`, then all results that there are."""
    fill(out / "cells", cells, tell)
    rows = finished(out / "cells", cells)
    if len(rows) < len(cells):
        tell(f"{len(rows)} of {len(cells)} cells are done; others are being made by other processes")
    return rows


def write(out: Path, rows: Sequence[Row], report: str) -> None:
    """results.json and report.md."""
    for name, text in (("results.json", json.dumps(list(rows), indent=1)), ("report.md", report)):
        with replacing(out / name) as target:
            target.write(text.encode())
