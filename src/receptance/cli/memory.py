"""`receptance memory`: what small models of each kind can hold."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file with models and tasks.")],
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Train small models on tests of memory: recall, needles, copying, groups.

    Writes results.json, report.md and memory.png beside CONFIG, in its `out`. What is in results.json is not run again.

    \b
    Examples:
      receptance memory examples/memory/recall.toml
      receptance memory examples/memory/groups.toml --device cuda
    """
    from receptance.evaluation.memory import run

    out = run(config, device, lambda text: typer.echo(text, err=True))
    typer.echo((out / "report.md").read_text(encoding="utf-8"), nl=False)
