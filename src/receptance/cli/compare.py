"""`receptance compare`: several models trained alike, one report."""

from pathlib import Path
from typing import Annotated

import typer

from receptance.cli import options


def command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file as for train, with [[models]].")],
    overrides: options.Overrides = None,
) -> None:
    """Train several models on the same data in the same order, and write one report.

    Finished runs are not made again, interrupted ones go on. The folder run.out gets report.md, compare.json and, with
    matplotlib, the pictures; each model has its run in a folder of its own beside them.

    \b
    Examples:
      receptance compare examples/compare/laptop.toml
      receptance compare examples/compare/laptop.toml run.tokens=2_000_000
    """
    from receptance.cli.train import Progress
    from receptance.evaluation.compare import compare, read_comparison

    comparison = read_comparison(config, overrides or [])
    with Progress(comparison.entries[0].config.steps) as progress:
        out = compare(comparison, progress)
    typer.echo((out / "report.md").read_text(encoding="utf-8"), nl=False)
    typer.echo(f"written: {out}", err=True)
