"""Exact attribution: how much of a logit each token of the past wrote, through the linear read-out of the states.

A WKV operator is linear in its values: what layer l reads at position t is y[t] = Σ_i c[t, i] v[i], a sum over what the
tokens i ≤ t wrote. With the statistics of the norms that follow kept as they were, the logit is linear in y too, so it
is the sum of what came through each layer's memory from each token, of what the channel mixes and the embedding of
token t itself added, and of a constant. Nothing is estimated; `Attribution.total` is the logit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from receptance.inspection.record import Layer, Recording
from receptance.ops.pieces import upcast


@dataclass
class Attribution:
    """Parts of one logit a position, above the mean of all logits at that position.

    targets [T]: the token whose logit it is. past [T, L, T]: [t, l, i] came through layer l's memory from token i.
    reach: of each layer with a matrix state, how far back each head reads, [H]: see `distance`.
    start [T, L]: from the state before the text. own [T, L]: layer l's bonus of token t and constants of its norm.
    ffn [T, L]: the channel mixes. embedding [T]. constant [T]: the final norm's bias.
    """

    targets: Tensor
    past: Tensor
    start: Tensor
    own: Tensor
    ffn: Tensor
    embedding: Tensor
    constant: Tensor
    reach: dict[int, Tensor]

    @property
    def total(self) -> Tensor:
        """[T]: the logits of the targets above the mean logit."""
        inside = self.past.sum(-1) + self.start + self.own + self.ffn
        return inside.sum(-1) + self.embedding + self.constant


@torch.no_grad()
def attribute(recording: Recording, targets: Tensor | None = None) -> Attribution:
    """targets [T]: token ids; None: the token that came next, and for the last position the likeliest one."""
    model, tokens = recording.model, recording.tokens
    if targets is None:
        targets = torch.cat([tokens[1:], recording.logits[-1:].argmax(-1)])
    head = upcast(model.head.weight)
    row = head[targets] - head.mean(0)  # [T, C]
    x, norm = upcast(recording.layers[-1].out), model.ln_out
    spread = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    aim = _centred(row * upcast(norm.weight)) / spread  # [T, C]: logit = Σ aim·x + constant
    parts = [_through(layer, getattr(block, "att", None), aim) for layer, block in zip(recording.layers, model.blocks)]
    past, start, own = (torch.stack(list(found), 1) for found in list(zip(*parts))[:3])
    reach = {i: far for i, (_, _, _, far) in enumerate(parts) if far is not None}
    ffn = torch.stack([(upcast(layer.ffn) * aim).sum(-1) for layer in recording.layers], 1)
    embedding = (upcast(recording.embedded) * aim).sum(-1)
    return Attribution(targets, past, start, own, ffn, embedding, row @ upcast(norm.bias), reach)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _through(layer: Layer, mix: object, aim: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What layer's time mix gave to aim·x: from each token [T, T], from the start state [T], as a bonus [T].

    And how far back its heads read, [H], for which the same coefficients are needed.
    """
    length = len(aim)
    if layer.read is None:  # a channel mix in its place
        return aim.new_zeros(length, length), aim.new_zeros(length), (upcast(layer.att) * aim).sum(-1), None
    z = aim @ upcast(mix.output.weight)  # type: ignore[attr-defined] # [T, A]
    z = z if layer.gate is None else z * upcast(layer.gate)
    if not layer.matrix:
        past, start = _vector_reads(layer, z)
        return past, start, aim.new_zeros(length), None
    shape = layer.read.shape
    z, norm = z.view(shape), mix.ln_x  # type: ignore[attr-defined]
    spread = (layer.read.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    direction = _centred(z * upcast(norm.weight).view(shape[1:])) / spread  # [T, H, N]
    own = (z * upcast(norm.bias).view(shape[1:])).sum((-1, -2))
    if hasattr(mix, "r_k"):
        r, k, v = (layer.inputs[name] for name in "rkv")
        own = own + ((r * k * upcast(mix.r_k)).sum(-1) * (v * z).sum(-1)).sum(-1)
    coefficients, queries = reads(layer)
    values = torch.einsum("thn,ihn->thi", direction, layer.inputs["v"])
    start = torch.einsum("thv,hvk,thk->t", direction, layer.start, queries)
    return (coefficients * values).sum(1), start, own, distance(coefficients, layer.inputs["v"])


def distance(coefficients: Tensor, values: Tensor) -> Tensor:
    """Mean distance in tokens of what each head reads, [H]: weighed by |coefficient| [T, H, T] × |value| [T, H, N]."""
    weights = coefficients.abs() * values.norm(dim=-1).T  # [T, H, T]
    at = torch.arange(len(values), device=weights.device)
    back = (at[:, None] - at).clamp(min=0)[:, None]
    found: Tensor = (weights * back).sum((0, 2)) / weights.sum((0, 2)).clamp(min=1e-30)
    return found


def reads(layer: Layer) -> tuple[Tensor, Tensor]:
    """Of a matrix state: c [T, H, T], y[t] = Σ_i c[t, :, i] v[i] + start q[t]; and q [T, H, N], the query at the start.

    Going back in time the query r[t] passes through the transition of each token, and meets that token's key.
    """
    inputs = layer.inputs
    r, k, decay = inputs["r"], inputs["k"], inputs["w"].exp().expand_as(inputs["k"])
    length, heads, _ = r.shape
    found = r.new_zeros(length, heads, length)
    q = torch.zeros_like(r)
    for i in reversed(range(length)):
        if "a" in inputs:  # RWKV-7 reads what it has just written
            q[i] = r[i]
            found[i:, :, i] = (q[i:] * k[i]).sum(-1)
            erased = inputs["a"][i] * (q[i:] * inputs["b"][i]).sum(-1, keepdim=True)
            q[i:] = q[i:] * decay[i] + erased
        else:  # RWKV-5 and 6 read before they write, and add a bonus
            found[i, :, i] = (r[i] * inputs["u"] * k[i]).sum(-1)
            found[i + 1 :, :, i] = (q[i + 1 :] * k[i]).sum(-1)
            q[i + 1 :] *= decay[i]
            q[i] = r[i]
    return found, q


def _vector_reads(layer: Layer, z: Tensor) -> tuple[Tensor, Tensor]:
    """RWKV-4's y[t] = Σ_i c[t, i] v[i], channel by channel: Σ over channels of c v z, [T, T], and the start's share."""
    w, k, v, u = (layer.inputs[name] for name in "wkvu")
    num, den, top = layer.start
    length = len(k)
    past, start = z.new_zeros(length, length), z.new_zeros(length)
    age = torch.arange(length, device=z.device, dtype=z.dtype)
    for t in range(length):
        ages = age[:t].flip(0)[:, None]  # of token t-1: 0
        exponents = torch.cat([k[:t] + ages * w, (u + k[t])[None], (top + t * w)[None]])
        shares = (exponents - exponents.max(0).values).exp()
        shares[-1] *= den
        shares = shares / shares.sum(0)
        past[t, : t + 1] = (shares[:-1] * v[: t + 1]) @ z[t]
        start[t] = (shares[-1] * torch.where(den > 0, num / den.clamp(min=1e-38), 0)) @ z[t]
    return past, start
