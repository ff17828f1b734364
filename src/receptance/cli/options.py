"""Flags and arguments that several verbs share, and what becomes of them."""

from pathlib import Path
from typing import Annotated

import typer

from receptance.errors import ConfigError

Temperature = Annotated[float | None, typer.Option("--temperature", "-t", help="0 = greedy.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Keep the K most probable tokens; 0 = all.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Keep the most probable tokens that sum to P; 1 = all.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Drop tokens below P times the most probable one.")]
Presence = Annotated[float | None, typer.Option("--presence-penalty", help="Off the logit of each token used.")]
Frequency = Annotated[float | None, typer.Option("--frequency-penalty", help="Off the logit, times its uses.")]
Repetition = Annotated[float | None, typer.Option("--repetition-penalty", help="As in HF transformers; 1 = off.")]
Decay = Annotated[float | None, typer.Option("--penalty-decay", help="By which uses fade with each token.")]
LogitBias = Annotated[list[str] | None, typer.Option("--logit-bias", metavar="ID=VALUE", help="-inf bans; repeatable.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before it; \\n is a newline; repeatable.")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "-n", help="At most so many tokens.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same text.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16, float16; native: int8, int4; torch: float64; default: the file's."
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu (default), cuda, cuda:1, ...")]
Place = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Engine = Annotated[str | None, typer.Option("--engine", help="native (CPU, without torch; default there) or torch.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Of the native engine; default: one a core.")]
TokenizerName = Annotated[
    str | None, typer.Option("--tokenizer", metavar="NAME|PATH", help="world, pile, byte, or a file; default: told.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings in place of the file's.", show_default=False),
]
Folders = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="out=FOLDER, root=FOLDER in place of the file's.", show_default=False),
]
StateFile = Annotated[Path | None, typer.Option("--state", metavar="FILE", help="Go on from a saved state.")]


def read_key(file: Path | None) -> str | None:
    """The API key in a file."""
    return None if file is None else file.read_text(encoding="utf-8").strip()


def paths(overrides: list[str] | None) -> dict[str, str]:
    """out=FOLDER and root=FOLDER. Raises ConfigError for anything else."""
    given = dict(pair.split("=", 1) for pair in overrides or () if "=" in pair)
    if len(given) < len(overrides or ()) or given.keys() - {"out", "root"}:
        raise ConfigError(f"overrides {overrides}: expected out=FOLDER or root=FOLDER")
    return {key: str(Path(value).resolve()) for key, value in given.items()}
