"""`receptance quantize`: a smaller file, and what it costs."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from receptance.cli import options
from receptance.cli.convert import check_target, tokenizer_fields
from receptance.cli.errors import UsageError
from receptance.cli.model_source import ModelSource, find_model, load_tokenizer, warnings_as_notes
from receptance.cli.terminal import table_console, write_json
from receptance.embedded import ASSETS
from receptance.errors import ReceptanceError

if TYPE_CHECKING:
    from receptance.checkpoint.gguf import Stored
    from receptance.engine.quality import Quality
    from receptance.native import NativeConfig, NativeModel

HELD_OUT = ASSETS / "held_out.txt"  # written for this purpose: in no model's training data
TYPES = ("q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "int8", "int4")
MAX_TEXT = 4 << 20  # bytes


def command(
    source: Annotated[str, typer.Argument(metavar="IN", help="Path, name or org/name[:file].")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The .gguf file to write.")],
    type: Annotated[str, typer.Option("--type", help="q8_0, q6_k, q5_k, q4_k, q4_0, int8 or int4.")] = "q8_0",
    tensor: Annotated[
        list[str] | None,
        typer.Option("--tensor", metavar="NAME=TYPE", help="Another type for some; * in NAME stands for anything."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Held-out text to measure on; default: our own page.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Measure on so many tokens of it.")] = 1024,
    sensitivity: Annotated[
        int, typer.Option("--sensitivity", metavar="N", help="Each tensor alone on N tokens; 0 = leave out.")
    ] = 128,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Measure what it costs.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="The report as one JSON object.")] = False,
    tokenizer: options.TokenizerName = None,
    threads: options.Threads = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a quantised GGUF file, which llama.cpp reads too (RWKV-6 and 7), and measure what it costs.

    Large matrices get the type (the head 6 bits where the rest has fewer; with int4 8); low-rank maps keep 16 bits,
    norms, mixes and decays 32. int8 and int4 are q8_0 and q4_0. The report compares the new file with IN in float32
    arithmetic: perplexity, KL divergence, agreement on the most probable token, each tensor quantised alone, size,
    speed. OUT appears only once it is complete, before the report.

    \b
    Examples:
      receptance quantize model.pth model-q4.gguf --type q4_k
      receptance quantize model.pth q4.gguf --type q4_k --tensor '*.value.*=q6_k'
      receptance quantize rwkv7-stories small.gguf --text page.txt --json
    """
    from receptance.checkpoint.gguf import chosen_formats, recipe_named, save_gguf
    from receptance.checkpoint.load import open_checkpoint, verified_weights
    from receptance.native.model import check_threads

    if type not in TYPES:
        raise UsageError(f"--type is {type!r}, expected one of {', '.join(TYPES)}")
    if target.suffix != ".gguf":
        raise UsageError(f"OUT is {str(target)!r}, expected a name that ends in .gguf")
    if tokens < 2 or sensitivity < 0:
        raise UsageError("--tokens must be at least 2, and --sensitivity at least 0")
    check_threads(threads)
    model = find_model(source)
    check_target(target, force)
    weights, config = verified_weights(open_checkpoint(model.path))
    formats = chosen_formats(weights, recipe_named(type), exceptions(tensor or []))
    ids = held_out_ids(model, config, tokenizer, text)[: tokens + 1] if report else []
    steps = Steps(len(formats))
    fields = tokenizer_fields(model, config, tokenizer)
    try:
        save_gguf(target, weights, config, recipe_named(type), fields, formats=formats, progress=steps.writing)
        steps.end()
        if report:
            with warnings_as_notes():
                found = measure(target, weights, config, formats, ids, sensitivity, threads, steps)
    finally:
        steps.end()  # an error has a line of its own
    if report:
        found = {"in": model.name, "out": str(target), "type": type, "text": str(text or HELD_OUT.name), **found}
        write_json(found) if as_json else show(found)
    else:
        typer.echo(f"{target}: {target.stat().st_size:,} bytes", err=True)


def exceptions(words: list[str]) -> dict[str, str]:
    """{pattern: type}"""
    found = {}
    for word in words:
        pattern, _, type = word.partition("=")
        if not pattern or type not in (*TYPES, "float16", "bfloat16", "float32"):
            raise UsageError(f"--tensor is {word!r}, expected NAME=TYPE such as 'head.weight=q8_0'")
        found[pattern] = type
    return found


def held_out_ids(model: ModelSource, config: "NativeConfig", tokenizer: str | None, text: Path | None) -> list[int]:
    page = text or HELD_OUT
    with page.open("rb") as file:
        content = file.read(MAX_TEXT)
    tok = load_tokenizer(model, config.vocab_size, tokenizer)
    ids = [tok.eos_id, *tok.encode(content.decode("utf-8", "replace"))]
    if len(ids) < 3:
        raise ReceptanceError(f"{page}: holds fewer than two tokens; give a longer text, or --no-report")
    return ids


class Steps:
    """What is being done, in one line of a terminal; nothing on a pipe."""

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self.is_shown = typer.get_text_stream("stderr").isatty()

    def line(self, what: str) -> None:
        self.done += 1
        if self.is_shown:
            typer.echo(f"\r\x1b[K{self.done}/{self.total}  {what}", err=True, nl=False)

    def writing(self, name: str, format: str) -> None:
        self.line(f"{name} → {format}")

    def end(self, total: int = 0) -> None:
        if self.is_shown:
            typer.echo("\r\x1b[K", err=True, nl=False)
        self.total, self.done = total, 0


def measure(
    target: Path,
    weights: "Mapping[str, Stored]",
    config: "NativeConfig",
    formats: Mapping[str, str],
    ids: list[int],
    sensitivity: int,
    threads: int | None,
    steps: Steps,
) -> dict[str, object]:
    """The report as plain values."""
    from receptance.checkpoint import load
    from receptance.checkpoint.gguf import quantised
    from receptance.engine.quality import compare, decode_speeds, log_probabilities, sensitivities
    from receptance.native import NativeModel

    def make(changed: Mapping[str, object]) -> "NativeModel":
        return NativeModel({**weights, **changed}, config, "", threads=threads)  # type: ignore[dict-item]

    reference = make({})
    small = load(target, engine="native", threads=threads)
    whole = compare(log_probabilities(reference, ids[:-1]), small, ids)
    speeds = decode_speeds([reference, small], ids)
    size = sum(x.nbytes for x in weights.values())
    large = {name: format for name, format in formats.items() if format not in ("float32", "float16", "bfloat16")}
    steps.end(len(large) + 1)
    alone: dict[str, Quality] = {}
    if sensitivity:
        changed = {name: lambda name=name: quantised(weights[name], formats[name]) for name in large}
        alone = sensitivities(make, changed, ids[: sensitivity + 1], lambda name: steps.line(f"{name} alone"))
    steps.end()
    return {
        "version": config.version,
        **asdict(whole),
        "perplexity_change": whole.perplexity_change,
        "bytes": target.stat().st_size,
        "original_bytes": size,
        "bits_per_weight": 8 * target.stat().st_size / sum(math.prod(x.shape) for x in weights.values()),
        "decode_tokens_per_second": speeds[1],
        "original_decode_tokens_per_second": speeds[0],
        "threads": small.threads,
        "engine": small.engine_name,
        "tensors": {
            name: {"type": large[name], "kl_divergence": quality.kl_divergence, "same_top": quality.same_top}
            for name, quality in alone.items()
        },
    }


def show(found: dict[str, object]) -> None:
    from rich.table import Table

    console = table_console()
    facts = Table("", found_name(str(found["in"])), found_name(str(found["out"])), box=None, header_style="bold")
    number = {name: value for name, value in found.items() if isinstance(value, int | float)}
    facts.add_row("size", f"{number['original_bytes']:,} bytes", f"{number['bytes']:,} bytes")
    change = f"{number['perplexity']:.4f} ({number['perplexity_change']:+.2%})"
    facts.add_row("perplexity", f"{number['reference_perplexity']:.4f}", change)
    facts.add_row("KL divergence", "", f"{number['kl_divergence']:.5f} nats a token")
    facts.add_row("same top token", "", f"{number['same_top']:.2%} of {number['tokens']:,}")
    speeds = [number["original_decode_tokens_per_second"], number["decode_tokens_per_second"]]
    facts.add_row(f"decode, {number['threads']} threads", *(f"{speed:.1f} tok/s" for speed in speeds))
    console.print(facts)
    tensors = found["tensors"]
    if isinstance(tensors, dict) and tensors:
        table = Table(
            "alone quantised, worst first", "type", "KL divergence", "same top", box=None, header_style="bold"
        )
        worst = sorted(tensors.items(), key=lambda item: -item[1]["kl_divergence"])
        for name, row in worst:
            table.add_row(name, row["type"], f"{row['kl_divergence']:.6f}", f"{row['same_top']:.1%}")
        console.print(table)


def found_name(path: str) -> str:
    return Path(path).name
