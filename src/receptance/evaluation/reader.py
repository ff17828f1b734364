"""Rows of numbers instead of tokens, with one answer each: any of the models between two linear maps."""

from typing import Any

import torch
from torch import Tensor, nn

from receptance.evaluation.synthetic import Reading
from receptance.models import RWKV, Rule, State
from receptance.models.base import Recipe


class Numbers(nn.Module):
    """In the place of a table of embeddings: number n → (n - mean) / deviation · weight + bias, as `reading` has it."""

    def __init__(self, reading: Reading, width: int, length: int):
        super().__init__()
        self.mean, self.deviation = reading.mean, reading.deviation
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(length if reading.places else 1, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = (tokens[..., None].to(self.weight.dtype) - self.mean) / self.deviation  # [B, T, 1]
        return torch.addcmul(self.bias, x, self.weight)  # [B, T, C]


NUMBERS: Recipe = {"emb.weight": Rule(("normal", 0.02)), "emb.bias": Rule(("normal", 0.02))}


class Reader(nn.Module):
    """`model`, whose answer to a row is read from the mean of its vectors at all places.

    Called as a model is: tokens [B, T]; targets [B, T] ask at the last place, where the logits [B, 1, V] belong.
    """

    def __init__(self, model: RWKV):
        super().__init__()
        self.model = model

    def mean(self, tokens: Tensor, state: State | None, backend: Any) -> tuple[Tensor, State]:
        x, state, _, _ = self.model.hidden(tokens, state, lengths=None, resets=None, backend=backend)
        dropout = self.model.dropout if self.training else 0.0
        return nn.functional.dropout(x.mean(1), dropout), state  # [B, C]

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        x, state = self.mean(tokens, state, "auto")
        return self.model.head(x)[:, None], state

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: State | None = None,
        *,
        resets: Tensor | None = None,
        token_weights: Tensor | None = None,
        total: Tensor | float = 1.0,
        logit_penalty: float = 0.0,
        backend: Any = "auto",
    ) -> tuple[Tensor, State]:
        """As of RWKV, but for what rows of one answer have not: documents, other places that ask, a penalty."""
        x, state = self.mean(tokens, state, backend)
        return nn.functional.cross_entropy(self.model.head(x), targets[:, -1], reduction="sum") / total, state
