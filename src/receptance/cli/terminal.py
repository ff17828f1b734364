"""What stands between generated text and a terminal: whole output, no control codes, and a Ctrl-C that only stops."""

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def write(text: str) -> None:
    """To stdout at once. On a terminal without control codes: a model's text must not move the cursor or worse."""
    sys.stdout.write(CONTROL.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2), flush=True)


def table_console() -> "Console":
    """Folds what is too wide for the terminal; into a file or a pipe each row stays one line."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def note(text: str) -> None:
    """To stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """On a terminal a line on stderr that says what takes seconds, and goes when it is done."""
    is_shown = sys.stderr.isatty()
    if is_shown:
        print(f"{what} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def read_stdin() -> str:
    """All of standard input as UTF-8, broken bytes replaced, without the newline that ends its last line."""
    data = sys.stdin.buffer.read()
    text = data.decode("utf-8", "replace")
    if "\ufffd" in text and text.encode() != data:
        note("note: standard input is not UTF-8 throughout; what is not was replaced by \ufffd")
    return text.removesuffix("\n").removesuffix("\r")


@contextmanager
def interruptible(has_begun: Callable[[], bool] = lambda: True) -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C only makes the given function true; a second one interrupts as usual.

    has_begun: whether there is something to end in order; before, the first one interrupts too.
    """
    pressed = False

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed or not has_begun():
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
