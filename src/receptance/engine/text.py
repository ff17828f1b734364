"""The text side of one request: which characters a drawn token makes certain, and whether the text ends with it."""

from receptance.engine.params import SamplingParams
from receptance.engine.request import FinishReason
from receptance.tokenizers import StopMatcher, Tokenizer


class Reader:
    """Takes the drawn tokens one by one.

    decoded: characters that the tokens so far have given, with those held back. passed: those that are certain.
    unmarked: the ids since the last `mark`; without `marks` none are kept.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, marks: bool = True):
        self._tokenizer = tokenizer
        self._ends = frozenset((tokenizer.eos_id, *params.stop_tokens))
        self._most = params.max_tokens
        self._decoder = tokenizer.stream()
        self._stop = StopMatcher(params.stop_strings)
        self._count, self._marks = 0, marks
        self.decoded = self.passed = 0
        self.unmarked: list[int] = []
        self._unmarked_text = 0  # their characters so far

    def is_last(self, token: int, count: int) -> bool:
        """Whether the text ends with this token, the count-th, whatever characters it has."""
        return token in self._ends or count >= self._most

    def accept(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that became certain with this token, and why the text ends with it, if it does."""
        self._count += 1
        reason: FinishReason | None = None
        if token in self._ends:
            reason, text = "stop", self._stop.finish()
        else:
            piece = self._decoder.push(token)
            text = self._stop.push(piece)
            if self._stop.matched is not None:
                reason = "stop"
            elif self._count >= self._most:
                reason, text = "length", text + self._stop.finish()
            self.decoded += len(piece)
            if self._marks:
                self.unmarked.append(token)
                self._unmarked_text += len(piece)
        self.passed += len(text)
        return text, reason

    def finish(self) -> str:
        """The text ends here for a reason outside it: what was held back is certain."""
        text = self._stop.finish()
        self.passed += len(text)
        return text

    @property
    def is_whole(self) -> bool:
        """No character is unfinished: where one is, decoding to the end shows U+FFFD after the characters so far."""
        return len(self._tokenizer.decode(self.unmarked)) == self._unmarked_text

    @property
    def is_clean(self) -> bool:
        """The certain text is that of all tokens so far, so that the state after them is the state after the text."""
        return self.decoded == self.passed and self.is_whole

    def mark(self) -> None:
        """Count `unmarked` from here."""
        self.unmarked, self._unmarked_text = [], 0
