"""Rows of numbers instead of tokens, for any of the models."""

import torch
from torch import Tensor, nn

from receptance.evaluation.synthetic import Reading
from receptance.models import Rule
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
