"""`receptance.engine.sampling` for NumPy arrays: the same functions, the same order of steps, the same draws.

Kept apart rather than made generic, because the torch form runs batches on a GPU and this one must not import torch.
tests/engine/test_numpy_sampling.py holds both to each other.
"""

import hashlib
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from receptance.engine.params import SamplingParams

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


@dataclass(frozen=True)
class ParamRows:
    """The parameters of a batch as columns [B, 1]."""

    temperature: Floats
    top_k: Ints
    top_p: Floats
    min_p: Floats
    presence: Floats
    frequency: Floats
    repetition: Floats
    decay: Floats
    count_digits: NDArray[np.bool_]
    bias: tuple[Ints, Ints, Floats]  # rows, ids, values; each [number of biases]
    needs_sort: bool
    has_penalties: bool

    @staticmethod
    def of(params: Sequence[SamplingParams], vocab_size: int, eos_id: int) -> "ParamRows":
        """Raises ConfigError for a logit bias on an id that the vocabulary lacks."""

        def column(values: list[float], dtype: type = np.float32) -> NDArray[np.generic]:
            return np.array(values, dtype=dtype)[:, None]

        for p in params:
            p.check_bias(vocab_size)
        pairs = [(row, *pair) for row, p in enumerate(params) for pair in p.bias_pairs]
        pairs += [(row, eos_id, -math.inf) for row, p in enumerate(params) if p.ignore_eos]
        rows, ids, values = zip(*pairs) if pairs else ((), (), ())
        return ParamRows(
            temperature=column([p.temperature for p in params]),  # type: ignore[arg-type]
            top_k=column([min(p.top_k or vocab_size, vocab_size) for p in params], np.int64),  # type: ignore[arg-type]
            # above any sum of probabilities, whatever the rounding: nothing is cut
            top_p=column([p.top_p if p.top_p < 1 else 2.0 for p in params], np.float64),  # type: ignore[arg-type]
            min_p=column([p.min_p for p in params]),  # type: ignore[arg-type]
            presence=column([p.presence_penalty for p in params]),  # type: ignore[arg-type]
            frequency=column([p.frequency_penalty for p in params]),  # type: ignore[arg-type]
            repetition=column([p.repetition_penalty for p in params]),  # type: ignore[arg-type]
            decay=column([p.penalty_decay for p in params]),  # type: ignore[arg-type]
            count_digits=column([p.penalize_digits for p in params], np.bool_),  # type: ignore[arg-type]
            bias=(np.array(rows, np.int64), np.array(ids, np.int64), np.array(values, np.float32)),
            needs_sort=any(p.top_p < 1 or p.top_k > 0 for p in params),
            has_penalties=any(p.has_penalties for p in params),
        )


@dataclass(frozen=True)
class Counts:
    """What each row has read and written, for the penalties: as `sampling.Counts`, whose fields it has."""

    occurrence: Floats
    seen: Ints
    weight: Floats

    PROMPT = 1
    GENERATED = 2

    @staticmethod
    def start(prompts: Sequence[Sequence[int]], weight: Floats) -> "Counts":
        """Nothing generated yet after these prompts; `weight` [V], see `digit_weight`."""
        seen = np.zeros((len(prompts), len(weight)), np.uint8)
        for row, prompt in enumerate(prompts):
            seen[row, sorted(set(prompt))] = Counts.PROMPT
        return Counts(np.zeros(seen.shape, np.float32), seen, weight)

    def after(self, tokens: Sequence[int], params: ParamRows) -> "Counts":
        """One more token of each row generated: everything before it decays first."""
        rows = np.arange(len(tokens))
        occurrence, seen = self.occurrence * params.decay, self.seen.copy()
        occurrence[rows, tokens] += np.where(params.count_digits[:, 0], np.float32(1), self.weight[list(tokens)])
        seen[rows, tokens] = Counts.GENERATED
        return Counts(occurrence, seen, self.weight)

    def select(self, rows: list[int]) -> "Counts":
        return Counts(self.occurrence[rows], self.seen[rows], self.weight)


def digit_weight(token_bytes: Iterable[bytes]) -> Floats:
    """[V]: 0 for pieces of " \\t0123456789", whose occurrences the reference does not count; 1 for other tokens."""
    return np.array([0.0 if text in b" \t0123456789" else 1.0 for text in token_bytes], np.float32)


def softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def adjusted(logits: Floats, params: ParamRows, counts: Counts | None = None) -> Floats:
    """Logits [B, V] with bias and penalties, float32. `counts` may be None when no row has penalties."""
    rows, ids, values = params.bias
    x = logits.astype(np.float32)  # a copy
    np.add.at(x, (rows, ids), values)
    if not params.has_penalties:
        return x
    if counts is None:
        raise ValueError("a row has penalties, but there are no counts")
    x = np.where(counts.seen > 0, np.where(x > 0, x / params.repetition, x * params.repetition), x)
    penalty = params.presence + counts.occurrence * params.frequency
    return np.where(counts.seen == Counts.GENERATED, x - penalty, x)


def distribution(logits: Floats, params: ParamRows) -> Floats:
    """Adjusted logits [B, V] → the probabilities to draw from: truncated, then tempered. Greedy rows are one-hot."""
    if (params.temperature == 0).all():
        return one_hot(logits)
    probs = softmax(logits)
    floor = params.min_p * probs.max(-1, keepdims=True)  # [B, 1]
    if params.needs_sort:
        ordered = -np.sort(-probs, axis=-1)
        # the first position where the running sum reaches top_p; past the end when rounding keeps it below
        last = (np.cumsum(ordered, axis=-1, dtype=np.float64) < params.top_p).sum(-1, keepdims=True)
        last = np.minimum(last, params.top_k - 1)
        floor = np.maximum(floor, np.take_along_axis(ordered, last, 1))
    kept = np.where(probs >= floor, logits, np.float32(-math.inf))
    # p^(1/T) is a softmax of logits / T; the maximum goes first, so that a tiny T cannot overflow
    kept = kept - kept.max(-1, keepdims=True)
    drawn = softmax(kept / np.maximum(params.temperature, np.float32(1e-6)))
    return np.where(params.temperature == 0, one_hot(logits), drawn)


def one_hot(logits: Floats) -> Floats:
    hot = np.zeros(logits.shape, np.float32)
    hot[np.arange(len(logits)), logits.argmax(-1)] = 1
    return hot


def new_seed() -> int:
    return int.from_bytes(os.urandom(8), "little") >> 1  # as `secrets`, whose import the first token would wait for


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on nothing but the request's seed and the number of tokens it has drawn."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, step), digest_size=8).digest()
    return int(struct.unpack("<Q", digest)[0] >> 11) / 2**53


def draw(probs: Floats, uniforms: Sequence[float]) -> list[int]:
    """Token ids [B] by the inverse of each row's own cumulative distribution, in float64."""
    ids = []
    for row, u in zip(np.cumsum(probs, axis=-1, dtype=np.float64), uniforms):
        # u·total may round up to the total itself; the first position that reaches it is the last token with any mass
        ids.append(int(min(np.searchsorted(row, u * row[-1], "right"), np.searchsorted(row, row[-1]))))
    return ids


def sample(logits: Floats, params: ParamRows, uniforms: Sequence[float], counts: Counts | None = None) -> list[int]:
    """Raw logits [B, V] → the next token of each row, [B]."""
    with np.errstate(invalid="ignore", over="ignore"):  # -inf less -inf where a row bans all, as in torch
        return draw(distribution(adjusted(logits, params, counts), params), uniforms)


def log_probabilities(logits: Floats, tokens: Sequence[int], n: int) -> tuple[Floats, Ints, Floats]:
    """Of raw logits [B, V]: the tokens' log-probabilities [B]; ids and log-probabilities of the n best, [B, n]."""
    x = logits.astype(np.float32)
    x = x - x.max(-1, keepdims=True)
    x = x - np.log(np.exp(x).sum(-1, keepdims=True))
    best = np.argsort(-x, axis=-1, kind="stable")[:, :n]
    return x[np.arange(len(x)), list(tokens)], best, np.take_along_axis(x, best, 1)
