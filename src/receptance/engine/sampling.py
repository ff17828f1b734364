"""From logits to the next token: pure functions on [B, V], each row with its own parameters.

The order is that of the reference package (`rwkv`, PIPELINE): logit bias, penalties, truncation by top_p, top_k and
min_p on the *untempered* distribution, and only then the temperature, as p^(1/T). `SamplingParams` explains each.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from receptance.engine.numpy_sampling import uniform
from receptance.engine.params import SamplingFields, SamplingParams

__all__ = [
    "Counts",
    "ParamRows",
    "SamplingFields",
    "SamplingParams",
    "adjusted",
    "digit_weight",
    "distribution",
    "draw",
    "log_probabilities",
    "sample",
    "uniform",
]


@dataclass(frozen=True)
class ParamRows:
    """The parameters of a batch as columns [B, 1] on the logits' device; build it when the batch changes."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor
    decay: Tensor
    count_digits: Tensor
    bias: tuple[Tensor, Tensor, Tensor]  # rows, ids, values; each [number of biases]
    needs_sort: bool
    has_penalties: bool

    @staticmethod
    def of(params: Sequence[SamplingParams], vocab_size: int, eos_id: int, device: torch.device | str) -> "ParamRows":
        """Raises ConfigError for a logit bias on an id that the vocabulary lacks."""

        def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        for p in params:
            p.check_bias(vocab_size)
        pairs = [(row, *pair) for row, p in enumerate(params) for pair in p.bias_pairs]
        pairs += [(row, eos_id, -math.inf) for row, p in enumerate(params) if p.ignore_eos]
        rows, ids, values = zip(*pairs) if pairs else ((), (), ())
        return ParamRows(
            temperature=column([p.temperature for p in params]),
            top_k=column([min(p.top_k or vocab_size, vocab_size) for p in params], torch.long),
            # above any sum of probabilities, whatever the rounding: nothing is cut
            top_p=column([p.top_p if p.top_p < 1 else 2.0 for p in params], torch.float64),
            min_p=column([p.min_p for p in params]),
            presence=column([p.presence_penalty for p in params]),
            frequency=column([p.frequency_penalty for p in params]),
            repetition=column([p.repetition_penalty for p in params]),
            decay=column([p.penalty_decay for p in params]),
            count_digits=column([p.penalize_digits for p in params], torch.bool),
            bias=(
                torch.tensor(rows, dtype=torch.long, device=device),
                torch.tensor(ids, dtype=torch.long, device=device),
                torch.tensor(values, dtype=torch.float32, device=device),
            ),
            needs_sort=any(p.top_p < 1 or p.top_k > 0 for p in params),
            has_penalties=any(p.has_penalties for p in params),
        )


@dataclass(frozen=True)
class Counts:
    """What each row has read and written, for the penalties. Nothing is changed in place.

    occurrence [B, V]: decayed number of times each token was generated.
    seen [B, V]: 0 = never, PROMPT, or GENERATED.
    weight [V]: what one occurrence of each token counts where digits are not penalised, else 1.
    """

    occurrence: Tensor
    seen: Tensor
    weight: Tensor

    PROMPT = 1
    GENERATED = 2

    @staticmethod
    def start(prompts: Sequence[Sequence[int]], weight: Tensor) -> "Counts":
        """Nothing generated yet after these prompts; `weight` [V], see `digit_weight`."""
        seen = torch.zeros(len(prompts), len(weight), dtype=torch.uint8, device=weight.device)
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(sorted(set(prompt)), dtype=torch.long)] = Counts.PROMPT
        return Counts(torch.zeros(seen.shape, device=weight.device), seen, weight)

    def after(self, tokens: Tensor, params: ParamRows) -> "Counts":
        """One more token [B] generated: everything before it decays first."""
        index = tokens[:, None]
        new = torch.where(params.count_digits, 1.0, self.weight[index])  # [B, 1]
        occurrence = (self.occurrence * params.decay).scatter_add(1, index, new)
        return Counts(occurrence, self.seen.scatter(1, index, Counts.GENERATED), self.weight)

    def select(self, rows: list[int]) -> "Counts":
        return Counts(self.occurrence[rows], self.seen[rows], self.weight)


def digit_weight(token_bytes: Iterable[bytes]) -> Tensor:
    """[V]: 0 for pieces of " \\t0123456789", whose occurrences the reference does not count; 1 for other tokens."""
    return torch.tensor([0.0 if text in b" \t0123456789" else 1.0 for text in token_bytes])


def adjusted(logits: Tensor, params: ParamRows, counts: Counts | None = None) -> Tensor:
    """Logits [B, V] with bias and penalties, float32. `counts` may be None when no row has penalties."""
    rows, ids, values = params.bias
    x = logits.float().index_put((rows, ids), values, accumulate=True)
    if not params.has_penalties:
        return x
    if counts is None:
        raise ValueError("a row has penalties, but there are no counts")
    x = torch.where(counts.seen > 0, torch.where(x > 0, x / params.repetition, x * params.repetition), x)
    penalty = params.presence + counts.occurrence * params.frequency
    return torch.where(counts.seen == Counts.GENERATED, x - penalty, x)


def distribution(logits: Tensor, params: ParamRows) -> Tensor:
    """Adjusted logits [B, V] → the probabilities to draw from: truncated, then tempered. Greedy rows are one-hot."""
    probs = logits.softmax(-1)
    floor = params.min_p * probs.amax(-1, keepdim=True)  # [B, 1]
    if params.needs_sort:
        ordered = _descending(probs)
        # the first position where the running sum reaches top_p; past the end when rounding keeps it below
        last = (ordered.cumsum(-1, dtype=torch.float64) < params.top_p).sum(-1, keepdim=True)
        last = torch.minimum(last, params.top_k - 1)
        floor = torch.maximum(floor, ordered.gather(1, last))
    kept = torch.where(probs >= floor, logits, -math.inf)
    # p^(1/T) is a softmax of logits / T; the maximum goes first, so that a tiny T cannot overflow
    kept = kept - kept.amax(-1, keepdim=True)
    drawn = (kept / params.temperature.clamp(min=1e-6)).softmax(-1)
    greedy = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(drawn)
    return torch.where(params.temperature == 0, greedy, drawn)


def _descending(probs: Tensor) -> Tensor:
    if probs.device.type == "cpu":  # torch also orders the indices, which takes 25 times as long as numpy's sort
        return torch.from_numpy(-np.sort(-probs.detach().numpy(), axis=-1))
    return probs.sort(-1, descending=True).values


def draw(probs: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Token ids [B] by the inverse of each row's own cumulative distribution, in float64."""
    total = probs.cumsum(-1, dtype=torch.float64)  # [B, V]
    points = torch.tensor(uniforms, dtype=torch.float64, device=probs.device)[:, None] * total[:, -1:]
    ids = torch.searchsorted(total, points, right=True).squeeze(1)
    # u·total may round up to the total itself; the first position that reaches it is the last token with any mass
    return torch.minimum(ids, torch.searchsorted(total, total[:, -1:].contiguous()).squeeze(1))


def sample(logits: Tensor, params: ParamRows, uniforms: Sequence[float], counts: Counts | None = None) -> Tensor:
    """Raw logits [B, V] → the next token of each row, [B]."""
    return draw(distribution(adjusted(logits, params, counts), params), uniforms)


def log_probabilities(logits: Tensor, tokens: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of raw logits [B, V]: the tokens' log-probabilities [B]; ids and log-probabilities of the n best, [B, n]."""
    x = logits.float().log_softmax(-1)
    top = x.topk(min(n, x.shape[-1]), -1)
    return x.gather(1, tokens[:, None]).squeeze(1), top.indices, top.values
