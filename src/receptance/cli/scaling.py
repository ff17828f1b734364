"""`receptance scaling`: how losses fall with size, tokens and compute."""

from pathlib import Path
from typing import Annotated

import typer

from receptance.cli import options


def command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="As for compare, with sizes and budgets.")],
    overrides: options.Overrides = None,
) -> None:
    """Train a ladder of sizes on several budgets of tokens, and fit power laws to their losses.

    run.out gets scaling.json, report.md and the picture: loss against compute with the line through the best runs,
    and the compute-optimal number of parameters. Finished runs are not made again, and processes started on the same
    file share the work.

    \b
    Examples:
      receptance scaling examples/scaling/laptop.toml
      receptance scaling examples/scaling/bytes.toml data.root=/path/to/folder
    """
    from receptance.cli.train import Progress
    from receptance.evaluation.scaling import read_ladder, scaling

    with Progress(read_ladder(config, overrides or [])[1][0][1].config.steps) as progress:
        out = scaling(config, overrides or [], progress)
    typer.echo((out / "report.md").read_text(encoding="utf-8"), nl=False)
    typer.echo(f"written: {out}", err=True)
