"""`receptance data`: texts to token files, and a look into them."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from receptance.cli.errors import guarded
from receptance.errors import ConfigError

if TYPE_CHECKING:
    from receptance.data import BinIdx, Progress

SHOWN = 300  # tokens of the document that `inspect` shows
PLAIN_SECONDS = 5.0  # between lines where there is no terminal

app = typer.Typer(
    name="data",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Turn texts into token files for training, and look into them.

\b
Examples:
  receptance data prepare a.jsonl.xz b.parquet --out tokens/a --tokenizer byte
  receptance data inspect tokens/mine
""",
)


@app.command("prepare", short_help="Tokenise texts into NAME.bin and NAME.idx.")
@guarded
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help=".txt, .jsonl (.xz, .gz, .zst), .parquet, a datasets folder, hf:NAME."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="NAME", help="Write NAME.bin, NAME.idx and NAME.json.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="NAME|PATH", help="world, pile, byte, or a file or folder.")
    ] = "world",
    processes: Annotated[
        int | None, typer.Option("--processes", "-p", min=1, help="Default: one for each core.")
    ] = None,
    column: Annotated[str, typer.Option("--column", help="Key of the text in JSON rows and tables.")] = "text",
    separator: Annotated[
        str | None,
        typer.Option("--separator", metavar="TEXT", help="Cuts .txt files into documents; \\n is a newline."),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that are no documents.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what NAME holds and start over.")] = False,
) -> None:
    """Tokenise texts into NAME.bin and NAME.idx, the community's format, for `data.train = ["NAME"]`.

    Interrupted at any moment, the same command goes on where it was; the files come out the same, whatever the number
    of processes. A SOURCE of the hub is hf:ORG/NAME[@CONFIG][:SPLIT]. NAME.json says what the tokens were made from.

    \b
    Examples:
      receptance data prepare a.jsonl b.jsonl.xz --out tokens/mine
      receptance data prepare c.txt --separator "<|endoftext|>" --out tokens/c
      receptance data prepare hf:roneneldan/TinyStories:train --out tokens/tiny
    """
    from receptance.data import prepare as run
    from receptance.data import read_manifest
    from receptance.tokenizers import tokenizer as open_tokenizer

    mark = separator.replace("\\n", "\n").replace("\\t", "\t") if separator else None
    try:
        with Bar() as bar:
            data = run(
                sources, open_tokenizer(tokenizer), out, column=column, separator=mark, skip_bad=skip_bad,
                processes=processes or cores(), restart=restart, progress=bar.show,
            )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise
    typer.echo(f"{out}: {len(data.tokens):,} tokens in {len(data):,} documents")
    made_from = read_manifest(out)
    skipped = sum(source.skipped for source in made_from.sources) if made_from else 0
    if skipped:
        typer.echo(f"left out {skipped:,} bad rows; {out}.json names the first of them")


@app.command("inspect", short_help="Say what a token file holds.")
@guarded
def inspect(
    name: Annotated[Path, typer.Argument(metavar="NAME", help="Of NAME.bin and NAME.idx.")],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="NAME|PATH", help="To show text instead of numbers.")
    ] = None,
    document: Annotated[int, typer.Option("--document", "-d", min=0, help="Number of the document shown.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Facts as JSON, no document.")] = False,
) -> None:
    """Say what a token file holds, from whatever tool it comes, and show a document.

    \b
    Examples:
      receptance data inspect tokens/mine
      receptance data inspect minipile --tokenizer world --document 12
    """
    from receptance.cli.terminal import write, write_json
    from receptance.data import BinIdx, read_manifest
    from receptance.tokenizers import tokenizer as open_tokenizer

    data = BinIdx(name)
    if document >= len(data):
        raise ConfigError(f"{name} has {len(data):,} documents, numbered from 0; there is no {document}")
    facts = summary(data)
    if as_json:
        write_json(facts)
        return
    for key, value in facts.items():
        typer.echo(f"{key.replace('_', ' ') + ':':<20}{value:,}")
    made_from = read_manifest(name)
    if made_from is not None:
        made_with = str(made_from.tokenizer["name"])
        typer.echo(f"{'tokenizer:':<20}{made_with}")
        if tokenizer is None and made_with in ("world", "pile", "byte"):
            tokenizer = made_with
    for source in made_from.sources if made_from else []:
        rate = source.text_bytes / max(source.tokens, 1)
        copies = f" × {source.copies}" if source.copies > 1 else ""
        typer.echo(f"{source.name}: {source.tokens:,} tokens{copies}, {rate:.2f} bytes a token")
    shown = data[document][:SHOWN].tolist()
    typer.echo(f"\ndocument {document}, {int(data.sizes[document]):,} tokens:")
    text = " ".join(map(str, shown)) if tokenizer is None else open_tokenizer(tokenizer).decode(shown)
    write(f"{text} …\n" if len(shown) < data.sizes[document] else f"{text}\n")


def summary(data: "BinIdx") -> dict[str, int]:
    import numpy as np

    return {
        "documents": len(data),
        "tokens": len(data.tokens),
        "bytes_per_token_id": data.tokens.dtype.itemsize,
        "highest_id": int(data.tokens.max()),
        "shortest_document": int(data.sizes.min()),
        "median_document": int(np.median(data.sizes)),
        "longest_document": int(data.sizes.max()),
    }


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Bar:
    """A rich progress bar over the bytes of the sources; on a pipe, a plain line every few seconds."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True)
        self._bar = RichProgress(
            DownloadColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None)
        self._first: Progress | None = None
        self._started = self._told = time.monotonic()

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, progress: "Progress") -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = progress
        speed = (progress.text_bytes - self._first.text_bytes) / max(now - self._started, 1e-9) / 1e6
        line = f"{progress.documents:,} documents · {progress.tokens:,} tokens · {speed:.1f} MB/s"
        if progress.skipped:
            line += f" · {progress.skipped:,} bad rows"
        self._bar.update(self._task, completed=progress.read, total=progress.total, description=line)
        if not self._console.is_terminal and now - self._told > PLAIN_SECONDS:
            self._told = now
            typer.echo(f"{progress.read / max(progress.total, 1):.0%} · {line}", err=True)
