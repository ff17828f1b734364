"""`receptance bench serve`: what a server's clients wait for, at a given rate of requests."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from receptance.cli import options
from receptance.cli.errors import guarded
from receptance.cli.terminal import write_json
from receptance.errors import ConfigError

if TYPE_CHECKING:
    from receptance.server.load import Result


@guarded
def command(
    url: Annotated[str, typer.Option("--url", help="The server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Its name there; default: the first.")] = None,
    rate: Annotated[
        str, typer.Option("--rate", metavar="X,X", help="Requests in a second; several are compared.")
    ] = "2",
    seconds: Annotated[float, typer.Option("--seconds", help="For each rate.")] = 20.0,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="N,N", help="Tokens of prompts, drawn among these.")
    ] = "128",
    output: Annotated[str, typer.Option("--output", metavar="N,N", help="Tokens of texts, drawn among these.")] = "64",
    seed: Annotated[int, typer.Option("--seed", help="Of arrivals, lengths and prompts.")] = 1,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="FILE", help="A file with the API key.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it (png, svg); needs matplotlib.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Measure a server: requests arrive at random times at a given rate, whether or not earlier ones have ended.

    Reported are percentiles of the time to the first token and of the time between tokens, and the tokens written in a
    second. Prompts are random words, so that nothing is found in the server's cache.

    \b
    Examples:
      receptance bench serve --rate 4
      receptance bench serve --rate 1,2,4,8 --prompt 32,256 --plot serve.png
    """
    try:
        import httpx  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError("bench serve needs httpx: pip install httpx") from None
    if not seconds > 0:
        raise ConfigError("--seconds must be above 0")
    rates, prompts, outputs = (
        numbers(rate, float, "--rate"),
        numbers(prompt, int, "--prompt"),
        numbers(output, int, "--output"),
    )
    from receptance.server.load import Load

    load = Load(url.rstrip("/").removesuffix("/v1"), model, options.read_key(key_file), prompts, outputs, seed)
    results = [asyncio.run(load.run(each, seconds)) for each in rates]
    if plot is not None:
        draw(plot, results)
    if as_json:
        write_json({"bench": "serve", "url": load.url, "runs": [result.report() for result in results]})
    else:
        typer.echo(as_table(results))


def numbers(text: str, kind: Any, flag: str) -> list[Any]:
    try:
        found = [kind(x) for x in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(x > 0 for x in found):
        raise ConfigError(f"{flag} is {text!r}, expected numbers above 0, such as 1,2")
    return found


def as_table(results: "Sequence[Result]") -> str:
    from receptance.server.load import PERCENTILES, percentiles

    counts = f"{'rate':>8}{'answered':>10}{'refused':>9}{'failed':>8}{'tokens/s':>10}"
    names = " ".join(f"{f'p{p}':>8}" for p in PERCENTILES)
    lines = [
        f"{'':{len(counts)}}   {'first token, ms':^{len(names)}}  | {'between tokens, ms':^{len(names)}}",
        f"{counts}   {names}  | {names}",
    ]
    for x in results:
        parts = [
            " ".join(f"{1000 * value:8.1f}" for value in (percentiles(values) or {}).values())
            for values in (x.first, x.between)
        ]
        numbers = f"{x.rate:8.2f}{len(x.whole):10}{x.refused:9}{x.failed:8}{x.tokens / x.seconds:10,.0f}"
        lines.append(f"{numbers}   {parts[0]}  | {parts[1]}")
    return "\n".join(lines)


def draw(path: Path, results: "Sequence[Result]") -> None:
    """Percentiles over the rate."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    from receptance.server.load import PERCENTILES, percentiles

    figure, both = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, title, pick in zip(both, ("first token", "between tokens"), ("first", "between")):
        for p, style in zip(PERCENTILES, ("o-", "s--", "^:")):
            found = [(x.rate, percentiles(getattr(x, pick))) for x in results]
            points = [(rate, 1000 * values[f"p{p}"]) for rate, values in found if values]
            axes.plot(*zip(*points), style, label=f"p{p}") if points else None
        axes.set(title=title, xlabel="requests/s", ylabel="ms", yscale="log", xticks=[x.rate for x in results])
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
