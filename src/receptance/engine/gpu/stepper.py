"""Steps of a batch without the host: a captured graph decodes and draws, and its tokens can be its next inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from receptance.engine.gpu.model import GpuModel, bucket
from receptance.engine.gpu.sampler import GpuSampler
from receptance.engine.table_sampler import ROW

UNIFORM: int = ROW.fields["uniform"][1] // 8  # type: ignore[index]


@dataclass(eq=False)
class Step:
    """The step of one bucket of rows: where its inputs lie on the host and on the device, its outputs, its graph."""

    host: Tensor  # uint8: entries of the sampler's table, then tokens, then slots
    inputs: Tensor
    drawn: Tensor  # int64 [rows]
    logits: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None
    sent: torch.cuda.Event | None = None  # after the copy of `host`, which may then be written again

    @staticmethod
    def of(rows: int, device: torch.device) -> "Step":
        host = torch.zeros(rows * (ROW.itemsize + 16), dtype=torch.uint8)
        if device.type == "cuda":
            host = host.pin_memory()
        return Step(host, host.to(device, copy=True), torch.zeros(rows, dtype=torch.int64, device=device))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of `host` or `inputs`: entries uint8, tokens int64 [rows], slots int32 [rows]."""
        rows = len(self.drawn)
        entries, tokens, slots, _ = x.split([rows * ROW.itemsize, rows * 8, rows * 4, rows * 4])
        return entries, tokens.view(torch.int64), slots.view(torch.int32)


class Stepper:
    """Gives each of some sequences a token and draws the next.

    The graph for each bucket of rows is captured at its first step (a fraction of a second; once on each GPU about a
    second more to choose its kernels, see `GpuModel.tune`); rows beyond the batch work on the pool's last row, and take
    the largest logit.
    """

    def __init__(self, model: GpuModel, sampler: GpuSampler):
        self.model, self.sampler = model, sampler
        self._steps: dict[int, Step] = {}
        self._last: tuple[Step, int] | None = None

    @torch.inference_mode()
    def step(
        self, slots: Sequence[int], tokens: Sequence[int], entries: NDArray[Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Feed tokens[i] to the state in row slots[i] of the pool: the tokens drawn, int64 [n], and the logits [n, V].

        entries: `GpuSampler.entries`; None: the largest logits. A token is -1 where logits were not numbers. Results
        are on the device, and the next step overwrites them.
        """
        n, size = len(slots), bucket(len(slots), self.model.most_rows)
        if size not in self._steps:
            self._steps[size] = self._prepare(size)
        step = self._steps[size]
        if step.sent is not None:
            step.sent.synchronize()
        table, places, rows = (x.numpy() for x in step.parts(step.host))
        table[: n * ROW.itemsize] = 0 if entries is None else entries.view(np.uint8)
        table[n * ROW.itemsize :] = 0
        places[:n], places[n:] = tokens, 0
        rows[:n], rows[n:] = slots, self.model.slots
        step.inputs.copy_(step.host, non_blocking=True)
        if step.sent is not None:
            step.sent.record()
        self._last = step, n
        return self._run(step)

    @torch.inference_mode()
    def again(self, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`step` for the same sequences, fed with what the last one drew; uniforms: new ones, float64 [n] there."""
        assert self._last is not None, "again goes on from a step"
        step, n = self._last
        if uniforms is not None:
            step.parts(step.inputs)[0].view(torch.float64).view(-1, ROW.itemsize // 8)[:n, UNIFORM] = uniforms
        return self._run(step)

    def _run(self, step: Step) -> tuple[Tensor, Tensor]:
        assert self._last is not None
        n = self._last[1]
        if step.graph is None:
            step.logits = self._launch(step)
        else:
            step.graph.replay()
        assert step.logits is not None
        return step.drawn[:n], step.logits[:n]

    def _launch(self, step: Step) -> Tensor:
        table, tokens, slots = step.parts(step.inputs)
        logits = self.model.decode(tokens, slots)
        self.sampler.launch(logits, table, step.drawn, again=tokens)
        return logits

    def _prepare(self, size: int) -> Step:
        """Before it is captured, the step runs once, on the pool's last row alone: to load kernels and make buffers."""
        step = Step.of(size, self.model.device)
        if self.model.device.type != "cuda":
            return step
        self.model.tune(size)
        step.parts(step.inputs)[2].fill_(self.model.slots)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch(step)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        step.graph, step.sent = torch.cuda.CUDAGraph(), torch.cuda.Event()
        with torch.cuda.graph(step.graph, stream=stream):
            step.logits = self._launch(step)
        return step
