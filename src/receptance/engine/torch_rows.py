"""Rows of text in the torch engine: feed them, step them, draw from them. The twin of `numpy_rows`."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from receptance.engine.params import SamplingParams
from receptance.engine.sampling import Counts, ParamRows, digit_weight, log_probabilities, sample
from receptance.models import RWKV, State

Report = tuple[float | None, tuple[tuple[int, float], ...]]  # a token's log-probability, and the most probable ones


@torch.inference_mode()
def prefill(model: RWKV, prompts: Sequence[Sequence[int]], state: State | None, chunk: int) -> tuple[Tensor, State]:
    """Feed each row its own non-empty prompt, `chunk` tokens at a time: logits after the last token [B, V], state."""
    logits: Tensor | None = None
    for start in range(0, max(map(len, prompts)), chunk):
        pieces = [prompt[start : start + chunk] for prompt in prompts]
        lengths = torch.tensor([len(piece) for piece in pieces])
        width = int(lengths.max())
        tokens = torch.tensor([[*piece, *[0] * (width - len(piece))] for piece in pieces])  # [B, width]
        ragged = bool((lengths < width).any())
        new, state = model.forward(tokens, state, lengths=lengths if ragged else None, last_only=True)
        has_tokens = (lengths > 0).to(new.device)[:, None]
        logits = new if logits is None else torch.where(has_tokens, new, logits)
    assert logits is not None
    assert state is not None
    return logits, state


@torch.inference_mode()
def step(model: RWKV, tokens: list[int], state: State) -> tuple[Tensor, State]:
    """One token for each row: logits [B, V], state."""
    return model.forward(torch.tensor(tokens)[:, None], state, last_only=True)


def are_broken(logits: Tensor) -> bool:
    """Whether one is NaN or +inf: nothing can be drawn then."""
    return not bool((logits < math.inf).all())


class Draws:
    """The parameters and counts of a batch of rows, from which tokens are drawn."""

    def __init__(
        self,
        params: list[SamplingParams],
        prompts: list[list[int]],
        vocab: int,
        token_bytes: Callable[[int], bytes],
        eos_id: int,
        logits: Tensor,
    ):
        self.vocab, self.eos_id, self.device = vocab, eos_id, logits.device
        self.counts: Counts | None = None
        self.keep(None, params)
        if self.rows.has_penalties:
            self.counts = Counts.start(prompts, digit_weight(map(token_bytes, range(vocab))).to(self.device))

    def keep(self, alive: list[int] | None, params: list[SamplingParams]) -> None:
        """Go on with some rows only (None: all), whose parameters these are."""
        self.logprobs = [p.logprobs for p in params]
        self.rows = ParamRows.of(params, self.vocab, self.eos_id, self.device)
        if alive is not None and self.counts:
            self.counts = self.counts.select(alive)

    @torch.inference_mode()
    def draw(self, logits: Tensor, uniforms: Sequence[float]) -> tuple[list[int], list[Report]]:
        """The next token of each row, and what its `logprobs` asked for."""
        logits = logits[:, : self.vocab]
        drawn = sample(logits, self.rows, uniforms, self.counts)
        self.counts = self.counts.after(drawn, self.rows) if self.counts else None
        if all(n is None for n in self.logprobs):
            return drawn.tolist(), [(None, ())] * len(drawn)
        chosen, ids, values = log_probabilities(logits, drawn, max(n or 0 for n in self.logprobs))
        pairs = [list(zip(*row)) for row in zip(ids.tolist(), values.tolist())]
        reports = zip(chosen.tolist(), pairs, self.logprobs)
        return drawn.tolist(), [(None, ()) if n is None else (logprob, tuple(top[:n])) for logprob, top, n in reports]
