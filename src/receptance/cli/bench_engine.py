"""`receptance bench engine`: many sequences at once, beside what the machine can do."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from receptance.cli import options
from receptance.cli.errors import guarded
from receptance.cli.model_source import find_model, load_runner, load_tokenizer
from receptance.cli.terminal import doing, write_json
from receptance.errors import ConfigError, ReceptanceError

if TYPE_CHECKING:
    from receptance.engine.measure import Decode, Machine, Mixed, Prefill


@guarded
def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Path, name or org/name[:file].")] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N,N", help="Sequences at once.")] = "1,4,16,64",
    prompt: Annotated[int, typer.Option("--prompt", metavar="N", help="Tokens of a prompt.")] = 512,
    seconds: Annotated[float, typer.Option("--seconds", help="For each measurement.")] = 2.0,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it (png, svg); needs matplotlib.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    tokenizer: options.TokenizerName = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    engine: options.Engine = None,
    threads: options.Threads = None,
) -> None:
    """Measure the batched engine: writing at several batch sizes, reading prompts, and a mixed load.

    First some requests are checked to have the same tokens together as alone. "reached" is the share of the limit: what
    memory allows when weights are read once and states read and written once in a step, or what products allow.
    "own" is the share of a step that is neither the model nor the drawing of tokens.

    \b
    Examples:
      receptance bench engine
      receptance bench engine model.pth --device cuda --batch 1,64 --plot a.png
    """
    sizes = _sizes(batch)
    if prompt < 2 or not seconds > 0:
        raise ConfigError("--prompt must be at least 2, and --seconds above 0")
    from receptance.engine.measure import Bench, UnsoundError, machine_limits

    source = find_model(model)
    rwkv = load_runner(source, dtype, device, engine, threads)
    bench = Bench(rwkv, load_tokenizer(source, rwkv.config.vocab_size, tokenizer), max(sizes))
    try:
        with doing("checking that texts are the same together as alone"):
            bench.check()
    except UnsoundError as error:
        raise ReceptanceError(f"no speed is reported: {error}") from None
    with doing("measuring"):
        machine = machine_limits(rwkv, seconds)
        decodes = [bench.decode(n, seconds, machine) for n in sizes]
        prefills = [bench.prefill(n, prompt, seconds, machine) for n in (1, max(sizes) // 4 or 1)]
        mixed = bench.mixed(max(sizes), 2 * seconds)
    if plot is not None:
        draw(plot, source.name, decodes)
    if as_json:
        write_json(_as_json(source.name, rwkv, machine, decodes, prefills, mixed))
    else:
        typer.echo(_as_table(source.name, rwkv, machine, decodes, prefills, mixed))


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(x) for x in text.split(",")]
    except ValueError:
        raise ConfigError(f"--batch is {text!r}, expected numbers like 1,4,16") from None
    if not all(1 <= n <= 65536 for n in sizes):
        raise ConfigError(f"--batch is {text!r}, expected numbers from 1 to 65536")
    return sizes


def _as_json(
    name: str, model: Any, machine: "Machine", decodes: "list[Decode]", prefills: "list[Prefill]", mixed: "Mixed"
) -> dict[str, object]:
    config = model.config
    return {
        "bench": "engine",
        "model": {
            "name": name,
            "version": config.version,
            "n_layer": config.n_layer,
            "n_embd": config.n_embd,
            "dtype": str(model.dtype),
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "engine": model.engine,
            "device": str(model.device),
            **asdict(machine),
        },
        "decode": [{**asdict(x), "reached": x.reached} for x in decodes],
        "prefill": [{**asdict(x), "reached": x.reached} for x in prefills],
        "mixed": asdict(mixed),
    }


def _as_table(
    name: str, model: Any, machine: "Machine", decodes: "list[Decode]", prefills: "list[Prefill]", mixed: "Mixed"
) -> str:
    config = model.config
    lines = [
        f"RWKV-{config.version} {name}: {config.n_layer} layers of {config.n_embd}, {model.dtype}, {model.device}",
        "",
        f"{'writing':>16}{'tokens/s':>12}{'step ms':>10}{'draw ms':>10}{'own':>7}{'limit':>12}{'reached':>9}",
    ]
    for x in decodes:
        numbers = f"{x.tokens_per_s:12,.0f}{x.step_ms:10.2f}{x.draw_ms:10.2f}{x.own:7.0%}{x.limit:12,.0f}"
        lines.append(f"{x.batch:>10} texts{numbers}{x.reached:9.0%}")
    lines += ["", f"{'reading':>16}{'tokens/s':>12}{'':27}{'limit':>12}{'reached':>9}"]
    for y in prefills:
        shape = f"{y.batch} x {y.length}"
        lines.append(f"{shape:>16}{y.tokens_per_s:12,.0f}{'':27}{y.limit:12,.0f}{y.reached:9.0%}")
    lines += [
        "",
        f"mixed load of {mixed.batch}: reads {mixed.read_per_s:,.0f} and writes {mixed.written_per_s:,.0f} tokens/s",
        f"first token after {_milliseconds(mixed.first_token_ms)}; between tokens {_milliseconds(mixed.between_ms)}",
        f"this machine reads {machine.read / 1e9:.1f} GB/s and does {machine.operations / 1e9:,.0f} G operations/s",
    ]
    return "\n".join(lines)


def _milliseconds(found: Sequence[float]) -> str:
    return " / ".join(f"{x:.1f}" for x in found) + " ms (median / 95 % / 99 %)"


def draw(path: Path, name: str, decodes: "list[Decode]") -> None:
    """Tokens/s over the batch size, beside the limit, on logarithmic axes."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    batches = [x.batch for x in decodes]
    axes.loglog(batches, [x.limit for x in decodes], "--", color="gray", label="limit of the machine")
    axes.loglog(batches, [x.tokens_per_s for x in decodes], "o-", color="tab:blue", label="reached")
    for x in decodes:
        axes.annotate(f"{x.reached:.0%}", (x.batch, x.tokens_per_s), textcoords="offset points", xytext=(4, -12))
    axes.set(title=name, xlabel="texts at once", ylabel="tokens/s")
    axes.set_xticks(batches, [str(n) for n in batches])
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
