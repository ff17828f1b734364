"""A LLaMA-style Transformer: RMSNorm, rotary positions, SwiGLU, grouped queries, torch's attention kernels."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from receptance.models import RWKV, Rule, State
from receptance.models.base import Recipe
from receptance.ops import Operators

PADDING = -1  # document number of what is never looked at
EPS = 1e-5


@dataclass(frozen=True)
class TransformerConfig:
    """kv_heads: keys and values are shared by n_head / kv_heads query heads each (GQA).

    window: so many tokens back are seen and kept, the present one included; 0: all.
    token_shift: the input of queries, keys and values is blended with the token before, as in RWKV-4.
    """

    vocab_size: int
    n_layer: int
    n_embd: int
    dim_ffn: int
    head_size: int = 64
    kv_heads: int = 0
    window: int = 0
    token_shift: bool = False
    rope_base: float = 10_000.0
    version: str = "transformer"

    @classmethod
    def make(
        cls, vocab_size: int, n_layer: int, n_embd: int, head_size: int = 64, kv_heads: int = 0, window: int = 0
    ) -> "TransformerConfig":
        """The usual shape for a width: dim_ffn = 8/3 C, up to a multiple of 16. kv_heads 0: one for each query head."""
        return cls(vocab_size, n_layer, n_embd, 16 * math.ceil(n_embd / 6), head_size, kv_heads, window)

    def __post_init__(self) -> None:
        if self.n_embd % self.head_size or self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} must be even and divide n_embd {self.n_embd}")
        if self.kv_heads < 0 or (self.kv_heads and self.n_head % self.kv_heads):
            raise ValueError(f"kv_heads {self.kv_heads} must divide the {self.n_head} heads")

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size

    @property
    def n_kv(self) -> int:
        return self.kv_heads or self.n_head


class Sight(NamedTuple):
    """What every layer shares in a call. allowed [B, 1, T, S]: who sees whom; None: all that came before."""

    cos: Tensor  # [B, 1, T, N / 2]
    sin: Tensor
    allowed: Tensor | None
    resets: Tensor | None  # [B, T]
    lengths: Tensor | None  # [B]
    keep: Tensor | slice  # of the S keys and values, those that go into the state: all rows alike, or [B, K]

    def kept(self, x: Tensor) -> Tensor:
        """x [B, H, S, N]"""
        if isinstance(self.keep, slice):
            return x[:, :, self.keep]
        index = self.keep[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, N] turned by its position, halves paired as in LLaMA."""
    a, b = x.chunk(2, -1)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)], -1)


def lowered(x: Tensor) -> Tensor:
    """In the type that autocast would convert it to before each of several products: once is enough."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        c, kv = config.n_embd, config.n_kv * config.head_size
        self.head_size = config.head_size
        self.query = nn.Linear(c, c, bias=False)
        self.key = nn.Linear(c, kv, bias=False)
        self.value = nn.Linear(c, kv, bias=False)
        self.output = nn.Linear(c, c, bias=False)
        if config.token_shift:
            self.x_qkv = nn.Parameter(torch.empty(3, c))

    def forward(self, x: Tensor, state: dict[str, Tensor], sight: Sight) -> tuple[Tensor, dict[str, Tensor]]:
        b, t, c = x.shape
        after = {}
        if hasattr(self, "x_qkv"):
            before = torch.cat([state["att_shift"][:, None].to(x.dtype), x[:, :-1]], 1)  # [B, T, C]
            if sight.resets is not None:
                before = before.masked_fill(sight.resets[..., None], 0)
            xq, xk, xv = (x + (before - x) * mix for mix in self.x_qkv.to(x.dtype))
            after["att_shift"] = self._last(x, state["att_shift"], sight.lengths)
        else:
            xq = xk = xv = x
        q, k, v = (
            y.view(b, t, -1, self.head_size).transpose(1, 2) for y in (self.query(xq), self.key(xk), self.value(xv))
        )  # [B, H, T, N]
        q, k = rotate(q, sight.cos, sight.sin), rotate(k, sight.cos, sight.sin)
        k = torch.cat([state["keys"].to(k.dtype), k], 2)  # [B, Hkv, S, N]
        v = torch.cat([state["values"].to(v.dtype), v], 2)
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=sight.allowed, is_causal=sight.allowed is None, enable_gqa=k.shape[1] < q.shape[1]
        )
        after |= {"keys": sight.kept(k), "values": sight.kept(v)}
        return self.output(y.transpose(1, 2).reshape(b, t, c)), after

    @staticmethod
    def _last(x: Tensor, before: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, C]: each row's last token before its padding, or what was `before` where there is none."""
        if lengths is None:
            return x[:, -1]
        last = x.gather(1, (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
        return torch.where(lengths[:, None] > 0, last, before.to(x.dtype))


class SwiGLU(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.up = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.down = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.ln1 = nn.RMSNorm(config.n_embd, eps=EPS)
        self.ln2 = nn.RMSNorm(config.n_embd, eps=EPS)
        self.att = Attention(config)
        self.ffn = SwiGLU(config)

    def forward(
        self, x: Tensor, state: dict[str, Tensor], sight: Sight, dropout: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mixed, after = self.att(lowered(self.ln1(x)), state, sight)
        x = x + nn.functional.dropout(mixed, dropout)
        return x + nn.functional.dropout(self.ffn(lowered(self.ln2(x))), dropout), after


class Transformer(RWKV):
    """`forward` and `loss` are those of `RWKV`; the state is the cache of keys and values, and grows.

    State: keys, values [L, B, Hkv, S, N], keys after their rotation; document, position [1, B, S]: the number of
    the document that each belongs to, PADDING for padding, and its place in the row; with token_shift att_shift
    [L, B, C].
    """

    Config = TransformerConfig
    config: TransformerConfig

    def __init__(self, config: TransformerConfig, device: str | None = None):
        with torch.device(device or "cpu"):
            super().__init__(config, [Block(config) for _ in range(config.n_layer)])
            self.ln_out = nn.RMSNorm(config.n_embd, eps=EPS)  # type: ignore[assignment]

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Of the empty state."""
        c = self.config
        cache = c.n_layer, batch, c.n_kv, 0, c.head_size
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("keys", "values"), cache)
        shapes["document"] = shapes["position"] = 1, batch, 0
        if c.token_shift:
            shapes["att_shift"] = c.n_layer, batch, c.n_embd
        return shapes

    def zero_state(self, batch: int = 1) -> State:
        counts = ("document", "position")
        tensors = {}
        for name, shape in self.state_shapes(batch).items():
            tensors[name] = torch.zeros(shape, dtype=torch.long if name in counts else self.dtype, device=self.device)
        return State(tensors)

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
        is_plain = state is None and lengths is None and resets is None
        state = state or self.zero_state(len(tokens))
        if state.batch != len(tokens):
            raise ValueError(f"a state of {state.batch} rows for {len(tokens)} rows of tokens")

        sight, places = self._sight(tokens, state, lengths, resets, is_plain)
        dropout = self.dropout if self.training else 0.0
        x = nn.functional.dropout(self.emb(tokens), dropout)  # [B, T, C]
        after = []
        for i, block in enumerate(self.blocks):
            layer = {name: y[i] for name, y in state.items() if name not in places}
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, new = checkpoint(block, x, layer, sight, dropout, use_reentrant=False)
            else:
                x, new = block(x, layer, sight, dropout)
            after.append(new)
        fields = {name: torch.stack([new[name] for new in after]) for name in after[0]}
        return self.ln_out(x), State({**fields, **places}), single, lengths

    def _sight(
        self, tokens: Tensor, state: State, lengths: Tensor | None, resets: Tensor | None, is_plain: bool
    ) -> tuple[Sight, dict[str, Tensor]]:
        """Who sees whom: the same document, not later, within the window. And the state's document and position."""
        batch, t = tokens.shape
        device, window = tokens.device, self.config.window
        past, past_position = state["document"][0], state["position"][0]  # [B, P]
        n_past, place = past.shape[1], torch.arange(t, device=device)
        if n_past:
            document, first = past.clamp(min=0).amax(1, keepdim=True), past_position.amax(1, keepdim=True) + 1
        else:
            document, first = (past.new_zeros(batch, 1) for _ in range(2))
        document, position = document.expand(batch, t), first + place
        if resets is not None:
            document = document + resets.cumsum(1)
        if lengths is not None:
            is_padding = place >= lengths[:, None]
            document, position = document.masked_fill(is_padding, PADDING), position.masked_fill(is_padding, PADDING)
        documents, positions = torch.cat([past, document], 1), torch.cat([past_position, position], 1)  # [B, S]
        size = n_past + t

        allowed = None
        if not is_plain or (window and size > window):
            order = torch.arange(size, device=device)
            now = order[n_past:, None]  # [T, 1]
            allowed = (documents[:, None] == document[:, :, None]) & (order <= now)
            if window:
                allowed &= positions[:, None] > position[:, :, None] - window
            allowed = (allowed | (order == now))[:, None]  # [B, 1, T, S]; padding sees itself, for none may see nothing

        keep: Tensor | slice = slice(max(0, size - window) if window else 0, None)
        if lengths is not None and window and size > window:  # padding to the left, so that it goes first
            keep = (documents != PADDING).int().sort(dim=1, stable=True).indices[:, size - window :]
        half = torch.arange(0, self.config.head_size, 2, device=device, dtype=torch.float64)
        speed = self.config.rope_base ** (-half / self.config.head_size)
        angle = (position[..., None] * speed)[:, None]  # [B, 1, T, N / 2], in float64 for far positions
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        sight = Sight(angle.cos().to(dtype), angle.sin().to(dtype), allowed, resets, lengths, keep)
        kept = [x[:, keep] if isinstance(keep, slice) else x.gather(1, keep) for x in (documents, positions)]
        return sight, {"document": kept[0][None], "position": kept[1][None]}

    @staticmethod
    def recipe(config: TransformerConfig, lr: float = 6e-4) -> Recipe:
        """LLaMA's: N(0, 0.02), into the residual by 1/sqrt(2L) less; weight decay on matrices. `lr` is unused."""
        matrix, into = Rule(("normal", 0.02), decay=True), 0.02 / math.sqrt(2 * config.n_layer)
        one = Rule(torch.ones(config.n_embd))
        rules = {"emb.weight": matrix, "head.weight": matrix, "ln_out.weight": one}
        for i in range(config.n_layer):
            names = ("att.query", "att.key", "att.value", "ffn.gate", "ffn.up")
            block = {f"{name}.weight": matrix for name in names} | {"ln1.weight": one, "ln2.weight": one}
            block |= {f"{name}.weight": Rule(("normal", into), decay=True) for name in ("att.output", "ffn.down")}
            if config.token_shift:
                block["att.x_qkv"] = Rule(torch.full((3, config.n_embd), 0.5))
            rules |= {f"blocks.{i}.{name}": rule for name, rule in block.items()}
        return rules
