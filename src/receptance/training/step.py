"""One optimiser step: the host's part (schedule, batch) and the device's part, which CUDA replays as one graph."""

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from receptance.baselines import BASELINES
from receptance.errors import ConfigError
from receptance.training.batch import Batch
from receptance.training.distributed import local
from receptance.training.guard import judge
from receptance.training.master import MasterAdamW
from receptance.training.metrics import peak_memory
from receptance.training.optim import guard_statistics, set_learning_rate, set_weight_decay, update_average
from receptance.training.schedule import learning_rate, progress, weight_decay

if TYPE_CHECKING:
    from receptance.training.config import TrainConfig
    from receptance.training.loop import Run

SETTLED_STEPS = 2  # after which the optimiser's state has been there for a whole step
EAGER_STEPS = 3  # before the capture: kernels compile, libraries and the optimiser's state come into being


class Step:
    """Step after step of a run: `step(i)` takes step i and returns its outcome (see `compute`), left on the device.

    Launching some ten thousand kernels takes the CPU longer than a GPU needs to run those of a small model. As
    `run.cuda_graph` says, the device's part is therefore captured once, after EAGER_STEPS ordinary steps, and replayed.
    """

    def __init__(self, run: "Run", message: Callable[[str], None]):
        self._run, self._message = run, message
        self._graph = Graph(run) if wants_graph(run) else None
        self._calls = 0

    def __call__(self, step: int) -> Tensor:
        if self._calls == SETTLED_STEPS:
            spend_memory(self._run, self._message)
        self._calls += 1
        batch = prepare(self._run, step)
        if self._graph is not None:
            try:
                return self._graph(batch)
            except CaptureError as error:
                self._message(f"{error}; going on without a CUDA graph (run.cuda_graph = off silences this)")
                self._graph = None
        return compute(self._run, batch)


def spend_memory(run: "Run", message: Callable[[str], None]) -> None:
    """Let the passes keep results in what the steps so far have left of `run.memory`."""
    allowed, peak = int(run.config.run.memory * 1e9), peak_memory(run.device)
    if not allowed or run.config.model.version in BASELINES:  # which keep everything
        return
    run.model.spare.limit = max(0, allowed - peak)
    if peak >= allowed:
        message(f"a step takes {peak / 1e9:.1f} GB, as much as run.memory allows or more; nothing is kept beyond that")
    else:
        message(f"a step takes {peak / 1e9:.1f} GB; {(allowed - peak) / 1e9:.1f} GB more may hold what it makes again")


def rate(config: "TrainConfig", step: int) -> float:
    """The learning rate of a step, before the recipe's factors."""
    o = config.optim
    return learning_rate(step, config.steps, lr=o.lr, lr_final=o.lr_final, warmup_steps=o.warmup_steps, kind=o.schedule,
                         decay_fraction=o.decay_fraction, decay_shape=o.decay_shape)  # fmt: skip


def prepare(run: "Run", step: int) -> Batch:
    """The host's part: random seed, learning rates, and this process's part of the batch, on the device."""
    optim = run.config.optim
    # dropout depends on the step and the process alone: resumed runs repeat it
    torch.manual_seed(run.config.run.seed * 1_000_003 + step + 15_485_863 * run.parallel.rank)
    set_learning_rate(run.optimizer, rate(run.config, step))
    if optim.weight_decay_final is not None:
        done = progress(step, run.config.steps, optim.warmup_steps, "exponential")
        set_weight_decay(run.optimizer, weight_decay(done, optim.weight_decay, optim.weight_decay_final))
    return run.parallel.share(run.batch(step))


def compute(run: "Run", batch: Batch) -> Tensor:
    """The device's part: gradients, clipping, the guard's decision, update. Returns the outcome that `verdict` reads.

    Nothing in here may ask for a value on the device or depend on one in Python, or a CUDA graph could not hold it.
    """
    optim, optimizer = run.config.optim, run.optimizer
    loss = accumulate(run, batch)
    norm = clip(run)
    statistics = guard_statistics(optimizer)
    bad = judge(statistics, loss, norm, optim)
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # the update is skipped where this is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # in a graph, the gradients' memory goes back to its pool
    if optim.ema:
        update_average(optimizer, optim.ema)
    return torch.stack([loss, norm, *statistics[-2:]])


def clip(run: "Run") -> Tensor:
    """Bound the gradients' norm; returns the one they had."""
    if isinstance(run.optimizer, MasterAdamW):
        return run.optimizer.collect(run.parallel.average)  # it clips as it updates
    params = [p for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])  # type: ignore[misc]
    if run.config.optim.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(params, run.config.optim.grad_clip, norm)
    return local(norm)


def accumulate(run: "Run", batch: Batch) -> Tensor:
    """Add up the gradients of the batch's parts; returns the batch's mean loss."""
    parts = run.config.run.accumulate
    total = torch.zeros((), device=run.device)
    for i, part in enumerate(batch.rows(parts), 1):
        total += run.passes.backward(part, last=i == parts)
    return run.parallel.mean(total)


def wants_graph(run: "Run") -> bool:
    """Whether to capture the step. Raises ConfigError when that is asked for where it cannot be."""
    wish = run.config.run.cuda_graph
    if wish == "on" and run.device.type != "cuda":
        raise ConfigError(f"run.cuda_graph = 'on' needs a CUDA device, the run is on {run.device}; use 'auto'")
    fixed_decay = run.config.optim.weight_decay_final is None  # the graph would keep that of the captured step
    if wish == "on" and not fixed_decay:
        raise ConfigError("run.cuda_graph = 'on' cannot follow optim.weight_decay_final; use 'auto'")
    if wish == "auto":
        plain = run.parallel.size == 1 and not run.config.run.segment_len  # segments save the generator's state
        return run.device.type == "cuda" and not run.config.optim.dropout and fixed_decay and plain
    return wish == "on"


class CaptureError(RuntimeError):
    """The step could not be captured; nothing has been changed by the attempt."""


class Graph:
    """`compute` as a CUDA graph. The first EAGER_STEPS calls run it as it is, the next one captures it.

    Protocol: "Whole-network capture" in PyTorch's notes on CUDA semantics. The eager calls run on the stream that is
    captured later, because autograd remembers streams. A batch of another shape than the captured one runs as it is.
    """

    def __init__(self, run: "Run"):
        self._run = run
        self._calls = 0
        self._stream = torch.cuda.Stream(run.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._outcome = torch.empty(0, device=run.device)

    def __call__(self, batch: Batch) -> Tensor:
        self._calls += 1
        if self._calls <= EAGER_STEPS:
            return self._eager(batch)
        if self._graph is None:
            self._capture(batch)
        if self._graph is None or self._batch is None or not batch.is_like(self._batch):
            return self._eager(batch)
        batch.into(self._batch)
        self._graph.replay()
        return self._outcome.clone()  # the next replay overwrites it

    def _eager(self, batch: Batch) -> Tensor:
        current = torch.cuda.current_stream(self._run.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outcome = compute(self._run, batch)
        current.wait_stream(self._stream)
        return outcome

    def _capture(self, batch: Batch) -> None:
        """Record the kernels of one step without running them. Raises CaptureError."""
        self._batch = batch.clone()
        gc.collect()  # an old autograd graph would bring the stream that it was made on into the capture
        graph = torch.cuda.CUDAGraph()
        self._set_capturable(True)
        try:
            # The outer context puts the stream back where a failed capture does not. thread_local: other threads may
            # copy and allocate meanwhile, as saving a checkpoint does.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._run.device)),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                self._outcome = compute(self._run, self._batch)
        except RuntimeError as error:
            self._set_capturable(False)
            self._run.optimizer.zero_grad(set_to_none=True)  # those of the attempt hold nothing
            raise CaptureError(f"the training step cannot be captured: {_cause(error)}") from error
        self._graph = graph

    def _set_capturable(self, value: bool) -> None:
        for group in self._run.optimizer.param_groups:
            group["capturable"] = value


def _cause(error: BaseException) -> str:
    """The first line of the first error: what follows it only says that the capture has failed."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [repr(error)])[0]
