"""The forward and backward pass of a training step: whole rows or segments, one process or many."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from receptance.models import RWKV, State
from receptance.ops import Operators
from receptance.training.config import TrainConfig
from receptance.training.distributed import Parallel
from receptance.training.segments import exact_backward, spacing, truncated_backward


class WithLoss(nn.Module):
    """A model and its loss as one module: what DistributedDataParallel wraps."""

    def __init__(self, model: RWKV, logit_penalty: float, backend: str | Operators):
        super().__init__()
        self.model = model
        self._logit_penalty, self._backend = logit_penalty, backend

    def forward(self, tokens: Tensor, targets: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self.model.loss(tokens, targets, state, logit_penalty=self._logit_penalty, backend=self._backend)


class Passes:
    """`backward(tokens, targets, …)` adds the gradients of a part of the batch to the parameters."""

    def __init__(
        self,
        config: TrainConfig,
        model: RWKV,
        parallel: Parallel,
        autocast: Callable[[], AbstractContextManager[object]],
    ):
        self._run, self._model, self._parallel, self._autocast = config.run, model, parallel, autocast
        self._module = parallel.replicate(WithLoss(model, config.optim.logit_penalty, parallel.operators), model)

    def backward(self, tokens: Tensor, targets: Tensor, share: float, last: bool) -> Tensor:
        """Gradients of `share` times the mean loss over this process's tokens [B, t]; returns that product.

        last: no other pass of this step follows, and processes average their gradients.
        """
        parallel, run = self._parallel, self._run
        share *= parallel.weight(tokens.shape[1])

        def loss(tokens: Tensor, targets: Tensor, state: State | None) -> tuple[Tensor, State]:
            with self._autocast():
                mean, after = self._module(tokens, targets, state)
            return mean * share, after

        def loss_and_state(tokens: Tensor, targets: Tensor, state: State | None) -> tuple[Tensor, State]:
            mean, after = loss(tokens, targets, state)
            return mean, parallel.handed_on(after)

        def advance(tokens: Tensor, state: State | None) -> State:
            with self._autocast():
                _, after, _, _ = self._model.hidden(
                    tokens, state, lengths=None, resets=None, backend=parallel.operators
                )
            return parallel.handed_on(after)

        def around(last_segment: bool) -> AbstractContextManager[object]:
            return parallel.averaging(self._module, last and last_segment)

        if not run.segment_len:
            with around(True):
                mean, _ = loss(tokens, targets, None)
                mean.backward()  # type: ignore[no-untyped-call]
            return mean.detach()
        length = run.segment_len // parallel.config.parallel.context
        if run.segment_gradients == "truncated":
            return truncated_backward(loss_and_state, tokens, targets, length, around=around)[0]
        n_segments = -(-tokens.shape[1] // length)
        return exact_backward(
            advance, loss_and_state, tokens, targets, length, around=around,
            keep_every=spacing(run.segment_states, n_segments), offload=run.segment_states == "cpu",
        )[0]  # fmt: skip
