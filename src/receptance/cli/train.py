"""`receptance train`: a run from a TOML file, with a progress bar, continued where it stopped."""

import json
import shlex
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from receptance.cli import options
from receptance.cli.terminal import doing

if TYPE_CHECKING:
    from receptance.models import RWKV
    from receptance.tokenizers import Tokenizer


def command(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", show_default=False)] = None,
    overrides: options.Overrides = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Train on these text or jsonl files; no CONFIG needed.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run (run.out).")] = None,
    ray: Annotated[
        int | None, typer.Option(help="Run in so many processes of a Ray cluster.", show_default=False)
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the whole configuration and stop.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Prepare data and model, print the memory needed, stop.")
    ] = False,
) -> None:
    """Train a model from text.

    CONFIG is a TOML file; docs/training.md lists every setting, and SECTION.KEY=VALUE overrides one. An interrupted run
    continues when the same command is given again. The finished model is the folder OUT/model.

    \b
    Examples:
      receptance train --text my.txt --out runs/mine
      receptance train --text my.txt --out runs/mine run.tokens=2_000_000
      receptance train examples/stories/rwkv7.toml optim.lr=1e-3
      receptance train examples/stories/rwkv7.toml --plan
      torchrun --standalone --nproc-per-node 4 -m receptance train big.toml
    """
    from receptance.training.config import read_config, to_json

    settings = list(overrides or [])
    if config is not None and "=" in str(config):  # no CONFIG: the first word is an override already
        settings.insert(0, str(config))
        config = None
    if text:
        settings.append(f"data.train=[{', '.join(quoted(path.resolve()) for path in text)}]")
    if out is not None:
        settings.append(f"run.out={quoted(out)}")
    chosen = read_config(config, settings)
    if show:
        typer.echo(to_json(chosen))
        return

    if ray is not None:
        from receptance.training.ray_launcher import train_on_ray

        announce(train_on_ray(chosen, ray))
        return
    with doing("loading PyTorch"):
        from receptance.training import announce_memory, set_up, train
        from receptance.training.distributed import started_rank

    is_first = started_rank() == 0
    with Progress(chosen.steps, quiet=not is_first) as progress:
        if plan:
            announce_memory(set_up(chosen, progress), progress)
            return
        folder = train(chosen, progress, sample)
    if is_first:
        announce(folder)


def quoted(path: Path) -> str:
    """A string of TOML."""
    return json.dumps(str(path), ensure_ascii=False)


def announce(folder: Path) -> None:
    typer.echo(f"finished: {folder}\ntry it: receptance run {shlex.quote(str(folder))} 'Once upon a time'")


def sample(model: "RWKV", tokenizer: "Tokenizer", prompt: str, n_tokens: int) -> str:
    from receptance.generation import generate

    return "".join(generate(model, tokenizer, prompt, max_tokens=n_tokens, temperature=0.8, top_p=0.9, seed=1))


class Progress:
    """A rich progress bar; on a pipe, plain lines."""

    def __init__(self, steps: int, quiet: bool = False):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"), console=self._console,
            disable=quiet or not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=steps)
        self._steps = steps
        self._first: tuple[float, float] | None = None

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, row: dict[str, float]) -> None:
        line = (
            f"loss {row['loss']:.4f} · {row['bits']:.3f} bits · lr {row['lr']:.2e} · "
            f"{row['tokens_per_second']:,.0f} tokens/s · {row['memory_gib']:.1f} GiB"
        )
        if "mfu" in row:
            line += f" · MFU {row['mfu']:.0%}"
        if row["skipped"]:
            line += f" · {row['skipped']:.0f} skipped"
        self._bar.update(self._task, completed=row["step"], description=line)
        if not self._console.is_terminal:
            self.message(f"step {row['step']:.0f}/{self._steps} · {line} · {self._left(row['step'])} left")

    def _left(self, step: float) -> str:
        """Time to the end at the pace since the first row."""
        if self._first is None:
            self._first = step, time.perf_counter()
        first, start = self._first
        if step == first:
            return "?" if step < self._steps else "0:00:00"
        return str(timedelta(seconds=round((time.perf_counter() - start) / (step - first) * (self._steps - step))))
