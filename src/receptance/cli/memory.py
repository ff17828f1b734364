"""`receptance memory`: what small models of each kind can hold."""

from pathlib import Path
from typing import Annotated

import typer

from receptance.cli import options


def command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file with models and tasks.")],
    overrides: options.Folders = None,
    device: options.Place = "cpu",
) -> None:
    """Train small models on tests of memory and reasoning: recall, needles, groups, ListOps, digits, questions.

    Writes results.json, report.md and memory.png into CONFIG's `out`. What has a result there is not run again, and
    processes started on the same file share the work.

    \b
    Examples:
      receptance memory examples/memory/recall.toml
      receptance memory examples/memory/digits.toml root=mnist --device cuda
    """
    from receptance.evaluation.memory import run

    out = run(config, device, lambda text: typer.echo(text, err=True), options.paths(overrides))
    typer.echo((out / "report.md").read_text(encoding="utf-8"), nl=False)
