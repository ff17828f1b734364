"""Perplexity and bits per byte of any text."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from receptance.errors import ConfigError
from receptance.evaluation.score import Pair, Scorer
from receptance.tokenizers import Tokenizer


@dataclass(frozen=True)
class TextLoss:
    """nats summed over `tokens`, of a text of so many bytes and words (what white space parts)."""

    nats: float
    tokens: int
    n_bytes: int
    words: int
    documents: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.n_bytes

    @property
    def perplexity(self) -> float:
        """Per token: to compare models of one tokenizer."""
        return math.exp(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float:
        return math.exp(min(700.0, self.nats / self.words))


def text_loss(
    scorer: Scorer,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    window: int = 0,
    stride: int = 0,
    with_end: bool = True,
) -> TextLoss:
    """Each document from its start, after the end-of-document token.

    window 0: a document is read once, every token with all of the document before it. Else no token sees further back
    than `window` tokens: of each window the last `stride` tokens are scored (0: half of it), all of the first one.
    with_end: that the document ends is scored too, as in training. Raises ConfigError for a text without a byte.
    """
    if window < 0 or stride < 0 or stride > window or (window == 1 and stride == 0):
        raise ConfigError(f"window {window} and stride {stride}: expected 0 <= stride <= window")
    stride = stride or max(1, window // 2)
    pairs: list[Pair] = []
    n_bytes = words = count = 0
    for text in documents:
        ids = tokenizer.encode(text) + ([tokenizer.eos_id] if with_end else [])
        n_bytes, words, count = n_bytes + len(text.encode()), words + len(text.split()), count + 1
        pairs += windows(ids, window, stride) if window else [([], ids)]
    if not n_bytes:
        raise ConfigError("there is no text to measure: every document is empty")
    scored = scorer.score(pairs)
    return TextLoss(-math.fsum(x.total for x in scored), sum(len(x.ids) for x in scored), n_bytes, max(words, 1), count)


def windows(ids: list[int], window: int, stride: int) -> list[Pair]:
    """(context, scored) pairs: together at most `window` tokens, each token scored once."""
    pairs: list[Pair] = [([], ids[:window])] if ids else []
    for start in range(window, len(ids), stride):
        end = min(start + stride, len(ids))
        pairs.append((ids[max(0, end - window) : start], ids[start:end]))
    return pairs
