"""`receptance convert`: the same weights in another file."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from receptance.cli.errors import UsageError
from receptance.cli.hub import COMPANIONS
from receptance.cli.model_source import find_model, load_model
from receptance.errors import ReceptanceError


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Path, name or org/name[:file].")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A .pth or .safetensors file, or a folder.")],
    format: Annotated[
        str | None,
        typer.Option("--format", help="pth, safetensors, folder (ours) or hf (transformers, fla); default: by suffix."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16, float16 or float64; default: unchanged, exact.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace DST if it exists.")] = False,
) -> None:
    """Write a model in another layout, bit for bit unless --dtype says otherwise. Nothing in SRC is executed.

    A folder also gets the tokenizer and model.toml that lie beside SRC. DST appears only once it is complete.

    \b
    Examples:
      receptance convert model.pth model.safetensors
      receptance convert model.pth folder --format hf
      receptance convert folder half.pth --dtype bfloat16
    """
    model = find_model(source)
    if target.exists() and not force:
        raise ReceptanceError(f"{target} exists; --force replaces it")
    if format is not None and format not in ("pth", "safetensors", "folder", "hf"):
        raise UsageError(f"--format is {format!r}, expected pth, safetensors, folder or hf")

    from receptance.checkpoint import save

    save(load_model(model, dtype), target, format)
    if target.is_dir():
        copy_companions(model.folder, target)
    size = sum(file.stat().st_size for file in (target.iterdir() if target.is_dir() else [target]))
    typer.echo(f"{target}: {size:,} bytes", err=True)


def copy_companions(folder: Path, target: Path) -> None:
    """The tokenizer, the preset and its state; config.json is the new layout's own."""
    from receptance.cli.preset import PRESET_FILE, read_preset

    names = [name for name in COMPANIONS if name != "config.json"]
    files = [folder / name for name in names] + sorted(folder.glob("rwkv_vocab*.txt"))
    if (folder / PRESET_FILE).is_file() and (state := read_preset(folder).state):
        files.append(state)
    for file in files:
        if file.is_file() and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
