"""RWKV-6 "Finch" (2024): RWKV-5 with data-dependent token shift and decay, both through low-rank maps."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from receptance.models.base import (
    RWKV,
    ZERO,
    Block,
    Call,
    Mix,
    Recipe,
    Rule,
    Shapes,
    depth,
    frame_recipe,
    norm_recipe,
    ramp,
    tall_gain,
)
from receptance.ops import wkv6
from receptance.ops.ffn import sigmoid_gate
from receptance.ops.heads import norm_and_gate
from receptance.ops.pieces import upcast


@dataclass(frozen=True)
class RWKV6Config:
    """mix_rank, decay_rank: widths of the two low-rank maps. time_state: a tuned initial state is present."""

    vocab_size: int
    n_layer: int
    n_embd: int
    dim_ffn: int
    head_size: int = 64
    mix_rank: int = 32
    decay_rank: int = 64
    time_state: bool = False
    version: ClassVar[str] = "6"

    @classmethod
    def make(cls, vocab_size: int, n_layer: int, n_embd: int, head_size: int = 64) -> "RWKV6Config":
        """The usual shape for a width: dim_ffn = 3.5C rounded down to a multiple of 32; ranks double at 4096."""
        ranks = (64, 128) if n_embd >= 4096 else (32, 64)
        return cls(vocab_size, n_layer, n_embd, int(3.5 * n_embd) // 32 * 32, head_size, *ranks)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "RWKV6Config":
        """Read every field from the official tensor names and shapes. KeyError when a needed one is missing."""
        vocab_size, n_embd = shapes["emb.weight"]
        n_layer = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        return cls(
            vocab_size,
            n_layer,
            n_embd,
            dim_ffn=shapes["blocks.0.ffn.key.weight"][0],
            head_size=shapes["blocks.0.att.time_faaaa"][1],
            mix_rank=shapes["blocks.0.att.time_maa_w2"][1],
            decay_rank=shapes["blocks.0.att.time_decay_w1"][1],
            time_state="blocks.0.att.time_state" in shapes,
        )


class TimeMix(Mix):
    present = False

    def __init__(self, config: RWKV6Config):
        super().__init__()
        c, n = config.n_embd, config.head_size
        self.n_head = h = c // n
        self.time_maa_x = nn.Parameter(torch.empty(1, 1, c))
        self.time_maa_w = nn.Parameter(torch.empty(1, 1, c))
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, c))
        self.time_maa_v = nn.Parameter(torch.empty(1, 1, c))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, c))
        self.time_maa_g = nn.Parameter(torch.empty(1, 1, c))
        self.time_maa_w1 = nn.Parameter(torch.empty(c, 5 * config.mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, config.mix_rank, c))  # in the order w, k, v, r, g
        self.time_decay = nn.Parameter(torch.empty(1, 1, c))
        self.time_decay_w1 = nn.Parameter(torch.empty(c, config.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_rank, c))
        self.time_faaaa = nn.Parameter(torch.empty(h, n))  # bonus of the current token
        if config.time_state:
            self.time_state = nn.Parameter(torch.empty(h, n, n))  # value × key
        self.receptance = nn.Linear(c, c, bias=False)
        self.key = nn.Linear(c, c, bias=False)
        self.value = nn.Linear(c, c, bias=False)
        self.gate = nn.Linear(c, c, bias=False)
        self.output = nn.Linear(c, c, bias=False)
        self.ln_x = nn.GroupNorm(h, c, eps=64e-5)

    def mixes(self) -> list[Tensor]:
        """The first blend makes what each position adds to the others' shares, of the input as it is."""
        return [self.time_maa_x, torch.zeros_like(self.time_maa_x)]

    def forward(
        self, mixed: list[Tensor], last: Tensor, state: dict[str, Tensor], call: Call
    ) -> tuple[Tensor, dict[str, Tensor]]:
        xx, x = mixed
        b, t, c = x.shape
        heads = (b, t, self.n_head, c // self.n_head)
        low = torch.tanh(xx @ self.time_maa_w1).view(b, t, 5, -1)
        own = call.cheap(torch.einsum, "btjr,jrc->jbtc", low, self.time_maa_w2.to(low.dtype))
        mixes = [self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g]
        xw, xk, xv, xr, xg = call.shift(x, last, mixes, own)  # [B, T, C] each
        r, k, v = self.receptance(xr).view(heads), self.key(xk).view(heads), self.value(xv).view(heads)
        gate = self.gate(xg)
        w = upcast(self.time_decay) + upcast(torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2)
        w = -w.exp().view(heads)  # log-decay of each token and channel, unbounded below
        u = upcast(self.time_faaaa)
        y, wkv = wkv6(r, w, k, v, u, state["wkv"], lengths=call.lengths, resets=call.resets, backend=call.backend)
        norm = self.ln_x
        y = call.fused(norm_and_gate, y, norm.weight, norm.bias, norm.eps, gate, "silu")
        return self.output(y), {"wkv": wkv}


class ChannelMix(Mix):
    present = False

    def __init__(self, config: RWKV6Config):
        super().__init__()
        c, f = config.n_embd, config.dim_ffn
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, c))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, c))
        self.key = nn.Linear(c, f, bias=False)
        self.receptance = nn.Linear(c, c, bias=False)
        self.value = nn.Linear(f, c, bias=False)

    def mixes(self) -> list[Tensor]:
        return [self.time_maa_k, self.time_maa_r]

    def forward(self, mixed: list[Tensor], call: Call) -> Tensor:
        xk, xr = mixed
        k = call.channels(xk, self.key, self.value)
        return sigmoid_gate(self.receptance(xr), k, backend=call.form)


class RWKV6(RWKV):
    Config = RWKV6Config
    config: RWKV6Config

    def __init__(self, config: RWKV6Config, device: str | None = None, dtype: torch.dtype | None = None):
        with torch.device(device or "cpu"):
            super().__init__(
                config, [Block(config, i, TimeMix(config), ChannelMix(config)) for i in range(config.n_layer)]
            )
        if dtype is not None:
            self.to(dtype)

    @staticmethod
    def recipe(config: RWKV6Config, lr: float = 6e-4) -> Recipe:
        """RWKV-v5 trainer. `lr` is unused: it is there for RWKV-4, whose embedding needs it."""
        c = config.n_embd
        rules = frame_recipe(config, emb=1e-4, head=0.5 * tall_gain(config.vocab_size, c))
        i = torch.arange(c, dtype=torch.float64)
        x = i / (c - 1)
        for layer in range(config.n_layer):
            rho, theta = depth(config, layer)
            p = ramp(c)
            mixes = {
                "att.time_maa_x": 1 - p**theta,
                "att.time_maa_w": 1 - p**theta,
                "att.time_maa_k": 1 - p**theta,
                "att.time_maa_v": 1 - (p**theta + 0.3 * rho),
                "att.time_maa_r": 1 - p ** (theta / 2),
                "att.time_maa_g": 1 - p ** (theta / 2),
                "ffn.time_maa_k": 1 - p ** (theta**3),
                "ffn.time_maa_r": 1 - p ** (theta**3),
            }
            block = {
                **norm_recipe(config, layer, heads_norm=True),
                **{name: Rule(values, lr_stage2=5.0) for name, values in mixes.items()},
                "att.time_maa_w1": Rule(ZERO),
                "att.time_maa_w2": Rule(("uniform", 0.01)),
                "att.time_decay": Rule(-6 + 5 * x ** (0.7 + 1.3 * rho), lr=2.0, lr_stage2=5.0),
                "att.time_decay_w1": Rule(ZERO),
                "att.time_decay_w2": Rule(("uniform", 0.01)),
                "att.time_faaaa": Rule(rho * (1 - x) + 0.1 * ((i + 1) % 3 - 1), lr_stage2=5.0),
                "att.receptance.weight": Rule(("orthogonal", 1.0), decay=True),
                "att.key.weight": Rule(("orthogonal", 0.1), decay=True),
                "att.value.weight": Rule(("orthogonal", 1.0), decay=True),
                "att.gate.weight": Rule(("orthogonal", 0.1), decay=True),
                "att.output.weight": Rule(ZERO, decay=True),
                "ffn.key.weight": Rule(("orthogonal", 1.0), decay=True),
                "ffn.receptance.weight": Rule(ZERO, decay=True),
                "ffn.value.weight": Rule(ZERO, decay=True),
            }
            if config.time_state:
                block["att.time_state"] = Rule(ZERO)
            rules |= {f"blocks.{layer}.{name}": rule for name, rule in block.items()}
        return rules
