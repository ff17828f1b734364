"""`receptance list`: the models that are here."""

from typing import Annotated

import typer

from receptance import embedded
from receptance.cli import hub
from receptance.cli.terminal import table_console, write_json


def command(as_json: Annotated[bool, typer.Option("--json", help="A JSON list.")] = False) -> None:
    """List the embedded and the downloaded models: each NAME can be used wherever a MODEL is asked for.

    \b
    Examples:
      receptance list
      receptance list --json
    """
    models = here()
    if as_json:
        write_json(models)
        return
    if not models:
        typer.echo("no models here; receptance pull org/name downloads one", err=True)
        return

    from rich.table import Table
    from rich.text import Text

    table = Table("name", "kind", box=None, header_style="bold")
    table.add_column("size", justify="right")
    table.add_column("where", overflow="fold")
    for model in models:
        size = f"{int(str(model['bytes'])) / 1e6:,.1f} MB"
        table.add_row(Text(str(model["name"])), str(model["kind"]), size, Text(str(model["path"])))
    table_console().print(table)


def here() -> list[dict[str, object]]:
    """One row for each name that `find_model` knows without a path."""
    rows: list[dict[str, object]] = []
    for name in embedded.embedded_models():
        size = sum(file.stat().st_size for file in (embedded.ASSETS / name).rglob("*") if file.is_file())
        rows.append({"name": name, "kind": "embedded", "bytes": size, "path": str(embedded.ASSETS / name)})
    for model in hub.cached_models():
        is_folder = any(name in model.weights for name in hub.FOLDER_WEIGHTS)
        names = [model.repo] if is_folder or len(model.weights) == 1 else [f"{model.repo}:{w}" for w in model.weights]
        for name in names:
            path = model.folder if name == model.repo else model.folder / name.partition(":")[2]
            size = model.size if path.is_dir() else path.stat().st_size
            rows.append({"name": name, "kind": "hub", "bytes": size, "path": str(path)})
    return rows
