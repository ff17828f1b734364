"""The forward and backward pass of a training step: whole rows or segments, one process or many."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from receptance.models import RWKV, State
from receptance.ops import Operators
from receptance.training.batch import Batch
from receptance.training.config import TrainConfig
from receptance.training.distributed import Parallel
from receptance.training.segments import exact_backward, spacing, truncated_backward


class WithLoss(nn.Module):
    """A model and its loss as one module: what DistributedDataParallel wraps."""

    def __init__(self, model: RWKV, logit_penalty: float, backend: str | Operators):
        super().__init__()
        self.model = model
        self._logit_penalty, self._backend = logit_penalty, backend

    def forward(self, batch: Batch, state: State | None = None) -> tuple[Tensor, State]:
        """The batch's part of the step's loss."""
        return self.model.loss(
            batch.tokens, batch.targets, state, resets=batch.resets, token_weights=batch.counted,
            total=batch.n_targets, logit_penalty=self._logit_penalty, backend=self._backend,
        )  # fmt: skip


class Passes:
    """`backward(batch, …)` adds the gradients of a part of the step to the parameters."""

    def __init__(
        self,
        config: TrainConfig,
        model: RWKV,
        parallel: Parallel,
        autocast: Callable[[], AbstractContextManager[object]],
    ):
        self._run, self._model, self._parallel, self._autocast = config.run, model, parallel, autocast
        self._module = parallel.replicate(WithLoss(model, config.optim.logit_penalty, parallel.operators), model)

    def backward(self, batch: Batch, last: bool) -> Tensor:
        """Gradients of this part of the step's loss, times the number of processes; returns what they are of.

        last: no other pass of this step follows, and processes average their gradients.
        """
        parallel, run = self._parallel, self._run

        def loss(batch: Batch, state: State | None) -> tuple[Tensor, State]:
            with self._autocast():
                part, after = self._module(batch, state)
            return part * parallel.size, parallel.handed_on(after) if run.segment_len else after

        def advance(batch: Batch, state: State | None) -> State:
            with self._autocast():
                _, after, _, _ = self._model.hidden(
                    batch.tokens, state, lengths=None, resets=batch.resets, backend=parallel.operators
                )
            return parallel.handed_on(after)

        def around(last_segment: bool) -> AbstractContextManager[object]:
            return parallel.averaging(self._module, last and last_segment)

        if not run.segment_len:
            with around(True):
                part, _ = loss(batch, None)
                part.backward()  # type: ignore[no-untyped-call]
            return part.detach()
        length = run.segment_len // parallel.config.parallel.context
        if run.segment_gradients == "truncated":
            return truncated_backward(loss, batch, length, around=around)[0]
        n_segments = -(-batch.tokens.shape[1] // length)
        return exact_backward(
            advance, loss, batch, length, around=around,
            keep_every=spacing(run.segment_states, n_segments), offload=run.segment_states == "cpu",
        )[0]  # fmt: skip
