"""Log-likelihoods of continuations: what every measure here is made of."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from receptance.engine.request import Prompt, Scored
from receptance.tokenizers import Tokenizer

if TYPE_CHECKING:
    from receptance.models import RWKV

Pair = tuple[Prompt, Prompt]  # context, continuation
ROWS, TOKENS = 16, 1 << 14  # of a batch


class Scorer(Protocol):
    """`receptance.Engine`, or `PlainScorer`."""

    def score(self, scores: Iterable[Pair], /) -> list[Scored]: ...


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of context + continuation, cut where the continuation begins; white space at the end goes to it.

    A token that reaches over the border belongs to the continuation, so that the text is always the text.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    whole, before = tokenizer.encode(bare + continuation), tokenizer.encode(bare)
    n = 0
    while n < min(len(before), len(whole) - 1) and whole[n] == before[n]:
        n += 1
    return whole[:n], whole[n:]


class PlainScorer:
    """Scores with one forward pass for each batch of like length: for models that the engine has no pool for."""

    def __init__(self, model: "RWKV", tokenizer: Tokenizer):
        self._model, self._tokenizer = model, tokenizer

    def score(self, scores: Iterable[Pair], /) -> list[Scored]:
        """See `receptance.Engine.score`."""
        pairs = [(self._ids(context) or [self._tokenizer.eos_id], self._ids(text)) for context, text in scores]
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        found: list[Scored | None] = [None] * len(pairs)
        batch: list[int] = []
        for place, i in enumerate(order):
            batch.append(i)
            longest = sum(map(len, pairs[i]))
            if len(batch) == ROWS or (len(batch) + 1) * longest > TOKENS or place == len(order) - 1:
                for j, scored in zip(batch, self._batch([pairs[j] for j in batch])):
                    found[j] = scored
                batch = []
        return [scored for scored in found if scored is not None]

    def _ids(self, prompt: Prompt) -> list[int]:
        return self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        import torch

        lengths = [len(context) + len(text) - 1 for context, text in pairs]
        tokens = torch.zeros(len(pairs), max(1, *lengths), dtype=torch.long)
        for row, (context, text) in zip(tokens, pairs):
            row[: len(context) + len(text) - 1] = torch.tensor([*context, *text][:-1])
        vocab = min(self._tokenizer.vocab_size, self._model.config.vocab_size)
        with torch.inference_mode():
            logits, _ = self._model(tokens.to(self._model.device), lengths=torch.tensor(lengths))
        found = []
        for row, (context, text) in zip(logits[..., :vocab], pairs):
            part = row[len(context) - 1 : len(context) + len(text) - 1].double().log_softmax(-1)
            targets = torch.tensor(text, dtype=torch.long, device=part.device)
            logprobs = part.gather(1, targets[:, None]).squeeze(1)
            found.append(Scored(text, logprobs.tolist(), bool((part.argmax(-1) == targets).all())))
        return found


def open_scorer(model: "RWKV", tokenizer: Tokenizer) -> Scorer:
    """The engine for an RWKV, which reads common beginnings once; `PlainScorer` for a model to compare with."""
    if str(model.config.version)[0].isdigit():
        from receptance.engine.engine import Engine

        return Engine(model, tokenizer, speculate=None)
    return PlainScorer(model, tokenizer)
