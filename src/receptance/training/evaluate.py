"""Held-out loss of a model on a token file."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from receptance.data import BinIdx
from receptance.models import RWKV
from receptance.tokenizers.base import Tokenizer

WINDOW, ROWS = 512, 32  # tokens per forward call, documents side by side


@dataclass(frozen=True)
class Loss:
    """nats summed over `tokens` targets (each document's end among them), and the bytes of the text they stand for."""

    nats: float
    tokens: int
    n_bytes: int

    @property
    def per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.n_bytes


@torch.no_grad()
def evaluate(
    model: RWKV,
    tokenizer: Tokenizer,
    data: BinIdx,
    max_tokens: int = 0,
) -> Loss:
    """Every document from an empty state and in full, up to max_tokens in all (0: everything)."""
    was_training = model.training
    model.eval()
    documents, left = [], max_tokens or int(data.sizes.sum())
    for i in range(len(data)):
        if left <= 0:
            break
        documents.append(np.asarray(data[i][:left], np.int64))
        left -= len(documents[-1])
    documents.sort(key=len)  # rows of like length share a batch
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for first in range(0, len(documents), ROWS):
        total += _batch(model, documents[first : first + ROWS], tokenizer.eos_id)
    model.train(was_training)
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    n_bytes = sum(int(sizes[document].sum()) for document in documents)
    return Loss(float(total), sum(map(len, documents)), n_bytes)


def _batch(model: RWKV, documents: list[np.ndarray], eos: int) -> Tensor:
    """Sum of nats over some documents; each is preceded by the end-of-document token."""
    longest = max(map(len, documents))
    tokens = torch.full((len(documents), longest + 1), eos)
    lengths = torch.tensor([len(document) for document in documents])
    for row, document in zip(tokens, documents):
        row[1 : len(document) + 1] = torch.from_numpy(document)
    tokens, lengths = tokens.to(model.device), lengths.to(model.device)
    state, total = None, torch.zeros((), dtype=torch.float64, device=model.device)
    for start in range(0, longest, WINDOW):
        part = tokens[:, start : start + WINDOW + 1]
        inputs, targets = part[:, :-1], part[:, 1:]
        valid = torch.arange(start, start + targets.shape[1], device=model.device) < lengths[:, None]
        nats, state = model.loss(inputs, targets, state, lengths=valid.sum(1), token_weights=valid, total=1.0)
        total += nats.double()
    return total
