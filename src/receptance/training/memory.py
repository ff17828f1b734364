"""How much memory a run will need, told before it starts: exact for weights and optimiser, measured for activations."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from receptance.ops.head_loss import BLOCK
from receptance.training.metrics import free_memory

if TYPE_CHECKING:
    from receptance.training.loop import Run


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. activations and logits: kept for the backward pass of one part of a step; logits with their gradient.

    working: what the backward pass of one layer needs beside what was kept; as much as the layer kept is never too
    little. free: what the device has left for all that does not exist yet (None: unknown).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int
    free: int | None

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.working

    @property
    def fits(self) -> bool:
        to_come = self.total - self.weights - self.optimizer
        return self.free is None or to_come <= self.free

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "activations", "logits", "working")
        parts = " + ".join(f"{name} {_size(getattr(self, name))}" for name in names)
        return f"memory: about {_size(self.total)} = {parts}"


def plan_memory(run: "Run") -> MemoryPlan:
    """Two forward passes, over one row and two, tell what a row keeps for the backward pass and what all rows share.

    Saved tensors are counted by their storages, each once, parameters left out. What a graph's memory pool or the
    allocator's rounding add is not in it.
    """
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in run.model.parameters()}
    state = [x for entry in run.optimizer.state.values() for x in entry.values()]
    rows = run.config.run.batch_size // run.config.run.accumulate
    body = _for_rows([_saved(run, n, with_loss=False) for n in (1, 2)], rows)
    whole = _for_rows([_saved(run, n, with_loss=True) for n in (1, 2)], rows)
    logits = 4 * min(rows * run.config.run.ctx_len * run.model.head.weight.shape[0], BLOCK[run.device.type])
    layers = len(run.model.blocks)
    if run.model.activation_checkpointing:
        run.model.activation_checkpointing = False
        inside = _for_rows([_saved(run, n, with_loss=False) for n in (1, 2)], rows)
        run.model.activation_checkpointing = True
        working = 4 * inside // layers // 3  # one block recomputed, and its gradients
    else:
        working = body // layers
    return MemoryPlan(
        weights=sum(weights.values()),
        gradients=sum(p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad),
        optimizer=sum(x.numel() * x.element_size() for x in state),
        activations=body,
        logits=whole - body + logits,  # one block of them, whose gradient takes its place
        working=working,
        free=free_memory(run.device),
    )


def _saved(run: "Run", rows: int, with_loss: bool) -> int:
    """Bytes that a forward pass over some rows keeps for the backward pass."""
    own = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    seen: dict[int, tuple[int, Tensor]] = {}  # the tensor is held, so that no other takes its address

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), x.detach()
        return x.detach()  # with its history, x would hold the graph that holds it

    tokens = torch.zeros(rows, run.config.run.ctx_len, dtype=torch.long, device=run.device)
    with saved_tensors_hooks(pack, lambda x: x), run.autocast():
        if with_loss:
            run.model.loss(tokens, tokens, logit_penalty=run.config.optim.logit_penalty)
        else:
            run.model.hidden(tokens, None, lengths=None, resets=None, backend="auto")
    return sum(size for size, _ in seen.values())


def _for_rows(measured: list[int], rows: int) -> int:
    """From what one row and two rows keep."""
    one, two = measured
    return one + (rows - 1) * (two - one)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**29 else f"{n_bytes / 2**20:.1f} MiB"
