"""Drafts: guesses at the next tokens, which one call of the model then checks together.

The text is the same as without them. A draft is checked by drawing each of its tokens as always, from the same logits
with the same random numbers; it saves time for as long as the draws are what was guessed. An RNN needs no cache to be
cut back: the state after a draft goes to a row of its own, and the row before it stays until the draft has held.
"""

from array import array
from collections.abc import Sequence
from typing import Protocol

from receptance.engine.runner import Runner, Work

LENGTHS = (3, 7, 15)  # of drafts: with the token before them, 4, 8 and 16 rows in one call
NGRAM = 3
MOST_TEXTS = 8  # that draft at once: the rows of more fill a batch as well, and surely
PROBE_EVERY = 256  # tokens with a guess but without a draft, after which one is tried although it would not pay
TOKEN_BITS = 20  # should ids be larger, some guesses would be wrong
LAST = (1 << TOKEN_BITS * NGRAM) - 1
REMEMBERED = 1 << 15  # of a text's last tokens at least as many are searched, and at most twice as many
STEPS = (3, 4, 6, 9, 13, 16)  # lengths of a match that are told apart
LONGEST = STEPS[-1]
STEP_OF = [max((step for step in STEPS if step <= length), default=0) for length in range(LONGEST + 1)]
MODEL = 100  # the evidence of a model's guesses
HOPEFUL = 0.8
GAIN = 1.1  # a draft must promise this much


class Drafts(Protocol):
    """The guesses for one text."""

    def add(self, token: int) -> None:
        """One more token of the text."""

    def evidence(self) -> int:
        """How much speaks for the next guesses: 0, nothing, there are none; guesses of the same evidence fare alike."""

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next."""

    def close(self) -> None: ...


class Drafter(Protocol):
    def start(self, tokens: list[int]) -> Drafts:
        """For a text that goes on from these tokens."""


class PromptLookup:
    """Guesses that what followed the last few tokens before will follow them again."""

    def start(self, tokens: list[int]) -> "Repeats":
        return Repeats(tokens)


class Repeats:
    def __init__(self, tokens: Sequence[int]):
        self._forget(tokens[-REMEMBERED:])

    def _forget(self, tokens: Sequence[int]) -> None:
        """Know of these tokens alone."""
        self._tokens = array("i")
        self._last = 0  # NGRAM tokens as one number, since there are as many of them as of tokens
        self._ends: dict[int, int] = {}  # of the last NGRAM tokens: where they ended before
        self._match: int | None = None
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        if len(self._tokens) == 2 * REMEMBERED:
            self._forget(self._tokens[REMEMBERED:])
        tokens = self._tokens
        tokens.append(token)
        self._last = (self._last << TOKEN_BITS | token) & LAST
        if len(tokens) >= NGRAM:
            self._match = self._ends.get(self._last)
            self._ends[self._last] = len(tokens)

    def evidence(self) -> int:
        """The number of last tokens that were the same before, up to LONGEST, in steps of a half more."""
        if self._match is None:
            return 0
        tokens, end, length = self._tokens, self._match, NGRAM
        while length < min(LONGEST, end) and tokens[end - length - 1] == tokens[-length - 1]:
            length += 1
        return STEP_OF[length]

    def propose(self, limit: int) -> list[int]:
        assert self._match is not None
        found: list[int] = []
        for at in range(self._match, self._match + limit):  # beyond the text's end it repeats the draft itself
            found.append(self._tokens[at] if at < len(self._tokens) else found[at - len(self._tokens)])
        return found

    def close(self) -> None:
        pass


class DraftModel:
    """Guesses by a smaller model with the same tokenizer: its most probable tokens."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.free = list(range(runner.slots))

    def start(self, tokens: list[int]) -> "Drafts":
        if len(self.free) < 2:
            return Repeats(tokens)  # no rows are left
        return ModelDrafts(self, tokens)


class ModelDrafts:
    def __init__(self, model: DraftModel, tokens: list[int]):
        self._model = model
        self._base, self._ahead = model.free.pop(), model.free.pop()
        self._unread = list(tokens)
        model.runner.reset(self._base)

    def add(self, token: int) -> None:
        self._unread.append(token)

    def evidence(self) -> int:
        return MODEL

    def propose(self, limit: int) -> list[int]:
        runner = self._model.runner
        logits = runner.run([Work(self._base, self._unread)])
        self._unread = []
        found = [int(logits[0, : runner.vocab].argmax())]
        while len(found) < limit:
            source = self._base if len(found) == 1 else self._ahead
            logits = runner.run([Work(source, found[-1:], self._ahead)])
            found.append(int(logits[0, : runner.vocab].argmax()))
        return found

    def close(self) -> None:
        self._model.free += [self._base, self._ahead]


class Worth:
    """Whether drafts pay: from measured times of calls by their number of rows, and from how many guesses have held."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # of a call with so many rows

    def measured(self, rows: int, seconds: float) -> None:
        before = self._seconds.get(rows)
        # a call that was interrupted by something else says little: down at once, up slowly
        self._seconds[rows] = seconds if before is None or seconds < before else before + (seconds - before) * 0.05

    def length(self, held: float, batch: int) -> int:
        """Of the next drafts of `batch` texts, when a guess holds with this probability; 0: none pays."""
        plain = self._seconds.get(batch)
        if plain is None:
            return 0
        best, best_rate = 0, GAIN / plain
        for length in LENGTHS:
            seconds = self._seconds.get(batch * (length + 1))
            if seconds is None:  # try it once, when that may pay
                return length if held > HOPEFUL else best
            tokens, again = length + 1.0, 0.0
            if held < 1:
                tokens = (1 - held ** (length + 1)) / (1 - held)
                # where only some guesses were right, the state after them is lost: the next call reads them again
                again = held * (1 - length * held ** (length - 1) + (length - 1) * held**length) / (1 - held)
            seconds += again * (seconds - plain) / length
            if tokens / seconds > best_rate:
                best, best_rate = length, tokens / seconds
        return best


class Record:
    """How guesses have fared, by the evidence for them."""

    def __init__(self) -> None:
        self._held: dict[int, float] = {}
        self._idle = 0  # tokens with a guess since the last draft

    def held(self, evidence: int) -> float:
        """How probable it seems that the next guess is right."""
        return self._held.get(evidence, 0.5 if evidence < LONGEST else 0.9)

    def wanted(self, worth: Worth, evidence: int, batch: int) -> int:
        """The length of the next draft; 0: it would not pay. Now and then one is tried all the same."""
        if evidence == 0:
            return 0
        self._idle += 1
        length = worth.length(self.held(evidence), batch)
        return LENGTHS[0] if length == 0 and self._idle >= PROBE_EVERY else length

    def checked(self, evidence: int, length: int, right: int) -> None:
        self._idle = 0
        trials = min(right + 1, length)  # guesses after the first wrong one were not tried
        before = self.held(evidence)
        self._held[evidence] = before + (right / trials - before) * min(0.5, 0.1 * trials)
