"""RWKV-5 "Eagle" (2024) in its three layouts: 5.0, 5.1 (adds the gate) and 5.2 (decay and bonus per channel)."""

from dataclasses import dataclass

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
from receptance.models.v4 import ChannelMix, mix_recipe
from receptance.ops import wkv6
from receptance.ops.heads import norm_and_gate
from receptance.ops.pieces import upcast


@dataclass(frozen=True)
class RWKV5Config:
    """version: "5.0", "5.1" or "5.2". time_state: the checkpoint carries a tuned initial state.

    column: a 5.1 file that stores decay and bonus as [H, 1] instead of [H].
    """

    vocab_size: int
    n_layer: int
    n_embd: int
    dim_ffn: int
    head_size: int = 64
    time_state: bool = False
    version: str = "5.2"
    column: bool = False

    @classmethod
    def make(
        cls, vocab_size: int, n_layer: int, n_embd: int, head_size: int = 64, version: str = "5.2"
    ) -> "RWKV5Config":
        """The usual shape for a width: dim_ffn = 4C for 5.0, 3.5C rounded down to a multiple of 32 after it."""
        dim_ffn = 4 * n_embd if version == "5.0" else int(3.5 * n_embd) // 32 * 32
        return cls(vocab_size, n_layer, n_embd, dim_ffn, head_size, version=version)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "RWKV5Config":
        """Read every field from the official tensor names and shapes. KeyError when a needed one is missing."""
        vocab_size, n_embd = shapes["emb.weight"]
        n_layer = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        decay = shapes["blocks.0.att.time_decay"]
        if "blocks.0.att.gate.weight" not in shapes:
            version = "5.0"
        else:
            version = "5.2" if len(decay) == 2 and decay[1] > 1 else "5.1"
        head_size, rest = divmod(shapes["blocks.0.att.key.weight"][0], decay[0])
        if rest or not head_size:
            raise ValueError(f"{decay[0]} heads do not divide a width of {shapes['blocks.0.att.key.weight'][0]}")
        dim_ffn = shapes["blocks.0.ffn.key.weight"][0]
        column = len(decay) == 2 and version == "5.1"
        return cls(
            vocab_size, n_layer, n_embd, dim_ffn, head_size, "blocks.0.att.time_state" in shapes, version, column
        )


class TimeMix(Mix):
    def __init__(self, config: RWKV5Config):
        super().__init__()
        c, n = config.n_embd, config.head_size
        self.n_head = h = c // n
        per_head = (h, n) if config.version == "5.2" else (h, 1) if config.column else (h,)
        self.time_decay = nn.Parameter(torch.empty(per_head))  # log-decay per step is -exp(time_decay)
        if config.version == "5.0":
            self.time_first = nn.Parameter(torch.empty(per_head))  # bonus is exp(time_first) …
        else:
            self.time_faaaa = nn.Parameter(torch.empty(per_head))  # … or time_faaaa itself
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, c))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, c))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, c))
        self.has_gate = config.version != "5.0"
        if self.has_gate:
            self.time_mix_g = nn.Parameter(torch.empty(1, 1, c))
            self.gate = nn.Linear(c, c, bias=False)
        if config.time_state:
            self.time_state = nn.Parameter(torch.empty(h, n, n))  # value × key
        self.receptance = nn.Linear(c, c, bias=False)
        self.key = nn.Linear(c, c, bias=False)
        self.value = nn.Linear(c, c, bias=False)
        self.output = nn.Linear(c, c, bias=False)
        self.ln_x = nn.GroupNorm(h, c, eps=64e-5)  # for any head size: training divides by 8 and uses 1e-5

    def mixes(self) -> list[Tensor]:
        return [self.time_mix_r, self.time_mix_k, self.time_mix_v, *([self.time_mix_g] if self.has_gate else [])]

    def forward(
        self, mixed: list[Tensor], last: Tensor, state: dict[str, Tensor], call: Call
    ) -> tuple[Tensor, dict[str, Tensor]]:
        xr, xk, xv, *xg = mixed
        b, t, c = xr.shape
        heads = (b, t, self.n_head, c // self.n_head)
        r, k, v = self.receptance(xr).view(heads), self.key(xk).view(heads), self.value(xv).view(heads)
        gate = self.gate(xg[0]) if self.has_gate else None
        u = upcast(self.time_faaaa) if self.has_gate else upcast(self.time_first).exp()
        w = -upcast(self.time_decay).exp()
        if w.dim() == 1:
            w, u = w[:, None], u[:, None]
        w, u = w.expand(heads[2:]), u.expand(heads[2:])
        y, wkv = wkv6(r, w, k, v, u, state["wkv"], lengths=call.lengths, resets=call.resets, backend=call.backend)
        norm = self.ln_x
        y = call.fused(norm_and_gate, y, norm.weight, norm.bias, norm.eps, gate, "silu")
        return self.output(y), {"wkv": wkv}


class RWKV5(RWKV):
    Config = RWKV5Config
    config: RWKV5Config

    def __init__(self, config: RWKV5Config, device: str | None = None, dtype: torch.dtype | None = None):
        with torch.device(device or "cpu"):
            super().__init__(
                config,
                [
                    Block(config, i, TimeMix(config), ChannelMix(config.n_embd, config.dim_ffn))
                    for i in range(config.n_layer)
                ],
            )
        if dtype is not None:
            self.to(dtype)

    @staticmethod
    def recipe(config: RWKV5Config, lr: float = 6e-4) -> Recipe:
        """5.0 and 5.1 start as RWKV-v4neo does (embedding U(-lr, lr)), 5.2 as the RWKV-v5 trainer."""
        c, f, n = config.n_embd, config.dim_ffn, config.head_size
        h = c // n
        late = config.version == "5.2"
        emb, gains = (1e-4, (1.0, 0.1, 1.0, 0.1)) if late else (lr, (1.0, 1.0, 1.0, 1.0))
        rules = frame_recipe(config, emb=emb, head=0.5 * tall_gain(config.vocab_size, c))
        for layer in range(config.n_layer):
            rho, theta = depth(config, layer)
            p = ramp(c)
            size = c if late else h
            i = torch.arange(size, dtype=torch.float64)
            x = i / max(size - 1, 1)
            bonus = rho * (1 - x) + (0.1 * ((i + 1) % 3 - 1) if late else 0)
            block = {
                **norm_recipe(config, layer, heads_norm=True),
                **mix_recipe("att.", p, rho, theta),
                "att.time_decay": Rule(-6 + 5 * x ** (0.7 + 1.3 * rho), lr=2.0, lr_stage2=5.0),
                "att.receptance.weight": Rule(("orthogonal", gains[0]), decay=True),
                "att.key.weight": Rule(("orthogonal", gains[1]), decay=True),
                "att.value.weight": Rule(("orthogonal", gains[2]), decay=True),
                "att.output.weight": Rule(ZERO, decay=True),
                "ffn.time_mix_k": Rule(p**theta, lr_stage2=5.0),
                "ffn.time_mix_r": Rule(p**theta, lr_stage2=5.0),
                "ffn.key.weight": Rule(("orthogonal", 1.0 if late else tall_gain(f, c)), decay=True),
                "ffn.receptance.weight": Rule(ZERO, decay=True),
                "ffn.value.weight": Rule(ZERO, decay=True),
            }
            if config.version == "5.0":
                block["att.time_first"] = Rule(torch.full((h,), -3.0), lr=3.0, lr_stage2=5.0)
            else:
                block["att.time_faaaa"] = Rule(bonus, lr_stage2=5.0)
                block["att.time_mix_g"] = Rule(p ** (theta / 2), lr_stage2=5.0)
                block["att.gate.weight"] = Rule(("orthogonal", gains[3]), decay=True)
            if config.time_state:
                block["att.time_state"] = Rule(ZERO)
            rules |= {f"blocks.{layer}.{name}": rule for name, rule in block.items()}
        return rules
