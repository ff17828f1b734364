"""`receptance bench serve`: what a server's clients wait for, at a given rate of requests."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from receptance.cli.errors import guarded
from receptance.cli.terminal import write_json
from receptance.errors import ConfigError, ReceptanceError

if TYPE_CHECKING:
    import httpx

PERCENTILES = (50, 90, 99)


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
      receptance bench serve --rate 1,2,4,8 --prompt 32,256 --output 16,128 --plot serve.png
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
    key = None if key_file is None else key_file.read_text(encoding="utf-8").strip()
    load = Load(url.rstrip("/").removesuffix("/v1"), model, key, prompts, outputs, seed)
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


@dataclass
class Result:
    """Seconds of all requests that were answered at one rate."""

    rate: float
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0  # 429 and 503
    failed: int = 0

    def report(self) -> dict[str, Any]:
        return {
            "rate": self.rate,
            "seconds": self.seconds,
            "answered": len(self.whole),
            "refused": self.refused,
            "failed": self.failed,
            "tokens_per_s": self.tokens / self.seconds,
            "first_token_s": percentiles(self.first),
            "between_tokens_s": percentiles(self.between),
            "request_s": percentiles(self.whole),
        }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in PERCENTILES}


@dataclass
class Load:
    url: str
    model: str | None
    key: str | None
    prompts: list[int]
    outputs: list[int]
    seed: int

    async def run(self, rate: float, seconds: float) -> Result:
        """Send requests for so long, wait until all are answered. Raises ReceptanceError where no server is."""
        import httpx

        rng, result, tasks = random.Random(self.seed), Result(rate), []
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=1000)
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=600, limits=limits) as client:
            try:
                answer = await client.get("/v1/models")
                answer.raise_for_status()
            except httpx.HTTPError as error:
                raise ReceptanceError(f"{self.url} does not answer ({error})") from None
            vocabulary = await self._words(client, rng)
            began = time.perf_counter()
            due = began
            while (due := due + rng.expovariate(rate)) < began + seconds:
                body = {
                    "model": self.model,
                    "prompt": rng.choices(vocabulary, k=rng.choice(self.prompts)),
                    "max_tokens": rng.choice(self.outputs),
                    "ignore_eos": True,
                    "stream": True,
                    "seed": rng.randrange(1 << 30),
                }
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.ensure_future(self._request(client, body, due, result)))
            await asyncio.gather(*tasks)
            result.seconds = time.perf_counter() - began
        return result

    async def _words(self, client: "httpx.AsyncClient", rng: random.Random) -> list[int]:
        """Token ids of plain text."""
        text = (
            "The old king went to the sea with a fox, and there they met a bear who had lost his way home in the snow."
        )
        answer = await client.post("/tokenize", json={"model": self.model, "prompt": text})
        answer.raise_for_status()
        return list(answer.json()["tokens"])

    async def _request(self, client: "httpx.AsyncClient", body: dict[str, Any], due: float, result: Result) -> None:
        """Times count from when the request was due, however late this program was."""
        import httpx

        last, is_whole = 0.0, False
        try:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code in (429, 503):
                    result.refused += 1
                    return
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        is_whole = True
                    elif line.startswith("data: ") and json.loads(line[6:])["choices"][0]["text"]:
                        now = time.perf_counter()
                        (result.between if last else result.first).append(now - (last or due))
                        last = now
        except (httpx.HTTPError, ValueError, LookupError):
            is_whole = False
        if is_whole:
            result.whole.append(time.perf_counter() - due)
            result.tokens += body["max_tokens"]
        else:
            result.failed += 1


def as_table(results: Sequence[Result]) -> str:
    lines = [
        f"{'rate':>8}{'answered':>10}{'refused':>9}{'failed':>8}{'tokens/s':>10}   first token ms, between tokens ms"
    ]
    lines[0] += f" (p{', p'.join(map(str, PERCENTILES))})"
    for x in results:
        parts = [
            " ".join(f"{1000 * value:8.1f}" for value in (percentiles(values) or {}).values())
            for values in (x.first, x.between)
        ]
        numbers = f"{x.rate:8.2f}{len(x.whole):10}{x.refused:9}{x.failed:8}{x.tokens / x.seconds:10,.0f}"
        lines.append(f"{numbers}   {parts[0]}  | {parts[1]}")
    return "\n".join(lines)


def draw(path: Path, results: Sequence[Result]) -> None:
    """Percentiles over the rate."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, title, pick in zip(both, ("first token", "between tokens"), ("first", "between")):
        for p, style in zip(PERCENTILES, ("o-", "s--", "^:")):
            found = [(x.rate, percentiles(getattr(x, pick))) for x in results]
            points = [(rate, 1000 * values[f"p{p}"]) for rate, values in found if values]
            axes.plot(*zip(*points), style, label=f"p{p}") if points else None
        axes.set(title=title, xlabel="requests/s", ylabel="ms", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
