"""Held-out loss of a model on a token file."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from receptance.data import BinIdx
from receptance.models import RWKV
from receptance.tokenizers.base import Tokenizer
from receptance.training.distributed import Parallel

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
    parallel: Parallel | None = None,
) -> Loss:
    """Every document from an empty state and in full, up to max_tokens in all (0: everything).

    parallel: processes that all call this, and each take a share of the documents.
    """
    was_training = model.training
    model.eval()
    documents, left = [], max_tokens or int(data.sizes.sum())
    for i in range(len(data)):
        if left <= 0:
            break
        documents.append(np.asarray(data[i][:left], np.int64))
        left -= len(documents[-1])
    documents.sort(key=len)  # rows of like length share a batch
    n_shares = 1 if parallel is None else parallel.size
    shares = [_batches(documents[rank::n_shares]) for rank in range(n_shares)]  # like in length, so like in work
    mine = shares[0 if parallel is None else parallel.rank]
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch in mine:
        total += _batch(model, batch, tokenizer.eos_id)
    if parallel is not None:
        for _ in range(max(map(_calls, shares)) - _calls(mine)):  # shards are gathered by all processes or by none
            model.hidden(torch.zeros(1, 1), None, lengths=None, resets=None, backend="auto")
        total = parallel.mean(total) * parallel.size
    model.train(was_training)
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    n_bytes = sum(int(sizes[document].sum()) for document in documents)
    return Loss(float(total), sum(map(len, documents)), n_bytes)


def _batches(documents: list[np.ndarray]) -> list[list[np.ndarray]]:
    return [documents[first : first + ROWS] for first in range(0, len(documents), ROWS)]


def _calls(batches: list[list[np.ndarray]]) -> int:
    """Of the model, for these batches."""
    return sum(-(-max(map(len, batch)) // WINDOW) for batch in batches)


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
