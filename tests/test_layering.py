"""Who may import whom: one direction only, so that a change to one room never surprises the ones below it."""

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "receptance"

MAY_IMPORT = {
    "errors": set(),
    "atomic": {"errors"},
    "state_file": {"errors", "atomic"},
    "embedded": set(),
    "settings": {"errors"},
    "ops": {"errors"},
    "tokenizers": {"errors", "embedded", "gguf"},
    "native": {"errors", "state_file"},
    "gguf": {"errors", "native"},
    "models": {"errors", "ops", "state_file"},
    "baselines": {"errors", "atomic", "ops", "models", "checkpoint"},
    "checkpoint": {"errors", "atomic", "embedded", "baselines", "models", "native", "gguf"},
    "data": {"errors", "tokenizers"},
    "engine": {"errors", "atomic", "models", "checkpoint", "native", "ops", "tokenizers"},
    "generation": {"errors", "engine", "models", "tokenizers"},
    "training": {"errors", "atomic", "ops", "models", "baselines", "data", "checkpoint", "tokenizers", "settings"},
    "server": {"errors", "atomic", "state_file", "settings", "engine", "tokenizers", "checkpoint", "models", "native"},
    "evaluation": {
        "errors",
        "atomic",
        "engine",
        "models",
        "baselines",
        "tokenizers",
        "training",
        "data",
        "checkpoint",
        "settings",
    },
    "inspection": {"errors", "atomic", "ops", "models", "tokenizers", "checkpoint", "evaluation"},
    "cli": None,  # the top of the house
    "__init__": None,
    "__main__": None,
}


def rooms_imported_by(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path}: import from the package's root, not with '..'"
            if node.level == 1 and path.parent == SOURCE:
                names = [f"receptance.{node.module or alias.name}" for alias in node.names]
            else:
                names = [f"{node.module}.{alias.name}" for alias in node.names] if node.level == 0 else []
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("receptance.")}
    return rooms


def test_imports_go_one_way():
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        assert room in MAY_IMPORT, f"{path}: add the room '{room}' to MAY_IMPORT"
        allowed = MAY_IMPORT[room]
        if allowed is not None:
            wrong = rooms_imported_by(path) - allowed - {room}
            assert not wrong, f"{path} imports {sorted(wrong)}; '{room}' may import only {sorted(allowed)}"


def test_the_table_for_contributors_is_this_one():
    text = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \| .* \| (.*) \|$", text, re.M)
    told = {room: set(re.findall(r"\w+", cell)) for room, cell in rows if room != "cli"}
    helpers = {"errors", "atomic", "state_file", "embedded"}
    rooms = {room: allowed - helpers for room, allowed in MAY_IMPORT.items() if allowed is not None}
    assert told == {room: allowed for room, allowed in rooms.items() if room not in helpers}


def test_nothing_imports_the_command_line():
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] not in ("cli", "__main__.py"):
            assert "cli" not in rooms_imported_by(path), path
