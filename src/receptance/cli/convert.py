"""`receptance convert`: the same weights in another file."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from receptance.cli import options
from receptance.cli.errors import UsageError
from receptance.cli.hub import COMPANIONS
from receptance.cli.model_source import (
    ModelSource,
    fields_of,
    find_model,
    load_model,
    load_tokenizer,
    tokenizer_inside,
)
from receptance.cli.preset import PRESET_FIELD, PRESET_FILE, find_preset, read_preset
from receptance.errors import ReceptanceError

if TYPE_CHECKING:
    from receptance.gguf.writer import Value
    from receptance.native import NativeConfig


FORMATS = ("pth", "safetensors", "folder", "hf", "gguf")


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Path, name or org/name[:file].")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A .pth, .safetensors or .gguf file, or a folder.")],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="pth, safetensors, folder (ours), hf (transformers, fla) or gguf (llama.cpp); default: by suffix.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="float32, bfloat16, float16 or float64; gguf: also q8_0, q6_k, q5_k, q4_k, q4_0; default: unchanged.",
        ),
    ] = None,
    tokenizer: options.TokenizerName = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace DST if it exists.")] = False,
) -> None:
    """Write a model in another layout, bit for bit unless --dtype says otherwise. Nothing in SRC is executed.

    A folder also gets the tokenizer and model.toml that lie beside SRC, a .gguf file the tokenizer inside it. DST
    appears only once it is complete. `receptance quantize` also reports what a narrow type costs.

    \b
    Examples:
      receptance convert model.pth model.safetensors
      receptance convert model.pth folder --format hf
      receptance convert folder half.pth --dtype bfloat16
      receptance convert model.pth model.gguf --dtype q8_0
    """
    model = find_model(source)
    check_target(target, force)
    if format is not None and format not in FORMATS:
        raise UsageError(f"--format is {format!r}, expected {', '.join(FORMATS)}")

    from receptance.checkpoint import save
    from receptance.checkpoint.save import format_of

    if (format or format_of(target)) == "gguf":
        write_gguf(model, target, dtype, tokenizer)
    else:
        save(load_model(model, dtype), target, format)
    if target.is_dir():
        copy_companions(model.folder, target)
        if model.path.suffix == ".gguf" and (inside := tokenizer_inside(model)):
            inside.save(target)
    size = sum(file.stat().st_size for file in (target.iterdir() if target.is_dir() else [target]))
    typer.echo(f"{target}: {size:,} bytes", err=True)


def check_target(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise ReceptanceError(f"{target} exists; --force replaces it")


def write_gguf(model: ModelSource, target: Path, dtype: str | None, tokenizer: str | None) -> None:
    """Without torch; tells on stderr what llama.cpp will not do with the file."""
    from receptance.checkpoint.gguf import recipe_named, save_gguf
    from receptance.checkpoint.load import open_checkpoint, verified_weights

    recipe = None if dtype is None else recipe_named(dtype)
    weights, config = verified_weights(open_checkpoint(model.path))
    save_gguf(target, weights, config, recipe, tokenizer_fields(model, config, tokenizer))


def tokenizer_fields(model: ModelSource, config: "NativeConfig", name: str | None) -> "dict[str, Value]":
    """Tokenizer and preset as metadata for a GGUF file; where nothing tells the tokenizer, the file has none."""
    from receptance.tokenizers.gguf import gguf_fields

    try:
        found = load_tokenizer(model, config.vocab_size, name)
    except ReceptanceError:
        if name is not None:
            raise
        found = None
    fields, lost = gguf_fields(found, config.vocab_size)
    if config.major < 6:
        lost = f"llama.cpp has no RWKV-{config.version}: the file is for receptance alone"
    if lost:
        typer.echo(f"note: {lost}", err=True)
    inside = fields_of(model).get(PRESET_FIELD)
    beside = model.folder / PRESET_FILE
    if isinstance(inside, str) or beside.is_file():
        fields[PRESET_FIELD] = inside if isinstance(inside, str) else beside.read_text(encoding="utf-8")
        if find_preset(model).new_document and "tokenizer.ggml.bos_token_id" in fields:
            fields["tokenizer.ggml.add_bos_token"] = True  # id 0, which also ends documents
    return fields


def copy_companions(folder: Path, target: Path) -> None:
    """The tokenizer, the preset and its state; config.json is the new layout's own."""
    names = [name for name in COMPANIONS if name != "config.json"]
    files = [folder / name for name in names] + sorted(folder.glob("rwkv_vocab*.txt"))
    if (folder / PRESET_FILE).is_file() and (state := read_preset(folder).state):
        files.append(state)
    for file in files:
        if file.is_file() and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
