"""Rows of numbers instead of tokens, with one answer each: any of the models between two linear maps."""

import torch
from torch import Tensor, nn

from receptance.models import RWKV, Rule, State
from receptance.models.base import Recipe
from receptance.ops import Operators
from receptance.ops.head_loss import head_loss


class Numbers(nn.Module):
    """In the place of a table of embeddings: number n → (n - mean) / deviation · weight + bias."""

    def __init__(self, mean: float, deviation: float, width: int):
        super().__init__()
        self.mean, self.deviation = mean, deviation
        self.weight, self.bias = (nn.Parameter(torch.empty(width)) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = (tokens[..., None] - self.mean) / self.deviation  # [B, T, 1]
        return torch.addcmul(self.bias, x.to(self.weight.dtype), self.weight)  # [B, T, C]


NUMBERS: Recipe = {"emb.weight": Rule(("normal", 0.02)), "emb.bias": Rule(("normal", 0.02))}


class Reader(nn.Module):
    """`model`, whose answer to a row is read from the mean of its vectors at all places.

    Called as a model is: tokens [B, T]; targets [B, T] ask at the last place, where the logits [B, 1, V] belong.
    """

    def __init__(self, model: RWKV):
        super().__init__()
        self.model = model

    def mean(self, tokens: Tensor, state: State | None, backend: str | Operators) -> tuple[Tensor, State]:
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
        total: Tensor | float | None = None,
        logit_penalty: float = 0.0,
        backend: str | Operators = "auto",
    ) -> tuple[Tensor, State]:
        """As of RWKV. Documents inside a row and other places of the targets mean nothing here."""
        x, state = self.mean(tokens, state, backend)
        return head_loss(x, self.model.head.weight, targets[:, -1], logit_penalty, total=total), state
