"""Gradients through sequences longer than memory: segment by segment, states handed forward, their gradients back.

The recurrent state is all that a segment knows of the past and all that the future learns from it. So the exact
gradient of the whole sequence needs, at any time, the activations of one segment and the states at the borders: run
forward once without a graph and keep those states, then go through the segments from the last to the first, run each
again with a graph, and start its backward pass from its own loss and from the gradient that the next segment gave to
its start. The price is a second forward pass, as with activation checkpointing.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from receptance.models import State
from receptance.training.batch import Batch

Advance = Callable[[Batch, State | None], State]  # segment, start → end state; without the head
SegmentLoss = Callable[[Batch, State | None], tuple[Tensor, State]]  # segment, start → its part of the loss, end state


def _apart(last: bool) -> AbstractContextManager[object]:
    return nullcontext()


def exact_backward(
    advance: Advance,
    loss: SegmentLoss,
    batch: Batch,
    segment_len: int,
    *,
    state: State | None = None,
    keep_every: int = 1,
    offload: bool = False,
    around: Callable[[bool], AbstractContextManager[object]] = _apart,
) -> tuple[Tensor, State]:
    """Add the gradients of the sum of the segments' losses to the parameters; returns that sum and the end state.

    Equal to one backward pass through the whole, dropout included. `state`, the start, gets its gradient too if it asks
    for one. keep_every: keep the state at every n-th border and make the others again from it, at the price of a third
    forward pass; about √(number of segments) is the least memory. offload: keep the states in main memory.
    around(last): a context around each segment's forward and backward pass (to average gradients in the last alone).
    """
    pieces = batch.segments(segment_len)
    device = batch.tokens.device
    starts: dict[int, State | None] = {0: state}
    noise, now = [], state
    with torch.no_grad():
        for i, piece in enumerate(pieces[:-1]):
            noise.append(_random_state(device))
            now = advance(piece, now)
            if (i + 1) % keep_every == 0:
                starts[i + 1] = now.to("cpu") if offload else now
    noise.append(_random_state(device))

    total = torch.zeros((), device=device)
    end: State | None = None
    pull: dict[str, Tensor] = {}  # the gradient of the state after segment i
    for i in reversed(range(len(pieces))):
        if i not in starts:
            _fill(starts, i, keep_every, advance, pieces, noise, device)
        start = starts.pop(i)
        if i:
            assert start is not None
            start = _leaves(start.to(device))
        with around(i == 0):
            _set_random_state(noise[i], device)
            part, after = loss(pieces[i], start)
            names = [name for name in pull if after[name].requires_grad]
            torch.autograd.backward([part, *(after[name] for name in names)], [None, *(pull[name] for name in names)])
        if i and start is not None:
            pull = {name: x.grad for name, x in start.items() if x.grad is not None}
        total = total + part.detach()
        end = end or after.detach()
    assert end is not None
    return total, end


def truncated_backward(
    loss: SegmentLoss,
    batch: Batch,
    segment_len: int,
    *,
    state: State | None = None,
    around: Callable[[bool], AbstractContextManager[object]] = _apart,
) -> tuple[Tensor, State]:
    """As `exact_backward`, but no gradient crosses a border: the past is read, and not taught. One forward pass."""
    total = torch.zeros((), device=batch.tokens.device)
    pieces = batch.segments(segment_len)
    for i, piece in enumerate(pieces, 1):
        with around(i == len(pieces)):
            part, after = loss(piece, state)
            part.backward()  # type: ignore[no-untyped-call]
        state = after.detach()
        total = total + part.detach()
    assert state is not None
    return total, state


def spacing(kind: str, n_segments: int) -> int:
    """The `keep_every` of run.segment_states: all borders ("device", "cpu"), or about √n of them ("sqrt")."""
    return max(1, math.isqrt(n_segments)) if kind == "sqrt" else 1


@torch.no_grad()
def _fill(
    starts: dict[int, State | None],
    i: int,
    keep_every: int,
    advance: Advance,
    pieces: list[Batch],
    noise: list[list[Tensor]],
    device: torch.device,
) -> None:
    """The states at the borders from the last kept one up to border i."""
    first = i - i % keep_every
    now = starts[first]
    now = now.to(device) if now is not None else None
    for j in range(first, i):
        _set_random_state(noise[j], device)
        now = advance(pieces[j], now)
        starts[j + 1] = now


def _leaves(state: State) -> State:
    """The state as inputs of a new graph. RWKV-4's exponent is a normaliser and has no gradient."""
    return State({name: x.detach().requires_grad_(name != "exp") for name, x in state.items()})


def _random_state(device: torch.device) -> list[Tensor]:
    """What dropout draws from, so that a segment drops the same elements when it runs again."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
