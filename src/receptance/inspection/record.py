"""One reading of a text, with everything that the other files of this room ask for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from receptance.models import RWKV
from receptance.models.v4 import PreBlock
from receptance.ops import BACKENDS, State4
from receptance.ops.pieces import upcast


@dataclass
class Layer:
    """What one block did with T tokens of one text, without a batch axis.

    inputs: the WKV operator's, by its letters, [T, H, N] (RWKV-4: [T, A], and w, u of [A]). w is the log-decay.
    read: what the operator gave, [T, H, N] or [T, A]. gate [T, A] multiplies it (after its norm); None: there is none.
    att, ffn [T, C]: what the halves added to the residual stream. out [T, C]: the stream after the block.
    start: the operator's state before the text. A layer of RWKV-4 without a time mix has no inputs.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    read: Tensor | None = None
    gate: Tensor | None = None
    start: Any = None
    att: Tensor = field(default_factory=lambda: torch.empty(0))
    ffn: Tensor = field(default_factory=lambda: torch.empty(0))
    out: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def matrix(self) -> bool:
        """Whether the state is a matrix a head (RWKV-5 to 7)."""
        return "r" in self.inputs


@dataclass
class Recording:
    """tokens [T]; embedded [T, C]: the stream before the first block; logits [T, V]."""

    model: RWKV
    tokens: Tensor
    embedded: Tensor
    layers: list[Layer]
    logits: Tensor


class Recorder:
    """The plain operators, which keep what they are given: layer after layer, in the order of the calls."""

    form = "naive"

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, Tensor], Tensor, Any]] = []

    def _keep(self, op: str, names: str, inputs: tuple[Tensor, ...], *rest: Any, **options: Any) -> tuple[Tensor, Any]:
        y, state = BACKENDS[op]["chunk"](*(upcast(x) for x in inputs), *rest, **options)
        self.calls.append((dict(zip(names, inputs)), y, rest[0]))
        return y, state

    def wkv4(
        self, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: State4, lengths: Tensor | None, **options: Any
    ) -> tuple[Tensor, Any]:
        return self._keep("wkv4", "wkvu", (w, k, v, u), state, lengths, **options)

    def wkv6(
        self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, **options: Any
    ) -> tuple[Tensor, Any]:
        return self._keep("wkv6", "rwkvu", (r, w, k, v, u), state, **options)

    def wkv7(
        self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, **options: Any
    ) -> tuple[Tensor, Any]:
        return self._keep("wkv7", "rwkvab", (r, w, k, v, a, b), state, **options)


@torch.no_grad()
def record(model: RWKV, tokens: list[int] | Tensor) -> Recording:
    """Read tokens [T] from the start and keep what happened; in float32 or float64, as numbers are taken apart."""
    tokens = torch.as_tensor(tokens, device=model.device)
    if tokens.dim() != 1 or not len(tokens):
        raise ValueError(f"tokens must be [T] with at least one token, got shape {tuple(tokens.shape)}")
    layers = [Layer() for _ in model.blocks]
    hooks: list[Any] = []

    def on(module: nn.Module, take: Callable[[Any, Any], None]) -> None:
        hooks.append(module.register_forward_hook(lambda _, given, out: take(given, out)))

    for layer, block in zip(layers, model.blocks):
        _watch(layer, block, on)
    recorder = Recorder()
    was = model.training
    try:
        logits, _ = model.eval().forward(tokens, backend=cast(Any, recorder))
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()
    calls = iter(recorder.calls)
    for layer, block in zip(layers, model.blocks):
        if not isinstance(block, PreBlock):
            inputs, read, start = next(calls)
            shared = {"u", "w"} if "r" not in inputs else {"u"}  # without a batch axis
            layer.inputs = {name: upcast(x if name in shared else x[0]) for name, x in inputs.items()}
            layer.read, layer.start = read[0], tuple(x[0] for x in start) if isinstance(start, tuple) else start[0]
    embedded = model.blocks[0].ln0(model.emb(tokens))  # type: ignore[operator]
    return Recording(model, tokens, embedded, layers, logits)


def _watch(layer: Layer, block: nn.Module, on: Callable[[nn.Module, Callable[[Any, Any], None]], None]) -> None:
    def att(_: Any, out: Any) -> None:
        layer.att = (out[0] if isinstance(out, tuple) else out)[0]  # a channel mix gives no state

    def ffn(_: Any, out: Any) -> None:
        layer.ffn = out[0]

    def whole(_: Any, out: Any) -> None:
        layer.out = out[0][0]

    on(block, whole)
    on(cast(nn.Module, block.ffn), ffn)
    if isinstance(block, PreBlock):
        on(block.ffnPre, att)
        return
    mix = cast(Any, block.att)
    on(mix, att)
    if hasattr(mix, "g1"):  # RWKV-7

        def low_rank(given: Any, _: Any) -> None:
            xg = given[0][5]
            layer.gate = (torch.sigmoid(xg @ mix.g1) @ mix.g2)[0]

        on(mix, low_rank)
    elif hasattr(mix, "gate"):  # RWKV-5.1 to 6

        def silu(_: Any, out: Tensor) -> None:
            layer.gate = nn.functional.silu(out[0])

        on(mix.gate, silu)
    elif not hasattr(mix, "ln_x"):  # RWKV-4

        def sigmoid(_: Any, out: Tensor) -> None:
            layer.gate = torch.sigmoid(out[0])

        on(mix.receptance, sigmoid)
