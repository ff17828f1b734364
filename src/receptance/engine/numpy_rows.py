"""Rows of text in the native engine: feed them, step them, draw from them. The twin of `torch_rows`."""

from collections.abc import Callable, Sequence

import numpy as np

from receptance.engine.numpy_sampling import (
    Counts,
    Floats,
    ParamRows,
    digit_weight,
    log_probabilities,
    sample,
)
from receptance.engine.params import SamplingParams
from receptance.native import NativeModel, State

Report = tuple[float | None, tuple[tuple[int, float], ...]]  # a token's log-probability, and the most probable ones


def prefill(
    model: NativeModel, prompts: Sequence[Sequence[int]], state: State | None, chunk: int
) -> tuple[Floats, State]:
    """Feed each row its own non-empty prompt, `chunk` tokens at a time: logits after the last token [B, V], state.

    The core has chunks of its own, but hears no Ctrl-C before it returns.
    """
    logits: Floats | None = None
    for start in range(0, max(map(len, prompts)), chunk):
        pieces = [prompt[start : start + chunk] for prompt in prompts]
        lengths = np.array([len(piece) for piece in pieces])
        tokens = np.zeros((len(pieces), lengths.max()), np.int64)
        for row, piece in zip(tokens, pieces):
            row[: len(piece)] = piece
        new, state = model.forward(tokens, state, lengths=lengths, last_only=True)
        logits = new if logits is None else np.where(lengths[:, None] > 0, new, logits)
    assert logits is not None
    assert state is not None
    return logits, state


def step(model: NativeModel, tokens: list[int], state: State) -> tuple[Floats, State]:
    """One token for each row: logits [B, V], state."""
    return model.forward(np.array(tokens)[:, None], state, last_only=True)


def are_broken(logits: Floats) -> bool:
    """Whether one is NaN or +inf: nothing can be drawn then."""
    return not bool((logits < np.inf).all())


class Draws:
    """The parameters and counts of a batch of rows, from which tokens are drawn."""

    def __init__(
        self,
        params: list[SamplingParams],
        prompts: list[list[int]],
        vocab: int,
        token_bytes: Callable[[int], bytes],
        eos_id: int,
        logits: Floats,
    ):
        self.vocab, self.eos_id = vocab, eos_id
        self.counts: Counts | None = None
        self.keep(None, params)
        if self.rows.has_penalties:
            self.counts = Counts.start(prompts, digit_weight(map(token_bytes, range(vocab))))

    def keep(self, alive: list[int] | None, params: list[SamplingParams]) -> None:
        """Go on with some rows only (None: all), whose parameters these are."""
        self.logprobs = [p.logprobs for p in params]
        self.rows = ParamRows.of(params, self.vocab, self.eos_id)
        if alive is not None and self.counts:
            self.counts = self.counts.select(alive)

    def draw(self, logits: Floats, uniforms: Sequence[float]) -> tuple[list[int], list[Report]]:
        """The next token of each row, and what its `logprobs` asked for."""
        logits = logits[:, : self.vocab]
        drawn = sample(logits, self.rows, uniforms, self.counts)
        self.counts = self.counts.after(drawn, self.rows) if self.counts else None
        if all(n is None for n in self.logprobs):
            return drawn, [(None, ())] * len(drawn)
        chosen, ids, values = log_probabilities(logits, drawn, max(n or 0 for n in self.logprobs))
        pairs = [list(zip(*row)) for row in zip(ids.tolist(), values.tolist())]
        reports = zip(chosen.tolist(), pairs, self.logprobs)
        return drawn, [(None, ()) if n is None else (logprob, tuple(top[:n])) for logprob, top, n in reports]
