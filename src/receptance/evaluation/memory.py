"""`receptance memory`: models against tests of memory and reasoning, from one file, with a table and a picture."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from receptance.errors import ConfigError
from receptance.evaluation import grid
from receptance.evaluation.classify import Digits, ListOps, Questions
from receptance.evaluation.recall import Options, as_rows, learn
from receptance.evaluation.synthetic import Copying, Group, Needle, Recall, Task
from receptance.settings import build, read_toml
from receptance.training.config import BASELINES, VERSIONS, ModelConfig

TASKS: dict[str, Callable[..., Task]] = {
    "recall": Recall, "needle": Needle, "copying": Copying, "group": Group,
    "digits": Digits, "listops": ListOps, "questions": Questions,
}  # fmt: skip
SIZE = {"copying": "symbols"}  # what `test_lengths` changes; `length` for the others
FILES = {"digits", "questions"}  # tasks whose `root` is relative to the configuration
Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One model on one task. tests: the same task at other lengths."""

    model: str
    shape: ModelConfig
    task: Task
    tests: tuple[Task, ...]
    options: Options

    def cell(self, device: str, tell: Callable[[str], None]) -> grid.Cell:
        parts = {"shape": dataclasses.asdict(self.shape), "task": dataclasses.asdict(self.task),  # type: ignore[call-overload]
                 "tests": [test.name for test in self.tests], "train": dataclasses.asdict(self.options)}  # fmt: skip
        parts["task"].pop("root", None)
        name = f"{self.model}, {self.task.name}" + (f", seed {self.options.seed}" if self.options.seed > 1 else "")
        return grid.Cell(name, json.dumps(parts, sort_keys=True), partial(self.make, device, tell))

    def make(self, device: str, tell: Callable[[str], None]) -> Row:
        _, found = learn(self.shape, self.task, self.tests, self.options, device=device, tell=tell)
        tell(f"{self.model}, {self.task.name}: accuracy {found.scores[self.task.name].accuracy:.3f} "
             f"after {found.steps} steps, {found.seconds:.0f} s")  # fmt: skip
        return {"name": self.model, "task": self.task.name, "seed": self.options.seed, **as_rows([found])[0]}


def read_trials(path: Path, overrides: Mapping[str, str] = {}) -> tuple[Path, list[Trial]]:
    """The output folder and the grid of a TOML file: all `models` on all `tasks`, with all `seeds`. Raises ConfigError.

    [train]: `receptance.evaluation.recall.Options`; a model or a task may have its own. overrides: of `out` and `root`,
    where files are.
    """
    raw = read_toml(path)
    raw |= overrides
    if unknown := raw.keys() - {"out", "root", "seeds", "train", "models", "tasks"}:
        raise ConfigError(f"{path}: unknown {sorted(unknown)}; there are out, root, seeds, train, models, tasks")
    if not raw.get("models") or not raw.get("tasks"):
        raise ConfigError(f"{path}: needs [[models]] and [[tasks]]")
    root = path.resolve().parent / str(raw.get("root", "."))
    trials = []
    for given in raw["tasks"]:
        task, tests, for_task = _task(path, given, root)
        for shape in raw["models"]:
            fields = dict(shape)
            train = {**raw.get("train", {}), **for_task, **fields.pop("train", {})}
            name = str(fields.pop("name", f"{fields.get('version', '7')} D{fields.get('n_embd', 256)}"))
            fields["version"] = str(fields.get("version", "7"))
            if fields["version"] not in (*VERSIONS, *BASELINES):
                raise ConfigError(f"{path}: unknown version {fields['version']!r}")
            built = build(ModelConfig, fields, f"{path}: model {name}: ")
            for seed in raw.get("seeds", [train.get("seed", 1)]):
                options = build(Options, {**train, "seed": seed}, f"{path}: train.")
                trials.append(Trial(name, built, task, tests, options))
    return path.resolve().parent / str(raw.get("out", "runs/memory")), trials


def _task(path: Path, given: Mapping[str, Any], root: Path) -> tuple[Task, tuple[Task, ...], dict[str, Any]]:
    fields = dict(given)
    kind, lengths, options = fields.pop("task", None), fields.pop("test_lengths", []), fields.pop("train", {})
    fields = {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}  # a task is a key of caches
    if kind not in TASKS:
        raise ConfigError(f"{path}: unknown task {kind!r}; there are {sorted(TASKS)}")
    if kind in FILES:
        fields["root"] = str(root / fields.get("root", "."))
    try:
        tests = tuple(TASKS[kind](**{**fields, SIZE.get(kind, "length"): n}) for n in lengths)
        return TASKS[kind](**fields), tests, options
    except TypeError as error:
        raise ConfigError(f"{path}: task {kind}: {error}") from None


def run(path: Path, device: str, tell: Callable[[str], None], overrides: Mapping[str, str] = {}) -> Path:
    """Every cell that has no result yet and that no other process is at; then results.json, report.md and the picture.

    Returns the folder. Processes that are given the same file share the work.
    """
    out, trials = read_trials(path, overrides)
    cells = [trial.cell(device, tell) for trial in trials]
    rows = grid.run(out, cells, tell)
    write(out, rows, tell)
    return out


def write(out: Path, rows: Sequence[Row], tell: Callable[[str], None]) -> None:
    grid.write(out, rows, table(rows))
    try:
        from receptance.evaluation.plots import draw_memory
    except ImportError:
        tell("no picture: that needs matplotlib (pip install 'receptance[plots]')")
    else:
        if rows:
            draw_memory(rows, out / "memory")


def table(rows: Sequence[Row]) -> str:
    """Markdown: models down, tests across; the accuracy of all answers, for groups that of the last. Means of seeds."""
    tests = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    models = list(dict.fromkeys(row["name"] for row in rows))
    size = {row["name"]: f"{row['parameters']:,}" for row in rows}
    state = {row["name"]: f"{row['state_bytes']:,}" for row in rows}
    lines = ["| model | parameters | state, bytes | " + " | ".join(tests) + " |", "|---" * (len(tests) + 3) + "|"]
    for model in models:
        values = [_cell(accuracies(rows, model, test)) for test in tests]
        lines.append(f"| {model} | {size[model]} | {state[model]} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def accuracies(rows: Sequence[Row], model: str, test: str) -> list[float]:
    """Of each seed."""
    found = [row["scores"][test] for row in rows if row["name"] == model and test in row["scores"]]
    return [accuracy(test, score) for score in found]


def accuracy(test: str, score: Mapping[str, float]) -> float:
    return score["last" if " over " in test else "accuracy"]
