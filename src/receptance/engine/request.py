"""What is asked of the engine, and what comes of it."""

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal, NamedTuple, overload

from receptance.engine.params import SamplingParams
from receptance.engine.protocols import Model, State
from receptance.errors import ConfigError, ReceptanceError
from receptance.tokenizers import Tokenizer

Prompt = str | Sequence[int]
FinishReason = Literal["stop", "length", "cancelled"]

_ids = itertools.count()

BAD_LOGITS = (
    "the model's logits are not numbers (NaN) or infinite; are its weights damaged, or too large for its "
    "dtype? Try float32, and check the file it came from"
)


class GenerationError(ReceptanceError):
    """A prompt cannot be continued, or the model gives no usable probabilities."""


class GrammarError(GenerationError):
    """A grammar takes more work than is allowed; only following it shows that."""


class Token(NamedTuple):  # a frozen dataclass takes three times as long to make
    """One drawn token. `text` is what became certain with it: "" inside a character or a possible stop string.

    logprob and top (ids and log-probabilities of the most probable tokens) are there when `logprobs` was asked for.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Tokens(Sequence[Token]):
    """The tokens of a text, in some 16 bytes each: a `Token` is made when it is asked for."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._utf8 = bytearray()
        self._ends = array("q")  # of each token's text in it
        self._reports: list[tuple[float, tuple[tuple[int, float], ...]]] = []  # of all tokens, or of none

    def append(self, token: Token) -> None:
        self._utf8 += token.text.encode()
        self._ends.append(len(self._utf8))
        self._ids.append(token.id)
        if token.logprob is not None:
            self._reports.append((token.logprob, token.top))

    @property
    def ids(self) -> list[int]:
        return self._ids.tolist()

    @property
    def text(self) -> str:
        return self._utf8.decode()

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))

    @overload
    def __getitem__(self, i: int) -> Token: ...
    @overload
    def __getitem__(self, i: slice) -> list[Token]: ...
    def __getitem__(self, i: int | slice) -> Token | list[Token]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]  # negative ones, and IndexError
        start = self._ends[i - 1] if i else 0
        text = self._utf8[start : self._ends[i]].decode()
        return Token(self._ids[i], text, *(self._reports[i] if self._reports else ()))


@dataclass(frozen=True)
class Grammar:
    """What the text must be, from its first character to its last. Give one of the three.

    json_schema: a JSON schema as text ("{}": any JSON object); regex: a regular expression; lark: a grammar in the form
    of Lark. Raises ConfigError when not exactly one is given.
    """

    json_schema: str | None = None
    regex: str | None = None
    lark: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json_schema", "regex", "lark") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"a grammar has {given or 'nothing'}, expected one of json_schema, regex, lark")


@dataclass(frozen=True, eq=False)
class Request:
    """A text to go on from, and how.

    prompt: text or token ids; empty without a state: a new document.
    state: one row of any engine's State that has read what comes before the prompt; it is not changed.
    state_key: names the state, so that requests which start from the same one share the prefixes they read after it;
    None: they share nothing. Without a state it means nothing.
    n: so many texts for one reading of the prompt; text i has the seed `params.seed` + i.
    priority: smaller goes first, and takes the place of larger where there is no room.
    keep_state: the results hold the state after exactly prompt and text.
    grammar: what the text must be.
    """

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    state: State | None = None
    state_key: str | None = None
    n: int = 1
    priority: int = 0
    keep_state: bool = False
    grammar: Grammar | None = None
    id: str = field(default_factory=lambda: f"request-{next(_ids)}")

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or not 1 <= self.n <= 1024:
            raise ConfigError(f"n is {self.n!r}, expected a whole number from 1 to 1024")
        if not isinstance(self.prompt, str) and not isinstance(self.prompt, Sequence):
            raise ConfigError(f"the prompt is {type(self.prompt).__name__}, expected text or token ids")
        _check_priority(self.priority)
        if not isinstance(self.state_key, str | None):
            raise ConfigError(f"state_key is {self.state_key!r}, expected a name")
        if self.state is not None and self.state.batch != 1:
            raise ConfigError(f"the state has {self.state.batch} rows, expected one")


def _check_priority(priority: object) -> None:
    if not isinstance(priority, int):
        raise ConfigError(f"priority is {priority!r}, expected a whole number")


@dataclass(frozen=True, eq=False)
class Score:
    """Log-likelihood of a continuation. Its tokens follow those of the context; neither is changed by encoding.

    An empty context is the end-of-document token, as at the start of a document.
    """

    context: Prompt
    continuation: Prompt
    priority: int = 0

    def __post_init__(self) -> None:
        _check_priority(self.priority)


@dataclass(eq=False)
class Scored:
    """logprobs: of each token of the continuation, in nats. greedy: each is the most probable one."""

    ids: list[int]
    logprobs: list[float]
    greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@dataclass(eq=False)
class Completion:
    """One text: what has come of a request (of one of its n) so far.

    finish_reason: None while it runs. error: why it could not go on. cached_tokens: of the prompt, read by an earlier
    request. state: with keep_state, the one after prompt and text, in the engine's own form.
    """

    prompt_ids: list[int]
    seed: int
    index: int = 0
    tokens: Tokens = field(default_factory=Tokens)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    cached_tokens: int = 0
    state: Any = None

    @property
    def text(self) -> str:
        return self.tokens.text

    @property
    def ids(self) -> list[int]:
        return self.tokens.ids

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None or self.error is not None


def token_ids(model: Model, tokenizer: Tokenizer, text: Prompt) -> list[int]:
    """The tokens of a text, or its ids. Raises GenerationError for anything else, and for ids that the model lacks."""
    try:
        ids = tokenizer.encode(text) if isinstance(text, str) else list(map(index, text))
    except TypeError:  # the model would fail at it, and take with it whatever it runs beside it
        raise GenerationError(f"{str(text)[:100]!r} is neither text nor a list of token ids") from None
    vocab = model.config.vocab_size
    wrong = next((i for i in ids if not 0 <= i < vocab), None)
    if wrong is not None:
        raise GenerationError(
            f"the prompt has token id {wrong}, but the model's ids are 0 to {vocab - 1}; "
            f"does the tokenizer '{tokenizer.name}' belong to this model?"
        )
    return ids


def prompt_ids(model: Model, tokenizer: Tokenizer, prompt: Prompt, has_state: bool) -> list[int]:
    """The tokens to feed. Raises GenerationError as `token_ids` does, and for none after a state."""
    ids = token_ids(model, tokenizer, prompt)
    if not ids and has_state:
        raise GenerationError("the prompt is empty; a state goes on only from at least one more token of text")
    return ids or [tokenizer.eos_id]  # how a document begins
