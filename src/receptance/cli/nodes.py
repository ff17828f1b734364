"""`receptance nodes`: the nodes of a graph, RWKV against what is used for them."""

from pathlib import Path
from typing import Annotated

import typer

from receptance.cli import options


def command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file with a graph and models.")],
    overrides: options.Folders = None,
    device: options.Place = "cpu",
) -> None:
    """Classify the nodes of a graph from the sequences of their neighbours and compare accuracies.

    Writes results.json and report.md into CONFIG's `out`. What has a result there is not run again, and processes
    started on the same file share the work.

    \b
    Examples:
      receptance nodes examples/nodes/cora.toml root=/path/to/graph
    """
    from receptance.evaluation.nodes import run

    out = run(config, device, lambda text: typer.echo(text, err=True), options.paths(overrides))
    typer.echo((out / "report.md").read_text(encoding="utf-8"), nl=False)
