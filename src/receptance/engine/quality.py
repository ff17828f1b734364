"""What quantising costs: the same text through two models, token by token, or with single tensors quantised."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from receptance.native import NativeModel

Array = NDArray[np.float32]
PIECE = 128  # tokens in one call: bounds the memory for logits


@dataclass(frozen=True)
class Quality:
    """Of one model against a reference, over `tokens` predictions.

    kl_divergence: mean of KL(reference ‖ model), in nats. same_top: the share of tokens at which both put the same id
    first.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    same_top: float

    @property
    def perplexity_change(self) -> float:
        """As a fraction: 0.01 is one per cent more."""
        return self.perplexity / self.reference_perplexity - 1


def log_probabilities(model: NativeModel, ids: Sequence[int]) -> Iterator[Array]:
    """[T, V] for the ids, piece after piece."""
    state = None
    for start in range(0, len(ids), PIECE):
        logits, state = model.forward(np.asarray(ids[start : start + PIECE]), state)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        yield logits


def compare(reference: Iterator[Array], model: NativeModel, ids: Sequence[int]) -> Quality:
    """`reference`: log_probabilities of ids[:-1] in the model that is the judge."""
    losses = np.zeros(3)  # the model's, the reference's, and the divergence
    same = done = 0
    for expected, found in zip(reference, log_probabilities(model, ids[:-1])):
        rows = np.arange(len(found))
        targets = np.asarray(ids[done + 1 : done + 1 + len(found)])
        divergence = (np.exp(expected) * (expected - found)).sum(-1)
        losses += [-found[rows, targets].sum(), -expected[rows, targets].sum(), divergence.sum()]
        same += int((found.argmax(-1) == expected.argmax(-1)).sum())
        done += len(found)
    loss, reference_loss, kl = losses / done
    return Quality(done, float(np.exp(loss)), float(np.exp(reference_loss)), max(0.0, float(kl)), same / done)


def sensitivities(
    make: Callable[[Mapping[str, object]], NativeModel],
    changed: Mapping[str, Callable[[], object]],
    ids: Sequence[int],
    progress: Callable[[str], None],
) -> dict[str, Quality]:
    """Each tensor of `changed` alone replaced, against nothing replaced. make: the model with some tensors replaced."""
    reference = list(log_probabilities(make({}), ids[:-1]))
    found = {}
    for name, tensor in changed.items():
        progress(name)
        found[name] = compare(iter(reference), make({name: tensor()}), ids)
    return found


def decode_speeds(models: Sequence[NativeModel], ids: Sequence[int], seconds: float = 1.5) -> list[float]:
    """Tokens per second one by one: for each model the best of short runs, which take turns."""
    states = [model.forward(np.asarray(ids[:1]))[1] for model in models]
    best = [0.0] * len(models)
    deadline = time.perf_counter() + seconds * len(models)
    rounds = 0
    while rounds < 2 or time.perf_counter() < deadline:
        for i, model in enumerate(models):
            start = time.perf_counter()
            for token in ids[:8]:
                states[i] = model.forward(np.asarray([token]), states[i], last_only=True)[1]
            best[i] = max(best[i], len(ids[:8]) / (time.perf_counter() - start))
        rounds += 1
    return best
