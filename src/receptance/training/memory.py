"""How much memory a run will need, told before it starts: exact for weights and optimiser, measured for activations."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from receptance.ops.head_loss import BLOCK, head_loss
from receptance.training.master import MasterAdamW
from receptance.training.metrics import free_memory

if TYPE_CHECKING:
    from receptance.training.loop import Run


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. activations, logits: kept for the backward pass of one part of a step, below the loss and by it.

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
    """Forward passes over one row and two tell what a row keeps for the backward pass and what all rows share.

    What a graph's memory pool or the allocator's rounding add is not in it.
    """
    state = [x for entry in run.optimizer.state.values() for x in entry.values()]
    if isinstance(run.optimizer, MasterAdamW):
        state += run.optimizer.masters().values()
    model, rows = run.model, run.config.run.batch_size // run.config.run.accumulate
    body, loss = _kept(run, rows)
    was = model.activation_checkpointing, model.recompute
    model.activation_checkpointing, model.recompute = False, False
    everything, _ = _kept(run, rows)
    model.activation_checkpointing, model.recompute = was
    layer = everything // len(model.blocks)
    return MemoryPlan(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        gradients=sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        optimizer=sum(x.numel() * x.element_size() for x in state),
        activations=body,
        logits=loss + _block_of_logits(run, rows),
        working=layer if body >= everything else 4 * layer // 3,  # one block made again, and its gradients
        free=free_memory(run.device),
    )


def at_once(run: "Run") -> int:
    """Tokens of a row that one backward pass goes through."""
    config = run.config.run
    return min(config.segment_len or config.ctx_len, config.ctx_len)


def _block_of_logits(run: "Run", rows: int) -> int:
    """Logits and, but for a GPU's fused kernel, their gradient, of the positions that `head_loss` takes together."""
    n_vocab = run.model.head.weight.shape[0]
    elements = min(rows * at_once(run) * n_vocab, BLOCK.get(run.device.type, BLOCK["cpu"]))
    size = 2 if run.precision == "bfloat16" else 4
    return elements * (size if run.device.type == "cuda" else size + 4)


def _kept(run: "Run", rows: int) -> tuple[int, int]:
    """Bytes that a forward pass over so many rows keeps for the backward pass: below the loss, and by the loss."""
    one = _measure(run, 1)
    two = _measure(run, 2) if rows > 1 else one
    body, loss = (a + (rows - 1) * (b - a) for a, b in zip(one, two))
    return body, loss


def _measure(run: "Run", rows: int) -> tuple[int, int]:
    """By the allocator on a GPU; elsewhere by the saved tensors' storages, each once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    seen: dict[int, tuple[int, Tensor]] = {}  # the tensor is held, so that no other takes its address

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), x.detach()
        return x.detach()  # with its history, x would hold the graph that holds it

    def taken() -> int:
        if run.device.type == "cuda":
            return int(torch.cuda.memory_allocated(run.device))
        return sum(size for size, _ in seen.values())

    tokens = torch.zeros(rows, at_once(run), dtype=torch.long, device=run.device)
    before = taken()
    # hooks hold what they are shown, which on a GPU would be counted too
    hooks = nullcontext() if run.device.type == "cuda" else saved_tensors_hooks(pack, lambda x: x)
    with hooks, run.autocast():
        x, _, _, _ = run.model.hidden(tokens, None, lengths=None, resets=None, backend="auto")
        body = taken() - before
        _loss = head_loss(x, run.model.head.weight, tokens, run.config.optim.logit_penalty)
        return body, taken() - before - body


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**29 else f"{n_bytes / 2**20:.1f} MiB"
