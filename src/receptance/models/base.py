"""What all versions share: the frame around the blocks, the token shift, and the words of a recipe."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from receptance.models.state import State
from receptance.ops import Operators, form_of
from receptance.ops.ffn import relu_square
from receptance.ops.head_loss import head_loss, module_loss
from receptance.ops.norm import add_norm, layer_norm
from receptance.ops.pieces import compute_dtype, upcast, uses_triton
from receptance.ops.products import relu_square_products
from receptance.ops.recompute import Recompute, Spare
from receptance.ops.shift import norm_mix, shift_mix

Shapes = dict[str, tuple[int, ...]]
Residual = Tensor | tuple[Tensor, Tensor]  # [B, T, C], or two such whose sum it is


class Config(Protocol):
    """What every version's Config has; each version adds its own fields."""

    @property
    def version(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def dim_ffn(self) -> int: ...


@dataclass(frozen=True)
class Call:
    """How one forward call runs, the same for every layer.

    lengths [B]: rows are padded at the end. resets [B, T]: true at the first token of a document, which sees nothing
    before it. recompute: makes results of `cheap` again in the backward pass; None: they are kept. hands_on: blocks
    return x as a pair whose sum the next one makes, in the kernel that reads it anyway.
    """

    lengths: Tensor | None = None
    backend: str | Operators = "auto"
    dropout: float = 0.0
    resets: Tensor | None = None
    recompute: Recompute | None = None
    hands_on: bool = False

    def cheap(self, function: Callable[..., Any], *inputs: Any, dear: bool = False) -> Any:
        """function(*inputs), which need not be kept for the backward pass; `dear` ones are the first to be, if any."""
        return function(*inputs) if self.recompute is None else self.recompute(function, *inputs, dear=dear)

    @property
    def form(self) -> str:
        """The name that fused pieces choose by."""
        return form_of(self.backend)

    def fused(self, piece: Callable[..., Any], *inputs: Any, dear: bool = False) -> Any:
        """Call a fused piece of `receptance.ops` with this call's back end; its results are not kept."""
        return self.cheap(partial(piece, backend=self.form), *inputs, dear=dear)

    def shift(
        self, x: Tensor, last: Tensor, mixes: Sequence[Tensor], own: Tensor | None = None, *, present: bool = False
    ) -> list[Tensor]:
        """x blended with its predecessors by each of `mixes`; nothing crosses from one document into the next."""
        mixed: list[Tensor] = self.fused(partial(shift_mix, resets=self.resets, present=present), x, last, mixes, own)
        return mixed

    def norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        out: Tensor = self.fused(layer_norm, x, norm.weight, norm.bias, norm.eps)
        return out

    def leave(self, x: Tensor, delta: Tensor) -> Residual:
        """What a block returns: x + delta, or the pair."""
        return (x, delta) if self.hands_on else self.drop(x + delta)

    def add(self, x: Tensor, mixed: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """The residual sum and its norm; mixed None: nothing is added."""
        if mixed is None:
            return x, self.norm(x, norm)
        if self.dropout:
            x = self.drop(x + mixed)
            return x, self.norm(x, norm)
        x, normed = add_norm(x, mixed, norm.weight, norm.bias, norm.eps, backend=self.form)
        if self.recompute is not None:
            again = partial(layer_norm, backend=self.form)
            self.recompute.remember(normed, again, x, norm.weight, norm.bias, norm.eps)
        return x, normed

    def enter(
        self,
        x: Tensor,
        delta: Tensor | None,
        norm: nn.LayerNorm,
        last: Tensor,
        mixes: Sequence[Tensor],
        *,
        present: bool = False,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """The way into half a block: x + delta, what the next call's token shift needs, the mixes of the sum's norm,
        what stood before its first position.

        present: as in `shift_mix`. keep: the mixes, for the backward pass; otherwise it makes them again.
        """
        hand_over = getattr(self.backend, "shift", None)  # of rows that are cut over ranks: the vector before the piece
        if hand_over is not None or self.lengths is not None or self.dropout:
            x, normed = self.add(x, delta, norm)
            if hand_over is not None:
                if self.lengths is not None:
                    raise ValueError("rows of different lengths cannot be cut over ranks")
                last = hand_over(normed[:, -1], last)
            return x, carry(normed, last, self), self.shift(normed, last, mixes, present=present), last
        again = partial(norm_mix, resets=self.resets, present=present, backend=self.form)
        vectors = norm.weight, norm.bias, norm.eps, last, mixes
        x, end, mixed = again(x, delta, *vectors)
        if self.recompute is not None and not keep:
            self.recompute.remember(mixed, _third(again), x, None, *vectors)
        return x, end, mixed, last

    def joins_maps(self, x: Tensor) -> bool:
        """Whether `shifted_maps` saves time for inputs like x [B, T, C]: in training, on a GPU, in half precision."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or self.lengths is not None:
            return False
        is_cut = (
            getattr(self.backend, "shift", None) is not None
        )  # over ranks: the vector before the piece is elsewhere
        return (
            not is_cut and compute_dtype(x) in (torch.bfloat16, torch.float16) and uses_triton("low_rank", x, self.form)
        )

    def channels(self, x: Tensor, key: nn.Module, value: nn.Module) -> Tensor:
        """value(max(key(x), 0)²); modules that were replaced, wrapped or given hooks are called as they are."""
        if _is_plain(key) and _is_plain(value):
            return relu_square_products(x, key.weight, value.weight, backend=self.form)
        out: Tensor = value(relu_square(key(x), backend=self.form))
        return out

    def drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout) if self.dropout else x


def apart(x: Residual) -> tuple[Tensor, Tensor | None]:
    """x, and what is still to be added to it."""
    return x if isinstance(x, tuple) else (x, None)


def _third(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: function(*inputs)[2]


def carry(x: Tensor, last: Tensor, call: Call) -> Tensor:
    """The vector that the next call's token shift needs, [B, C]: each row's last valid one."""
    if call.lengths is None:
        return x[:, -1]
    index = (call.lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
    return torch.where((call.lengths > 0)[:, None], x.gather(1, index).squeeze(1), last.to(x.dtype))


class Mix(nn.Module):
    """Half a block of versions 4 to 6. It is called with its normed input blended with the position before, by each of
    `mixes`; present: they are the share of the input itself."""

    present = True

    def mixes(self) -> list[Tensor]:
        raise NotImplementedError


class Block(nn.Module):
    """x + TimeMix(ln1(x)), then x + ChannelMix(ln2(x)). Versions 4 to 6; `v_first` passes through unused."""

    ln0: nn.LayerNorm

    def __init__(self, config: Config, layer: int, att: Mix, ffn: Mix):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.att = att
        self.ffn = ffn

    def forward(
        self, x: Residual, v_first: Tensor | None, state: dict[str, Tensor], call: Call
    ) -> tuple[Residual, Tensor | None, dict[str, Tensor]]:
        x, delta = apart(x)
        att, ffn, shift = self.att, self.ffn, state["att_shift"]
        x, att_shift, mixed, last = call.enter(x, delta, self.ln1, shift, att.mixes(), present=att.present)
        delta, after = att(mixed, last, state, call)
        shift = state["ffn_shift"]
        x, ffn_shift, mixed, _ = call.enter(x, delta, self.ln2, shift, ffn.mixes(), present=ffn.present)
        return call.leave(x, ffn(mixed, call)), v_first, {**after, "att_shift": att_shift, "ffn_shift": ffn_shift}


class RWKV(nn.Module):
    """Embedding, ln0, blocks, ln_out, head; the parameters bear the official checkpoint's names.

    `forward(tokens, state)` is one function for training, prefill and decoding: any T, any split of T, same result.
    """

    config: Any
    blocks: nn.ModuleList
    engine = "torch"

    def __init__(self, config: Any, blocks: list[nn.Module]):
        super().__init__()
        self.config = config
        # given weights, because nn.Embedding's own initialisation takes a second to import torch's compiler on "meta"
        self.emb = nn.Embedding(config.vocab_size, config.n_embd, _weight=torch.empty(config.vocab_size, config.n_embd))
        self.blocks = nn.ModuleList(blocks)
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.activation_checkpointing = False  # recompute each block in the backward pass instead of keeping it
        self.recompute: bool | None = None  # the elementwise work alone is recomputed; None: on a GPU
        self.spare = Spare()  # of that work's results, those which are kept all the same
        self.dropout = 0.0  # in training mode: after the embedding and on the residual after each half block
        self._fingerprint: str | None = None

    @property
    def device(self) -> torch.device:
        return self.emb.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.emb.weight.dtype

    @property
    def fingerprint(self) -> str:
        """A short hash of shapes and sampled values, the same in every lossless format; states are bound to it."""
        return self._fingerprint or fingerprint(self.config.version, self.state_dict())

    @fingerprint.setter
    def fingerprint(self, value: str | None) -> None:
        self._fingerprint = value

    def state_shapes(self, batch: int) -> Shapes:
        """Name → shape of each state tensor; RWKV-5 to 7. RWKV-4 overrides it."""
        c = self.config
        heads = c.n_embd // c.head_size
        return {
            "att_shift": (c.n_layer, batch, c.n_embd),
            "wkv": (c.n_layer, batch, heads, c.head_size, c.head_size),
            "ffn_shift": (c.n_layer, batch, c.n_embd),
        }

    def zero_state(self, batch: int = 1) -> State:
        """The state before any token: zeros, or the tuned initial state when the checkpoint carries `time_state`."""
        tensors = {}
        for name, shape in self.state_shapes(batch).items():
            dtype = self.dtype if name.endswith("shift") or self.dtype == torch.float64 else torch.float32
            tensors[name] = torch.zeros(shape, dtype=dtype, device=self.device)
        if getattr(self.config, "time_state", False):
            tuned = torch.stack([upcast(block.att.time_state) for block in self.blocks])  # type: ignore[union-attr,arg-type]
            tensors["wkv"] = tuned[:, None].expand(self.state_shapes(batch)["wkv"])
        return State(tensors)

    def check_state(self, state: State, source: str = "state") -> None:
        """Raise ValueError unless the state has this model's fields and shapes."""
        found = {name: tuple(x.shape) for name, x in state.items()}
        expected = self.state_shapes(*found.get("att_shift", ())[1:2] or (1,))
        if found != expected:
            raise ValueError(f"{source}: a state with {found}; this RWKV-{self.config.version} model needs {expected}")

    def load_state(self, path: str | Path) -> State:
        """`State.load(path, self)`."""
        return State.load(path, self)

    def forward(
        self,
        tokens: list[int] | Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        last_only: bool = False,
        backend: str | Operators = "auto",
    ) -> tuple[Tensor, State]:
        """Run T tokens on from `state` (None: from the start).

        tokens: list or LongTensor [T] → logits [T, V]; LongTensor [B, T] → [B, T, V].
        lengths [B]: row i has lengths[i] tokens and padding of any id after them; the returned state is the one after
        its own last token, and logits beyond it mean nothing.
        resets [B, T] or [T], bool: true at the first token of a document inside a row; it sees nothing before it, the
        given state included.
        last_only: logits of each row's last token alone, [V] or [B, V].
        backend: "auto", a name of `receptance.ops.BACKENDS`, or an object with the operators.
        The returned state always has a batch axis (B = 1 for [T]). Raises ValueError on an empty or out-of-range input.
        """
        x, state, single, lengths = self.hidden(tokens, state, lengths=lengths, resets=resets, backend=backend)
        if last_only:
            x = carry(x, x[:, 0], Call(lengths))
        logits = self.head(x)
        return (logits[0] if single else logits), state

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        token_weights: Tensor | None = None,
        total: Tensor | float | None = None,
        logit_penalty: float = 0.0,
        backend: str | Operators = "auto",
    ) -> tuple[Tensor, State]:
        """Mean cross entropy in nats of the targets, both [B, T], and the state; logits are made block by block.

        lengths, resets: as in `forward`. token_weights, total, logit_penalty: as in `receptance.ops.head_loss`. A head
        that was replaced, wrapped or given hooks is called as the module it is.
        """
        x, state, _, _ = self.hidden(tokens, state, lengths=lengths, resets=resets, backend=backend)
        if not _is_plain(self.head):
            return module_loss(
                x, self.head, targets, self.config.vocab_size, logit_penalty, token_weights=token_weights, total=total
            ), state
        loss = head_loss(
            x, self.head.weight, targets, logit_penalty,
            token_weights=token_weights, total=total, backend=form_of(backend),
        )  # fmt: skip
        return loss, state

    def hidden(
        self,
        tokens: list[int] | Tensor,
        state: State | None,
        *,
        lengths: Tensor | None,
        resets: Tensor | None,
        backend: str | Operators,
    ) -> tuple[Tensor, State, bool, Tensor | None]:
        """Everything below the head: ([B, T, C] after ln_out, state, whether tokens had no batch axis, lengths)."""
        tokens, single, lengths, resets = self._checked(tokens, lengths, resets)
        batch = len(tokens)
        if state is None:
            state = self.zero_state(batch)
        elif not isinstance(state, State):
            state = State(state).to(self.device)
        self.check_state(state)
        if state.batch != batch:
            raise ValueError(f"a state of {state.batch} rows for {batch} rows of tokens")

        x, state = self.sequence(self.emb(tokens), state, lengths=lengths, resets=resets, backend=backend)
        return x, state, single, lengths

    def sequence(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        backend: str | Operators = "auto",
        end_norms: bool = True,
    ) -> tuple[Tensor, State]:
        """ln0, the blocks and ln_out: vectors of anything [B, T, C] → [B, T, C], and the state.

        end_norms: False leaves out ln0 and ln_out, so that the size of the vectors is not lost.
        """
        state = self.zero_state(len(x)) if state is None else state
        call = replace(self._call(x, lengths, resets, backend), hands_on=self._hands_on())
        x = call.drop(self.blocks[0].ln0(x) if end_norms else x)  # type: ignore[operator]
        stream: Residual = x
        v_first: Tensor | None = None
        after = []
        for i, block in enumerate(self.blocks):
            stream, v_first, new = self._block(block, stream, v_first, state.layer(i), call)
            after.append(new)
        x, delta = apart(stream)
        if end_norms:
            _, x = call.add(x, delta, self.ln_out)
        elif delta is not None:
            x = call.drop(x + delta)
        return x, State({name: torch.stack([n[name] for n in after]) for name in state})

    def bidirectional(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        backend: str | Operators = "auto",
        end_norms: bool = True,
    ) -> Tensor:
        """`sequence` with every block run from both ends: each position sees the whole row, [B, T, C] → [B, T, C].

        A block reads the row and the row turned round, with the same weights, from empty states; the mean of the two is
        what it adds. A row turned round gives its result turned round. lengths [B]: padding at the end is not read.
        """
        batch, t, _ = x.shape
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=x.device)
            place = torch.arange(t, device=x.device)
            place = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)[..., None]  # [B, T, 1]
            both = torch.cat([lengths, lengths])
        else:
            place, both = None, None

        def turned(x: Tensor) -> Tensor:
            return x.flip(1) if place is None else x.gather(1, place.expand_as(x))

        state, call = self.zero_state(2 * batch), self._call(x, both, None, backend)
        x = call.drop(self.blocks[0].ln0(x) if end_norms else x)  # type: ignore[operator]
        v_first: Tensor | None = None
        for i, block in enumerate(self.blocks):
            made, v_first, _ = self._block(block, torch.cat([x, turned(x)]), v_first, state.layer(i), call)
            ahead, back = apart(made)[0].split(batch)
            x = (ahead + turned(back)) / 2
        return call.norm(x, self.ln_out) if end_norms else x

    def _call(
        self, x: Tensor, lengths: Tensor | None, resets: Tensor | None, backend: str | Operators = "auto"
    ) -> Call:
        return Call(lengths, backend, self.dropout if self.training else 0.0, resets, self._recompute(x.is_cuda))

    def _hands_on(self) -> bool:
        """Where whole blocks are made again the pair would be kept for each; hooks on blocks expect the sum."""
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return not self.activation_checkpointing and not any(
            block._forward_hooks or block._forward_pre_hooks for block in self.blocks
        )

    def _block(
        self, block: nn.Module, x: Residual, v_first: Tensor | None, state: dict[str, Tensor], call: Call
    ) -> tuple[Residual, Tensor | None, dict[str, Tensor]]:
        """One block, with what is kept for its backward pass as the model's settings have it."""
        found: tuple[Residual, Tensor | None, dict[str, Tensor]]
        if self.activation_checkpointing and torch.is_grad_enabled():
            found = checkpoint(block, x, v_first, state, call, use_reentrant=False, preserve_rng_state=call.dropout > 0)
        elif call.recompute is not None:
            with call.recompute:
                found = block(x, v_first, state, call)
        else:
            found = block(x, v_first, state, call)
        return found

    def _recompute(self, on_gpu: bool) -> Recompute | None:
        """None where nothing is kept for a backward pass, or others decide what is."""
        wanted = on_gpu if self.recompute is None else self.recompute
        decided = self.activation_checkpointing or torch.compiler.is_compiling()
        return Recompute(self.spare) if wanted and torch.is_grad_enabled() and not decided else None

    def _checked(
        self, tokens: list[int] | Tensor, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, bool, Tensor | None, Tensor | None]:
        """What `forward` was given, on the device: tokens [B, T], whether they had no batch axis, lengths, resets."""
        tokens = torch.as_tensor(tokens, dtype=torch.long, device=self.device)
        if tokens.dim() not in (1, 2) or tokens.numel() == 0:
            raise ValueError(f"tokens must be [T] or [B, T] with at least one token, got shape {tuple(tokens.shape)}")
        single = tokens.dim() == 1
        if single:
            tokens = tokens[None]
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=self.device)
        if not torch.compiler.is_compiling():  # whose graphs cannot depend on values
            self._check_values(tokens, lengths)
        if resets is not None:
            resets = self._checked_resets(resets, *tokens.shape)
        return tokens, single, lengths, resets

    def _check_values(self, tokens: Tensor, lengths: Tensor | None) -> None:
        batch, t = tokens.shape
        if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {self.config.vocab_size}), got {int(tokens.min())}..{int(tokens.max())}"
            )
        if lengths is not None and (lengths.shape != (batch,) or not bool(((lengths >= 0) & (lengths <= t)).all())):
            raise ValueError(f"lengths must be [{batch}] with values in [0, {t}], got {lengths.tolist()}")

    def _checked_resets(self, resets: Tensor, batch: int, t: int) -> Tensor:
        if resets.dim() == 1:
            resets = resets[None]
        if resets.dtype != torch.bool or resets.shape != (batch, t):
            raise ValueError(f"resets must be bool [{batch}, {t}], got {resets.dtype} {list(resets.shape)}")
        if getattr(self.config, "time_state", False):
            raise ValueError("a model with a tuned initial state cannot reset documents inside a row: give them rows")
        return resets.to(self.device)


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling it is a product with its weight and no more."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is nn.Linear and module.bias is None and not any(hooks)


def fingerprint(version: str, tensors: dict[str, Tensor]) -> str:
    """Sixteen bytes of SHA-256 over the version and, per tensor, its name, shape and first 256 values as float32.

    RWKV-7's unused first-layer value residual is left out: some formats have no place for it.
    """
    digest = hashlib.sha256(f"rwkv-{version}".encode())
    for name in sorted(tensors.keys() - {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}):
        x = tensors[name]
        digest.update(f"\n{name} {list(x.shape)} ".encode())
        digest.update(x.detach().reshape(-1)[:256].float().cpu().numpy().astype("<f4").tobytes())
    return digest.hexdigest()[:32]


# A recipe: the initial value, learning-rate multiplier and weight-decay membership of every tensor.


@dataclass(frozen=True)
class Rule:
    """One tensor's recipe.

    init: a tensor of values, ("uniform", bound), ("orthogonal", gain), ("normal", std) or ("zero",).
    lr multiplies the learning rate; lr_stage2 does in the reference's second Pile stage; decay: weight decay applies.
    """

    init: Tensor | tuple[str, float]
    lr: float = 1.0
    lr_stage2: float = 1.0
    decay: bool = False


Recipe = dict[str, Rule]

ZERO = ("zero", 0.0)


def tall_gain(rows: int, cols: int) -> float:
    """Orthogonal gain of the reference: a tall matrix [rows, cols] grows by the root of its aspect."""
    return math.sqrt(rows / cols) if rows > cols else 1.0


def ramp(n: int) -> Tensor:
    """0, 1/n, …, (n-1)/n in float64."""
    return torch.arange(n, dtype=torch.float64) / n


def frame_recipe(config: Config, emb: float, head: float) -> Recipe:
    """emb, head, ln0 and ln_out."""
    one, zero = torch.ones(config.n_embd), torch.zeros(config.n_embd)
    return {
        "emb.weight": Rule(("uniform", emb), decay=True),
        "head.weight": Rule(("orthogonal", head), decay=True),
        "blocks.0.ln0.weight": Rule(one),
        "blocks.0.ln0.bias": Rule(zero),
        "ln_out.weight": Rule(one),
        "ln_out.bias": Rule(zero),
    }


def norm_recipe(config: Config, layer: int, heads_norm: bool) -> Recipe:
    """ln1, ln2 and (versions 5 to 7) att.ln_x of one block, without the block's prefix."""
    one, zero = torch.ones(config.n_embd), torch.zeros(config.n_embd)
    rules = {"ln1.weight": Rule(one), "ln1.bias": Rule(zero), "ln2.weight": Rule(one), "ln2.bias": Rule(zero)}
    if heads_norm:
        rules["att.ln_x.weight"] = Rule(one * ((1 + layer) / config.n_layer) ** 0.7)
        rules["att.ln_x.bias"] = Rule(zero)
    return rules


def depth(config: Config, layer: int) -> tuple[float, float]:
    """(ρ, θ): ρ runs 0 → 1 over the layers, θ from 1 down to 1/L. A one-layer model counts as its first layer."""
    return layer / max(config.n_layer - 1, 1), 1 - layer / config.n_layer


@torch.no_grad()
def apply_recipe(module: nn.Module, recipe: Recipe, generator: torch.Generator | None = None) -> None:
    """Set every parameter of `module` to its rule's initial value. Raises KeyError for a parameter without a rule."""
    for name, parameter in module.named_parameters():
        init = recipe[name].init
        if isinstance(init, Tensor):
            value = init.reshape(parameter.shape)
        elif init[0] == "zero":
            value = torch.zeros(parameter.shape)
        elif init[0] == "normal":
            value = torch.empty(parameter.shape).normal_(0, init[1], generator=generator)
        elif init[0] == "uniform":
            value = torch.empty(parameter.shape).uniform_(-init[1], init[1], generator=generator)
        else:
            value = nn.init.orthogonal_(torch.empty(parameter.shape), init[1], generator=generator)
        parameter.copy_(value)
