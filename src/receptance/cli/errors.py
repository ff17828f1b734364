"""What a user sees when something goes wrong: one line on stderr and an exit code, never a traceback."""

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

from receptance.errors import ReceptanceError

P = ParamSpec("P")

USER_ERROR = 1
INTERRUPTED = 130


class UsageError(ReceptanceError):
    """The arguments contradict each other or lack something; exit code 2."""


def complain(message: str) -> None:
    text = f"error: {' '.join(message.split())}"
    red = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[31m{text}\x1b[0m" if red else text, file=sys.stderr)


def exit_code(command: Callable[P, int | None], *args: P.args, **kwargs: P.kwargs) -> int:
    """Of a verb whose errors are reported as this module says. Anything unforeseen still shows its traceback: a bug."""
    try:
        return command(*args, **kwargs) or 0
    except ReceptanceError as error:
        complain(str(error))
        return 2 if isinstance(error, UsageError) else USER_ERROR
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        complain("this needs PyTorch, which is not installed: pip install 'receptance[torch]'")
        return USER_ERROR
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our output has gone, as in `| head`
            raise
        complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def guarded(command: Callable[P, int | None]) -> Callable[P, None]:
    """The same for typer, which wants an exception for any code but 0."""
    import typer

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if code := exit_code(command, *args, **kwargs):
            raise typer.Exit(code)

    return run
