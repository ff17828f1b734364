"""The WKV operators: pure functions on tensors that know no model.

    wkv4(w, k, v, u, state)           RWKV-4: [B, T, C]
    wkv6(r, w, k, v, u, state)        RWKV-5 and 6: [B, T, H, N]
    wkv7(r, w, k, v, a, b, state)     RWKV-7: [B, T, H, N]

`w` is always the log-decay (≤ 0). States are explicit, go in and come out, and carry gradients both ways. Arithmetic is
float64 when an input is float64 and float32 otherwise; y comes back in v's dtype, the state in the arithmetic's.

resets [B, T] (bool) is true at the first token of each document: for it and what follows in the row, everything before
it is forgotten, the start state too.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from receptance.ops.pieces import CUDA, PIECES, uses_cuda, uses_triton
from receptance.ops.wkv4 import chunk as chunk4
from receptance.ops.wkv4 import naive as naive4
from receptance.ops.wkv4.naive import EMPTY, State4
from receptance.ops.wkv6 import chunk as chunk6
from receptance.ops.wkv6 import naive as naive6
from receptance.ops.wkv7 import chunk as chunk7
from receptance.ops.wkv7 import naive as naive7

__all__ = [
    "BACKENDS",
    "EMPTY",
    "GPU_BACKENDS",
    "Operators",
    "State4",
    "choose_backend",
    "form_of",
    "wkv4",
    "wkv6",
    "wkv7",
]

# Back ends that run on any device: operator → name → function.
BACKENDS: dict[str, dict[str, Callable[..., Any]]] = {
    "wkv4": {"naive": naive4.wkv4, "chunk": chunk4.wkv4},
    "wkv6": {"naive": naive6.wkv6, "chunk": chunk6.wkv6},
    "wkv7": {"naive": naive7.wkv7, "chunk": chunk7.wkv7},
}

# Back ends that need a GPU: operator → name → module of the function, imported on first use.
GPU_BACKENDS: dict[str, dict[str, str]] = {
    op: {**({"cuda": CUDA[op]} if op in CUDA else {}), "triton": PIECES[op]} for op in BACKENDS
}
WIDEST_HEAD = 128  # of the GPU forms


class Operators(Protocol):
    """A back end made elsewhere: the operators with the contracts of their naive forms, given inputs as they come.

    form: the named back end that they build on, which the fused pieces around them choose by.
    """

    form: str

    def wkv4(
        self,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        u: Tensor,
        state: State4,
        lengths: Tensor | None,
        *,
        resets: Tensor | None,
    ) -> tuple[Tensor, State4]: ...
    def wkv6(
        self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, *, resets: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...
    def wkv7(
        self,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor,
        *,
        resets: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...


def form_of(backend: str | Operators) -> str:
    return backend if isinstance(backend, str) else backend.form


def choose_backend(op: str, backend: str, x: Tensor) -> str:
    """The back end that `backend` ("auto" or a name of the tables) means for inputs like x [B, T, ...]."""
    if backend == "auto":
        if x.shape[1] == 1:
            return "naive"
        fits = x.dim() == 3 or x.shape[-1] <= WIDEST_HEAD
        if fits and uses_cuda(op, x):
            return "cuda"
        if op == "wkv7" and x.dtype == torch.float32:  # its kernels spill in this precision
            fits = False
        return "triton" if fits and uses_triton(op, x) else "chunk"
    known = {**BACKENDS[op], **GPU_BACKENDS[op]}
    if backend not in known:
        raise ValueError(f"{op} has no back end {backend!r}; it has {sorted(known)} and 'auto'")
    return backend


def _run(
    op: str, backend: str | Operators, inputs: tuple[Tensor, ...], *rest: Any, resets: Tensor | None
) -> tuple[Tensor, Any]:
    """Call the back end: in float64 or float32, but a GPU kernel takes half-precision inputs as they are."""
    if not isinstance(backend, str):
        with torch.autocast(inputs[0].device.type, enabled=False):
            return getattr(backend, op)(*inputs, *rest, resets=resets)  # type: ignore[no-any-return]
    name = choose_backend(op, backend, inputs[2])  # wkv4's v, the others' k
    if name in GPU_BACKENDS[op]:
        function = getattr(import_module(GPU_BACKENDS[op][name]), op)
    else:
        function = BACKENDS[op][name]
        dtype = _compute_dtype(*inputs)
        inputs = tuple(x.to(dtype) for x in inputs)
    with torch.autocast(inputs[0].device.type, enabled=False):  # it would run the inner products in bfloat16
        return function(*inputs, *rest, resets=resets)  # type: ignore[no-any-return]


def _compute_dtype(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def wkv4(
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: State4 | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str | Operators = "auto",
) -> tuple[Tensor, State4]:
    """RWKV-4's exponentially weighted average (RWKV paper, eq. 16).

    w, u [C]; k, v [B, T, C]; state (num, den, exp), [B, C] each, true numerator = num·e^exp; None = empty.
    lengths [B]: rows are padded at the end; the state is the one after each row's own last token.
    Returns y [B, T, C] and the state. The exponent is a normaliser and carries no gradient.
    """
    dtype = _compute_dtype(w, k, v, u)
    if state is None:
        zero = k.new_zeros(k.shape[0], k.shape[2], dtype=dtype)
        state = zero, zero, torch.full_like(zero, EMPTY)
    num, den, exp = (x.to(dtype) for x in state)
    y, after = _run("wkv4", backend, (w, k, v, u), (num, den, exp), lengths, resets=_inside(resets, lengths))
    return y.to(v.dtype), after


def _inside(resets: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The resets before each row's padding."""
    if resets is None or lengths is None:
        return resets
    return resets & (torch.arange(resets.shape[1], device=resets.device) < lengths[:, None])


def _matrix_state(state: Tensor | None, k: Tensor, dtype: torch.dtype) -> Tensor:
    if state is None:
        return k.new_zeros(k.shape[0], *k.shape[2:], k.shape[3], dtype=dtype)
    return state.to(dtype)


def _padding(k: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(k.shape[1], device=k.device) >= lengths[:, None])[:, :, None, None]  # [B, T, 1, 1]


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str | Operators = "auto",
) -> tuple[Tensor, Tensor]:
    """Matrix-valued WKV of RWKV-5 and 6 (Eagle and Finch paper, section 4).

    r, k, v [B, T, H, N]; w [B, T, H, N], or [H, N] when the decay is constant (RWKV-5); u [H, N];
    state [B, H, N, N], value × key; None = zeros. Returns y [B, T, H, N] and the state.
    """
    dtype = _compute_dtype(r, w, k, v, u)
    w = w.expand_as(k)
    if lengths is not None:  # padding: decays nothing, writes nothing
        pad = _padding(k, lengths)
        w, k = w.masked_fill(pad, 0), k.masked_fill(pad, 0)
    y, state = _run("wkv6", backend, (r, w, k, v, u), _matrix_state(state, k, dtype), resets=_inside(resets, lengths))
    return y.to(v.dtype), state


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str | Operators = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised delta rule of RWKV-7 (Goose paper, eq. 17).

    r, w, k, v, a, b [B, T, H, N]; w log-decay; a = -kk, b = kk·iclr; state [B, H, N, N], value × key; None = zeros.
    Returns y [B, T, H, N] and the state.
    """
    dtype = _compute_dtype(r, w, k, v, a, b)
    if lengths is not None:  # padding: decays nothing, erases nothing, writes nothing
        pad = _padding(k, lengths)
        w, k, b = w.masked_fill(pad, 0), k.masked_fill(pad, 0), b.masked_fill(pad, 0)
    y, state = _run(
        "wkv7", backend, (r, w, k, v, a, b), _matrix_state(state, k, dtype), resets=_inside(resets, lengths)
    )
    return y.to(v.dtype), state
