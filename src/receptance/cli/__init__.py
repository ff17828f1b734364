"""The command line: one file per verb, each thin. Nothing here imports torch before a verb needs it."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

# A verb is a module of this package with a function `command`; its docstring is the help text.
VERBS = (
    "run", "chat", "serve", "eval", "memory", "compare", "scaling", "forecast", "nodes", "batch", "inspect", "convert",
    "quantize", "pull", "list", "doctor",
)  # fmt: skip
GROUPS = ("data", "bench")  # a module with `app`


def build(verb: str | None = None) -> "typer.Typer":
    """The whole command line, or as much of it as this verb needs: importing all verbs takes a tenth of a second."""
    from receptance.cli.tree import build

    return build(verb)


def main() -> None:
    from receptance.cli import quick

    if (request := quick.read(sys.argv[1:])) is not None:
        sys.exit(quick.run(request))
    build(sys.argv[1] if len(sys.argv) > 1 else None)()
