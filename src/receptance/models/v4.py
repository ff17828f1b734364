"""RWKV-4 ("RWKV: Reinventing RNNs for the Transformer Era", 2023). The maths is in docs/maths.md."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from receptance.models.base import (
    RWKV,
    ZERO,
    Block,
    Call,
    Mix,
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
from receptance.models.state import State
from receptance.ops import EMPTY, wkv4
from receptance.ops.ffn import sigmoid_gate
from receptance.ops.pieces import upcast


@dataclass(frozen=True)
class RWKV4Config:
    """pre_ffn: the first block has a channel mix (`ffnPre`) in place of its time mix."""

    vocab_size: int
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    pre_ffn: bool = False
    version: ClassVar[str] = "4"

    @classmethod
    def make(cls, vocab_size: int, n_layer: int, n_embd: int) -> "RWKV4Config":
        """The usual shape for a width: dim_att = C, dim_ffn = 4C."""
        return cls(vocab_size, n_layer, n_embd, dim_att=n_embd, dim_ffn=4 * n_embd)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "RWKV4Config":
        """Read every field from the official tensor names and shapes. KeyError when a needed one is missing."""
        vocab_size, n_embd = shapes["emb.weight"]
        n_layer = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        pre_ffn = "blocks.0.ffnPre.key.weight" in shapes
        if pre_ffn and n_layer == 1:
            dim_att = n_embd
        else:
            dim_att = shapes[f"blocks.{int(pre_ffn)}.att.key.weight"][0]
        return cls(vocab_size, n_layer, n_embd, dim_att, shapes["blocks.0.ffn.key.weight"][0], pre_ffn)


class TimeMix(Mix):
    def __init__(self, config: RWKV4Config):
        super().__init__()
        c, a = config.n_embd, config.dim_att
        self.time_decay = nn.Parameter(torch.empty(a))  # log-decay per step is -exp(time_decay)
        self.time_first = nn.Parameter(torch.empty(a))  # bonus of the current token, in the log domain
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, c))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, c))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, c))
        self.key = nn.Linear(c, a, bias=False)
        self.value = nn.Linear(c, a, bias=False)
        self.receptance = nn.Linear(c, a, bias=False)
        self.output = nn.Linear(a, c, bias=False)

    def mixes(self) -> list[Tensor]:
        return [self.time_mix_k, self.time_mix_v, self.time_mix_r]

    def forward(
        self, mixed: list[Tensor], last: Tensor, state: dict[str, Tensor], call: Call
    ) -> tuple[Tensor, dict[str, Tensor]]:
        xk, xv, xr = mixed
        k, v, r = self.key(xk), self.value(xv), self.receptance(xr)  # [B, T, A]
        y, (num, den, exp) = wkv4(
            -upcast(self.time_decay).exp(),
            k,
            v,
            upcast(self.time_first),
            (state["num"], state["den"], state["exp"]),
            lengths=call.lengths,
            resets=call.resets,
            backend=call.backend,
        )
        y = call.fused(sigmoid_gate, r, y.to(r.dtype))
        return self.output(y), {"num": num, "den": den, "exp": exp}


class ChannelMix(Mix):
    """Also RWKV-5's."""

    def __init__(self, n_embd: int, dim_ffn: int):
        super().__init__()
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, n_embd))
        self.key = nn.Linear(n_embd, dim_ffn, bias=False)
        self.receptance = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(dim_ffn, n_embd, bias=False)

    def mixes(self) -> list[Tensor]:
        return [self.time_mix_k, self.time_mix_r]

    def forward(self, mixed: list[Tensor], call: Call) -> Tensor:
        xk, xr = mixed
        k = call.channels(xk, self.key, self.value)
        return sigmoid_gate(self.receptance(xr), k, backend=call.form)


class PreBlock(nn.Module):
    """The first block of a pre_ffn model: two channel mixes. The first one's shift is kept in att_shift."""

    def __init__(self, config: RWKV4Config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.ln0 = nn.LayerNorm(config.n_embd)
        self.ffnPre = ChannelMix(config.n_embd, config.dim_ffn)
        self.ffn = ChannelMix(config.n_embd, config.dim_ffn)

    def forward(self, x: Residual, v_first: None, state: dict[str, Tensor], call: Call) -> tuple[Any, ...]:
        x, delta = apart(x)
        pre, ffn = self.ffnPre, self.ffn
        x, first, mixed, _ = call.enter(x, delta, self.ln1, state["att_shift"], pre.mixes(), present=True)
        delta = pre(mixed, call)
        x, second, mixed, _ = call.enter(x, delta, self.ln2, state["ffn_shift"], ffn.mixes(), present=True)
        return call.leave(x, ffn(mixed, call)), v_first, {**state, "att_shift": first, "ffn_shift": second}


class RWKV4(RWKV):
    Config = RWKV4Config
    config: RWKV4Config

    def __init__(self, config: RWKV4Config, device: str | None = None, dtype: torch.dtype | None = None):
        with torch.device(device or "cpu"):
            blocks: list[nn.Module] = [
                PreBlock(config)
                if config.pre_ffn and i == 0
                else Block(config, i, TimeMix(config), ChannelMix(config.n_embd, config.dim_ffn))
                for i in range(config.n_layer)
            ]
            super().__init__(config, blocks)
        if dtype is not None:
            self.to(dtype)

    def state_shapes(self, batch: int) -> Shapes:
        c = self.config
        att, ffn = (c.n_layer, batch, c.dim_att), (c.n_layer, batch, c.n_embd)
        return {"att_shift": ffn, "num": att, "den": att, "exp": att, "ffn_shift": ffn}

    def zero_state(self, batch: int = 1) -> State:
        tensors = dict(super().zero_state(batch))
        return State({**tensors, "exp": torch.full_like(tensors["exp"], EMPTY)})

    @staticmethod
    def recipe(config: RWKV4Config, lr: float = 6e-4) -> Recipe:
        """RWKV-v4neo. The embedding starts as U(-lr, lr), lr being the initial learning rate."""
        c, a, f = config.n_embd, config.dim_att, config.dim_ffn
        rules = frame_recipe(config, emb=lr, head=0.5 * tall_gain(config.vocab_size, c))
        n = torch.arange(a, dtype=torch.float64)
        for layer in range(config.n_layer):
            rho, theta = depth(config, layer)
            p = ramp(c)
            block = {
                **norm_recipe(config, layer, heads_norm=False),
                **mix_recipe("att.", p, rho, theta),
                "att.time_decay": Rule(-5 + 8 * (n / (a - 1)) ** (0.7 + 1.3 * rho), lr=2.0, lr_stage2=5.0),
                "att.time_first": Rule(math.log(0.3) + 0.5 * ((n + 1) % 3 - 1), lr=3.0, lr_stage2=5.0),
                "att.key.weight": Rule(ZERO, decay=True),
                "att.receptance.weight": Rule(ZERO, decay=True),
                "att.value.weight": Rule(("orthogonal", tall_gain(a, c)), decay=True),
                "att.output.weight": Rule(ZERO, decay=True),
                "ffn.time_mix_k": Rule(p**theta, lr_stage2=5.0),
                "ffn.time_mix_r": Rule(p**theta, lr_stage2=5.0),
                "ffn.key.weight": Rule(("orthogonal", tall_gain(f, c)), decay=True),
                "ffn.receptance.weight": Rule(ZERO, decay=True),
                "ffn.value.weight": Rule(ZERO, decay=True),
            }
            if config.pre_ffn and layer == 0:
                block |= {k.replace("ffn.", "ffnPre."): rule for k, rule in block.items() if k.startswith("ffn.")}
                block = {k: rule for k, rule in block.items() if not k.startswith("att.")}
            rules |= {f"blocks.{layer}.{name}": rule for name, rule in block.items()}
        return rules


def mix_recipe(prefix: str, p: Tensor, rho: float, theta: float) -> Recipe:
    """time_mix_k, _v, _r of the time mix in versions 4 and 5; _v may exceed 1."""
    return {
        prefix + "time_mix_k": Rule(p**theta, lr_stage2=5.0),
        prefix + "time_mix_v": Rule(p**theta + 0.3 * rho, lr_stage2=5.0),
        prefix + "time_mix_r": Rule(p ** (theta / 2), lr_stage2=5.0),
    }
