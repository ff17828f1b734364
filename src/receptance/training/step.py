"""One optimiser step: the host's part (schedule, batch) and the device's part, which CUDA replays as one graph."""

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from receptance.errors import ConfigError
from receptance.training.guard import judge
from receptance.training.optim import guard_statistics, set_learning_rate, set_weight_decay, update_average
from receptance.training.schedule import learning_rate, progress, weight_decay

if TYPE_CHECKING:
    from receptance.training.config import TrainConfig
    from receptance.training.loop import Run

EAGER_STEPS = 3  # before the capture: kernels compile, libraries and the optimiser's state come into being


class Step:
    """Step after step of a run: `step(i)` takes step i and returns its outcome (see `compute`), left on the device.

    Launching some ten thousand kernels takes the CPU longer than a GPU needs to run those of a small model. As
    `run.cuda_graph` says, the device's part is therefore captured once, after EAGER_STEPS ordinary steps, and replayed.
    """

    def __init__(self, run: "Run", message: Callable[[str], None]):
        self._run, self._message = run, message
        self._graph = Graph(run) if wants_graph(run) else None

    def __call__(self, step: int) -> Tensor:
        inputs, targets = prepare(self._run, step)
        if self._graph is not None:
            try:
                return self._graph(inputs, targets)
            except CaptureError as error:
                self._message(f"{error}; going on without a CUDA graph (run.cuda_graph = off silences this)")
                self._graph = None
        return compute(self._run, inputs, targets)


def rate(config: "TrainConfig", step: int) -> float:
    """The learning rate of a step, before the recipe's factors."""
    o = config.optim
    return learning_rate(step, config.steps, lr=o.lr, lr_final=o.lr_final, warmup_steps=o.warmup_steps, kind=o.schedule,
                         decay_fraction=o.decay_fraction, decay_shape=o.decay_shape)  # fmt: skip


def prepare(run: "Run", step: int) -> tuple[Tensor, Tensor]:
    """The host's part: random seed, learning rates, and the batch's inputs and targets, [B, T] each on the device."""
    optim = run.config.optim
    torch.manual_seed(
        run.config.run.seed * 1_000_003 + step
    )  # dropout depends on the step alone: resumed runs repeat it
    set_learning_rate(run.optimizer, rate(run.config, step))
    if optim.weight_decay_final is not None:
        done = progress(step, run.config.steps, optim.warmup_steps, "exponential")
        set_weight_decay(run.optimizer, weight_decay(done, optim.weight_decay, optim.weight_decay_final))
    return run.batch(step)


def compute(run: "Run", inputs: Tensor, targets: Tensor) -> Tensor:
    """The device's part: gradients, clipping, the guard's decision, update. Returns the outcome that `verdict` reads.

    Nothing in here may ask for a value on the device or depend on one in Python, or a CUDA graph could not hold it.
    """
    optim, optimizer = run.config.optim, run.optimizer
    loss = accumulate(run, inputs, targets)
    params = [p for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])  # type: ignore[misc]
    if optim.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(params, optim.grad_clip, norm)
    statistics = guard_statistics(optimizer)
    bad = judge(statistics, loss, norm, optim)
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # the update is skipped where this is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # in a graph, the gradients' memory goes back to its pool
    if optim.ema:
        update_average(optimizer, optim.ema)
    return torch.stack([loss, norm, *statistics[-2:]])


def accumulate(run: "Run", inputs: Tensor, targets: Tensor) -> Tensor:
    """Add up the gradients of the batch's parts; returns the batch's mean loss."""
    parts = run.config.run.accumulate
    total = torch.zeros((), device=run.device)
    for part, wanted in zip(inputs.chunk(parts), targets.chunk(parts)):
        with run.autocast():
            loss, _ = run.model.loss(part, wanted, logit_penalty=run.config.optim.logit_penalty)
        loss = loss / parts
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def wants_graph(run: "Run") -> bool:
    """Whether to capture the step. Raises ConfigError when that is asked for where it cannot be."""
    wish = run.config.run.cuda_graph
    if wish == "on" and run.device.type != "cuda":
        raise ConfigError(f"run.cuda_graph = 'on' needs a CUDA device, the run is on {run.device}; use 'auto'")
    fixed_decay = run.config.optim.weight_decay_final is None  # the graph would keep that of the captured step
    if wish == "on" and not fixed_decay:
        raise ConfigError("run.cuda_graph = 'on' cannot follow optim.weight_decay_final; use 'auto'")
    if wish == "auto":
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return run.device.type == "cuda" and not run.config.optim.dropout and fixed_decay and not distributed
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
        self._inputs, self._targets, self._outcome = (torch.empty(0, device=run.device) for _ in range(3))

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self._calls += 1
        if self._calls <= EAGER_STEPS:
            return self._eager(inputs, targets)
        if self._graph is None:
            self._capture(inputs, targets)
        if inputs.shape != self._inputs.shape or self._graph is None:
            return self._eager(inputs, targets)
        self._inputs.copy_(inputs, non_blocking=True)
        self._targets.copy_(targets, non_blocking=True)
        self._graph.replay()
        return self._outcome.clone()  # the next replay overwrites it

    def _eager(self, inputs: Tensor, targets: Tensor) -> Tensor:
        current = torch.cuda.current_stream(self._run.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outcome = compute(self._run, inputs, targets)
        current.wait_stream(self._stream)
        return outcome

    def _capture(self, inputs: Tensor, targets: Tensor) -> None:
        """Record the kernels of one step without running them. Raises CaptureError."""
        self._inputs, self._targets = inputs.clone(), targets.clone()
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
                self._outcome = compute(self._run, self._inputs, self._targets)
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
