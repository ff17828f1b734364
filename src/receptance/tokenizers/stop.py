"""Stop strings found in a stream of text."""

from collections.abc import Iterable

from receptance.errors import TokenizerError


class StopMatcher:
    """Passes text through until a stop string is complete, and never passes on the beginning of one.

    The stop string that is complete first ends the text before its start (of several that end together, the longest);
    so the output does not depend on how the text is split into pieces. `matched` is that stop string, or None so far.
    """

    def __init__(self, stop: Iterable[str]):
        """Raises TokenizerError for an empty stop string, which would stop everything."""
        self._stop = tuple(stop)
        if "" in self._stop:
            raise TokenizerError("a stop string is empty; remove it or give its text")
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is now certain to stand before any stop string; "" once stopped."""
        if not self._stop:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            _, start, self.matched = min(ends)
            self._held = ""
            return text[:start]
        held = self._possible_beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text held back, which turned out not to be a stop string; the stream has ended."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stop):
                return length
        return 0
