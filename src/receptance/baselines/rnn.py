"""Stacked LSTM or GRU layers of torch (cuDNN on a GPU), each with a norm before it and a residual around it."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from receptance.models import RWKV, Rule, State
from receptance.models.base import Recipe
from receptance.ops import Operators


@dataclass(frozen=True)
class RNNConfig:
    """version: "lstm" or "gru"."""

    vocab_size: int
    n_layer: int
    n_embd: int
    version: str = "lstm"

    @classmethod
    def make(cls, vocab_size: int, n_layer: int, n_embd: int, version: str = "lstm") -> "RNNConfig":
        return cls(vocab_size, n_layer, n_embd, version)

    @property
    def dim_ffn(self) -> int:
        return 0


class Block(nn.Module):
    def __init__(self, config: RNNConfig):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        layer = nn.LSTM if config.version == "lstm" else nn.GRU
        self.rnn = layer(config.n_embd, config.n_embd, batch_first=True)

    def forward(self, x: Tensor, state: dict[str, Tensor], pieces: "Pieces") -> tuple[Tensor, dict[str, Tensor]]:
        normed = self.ln1(x)
        outs = []
        for start, end, alive, fresh in pieces:
            if fresh is not None:
                state = {name: y.masked_fill(fresh[:, None], 0) for name, y in state.items()}
            h = state["h"].to(normed.dtype)[None].contiguous()
            if "c" in state:
                y, (h, c) = self.rnn(normed[:, start:end], (h, state["c"].to(normed.dtype)[None].contiguous()))
                new = {"h": h[0], "c": c[0]}
            else:
                y, h = self.rnn(normed[:, start:end], h)
                new = {"h": h[0]}
            if alive is not None:
                new = {name: torch.where(alive[:, None], x, state[name].to(x)) for name, x in new.items()}
            state = new
            outs.append(y)
        return x + torch.cat(outs, 1), state


# (start, end, rows [B] that have tokens here or None for all, rows whose document begins here or None for no row)
Pieces = list[tuple[int, int, Tensor | None, Tensor | None]]


def pieces_of(t: int, lengths: Tensor | None, resets: Tensor | None) -> Pieces:
    """The row cut where any document begins or ends: inside a piece torch's own loop runs."""
    cuts = {0, t}
    if lengths is not None:
        cuts |= {n for n in lengths.tolist() if n < t}
    if resets is not None:
        cuts |= set(resets.any(0).nonzero().flatten().tolist())
    places = sorted(cuts)
    return [
        (start, end, None if lengths is None else lengths > start, None if resets is None else resets[:, start])
        for start, end in pairwise(places)
    ]


class RNN(RWKV):
    """`forward` and `loss` are those of `RWKV`. State: h, and for LSTM c, [L, B, C]."""

    Config = RNNConfig
    config: RNNConfig

    def __init__(self, config: RNNConfig, device: str | None = None):
        with torch.device(device or "cpu"):
            super().__init__(config, [Block(config) for _ in range(config.n_layer)])

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        names = ("h", "c") if self.config.version == "lstm" else ("h",)
        return dict.fromkeys(names, (self.config.n_layer, batch, self.config.n_embd))

    def zero_state(self, batch: int = 1) -> State:
        shapes = self.state_shapes(batch)
        return State({name: torch.zeros(x, dtype=self.dtype, device=self.device) for name, x in shapes.items()})

    def check_state(self, state: State, source: str = "state") -> None:
        expected, found = self.state_shapes(state.batch), {name: tuple(x.shape) for name, x in state.items()}
        if found != expected:
            raise ValueError(f"{source}: a state with {found}; this {self.config.version} needs {expected}")

    def hidden(
        self,
        tokens: list[int] | Tensor,
        state: State | None,
        *,
        lengths: Tensor | None,
        resets: Tensor | None,
        backend: str | Operators,
    ) -> tuple[Tensor, State, bool, Tensor | None]:
        """As of RWKV. backend: means nothing here."""
        tokens, single, lengths, resets = self._checked(tokens, lengths, resets)
        batch, t = tokens.shape
        state = state or self.zero_state(batch)
        if state.batch != batch:
            raise ValueError(f"a state of {state.batch} rows for {batch} rows of tokens")
        self.check_state(state)
        pieces = pieces_of(t, lengths, resets)
        dropout = self.dropout if self.training else 0.0
        x = nn.functional.dropout(self.emb(tokens), dropout)  # [B, T, C]
        after = []
        for i, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, new = checkpoint(block, x, state.layer(i), pieces, use_reentrant=False)
            else:
                x, new = block(x, state.layer(i), pieces)
            x = nn.functional.dropout(x, dropout)
            after.append(new)
        return (
            self.ln_out(x),
            State({name: torch.stack([new[name] for new in after]) for name in state}),
            single,
            lengths,
        )

    @staticmethod
    def recipe(config: RNNConfig, lr: float = 6e-4) -> Recipe:
        """U(±1/sqrt(C)) as torch has it, forget gates open (bias 1); weight decay on matrices. `lr` is unused."""
        c = config.n_embd
        gates = 4 if config.version == "lstm" else 3
        bias = torch.zeros(gates * c)
        if config.version == "lstm":
            bias[c : 2 * c] = 1  # torch's order: input, forget, cell, output
        one, zero, matrix = torch.ones(c), torch.zeros(c), Rule(("uniform", c**-0.5), decay=True)
        rules = {
            "emb.weight": Rule(("normal", 1.0), decay=True),
            "head.weight": matrix,
            "ln_out.weight": Rule(one),
            "ln_out.bias": Rule(zero),
        }
        for i in range(config.n_layer):
            block = {"ln1.weight": Rule(one), "ln1.bias": Rule(zero)}
            block |= {"rnn.weight_ih_l0": matrix, "rnn.weight_hh_l0": matrix}
            block |= {"rnn.bias_ih_l0": Rule(bias), "rnn.bias_hh_l0": Rule(torch.zeros(gates * c))}
            rules |= {f"blocks.{i}.{name}": rule for name, rule in block.items()}
        return rules
