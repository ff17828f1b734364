"""Prompts read by `GpuModel`: rows are tokens, but for the operator, which takes padded rows [n, T].

A single prompt is padded to one of a few lengths, and reading such a length is one CUDA graph from its second time on:
it takes hundreds of launches, which for short prompts take the host longer than the GPU.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from receptance.engine.gpu.layers import NOTHING, Added, Buffers
from receptance.engine.gpu.model import SLOW_SQUARED_WAVES, SQUARED_WAVES, GpuModel

GRAPH_TOKENS = 4096  # longest prompt of a graph; longer ones keep the GPU busy
MOST_GRAPHS = 24
STEP, LEAST = 256, 8  # padded lengths are multiples of STEP, and below it powers of two


def padded(tokens: int) -> int:
    return max(1 << (tokens - 1).bit_length(), LEAST) if tokens <= STEP else -(-tokens // STEP) * STEP


class Prompts:
    """Room for n prompts of up to t tokens, `rows` in all, and for reading them. Padding is what lies behind them."""

    def __init__(self, model: GpuModel, rows: int, n: int, t: int, is_ragged: bool):
        self.model, self.rows, self.n, self.t, self.is_ragged = model, rows, n, t, is_ragged
        device = model.device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        # of each token: the state's row it begins from, the prompt it ends, its place in the operator's rows; or -1
        self.table = torch.zeros(3, rows, dtype=torch.int32, device=device)
        self.begins, self.ends, self.place = self.table
        self.prompts = torch.zeros(3, n, dtype=torch.int64, device=device)
        self.slots, self.lengths, self.last_rows = self.prompts
        self.b: Buffers
        self.own: Any = None  # the time mix's, for all layers

    def put(self, tokens: Tensor, lengths: Sequence[int], slots: Sequence[int]) -> None:
        table = np.full((3, self.rows), -1, np.int32)  # the GPU waits for it
        begins, ends, place = table
        first = 0
        last_rows = []
        for i, (length, slot) in enumerate(zip(lengths, slots)):
            last = first + length - 1
            begins[first], ends[last] = slot, i
            place[first : last + 1] = np.arange(i * self.t, i * self.t + length)
            last_rows.append(last)
            first += length
        self.table.copy_(torch.from_numpy(table))
        self.prompts.copy_(torch.tensor([list(slots), list(lengths), last_rows]))
        self.tokens[:first].copy_(tokens)
        self.tokens[first:].zero_()

    def run(self, all_logits: bool) -> Tensor:
        """Logits after each prompt, or after each token, of the model's type. Can be captured."""
        model = self.model
        self.b = b = Buffers(model, self.rows)
        self.own = None
        shape = len(model.layers), self.n, model.c  # each prompt's last rows; the pool gets them once all is read
        self.carried = {
            name: torch.empty(shape, dtype=model.dtype, device=model.device) for name in ("att_shift", "ffn_shift")
        }
        x, spare = b.x, b.sum
        pending = NOTHING
        for i, layer in enumerate(model.layers):
            self._normalise(x, spare, layer.ln1, i, "att_shift", layer.time.mixes, pending, first=i == 0)
            x, spare = spare, x
            model.time.prefill(i, layer, self)
            torch.mm(b.att, layer.time.output.full.T, out=b.delta)
            self._normalise(x, spare, layer.ln2, i, "ffn_shift", layer.channel_mixes, Added(b.delta))
            x, spare = spare, x
            waves = SQUARED_WAVES if self.n == 1 else SLOW_SQUARED_WAVES
            pending = model.channel_by_blas(layer, b, self.rows, waves)
        for name, rows in self.carried.items():
            model.state[name].index_copy_(1, self.slots, rows)
        if not all_logits:
            x = x[self.last_rows]
            pending = Added(*(None if y is None else y[self.last_rows] for y in (pending.delta, pending.gate)))
        normed = torch.empty_like(x, dtype=model.dtype)
        model.normalise(x, x, model.ln_out, normed, added=pending)
        return normed @ model.head.full.T

    def _normalise(
        self, x: Tensor, total: Tensor, norm: tuple[Tensor, Tensor], layer: int, name: str, mixes: Tensor,
        pending: Added, first: bool = False,
    ) -> None:  # fmt: skip
        """total = x + delta and its mixes."""
        each = 8 if len(x) > 2048 else 4 if len(x) >= 1024 else 2
        self.model.normalise(
            x, total, norm, self.b.mixed, added=pending, tokens=self.tokens if first else None, mixes=mixes,
            last=self.model.state[name][layer], after=self.carried[name][layer], begins=self.begins, ends=self.ends,
            each=each,
        )  # fmt: skip


class Reader:
    """Reads prompts, those whose padded length it has seen before by a graph; of graphs it keeps the latest."""

    def __init__(self, model: GpuModel):
        self.model = model
        self._seen: set[tuple[int, bool]] = set()
        self._graphs: dict[tuple[int, bool], tuple[Prompts, torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # of memory, which the graphs share: one runs at a time

    def read(self, tokens: Tensor, lengths: list[int], slots: Sequence[int], all_logits: bool) -> Tensor:
        """See `GpuModel.prefill`."""
        model, total = self.model, len(tokens)
        if len(lengths) > 1 or total > GRAPH_TOKENS or model.device.type != "cuda" or model.invariant:
            n, t = len(lengths), max(lengths)
            prompts = Prompts(model, total, n, t, min(lengths) < t)
            prompts.put(tokens, lengths, slots)
            return prompts.run(all_logits)
        size = padded(total), all_logits
        if size not in self._graphs and size not in self._seen:
            self._seen.add(size)
            prompts = Prompts(model, size[0], 1, size[0], True)
            prompts.put(tokens, lengths, slots)
            return prompts.run(all_logits)[: total if all_logits else 1]
        found = self._graphs.pop(size, None) or self._capture(*size)
        self._graphs[size] = found
        prompts, graph, logits = found
        prompts.put(tokens, lengths, slots)
        graph.replay()
        return logits[: total if all_logits else 1].clone()

    def _capture(self, rows: int, all_logits: bool) -> tuple[Prompts, torch.cuda.CUDAGraph, Tensor]:
        if len(self._graphs) == MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        prompts, graph = Prompts(self.model, rows, 1, rows, True), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = prompts.run(all_logits)
        self._pool = graph.pool()
        del prompts.b, prompts.own, prompts.carried  # the next graph's may lie in their memory
        return prompts, graph, logits
