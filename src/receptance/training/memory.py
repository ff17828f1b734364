"""How much memory a run will need, told before it starts: exact for weights and optimiser, measured for activations."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from receptance.training.loss import language_model_loss
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
    rows, layers = run.config.run.batch_size // run.config.run.accumulate, len(run.model.blocks)
    body, loss = _kept(run, rows)
    working = body // layers
    if run.model.activation_checkpointing:
        run.model.activation_checkpointing = False
        working = 4 * _kept(run, rows)[0] // layers // 3  # one block recomputed, and its gradients
        run.model.activation_checkpointing = True
    logits = rows * run.config.run.ctx_len * run.model.head.weight.shape[0] * 4
    return MemoryPlan(
        weights=sum(weights.values()),
        gradients=sum(p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad),
        optimizer=sum(x.numel() * x.element_size() for x in state),
        activations=body,
        logits=loss + logits,  # their gradient is as large as they are
        working=working,
        free=free_memory(run.device),
    )


def _kept(run: "Run", rows: int) -> tuple[int, int]:
    """Bytes that a forward pass over so many rows keeps for the backward pass: below the loss, and by the loss."""
    one = _measure(run, 1)
    two = _measure(run, 2) if rows > 1 else one
    body, loss = (a + (rows - 1) * (b - a) for a, b in zip(one, two))
    return body, loss


def _measure(run: "Run", rows: int) -> tuple[int, int]:
    own = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    seen: dict[int, tuple[int, Tensor]] = {}  # the tensor is held, so that no other takes its address

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), x
        return x

    tokens = torch.zeros(rows, run.config.run.ctx_len, dtype=torch.long, device=run.device)
    with saved_tensors_hooks(pack, lambda x: x):
        with run.autocast():
            logits, _ = run.model.forward(tokens)
        body = sum(size for size, _ in seen.values())
        _loss = language_model_loss(logits.float(), tokens, run.config.optim.logit_penalty)
    return body, sum(size for size, _ in seen.values()) - body


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**29 else f"{n_bytes / 2**20:.1f} MiB"
