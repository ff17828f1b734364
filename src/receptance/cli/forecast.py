"""`receptance forecast`: time series, RWKV against what is used for them."""

from pathlib import Path
from typing import Annotated

import typer

from receptance.cli import options


def command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file with a table and models.")],
    overrides: options.Folders = None,
    device: options.Place = "cpu",
) -> None:
    """Train forecasters of time series and compare their errors on the last part of the table.

    Writes results.json and report.md into CONFIG's `out`. What has a result there is not run again, and processes
    started on the same file share the work.

    \b
    Examples:
      receptance forecast examples/forecast/etth1.toml root=tables --device cuda
    """
    from receptance.evaluation.forecast import run

    out = run(config, device, lambda text: typer.echo(text, err=True), options.paths(overrides))
    typer.echo((out / "report.md").read_text(encoding="utf-8"), nl=False)
