"""What a request may ask of the sampler. Needs no torch: the command line and the server check requests with it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypedDict, cast

from receptance.errors import ConfigError

MAX_STOPS = 32
MAX_STOP_CHARS = 256


class SamplingFields(TypedDict, total=False):
    """The fields of SamplingParams, for functions that take them as keywords."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    penalty_decay: float
    penalize_digits: bool
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]]
    stop: str | Iterable[str]
    stop_tokens: Iterable[int]
    ignore_eos: bool
    seed: int | None
    logprobs: int | None


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises ConfigError naming the field, its value and the range.

    temperature: 0 = greedy: the largest logit, of equal ones the lowest id.
    top_k: keep the k most probable tokens, 0 = all. top_p: keep the most probable tokens up to and including the one
    that brings their sum to top_p; 0 = only the maximum, 1 = all (the reference turns greedy at 1 by a rounding
    accident). min_p: drop tokens below min_p times the maximum. Each is a threshold on the probability, so tokens that
    tie with the last one kept are kept too.
    presence_penalty, frequency_penalty: subtracted from the logit of each token generated so far, the latter times its
    number of occurrences; the prompt does not count. penalty_decay: all occurrences are multiplied by it at every step.
    penalize_digits: False, as in the reference, leaves tokens made of digits, blanks and tabs out of the occurrences
    (numbers and indentation repeat rightly; presence_penalty still applies to them); True counts all, as OpenAI does.
    repetition_penalty: as in HF: divides positive and multiplies negative logits of all tokens in prompt and output
    (of what a given state has read before, nothing is known). 1 = off.
    logit_bias: id → value added to the logit; -inf bans the token. Given as mapping or pairs, kept as sorted pairs.
    stop: the text ends before any of these strings. stop_tokens: ids that end it as end of document does.
    ignore_eos: never draw end of document, so that the text has max_tokens tokens.
    seed: same seed, same text, whatever else is in the batch; None = a fresh one.
    logprobs: report the log-probability of each token and of the n most probable ones, under the plain softmax of the
    model's logits (before bias, penalties, truncation and temperature, as OpenAI reports them); None = no report.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    penalty_decay: float = 0.996
    penalize_digits: bool = False
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()
    stop: str | Iterable[str] = ()
    stop_tokens: Iterable[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs"):
                continue
            if not _is_int(value) or not low <= value <= high:
                raise ConfigError(f"{name} is {value!r}, expected a whole number from {low} to {high}")
        for name, (lowest, highest) in NUMBERS.items():
            value = getattr(self, name)
            if not _is_number(value) or not lowest <= value <= highest:
                raise ConfigError(f"{name} is {value!r}, expected a number from {lowest:g} to {highest:g}")
        for name in ("penalize_digits", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected true or false")
        # frozen, and hashable whatever the caller gave
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "stop_tokens", _checked_ids(self.stop_tokens))

    @property
    def bias_pairs(self) -> tuple[tuple[int, float], ...]:
        return cast(tuple[tuple[int, float], ...], self.logit_bias)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return cast(tuple[str, ...], self.stop)

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def check_bias(self, vocab_size: int) -> None:
        """Raises ConfigError for a logit bias on an id that the vocabulary lacks."""
        if self.bias_pairs and (largest := self.bias_pairs[-1][0]) >= vocab_size:  # they are sorted
            raise ConfigError(f"logit_bias has token id {largest}, but the vocabulary's ids are 0 to {vocab_size - 1}")


INTEGERS = {"max_tokens": (0, 10**9), "top_k": (0, 10**9), "seed": (0, 2**64 - 1), "logprobs": (0, 100)}
NUMBERS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "repetition_penalty": (0.01, 100.0),
    "penalty_decay": (0.0, 1.0),
}
MAX_BIAS = 1e30  # what float32 holds together with any logit


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checked_bias(bias: object) -> tuple[tuple[int, float], ...]:
    try:
        pairs = dict(cast(Iterable[tuple[int, float]], bias))
    except (TypeError, ValueError):
        raise ConfigError(f"logit_bias is {bias!r}, expected token ids with the values to add") from None
    for token, value in pairs.items():
        if not _is_int(token) or token < 0:
            raise ConfigError(f"logit_bias has the token id {token!r}, expected a whole number from 0")
        if not _is_number(value) or not (abs(value) <= MAX_BIAS or value == -math.inf):
            raise ConfigError(
                f"logit_bias of token {token} is {value!r}, expected a number from {-MAX_BIAS:.0e} to {MAX_BIAS:.0e}, "
                "or -inf to ban the token"
            )
    return tuple(sorted((token, float(value)) for token, value in pairs.items()))


def _checked_stop(stop: object) -> tuple[str, ...]:
    if not isinstance(stop, Iterable):
        raise ConfigError(f"stop is {stop!r}, expected a string or several")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > MAX_STOPS:
        raise ConfigError(f"stop has {len(strings)} strings, expected at most {MAX_STOPS}")
    for text in strings:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
            raise ConfigError(f"stop has {text!r}, expected strings of 1 to {MAX_STOP_CHARS} characters")
    return strings


def _checked_ids(stop_tokens: object) -> tuple[int, ...]:
    if not isinstance(stop_tokens, Iterable):
        raise ConfigError(f"stop_tokens is {stop_tokens!r}, expected token ids")
    tokens = tuple(stop_tokens)
    for token in tokens:
        if not _is_int(token) or token < 0:
            raise ConfigError(f"stop_tokens has {token!r}, expected token ids from 0")
    return tokens
