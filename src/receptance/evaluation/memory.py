"""`receptance memory`: models against tests of memory, from one file, with a table and a picture."""

import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from receptance.checkpoint.atomic import replacing
from receptance.errors import ConfigError
from receptance.evaluation.recall import as_rows, learn
from receptance.evaluation.synthetic import Copying, Group, Needle, Recall, Task
from receptance.training.config import BASELINES, VERSIONS, ModelConfig

TASKS: dict[str, Callable[..., Task]] = {"recall": Recall, "needle": Needle, "copying": Copying, "group": Group}
SIZE = {"copying": "symbols"}  # what `test_lengths` changes; `length` for the others
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model on one task. tests: the same task at other lengths."""

    model: str
    shape: ModelConfig
    task: Task
    tests: tuple[Task, ...]
    options: Mapping[str, Any]


def read_cells(path: Path) -> tuple[Path, list[Cell]]:
    """The output folder and the grid of a TOML file: all `models` on all `tasks`. Raises ConfigError.

    [train]: options of `receptance.evaluation.recall.learn`; a model or a task may have its own.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    if unknown := raw.keys() - {"out", "train", "models", "tasks"}:
        raise ConfigError(f"{path}: unknown {sorted(unknown)}; there are out, train, models, tasks")
    if not raw.get("models") or not raw.get("tasks"):
        raise ConfigError(f"{path}: needs [[models]] and [[tasks]]")
    cells = []
    for given in raw["tasks"]:
        task, tests, for_task = _task(path, given)
        for shape in raw["models"]:
            fields = dict(shape)
            options = {**raw.get("train", {}), **for_task, **fields.pop("train", {})}
            if bad := options.keys() - {"steps", "batch", "lr", "weight_decay", "seed", "shortest"}:
                raise ConfigError(f"{path}: unknown training options {sorted(bad)}")
            name = str(fields.pop("name", f"{fields.get('version', '7')} D{fields.get('n_embd', 256)}"))
            fields["version"] = str(fields.get("version", "7"))
            if fields["version"] not in (*VERSIONS, *BASELINES):
                raise ConfigError(f"{path}: unknown version {fields['version']!r}")
            try:
                cells.append(Cell(name, ModelConfig(**fields), task, tests, options))
            except TypeError as error:
                raise ConfigError(f"{path}: model {name}: {error}") from None
    return path.resolve().parent / str(raw.get("out", "runs/memory")), cells


def _task(path: Path, given: Mapping[str, Any]) -> tuple[Task, tuple[Task, ...], dict[str, Any]]:
    fields = dict(given)
    kind, lengths, options = fields.pop("task", None), fields.pop("test_lengths", []), fields.pop("train", {})
    if kind not in TASKS:
        raise ConfigError(f"{path}: unknown task {kind!r}; there are {sorted(TASKS)}")
    try:
        tests = tuple(TASKS[kind](**{**fields, SIZE.get(kind, "length"): n}) for n in lengths)
        return TASKS[kind](**fields), tests, options
    except TypeError as error:
        raise ConfigError(f"{path}: task {kind}: {error}") from None


def run(path: Path, device: str, tell: Callable[[str], None]) -> Path:
    """Every cell that results.json does not hold yet; then report.md and memory.png. Returns the folder."""
    out, cells = read_cells(path)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
    for cell in cells:
        key = _key(cell)
        if any(row["cell"] == key for row in rows):
            continue
        _, found = learn(cell.shape, cell.task, cell.tests, device=device, tell=tell, **cell.options)
        rows.append({"cell": key, "name": cell.model, "task": cell.task.name, **as_rows([found])[0]})
        tell(f"{cell.model}, {cell.task.name}: accuracy {found.scores[cell.task.name].accuracy:.3f} "
             f"after {found.steps} steps, {found.seconds:.0f} s")  # fmt: skip
        with replacing(file) as target:
            target.write(json.dumps(rows, indent=1).encode())
    wanted = [row for cell in cells for row in rows if row["cell"] == _key(cell)]
    with replacing(out / "report.md") as target:
        target.write(table(wanted).encode())
    try:
        from receptance.evaluation.plots import draw_memory
    except ImportError:
        tell("no picture: that needs matplotlib (pip install 'receptance[plots]')")
    else:
        draw_memory(wanted, out / "memory")
    return out


def _key(cell: Cell) -> str:
    parts = {"shape": dataclasses.asdict(cell.shape), "task": dataclasses.asdict(cell.task),  # type: ignore[call-overload]
             "tests": [test.name for test in cell.tests], "train": dict(cell.options)}  # fmt: skip
    return json.dumps(parts, sort_keys=True)


def table(rows: Sequence[Row]) -> str:
    """Markdown: models down, tests across; the accuracy of all answers, for groups that of the last."""
    tests = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    models = list(dict.fromkeys(row["name"] for row in rows))
    size = {row["name"]: f"{row['parameters']:,}" for row in rows}
    state = {row["name"]: f"{row['state_bytes']:,}" for row in rows}
    lines = ["| model | parameters | state, bytes | " + " | ".join(tests) + " |", "|---" * (len(tests) + 3) + "|"]
    for model in models:
        found = {test: score for row in rows if row["name"] == model for test, score in row["scores"].items()}
        values = [f"{accuracy(test, found[test]):.3f}" if test in found else "–" for test in tests]
        lines.append(f"| {model} | {size[model]} | {state[model]} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def accuracy(test: str, score: Mapping[str, float]) -> float:
    return score["last" if " over " in test else "accuracy"]
