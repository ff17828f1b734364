"""`receptance inspect`: what a checkpoint is, and what happens inside when it reads a text."""

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from receptance.cli import options
from receptance.cli.model_source import ModelSource, fields_of, find_model, load_model, load_tokenizer
from receptance.cli.terminal import table_console, write_json
from receptance.errors import ConfigError

if TYPE_CHECKING:
    from receptance.models import RWKV


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Path, name or org/name[:file].")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, not one block for all.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with everything.")] = False,
    text: Annotated[str | None, typer.Option("--text", help="Look at how the model reads this; - is stdin.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="For pictures and page.")] = Path("inside"),
    subject: Annotated[
        str | None, typer.Option("--subject", help="Words of the text that the answer hangs on.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option("--answer", help="How the text should go on: traced from SUBJECT.")
    ] = None,
    tokenizer: options.TokenizerName = None,
    device: options.Device = None,
) -> None:
    """Show a model's architecture, parameters, types and the size of its state.

    With --text: what it forgets, writes, erases and reads back with that text, what each layer would answer, and which
    tokens an output comes from, as pictures, report.json and an interactive page, report.html.

    \b
    Examples:
      receptance inspect
      receptance inspect model.pth --tensors
      receptance inspect org/name:file.pth --json
      receptance inspect model.pth --text "Once upon a time" --out inside
      receptance inspect m.pth --text "Lima is in" --subject Lima --answer " Peru"
    """
    source = find_model(model)
    if (subject is None) != (answer is None) or (subject is not None and text is None):
        raise ConfigError("--subject and --answer go together, with --text")
    if text is not None:
        look_inside(source, sys.stdin.read() if text == "-" else text, out, subject, answer, tokenizer, device)
        return
    if source.path.suffix == ".gguf":
        summary, rows, layers = describe_gguf(source)
    else:
        rwkv = load_model(source)
        summary, layers = describe(source, rwkv), rwkv.config.n_layer
        rows = [
            {"name": n, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."), "parameters": x.numel()}
            for n, x in rwkv.state_dict().items()
        ]
    if as_json:
        write_json({**summary, "tensors": rows})
    else:
        _print(summary, rows if tensors else fold_blocks(rows, layers))


def look_inside(
    source: ModelSource,
    text: str,
    out: Path,
    subject: str | None,
    answer: str | None,
    tokenizer: str | None,
    device: str | None,
) -> None:
    try:
        from receptance.inspection.report import Fact, write_report
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; pip install 'receptance[torch,plots]'") from None
    model = load_model(source, dtype="float32", device=device)
    tok = load_tokenizer(source, model.config.vocab_size, tokenizer)
    fact = Fact(subject, answer) if subject is not None and answer is not None else None
    for path in write_report(model, tok, text, out, source.name, fact):
        typer.echo(path)


def describe(source: ModelSource, model: "RWKV") -> dict[str, object]:
    """The facts above the table; sizes in bytes."""
    from receptance.checkpoint import open_checkpoint

    stored = open_checkpoint(source.path)
    state = model.zero_state()
    return {
        "model": source.name,
        "path": str(source.path),
        "version": model.config.version,
        "config": asdict(model.config),
        "parameters": sum(x.numel() for x in model.parameters()),
        "stored_dtypes": sorted(set(stored.dtypes.values())),
        "stored_bytes": sum(tensor.nbytes for tensor in stored.tensors.values()),
        "has_checksums": bool(stored.records),
        "state": {name: list(x.shape) for name, x in state.items()},
        "state_bytes": 4 * sum(x.numel() for x in state.values()),  # as the CPU engine has it
        "fingerprint": model.fingerprint,
    }


def describe_gguf(source: ModelSource) -> tuple[dict[str, object], list[dict[str, object]], int]:
    """The same facts, the tensors under official names in the types of the file, and the number of layers.

    Without torch: its form of a quantised model would be eight times as large.
    """
    from receptance.checkpoint.load import open_checkpoint, verified_weights
    from receptance.native.arrays import fingerprint
    from receptance.native.binding import type_name

    stored = open_checkpoint(source.path)
    weights, config = verified_weights(stored)
    fields = fields_of(source)
    shapes = config.state_shapes(1)
    rows: list[dict[str, object]] = [
        {"name": name, "shape": list(x.shape), "dtype": type_name(x), "parameters": math.prod(x.shape)}
        for name, x in weights.items()
    ]
    summary = {
        "model": source.name,
        "path": str(source.path),
        "version": config.version,
        "config": {name: value for name, value in asdict(config).items() if value},
        "parameters": sum(math.prod(x.shape) for x in weights.values()),
        "stored_dtypes": sorted(set(stored.dtypes.values())),
        "stored_bytes": sum(tensor.nbytes for tensor in stored.tensors.values()),
        "has_checksums": False,
        "state": {name: list(shape) for name, shape in shapes.items()},
        "state_bytes": 4 * sum(math.prod(shape) for shape in shapes.values()),
        "fingerprint": fingerprint(config.version, weights),
        "metadata": {name: value for name, value in fields.items() if isinstance(value, int | float | str)},
    }
    return summary, rows, config.n_layer


def fold_blocks(rows: list[dict[str, object]], n_layer: int) -> list[dict[str, object]]:
    """Tensors that every layer has, under `blocks.*`, with the parameters of all layers together."""
    groups: dict[tuple[str, str, str], list[dict[str, object]]] = {}
    for row in rows:
        head, _, tail = str(row["name"]).partition(".")
        layer, _, rest = tail.partition(".")
        name = f"blocks.*.{rest}" if head == "blocks" and layer.isdigit() else str(row["name"])
        groups.setdefault((name, str(row["shape"]), str(row["dtype"])), []).append(row)
    folded = []
    for (name, _, _), members in groups.items():
        total = sum(int(str(row["parameters"])) for row in members)
        several = name.startswith("blocks.*") and len(members) > 1
        folded.append({**members[0], "name": name if several else members[0]["name"], "parameters": total})
        if several and len(members) < n_layer:
            folded[-1]["name"] = f"{name}  ({len(members)} of {n_layer} layers)"
    return folded


def _print(summary: dict[str, object], rows: list[dict[str, object]]) -> None:
    from rich.table import Table
    from rich.text import Text

    config = summary["config"]
    assert isinstance(config, dict)
    facts = [
        f"RWKV-{summary['version']}  {summary['path']}",
        "  ".join(f"{name} {value}" for name, value in config.items() if name != "version"),
        f"{summary['parameters']:,} parameters, {summary['stored_bytes']:,} bytes stored as "
        f"{', '.join(map(str, summary['stored_dtypes']))}"  # type: ignore[call-overload]
        f"{', with checksums' if summary['has_checksums'] else ''}",
        f"state: {summary['state_bytes']:,} bytes in float32, whatever the length of the text",
        f"fingerprint: {summary['fingerprint']}",
    ]
    table = Table("tensor", "shape", "dtype", box=None, header_style="bold")
    table.add_column("parameters", justify="right")
    for row in rows:
        table.add_row(Text(str(row["name"])), Text(str(row["shape"])), str(row["dtype"]), f"{row['parameters']:,}")
    console = table_console()
    for fact in facts:
        console.print(Text(fact))
    console.print(table)
