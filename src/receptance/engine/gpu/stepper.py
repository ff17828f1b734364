"""Steps of a batch without the host: a captured graph decodes and draws, and its tokens are its next inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from receptance.engine.gpu.rwkv7 import GpuModel
from receptance.engine.gpu.sampler import GpuSampler


def bucket(rows: int, most: int) -> int:
    """The number of rows that is run for `rows`: a power of two, at most `most`."""
    return min(1 << (rows - 1).bit_length(), most)


class Stepper:
    """The rows of a batch, from step to step.

    `assign` says which sequences they are; `step` gives each a token and draws the next. The graph for each bucket of
    rows is captured at its first step (a fraction of a second); rows beyond the batch work on the pool's last row.
    """

    def __init__(self, model: GpuModel, sampler: GpuSampler):
        if sampler.rows < model.most_rows:
            raise ValueError(f"a sampler of {sampler.rows} rows for a model of {model.most_rows}")
        self.model, self.sampler = model, sampler
        self.rows = 0
        self.tokens = torch.zeros(model.most_rows, dtype=torch.int64, device=model.device)
        self.slots = torch.full((model.most_rows,), model.slots, dtype=torch.int32, device=model.device)
        self.logits: Tensor | None = None  # of the last step, [bucket, V]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def assign(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Row i is the sequence in row slots[i] of the pool, to be given tokens[i] next."""
        rows = self.rows = len(slots)
        self.slots.fill_(self.model.slots)
        self.slots[:rows] = torch.tensor(slots, dtype=torch.int32).to(self.model.device)
        self.tokens[:rows] = torch.tensor(tokens).to(self.model.device)

    @torch.inference_mode()
    def step(self, uniforms: Sequence[float] | Tensor) -> Tensor:
        """One token more for each row: the drawn ones, int64 [rows] on the device, -1 where logits were not numbers.

        uniforms: a number in [0, 1) for each row. The tokens are the next step's inputs; `assign` anew to change them.
        """
        points = torch.as_tensor(uniforms, dtype=torch.float64)
        self.sampler.uniforms[: self.rows].copy_(points, non_blocking=True)
        size = bucket(self.rows, self.model.most_rows)
        if self.model.device.type != "cuda":
            self.logits = self._run(size)
        else:
            if size not in self._graphs:
                self._graphs[size] = self._capture(size)
            graph, self.logits = self._graphs[size]
            graph.replay()
        return self.sampler.tokens[: self.rows]

    def _run(self, size: int) -> Tensor:
        logits = self.model.decode(self.tokens[:size], self.slots[:size])
        self.sampler.draw(logits, self.slots[:size], self.sampler.uniforms[:size], again=self.tokens[:size])
        return logits

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Before it is captured, the step runs once, on the pool's last row alone: to load kernels and make buffers."""
        kept = self.slots.clone(), self.tokens.clone()
        self.slots.fill_(self.model.slots)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(size)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            logits = self._run(size)
        self.slots.copy_(kept[0])
        self.tokens.copy_(kept[1])
        return graph, logits
