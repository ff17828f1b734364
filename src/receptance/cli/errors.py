"""What a user sees when something goes wrong: one line on stderr and an exit code, never a traceback."""

import errno
import functools
from collections.abc import Callable
from typing import ParamSpec

import typer

from receptance.errors import ReceptanceError

P = ParamSpec("P")

USER_ERROR = 1
INTERRUPTED = 130


class UsageError(ReceptanceError):
    """The arguments contradict each other or lack something; exit code 2."""


def complain(message: str) -> None:
    typer.secho(f"error: {' '.join(message.split())}", err=True, fg="red")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """A verb whose errors are reported as this module says. Anything unforeseen still shows its traceback: a bug."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ReceptanceError as error:
            complain(str(error))
            raise typer.Exit(2 if isinstance(error, UsageError) else USER_ERROR) from None
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            complain("this needs PyTorch, which is not installed: pip install 'receptance[torch]'")
            raise typer.Exit(USER_ERROR) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone, as in `| head`
                raise
            complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    return run
