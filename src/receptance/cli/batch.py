"""`receptance batch`: a file of prompts in, a file of texts out."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from receptance.cli import options
from receptance.cli.errors import USER_ERROR, UsageError
from receptance.cli.model_source import ModelSource, find_model, load_runner, load_tokenizer
from receptance.cli.preset import find_preset
from receptance.cli.sampling_flags import sampling_params
from receptance.engine.params import SamplingParams

if TYPE_CHECKING:
    from receptance.engine.engine import Engine

DEFAULTS = SamplingParams(temperature=1.0, top_p=0.85, presence_penalty=0.2, frequency_penalty=0.2)  # as `run`


def command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="JSON lines of what is asked.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="JSON lines of answers; one that exists is completed.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="Path, name or org/name[:file].")
    ] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    stop: options.Stop = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Line i has the seed SEED + i.")] = None,
    slots: Annotated[
        int | None, typer.Option("--slots", metavar="N", help="Sequences at once; default: 64, 256 on a GPU.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu (default), cuda, or several: cuda:0,cuda:1.")
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", help="Processes, each with the model; on one device.")
    ] = 1,
    tokenizer: options.TokenizerName = None,
    dtype: options.Dtype = None,
    engine: options.Engine = None,
    threads: options.Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Continue, score or embed all lines of a file, many at once.

    A line of IN is {"prompt": "Once upon"} with any sampling fields (max_tokens, temperature, seed, stop, n,
    json_schema, regex, ...), or {"context": "...", "continuation": "..."} for its log-likelihood, or {"embed": "..."}.
    "id" names it; default: its number, from 0. Answers are written to OUT as they are ready, each with its id. After an
    interruption the same command goes on with the lines that have no answer yet.

    \b
    Examples:
      receptance batch prompts.jsonl texts.jsonl --max-tokens 100
      receptance batch in.jsonl texts.jsonl -m model.pth --device cuda:0,cuda:1
      receptance batch choices.jsonl scores.jsonl -m model.gguf --threads 8
    """
    if source.resolve() == target.resolve():
        raise UsageError("IN and OUT are the same file")
    if not source.is_file():
        raise UsageError(f"{source}: no such file")
    from receptance.engine.offline import Results, answer_all, read_lines
    from receptance.engine.workers import answer_on_workers

    found = find_model(model)
    flags = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
    }
    params = sampling_params(DEFAULTS, find_preset(found).sampling, flags, None, stop)
    with open(source, "rb") as file:
        total = sum(1 for line in file if line.strip())
    results = Results(target)
    devices = [None] * workers if device is None else [x.strip() for x in device.split(",") for _ in range(workers)]
    makers = [partial(open_engine, found, tokenizer, dtype, place, engine, threads, slots) for place in devices]
    try:
        with _Progress(total, len(results.done), quiet) as progress:
            lines = read_lines(source, params, set(results.done))

            def write(answer: dict[str, Any]) -> None:
                results.write(answer)
                progress.advance(answer)

            if len(makers) == 1:
                with makers[0]() as opened:
                    answer_all(opened, lines, write)
            else:
                answer_on_workers(makers, lines, write)
    finally:
        results.close()
    if results.failed:
        typer.echo(
            f'{results.failed} of {len(results.done)} lines could not be answered; see "error" in {target}', err=True
        )
        raise typer.Exit(USER_ERROR)


def open_engine(
    source: ModelSource,
    tokenizer: str | None,
    dtype: str | None,
    device: str | None,
    engine: str | None,
    threads: int | None,
    slots: int | None,
) -> "Engine":
    from receptance.engine.engine import Engine

    rwkv = load_runner(source, dtype, device, engine, threads)
    return Engine(rwkv, load_tokenizer(source, rwkv.config.vocab_size, tokenizer), slots=slots)


class _Progress:
    """A bar on stderr, with the tokens that were written in a second."""

    def __init__(self, total: int, done: int, quiet: bool):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=quiet)
        self._task = self._bar.add_task("", total=total, completed=done, speed="")
        self._tokens = 0

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, answer: dict[str, Any]) -> None:
        self._tokens += sum(x.get("completion_tokens", 0) for x in answer.get("texts", [answer]))
        seconds = self._bar.tasks[0].elapsed or 0.0
        speed = f"{self._tokens / seconds:,.0f} tok/s" if seconds and self._tokens else ""
        self._bar.update(self._task, advance=1, speed=speed)
