"""Numbers of a recording, layer by layer: what is forgotten, held, written, erased, what each would answer."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from receptance.inspection.attribution import Attribution
from receptance.inspection.record import Layer, Recording
from receptance.ops.pieces import upcast


def log_decay(layer: Layer) -> Tensor:
    """Mean log-decay a token of each channel of the state, [A]; RWKV-6 and 7: over the text."""
    w = layer.inputs["w"]
    if layer.matrix:
        w = w.mean(0)
    return w.flatten()


def half_life(layer: Layer) -> Tensor:
    """Tokens after which half of what a channel holds has decayed, [A], erasing not counted."""
    lives: Tensor = -math.log(2) / log_decay(layer).clamp(max=-1e-12)
    return lives


def shares_of_the_past(block: torch.nn.Module) -> dict[str, Tensor]:
    """Of each token-shift mix: the share of the previous token in every channel, [C], by the checkpoint's name.

    RWKV-6 adds a part that depends on the text to those of its time mix; what is returned is the constant part.
    """
    found = {}
    for name, x in block.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last.startswith(("x_", "time_maa_")) and x.numel() == x.shape[-1]:
            found[name] = upcast(x.detach()).flatten()
        elif last.startswith("time_mix_"):
            found[name] = 1 - upcast(x.detach()).flatten()
    return found


@dataclass
class Held:
    """Of one layer's state after some positions: positions [P], norm [P, H] (RWKV-4: [P, 1]), rank [P, H] or None.

    norm: Frobenius. rank: effective, the exponential of the entropy of the singular values (Roy and Vetterli, 2007);
    1 is one key with one value, N is a full matrix.
    """

    positions: list[int]
    norm: Tensor
    rank: Tensor | None


def held(layer: Layer, most: int = 64) -> Held:
    """The state along the text, at `most` positions at most."""
    inputs = layer.inputs
    length = len(inputs["k"])
    positions = sorted({round(i * (length - 1) / max(most - 1, 1)) for i in range(most)} | {length - 1})
    if not layer.matrix:
        return Held(positions, _averages(layer)[0][positions].norm(dim=-1, keepdim=True), None)
    state, kept = layer.start, []
    decay = inputs["w"].exp().expand_as(inputs["k"])
    for t in range(length):
        erased = (state @ inputs["a"][t, :, :, None]) @ inputs["b"][t, :, None] if "a" in inputs else 0
        state = state * decay[t, :, None] + erased + inputs["v"][t, :, :, None] * inputs["k"][t, :, None]
        if t in positions:
            kept.append(state)
    states = torch.stack(kept)  # [P, H, N, N]
    values = torch.linalg.svdvals(states)
    share = values / values.sum(-1, keepdim=True).clamp(min=1e-30)
    entropy = -(share * share.clamp(min=1e-30).log()).sum(-1)
    return Held(positions, states.norm(dim=(-1, -2)), entropy.exp())


def _averages(layer: Layer) -> tuple[Tensor, Tensor]:
    """RWKV-4's memory as the average that it is, num / den after each token, and that token's share of it, [T, A]."""
    w, k, v = (layer.inputs[name] for name in "wkv")
    num, den, top = layer.start
    averages, shares = [], []
    for t in range(len(k)):
        new = torch.maximum(top + w, k[t])
        past, now = (top + w - new).exp(), (k[t] - new).exp()
        num, den, top = past * num + now * v[t], past * den + now, new
        averages.append(num / den)
        shares.append(now / den)
    return torch.stack(averages), torch.stack(shares)


def strengths(layer: Layer) -> tuple[Tensor, Tensor]:
    """How much each token wrote and how much it removed, [T, H] each.

    Written: |k|·|v| a head. Removed: RWKV-7's in-context rate, the share of what its key held that is taken away,
    Σ iclr·kk²; RWKV-5 and 6: the mean share that decays. RWKV-4 (H = 1): the share of the new token in the average that
    is read, and of the past that is outweighed.
    """
    if not layer.matrix:
        share = _averages(layer)[1].mean(-1, keepdim=True)
        return share, share
    inputs = layer.inputs
    written = inputs["k"].norm(dim=-1) * inputs["v"].norm(dim=-1)
    if "a" in inputs:
        return written, -(inputs["a"] * inputs["b"]).sum(-1)
    return written, 1 - inputs["w"].exp().expand_as(inputs["k"]).mean(-1)


@dataclass
class Lens:
    """What each layer would answer if it were the last: tokens, chances [L, T]; final [L, T]: the chance of the model's
    own answer; entropy [L, T] in nats."""

    tokens: Tensor
    chances: Tensor
    final: Tensor
    entropy: Tensor


@torch.no_grad()
def logit_lens(recording: Recording) -> Lens:
    """The final norm and the head on the stream after each layer (nostalgebraist, 2020)."""
    model, answer = recording.model, recording.logits.argmax(-1)
    found = []
    for layer in recording.layers:
        logs = upcast(model.head(model.ln_out(layer.out))).log_softmax(-1)
        top = logs.max(-1)
        final = logs.gather(-1, answer[:, None])[:, 0].exp()
        found.append((top.indices, top.values.exp(), final, -(logs.exp() * logs).sum(-1)))
    return Lens(*(torch.stack(list(x)) for x in zip(*found)))


@dataclass
class Measured:
    """What pictures, page and report.json show, by layer; layers without a time mix are not among the keys.

    decay, lives [A]: `log_decay`, `half_life`. reach [H] (RWKV-4: [1, A]): how far back heads read, or the mean age of
    what is held. written, removed [T, H]: `strengths`.
    """

    decay: dict[int, Tensor]
    lives: dict[int, Tensor]
    reach: dict[int, Tensor]
    held: dict[int, Held]
    written: dict[int, Tensor]
    removed: dict[int, Tensor]
    lens: Lens


def measure(recording: Recording, attribution: Attribution) -> Measured:
    """Everything once."""
    layers = {i: layer for i, layer in enumerate(recording.layers) if layer.read is not None}
    lives = {i: half_life(layer) for i, layer in layers.items()}
    reach = {i: attribution.reach.get(i, lives[i][None] / math.log(2)) for i in layers}
    changes = {i: strengths(layer) for i, layer in layers.items()}
    return Measured(
        {i: log_decay(layer) for i, layer in layers.items()},
        lives,
        reach,
        {i: held(layer) for i, layer in layers.items()},
        {i: written for i, (written, _) in changes.items()},
        {i: removed for i, (_, removed) in changes.items()},
        logit_lens(recording),
    )
