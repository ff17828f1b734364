"""The tree of verbs, as typer reads it."""

from importlib import import_module
from typing import Annotated

import typer

from receptance import __version__
from receptance.cli import GROUPS, VERBS
from receptance.cli.errors import guarded


def build(verb: str | None = None) -> typer.Typer:
    """The whole command line, or as much of it as this verb needs: importing all verbs takes a tenth of a second."""
    app = typer.Typer(
        name="receptance",
        rich_markup_mode=None,  # help texts are plain: [MODEL] is no markup
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_receptance)
    for name in (verb,) if verb in VERBS else VERBS:
        module = import_module(f"receptance.cli.{name}")
        if name in GROUPS:
            app.add_typer(module.app, short_help=VERBS[name])
        else:
            app.command(name, short_help=VERBS[name])(guarded(module.command))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"receptance {__version__}")
        raise typer.Exit


def _receptance(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """RWKV-4, 5, 6 and 7: train, run, serve, evaluate and look inside.

    \b
    Examples:
      receptance run "Once upon a time"            the model in the package
      receptance run model.pth "Once upon a time"
      receptance chat model.pth
      receptance serve model.pth
      receptance pull org/name:file.pth
      receptance train --text my.txt --out runs/mine
      receptance VERB --help

    \b
    Exit codes:
      0    done
      1    a file, a value or this machine is wrong; a line on stderr says what
      2    the command line itself is wrong
      130  interrupted with Ctrl-C
    """
