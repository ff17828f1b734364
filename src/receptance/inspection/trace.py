"""Causal tracing: which hidden vectors, and which memories, carry a fact from its subject to the answer.

Meng et al., "Locating and Editing Factual Associations in GPT" (2022), as the RWKV paper uses it (its figure on the
Eiffel tower): noise is added to the embeddings of the subject, and one thing at a time is put back as it was.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from receptance.models import RWKV, State


@dataclass
class Trace:
    """Mean log-probability of the answer. clean, corrupted: without noise, and with it.

    hidden [L, P]: with the vector after layer l at position p put back; P positions of the prompt. memory [L, P - 1]:
    with layer l's recurrent state after position p put back, which a Transformer does not have. (What is read at the
    last position is in its vector already, so a state after it comes too late.)
    """

    clean: float
    corrupted: float
    hidden: Tensor
    memory: Tensor


class _Meddler:
    """Hooks on a model: noise on embeddings, and the blocks' vectors kept or put back. Rows start at `offset`."""

    def __init__(self, model: RWKV):
        self.offset = 0
        self.noise: Tensor | None = None  # [T, C]
        self.clean: list[Tensor] = []  # per layer [T, C]
        self.keeping = self.putting_back = False  # the latter: in row l that of layer l, of the one token that is run
        self.hooks = [model.emb.register_forward_hook(self._embedding)]
        for i, block in enumerate(model.blocks):
            self.hooks.append(block.register_forward_hook(lambda _, __, out, i=i: self._block(i, out)))

    def _embedding(self, _: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out if self.noise is None else out + self.noise[self.offset : self.offset + out.shape[1]]

    def _block(self, i: int, out: Any) -> Any:
        if self.keeping:
            self.clean.append(out[0][0])
        if not self.putting_back:
            return out
        x = out[0].clone()
        x[i, 0] = self.clean[i][self.offset]
        return x, *out[1:]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def trace(
    model: RWKV,
    prompt: list[int],
    answer: list[int],
    subject: range,
    *,
    noise: float = 3.0,
    samples: int = 3,
    seed: int = 0,
) -> Trace:
    """prompt, answer: token ids. subject: the positions in the prompt that are made noisy.

    noise: in standard deviations of the prompt's embeddings. samples: draws of the noise, which are averaged.
    """
    if not prompt or not answer or not len(subject) or not 0 <= subject[0] <= subject[-1] < len(prompt):
        raise ValueError(f"an answer and a subject inside the prompt are needed; got {len(answer)} tokens, {subject}")
    first, layers = subject[0], len(model.blocks)
    tokens = torch.tensor([*prompt[first:], *answer], device=model.device)  # what is before the subject is untouched
    places = len(prompt) - first
    generator = torch.Generator(model.device).manual_seed(seed)
    spread = model.emb(torch.tensor(prompt, device=model.device)).std()
    corrupted, hidden, memory = 0.0, torch.zeros(layers, places), torch.zeros(layers, places - 1)
    was, meddler = model.training, _Meddler(model.eval())
    try:
        start = model.forward(prompt[:first])[1] if first else model.zero_state()
        meddler.keeping = True
        clean = float(_score(model, meddler, tokens, places, start)[0])
        meddler.keeping = False
        for _ in range(samples):
            noises = torch.zeros(len(tokens), model.config.n_embd, device=model.device, dtype=model.dtype)
            drawn = torch.randn(len(subject), model.config.n_embd, generator=generator, device=model.device)
            noises[: len(subject)] = (noise * spread * drawn).to(model.dtype)
            meddler.noise = noises
            corrupted += float(_score(model, meddler, tokens, places, start)[0]) / samples
            noisy, untouched = start, start
            for p in range(places):  # what is put back at p changes nothing before it; all goes on from there together
                meddler.putting_back = True
                seen, back = _run(model, meddler, tokens[p : p + 1], noisy.select([0] * layers), p)
                meddler.putting_back = False
                if p == places - 1:
                    hidden[:, p] += _score(model, meddler, tokens, places, back, p + 1, seen).cpu() / samples
                    break
                _, noisy = _run(model, meddler, tokens[p : p + 1], noisy, p)
                meddler.noise = None
                _, untouched = _run(model, meddler, tokens[p : p + 1], untouched, p)
                meddler.noise = noises
                state = State.cat([back, *(_with_layer(noisy, untouched, layer) for layer in range(layers))])
                found = _score(model, meddler, tokens, places, state, p + 1).cpu() / samples
                hidden[:, p] += found[:layers]
                memory[:, p] += found[layers:]
            meddler.noise = None
    finally:
        meddler.remove()
        model.train(was)
    before = torch.full((layers, first), corrupted)
    return Trace(clean, corrupted, torch.cat([before, hidden], 1), torch.cat([before, memory], 1))


def _with_layer(noisy: State, clean: State, layer: int) -> State:
    tensors = {name: x.clone() for name, x in noisy.items()}
    for name, x in tensors.items():
        x[layer] = clean[name][layer]
    return State(tensors)


def _run(model: RWKV, meddler: _Meddler, tokens: Tensor, state: State, offset: int) -> tuple[Tensor, State]:
    """The last norm's vectors [rows, T, C] of tokens [T] in every row of `state`, and the states after."""
    meddler.offset = offset
    rows = tokens.expand(state.batch, -1)
    x, state, _, _ = model.hidden(rows, state, lengths=None, resets=None, backend="auto")
    return x, state


def _score(
    model: RWKV, meddler: _Meddler, tokens: Tensor, places: int, state: State, done: int = 0, seen: Tensor | None = None
) -> Tensor:
    """Log-probability of the answer, the tokens from `places` on, for each row of `state`.

    done: so many tokens are in the state. seen: the last norm's vectors [rows, 1, C] of the last of them, if the answer
    begins behind it.
    """
    parts = [] if seen is None else [seen]
    if done < len(tokens) - 1:
        x, _ = _run(model, meddler, tokens[done:-1], state, done)
        parts.append(x[:, max(0, places - 1 - done) :])
    logs: Tensor = model.head(torch.cat(parts, 1)).float().log_softmax(-1)
    return logs.gather(-1, tokens[places:].expand(state.batch, -1)[..., None])[..., 0].sum(-1)
