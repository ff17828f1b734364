"""RWKV-7 "Goose" (2025): the state follows a generalised delta rule with an in-context learning rate."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from receptance.models.base import (
    RWKV,
    ZERO,
    Call,
    Recipe,
    Residual,
    Rule,
    Shapes,
    apart,
    depth,
    frame_recipe,
    norm_recipe,
    ramp,
    tall_gain,
)
from receptance.ops import wkv7
from receptance.ops.heads import norm_and_gate
from receptance.ops.low_rank import shifted_maps
from receptance.ops.pieces import uses_triton
from receptance.ops.prepare import decay_and_keys, keys_and_bonus, value_residual_twice


def rank(x: float) -> int:
    """A low-rank width: the nearest multiple of 32, at least 32."""
    return max(32, 32 * round(x / 32))


def low_rank(rows: int, cols: int) -> Rule:
    return Rule(("orthogonal", 0.1 * tall_gain(rows, cols)))


@dataclass(frozen=True)
class RWKV7Config:
    """The ranks are the widths of the low-rank maps for decay (w), in-context rate (a), value residual (v), gate (g).

    first_value: the first layer carries v0, v1, v2 too. It never uses them; released files have them, others do not.
    time_state: a tuned initial state is present.
    wide_rate: the in-context rate of a channel goes up to 1 + its decay, so up to 2, instead of 1 (see TimeMix).
    """

    vocab_size: int
    n_layer: int
    n_embd: int
    dim_ffn: int
    decay_rank: int
    rate_rank: int
    value_rank: int
    gate_rank: int
    head_size: int = 64
    first_value: bool = True
    time_state: bool = False
    wide_rate: bool = False
    version: ClassVar[str] = "7"

    @classmethod
    def make(
        cls, vocab_size: int, n_layer: int, n_embd: int, head_size: int = 64, wide_rate: bool = False
    ) -> "RWKV7Config":
        """The usual shape for a width: dim_ffn = 4C and the reference trainer's current ranks."""
        root = math.sqrt(n_embd)
        ranks = rank(2.5 * root), rank(2.5 * root), rank(1.7 * root), rank(5 * root)
        return cls(vocab_size, n_layer, n_embd, 4 * n_embd, *ranks, head_size, wide_rate=wide_rate)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "RWKV7Config":
        """Read every field from the official tensor names and shapes. KeyError when a needed one is missing."""
        vocab_size, n_embd = shapes["emb.weight"]
        n_layer = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        first_value = "blocks.0.att.v1" in shapes
        value_rank = shapes[f"blocks.{int(n_layer > 1)}.att.v1"][1] if first_value or n_layer > 1 else 32
        return cls(
            vocab_size,
            n_layer,
            n_embd,
            dim_ffn=shapes["blocks.0.ffn.key.weight"][0],
            decay_rank=shapes["blocks.0.att.w1"][1],
            rate_rank=shapes["blocks.0.att.a1"][1],
            value_rank=value_rank,
            gate_rank=shapes["blocks.0.att.g1"][1],
            head_size=shapes["blocks.0.att.r_k"][1],
            first_value=first_value,
            time_state="blocks.0.att.time_state" in shapes,
            wide_rate="blocks.0.att.rate_span" in shapes,
        )


class TimeMix(nn.Module):
    """With `wide_rate` the state's transition is diag(w) - kk ((1 + w)·a·kk)ᵀ instead of diag(w) - kk (a·kk)ᵀ.

    Its eigenvalues then lie in (-1, 1) instead of (0, 1), which parity and permutations need: it is similar to the
    symmetric W - u uᵀ with u = sqrt((1 + w)·a)·kk, and uᵀ(I + W)⁻¹u = Σ a·kk² < 1. A plain factor of 2 would leave that
    range where w < 1. rate_span is a tensor so that files tell the two apart; what does not know it refuses the file.
    """

    rate_span: Tensor

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        c, n = config.n_embd, config.head_size
        self.layer = layer
        self.n_head = h = c // n
        self.x_r = nn.Parameter(torch.empty(1, 1, c))
        self.x_w = nn.Parameter(torch.empty(1, 1, c))
        self.x_k = nn.Parameter(torch.empty(1, 1, c))
        self.x_v = nn.Parameter(torch.empty(1, 1, c))
        self.x_a = nn.Parameter(torch.empty(1, 1, c))
        self.x_g = nn.Parameter(torch.empty(1, 1, c))
        self.w0 = nn.Parameter(torch.empty(1, 1, c))
        self.w1 = nn.Parameter(torch.empty(c, config.decay_rank))
        self.w2 = nn.Parameter(torch.empty(config.decay_rank, c))
        self.a0 = nn.Parameter(torch.empty(1, 1, c))
        self.a1 = nn.Parameter(torch.empty(c, config.rate_rank))
        self.a2 = nn.Parameter(torch.empty(config.rate_rank, c))
        if layer > 0 or config.first_value:
            self.v0 = nn.Parameter(torch.empty(1, 1, c))
            self.v1 = nn.Parameter(torch.empty(c, config.value_rank))
            self.v2 = nn.Parameter(torch.empty(config.value_rank, c))
        self.g1 = nn.Parameter(torch.empty(c, config.gate_rank))
        self.g2 = nn.Parameter(torch.empty(config.gate_rank, c))
        self.k_k = nn.Parameter(torch.empty(1, 1, c))
        self.k_a = nn.Parameter(torch.empty(1, 1, c))
        self.r_k = nn.Parameter(torch.empty(h, n))
        self.wide_rate = config.wide_rate
        if config.wide_rate:
            self.register_buffer("rate_span", torch.ones(()))
        if config.time_state:
            self.time_state = nn.Parameter(torch.empty(h, n, n))  # value × key
        self.receptance = nn.Linear(c, c, bias=False)
        self.key = nn.Linear(c, c, bias=False)
        self.value = nn.Linear(c, c, bias=False)
        self.output = nn.Linear(c, c, bias=False)
        self.ln_x = nn.GroupNorm(h, c, eps=64e-5)  # for any head size

    def mixes(self, joined: bool) -> list[Tensor]:
        """joined: the low-rank maps mix for themselves, in `first_maps`; they need the input as it is."""
        if joined:
            return [self.x_r, self.x_k, self.x_v, torch.zeros_like(self.x_r)]
        return [self.x_r, self.x_k, self.x_v, self.x_w, self.x_a, self.x_g]

    def first_maps(
        self, mixed: list[Tensor], last: Tensor, is_first: bool, joined: bool, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What w2, a2, g2 and, but in the first layer, v2 multiply: [B, T, rank] each."""
        if not joined:
            _, _, xv, xw, xa, xg = mixed
            gate = None if is_first else xv @ self.v1
            return torch.tanh(xw @ self.w1), xa @ self.a1, torch.sigmoid(xg @ self.g1), gate
        mixes, maps = [self.x_w, self.x_a, self.x_g], [self.w1, self.a1, self.g1]
        if not is_first:
            mixes, maps = [*mixes, self.x_v], [*maps, self.v1]
        activations = ("tanh", "none", "sigmoid", "none")[: len(maps)]
        found = shifted_maps(mixed[-1], last, mixes, maps, activations, resets=call.resets, backend=call.form)
        return found[0], found[1], found[2], None if is_first else found[3]

    def forward(
        self, mixed: list[Tensor], last: Tensor, joined: bool, v_first: Tensor | None, state: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """mixed: [B, T, C] for each of `mixes(joined)` → ([B, T, C], the first layer's values, WKV state)."""
        xr, xk, xv, *_ = mixed
        b, t, c = xr.shape
        heads = (b, t, self.n_head, c // self.n_head)
        r = self.receptance(xr)
        k = self.key(xk)
        v = self.value(xv)
        to_w, to_a, to_g, to_gate = self.first_maps(mixed, last, v_first is None, joined, call)
        if v_first is None:
            v_first = v_again = v
        else:
            gate = call.cheap(torch.matmul, to_gate, self.v2)
            # kept for the backward pass: making it again moves four times as much
            v, v_again, v_first = value_residual_twice(v, v_first, gate, self.v0, backend=call.form)
        w = call.cheap(torch.matmul, to_w, self.w2)
        a = call.cheap(torch.matmul, to_a, self.a2)
        g = call.cheap(torch.matmul, to_g, self.g2)

        r, k, v, v_again = (z.view(heads) for z in (r, k, v, v_again))
        vectors = self.w0, self.a0, self.k_k, self.k_a
        if uses_triton("prepare", k, call.form):
            w, k, erase, write, r, bonus = call.fused(keys_and_bonus, w, k, a, r, *vectors, self.r_k, dear=True)
        else:  # apart, since torch would keep k for the bonus's gradient before `call` knows that it can be made again
            w, k, erase, write = call.fused(decay_and_keys, w, k, a, *vectors, dear=True)
            bonus = (r * k * self.r_k).sum(-1)
        if self.wide_rate:
            write = (write * (1 + self.rate_span * w.exp())).to(write.dtype)
        y, wkv = wkv7(r, w, k, v, erase, write, state, lengths=call.lengths, resets=call.resets, backend=call.backend)
        norm = self.ln_x
        also = bonus, v_again
        out = norm_and_gate(y, norm.weight, norm.bias, norm.eps, g, "plain", also, backend=call.form)  # kept too
        return self.output(out), v_first, wkv


class ChannelMix(nn.Module):
    def __init__(self, config: RWKV7Config):
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(self, xk: Tensor, call: Call) -> Tensor:
        return call.channels(xk, self.key, self.value)


class Block(nn.Module):
    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(
        self, x: Residual, v_first: Tensor | None, state: dict[str, Tensor], call: Call
    ) -> tuple[Residual, Tensor, dict[str, Tensor]]:
        x, delta = apart(x)
        joined, last = self.training and call.joins_maps(x), state["att_shift"]
        x, att_shift, mixed, _ = call.enter(x, delta, self.ln1, last, self.att.mixes(joined))
        delta, v_first, wkv = self.att(mixed, last, joined, v_first, state["wkv"], call)
        mixes = [self.ffn.x_k]  # kept: one of 13 numbers per token and channel, for a pass less
        x, ffn_shift, (xk,), _ = call.enter(x, delta, self.ln2, state["ffn_shift"], mixes, keep=True)
        return call.leave(x, self.ffn(xk, call)), v_first, {"att_shift": att_shift, "wkv": wkv, "ffn_shift": ffn_shift}


class RWKV7(RWKV):
    Config = RWKV7Config
    config: RWKV7Config

    def __init__(self, config: RWKV7Config, device: str | None = None, dtype: torch.dtype | None = None):
        with torch.device(device or "cpu"):
            super().__init__(config, [Block(config, i) for i in range(config.n_layer)])
        if dtype is not None:
            self.to(dtype)

    @staticmethod
    def recipe(config: RWKV7Config, lr: float = 6e-4) -> Recipe:
        """The reference v7 trainer. `lr` is unused: it is there for RWKV-4, whose embedding needs it."""
        c, n = config.n_embd, config.head_size
        rules = frame_recipe(config, emb=1e-4, head=0.5 * tall_gain(config.vocab_size, c))
        i = torch.arange(c, dtype=torch.float64)
        linear = i / (c - 1) - 0.5
        side = (i % n - (n - 1) / 2) / ((n - 1) / 2)
        zigzag = side * side.abs()
        for layer in range(config.n_layer):
            rho, theta = depth(config, layer)
            p = ramp(c)
            block = {
                **norm_recipe(config, layer, heads_norm=True),
                "att.x_r": Rule(1 - p ** (0.2 * theta)),
                "att.x_w": Rule(1 - p ** (0.9 * theta)),
                "att.x_k": Rule(1 - p ** (0.7 * theta)),
                "att.x_v": Rule(1 - p ** (0.7 * theta)),
                "att.x_a": Rule(1 - p ** (0.9 * theta)),
                "att.x_g": Rule(1 - p ** (0.2 * theta)),
                "att.w0": Rule(-6 + 6 * (i / (c - 1)) ** (1 + rho**0.3) + 0.5 + 2.5 * zigzag, lr=2.0, lr_stage2=5.0),
                "att.a0": Rule(-0.19 + 0.3 * zigzag + 0.4 * linear),
                "att.k_k": Rule(0.71 - 0.1 * linear),
                "att.k_a": Rule(torch.full((c,), 1.02)),
                "att.r_k": Rule(torch.full((c,), -0.04)),
                "att.w1": Rule(ZERO),
                "att.w2": low_rank(config.decay_rank, c),
                "att.a1": Rule(ZERO),
                "att.a2": low_rank(config.rate_rank, c),
                "att.g1": Rule(ZERO),
                "att.g2": low_rank(config.gate_rank, c),
                "att.receptance.weight": Rule(("orthogonal", 1.0), decay=True),
                "att.key.weight": Rule(("orthogonal", 0.1), decay=True),
                "att.value.weight": Rule(("orthogonal", 1.0), decay=True),
                "att.output.weight": Rule(ZERO, decay=True),
                "ffn.x_k": Rule(1 - p ** (theta**4)),
                "ffn.key.weight": Rule(("orthogonal", 1.0), decay=True),
                "ffn.value.weight": Rule(ZERO, decay=True),
            }
            if layer > 0 or config.first_value:
                block |= {
                    "att.v0": Rule(0.73 - 0.4 * linear),
                    "att.v1": Rule(ZERO),
                    "att.v2": low_rank(config.value_rank, c),
                }
            if config.time_state:
                block["att.time_state"] = Rule(ZERO)
            rules |= {f"blocks.{layer}.{name}": rule for name, rule in block.items()}
        return rules
