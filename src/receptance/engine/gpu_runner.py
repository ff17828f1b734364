"""The runner of models that have kernels for a GPU: states stay in place, a step and its draws are one CUDA graph."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from receptance.engine.gpu.gemv import Weights
from receptance.engine.gpu.model import MOST_TOKENS, GpuModel
from receptance.engine.gpu.sampler import GpuSampler
from receptance.engine.gpu.stepper import Stepper
from receptance.engine.runner import Work
from receptance.engine.scheduler import PIECE
from receptance.engine.torch_runner import TorchRunner
from receptance.models import RWKV, State

MOST_ROWS = 1024  # that decode in one call


class GpuRunner(TorchRunner):
    """See `Runner`. invariant: every row's logits are bit by bit those it would have alone, at the price of speed.

    weights: see `GpuModel`."""

    overlaps = True

    def __init__(
        self,
        model: RWKV,
        slots: int,
        vocab: int,
        token_bytes: Callable[[int], bytes],
        eos_id: int,
        *,
        invariant: bool = False,
        weights: Weights = "full",
    ):
        super().__init__(model, 0, vocab, token_bytes, eos_id)
        self.slots = slots
        self.gpu = GpuModel(
            model, slots=slots, dtype=model.dtype, most_rows=min(MOST_ROWS, slots), invariant=invariant, weights=weights
        )
        self.pool = State(self.gpu.state)
        self._stepper = Stepper(self.gpu, self._gpu_sampler)

    def _make_sampler(self, weight: Callable[[], NDArray[np.float32]], eos_id: int) -> GpuSampler:
        self._gpu_sampler = GpuSampler(self.vocab, eos_id, weight, self.model.device, self.model.dtype)
        return self._gpu_sampler

    def step(
        self,
        works: Sequence[Work],
        rows: Sequence[int],
        uniforms: Sequence[float],
        masks: Sequence[NDArray[Any] | None] | None,
        meanwhile: Callable[[], None],
    ) -> tuple[list[int], Tensor] | None:
        if len(works) > self.gpu.most_rows or any(len(work.tokens) > 1 or work.target is not None for work in works):
            return None
        entries, held = self._gpu_sampler.entries(rows, uniforms, masks)
        drawn, logits = self._stepper.step([work.slot for work in works], [work.tokens[0] for work in works], entries)
        meanwhile()
        tokens: list[int] = drawn.tolist()
        del held  # the masks, which the step has read
        return tokens, logits

    @torch.inference_mode()
    def run(self, works: Sequence[Work], *, all_logits: bool = False) -> Tensor:
        moved = [work for work in works if work.target is not None and work.target != work.slot]
        if moved:
            sources, targets = [work.slot for work in moved], [work.target for work in moved]
            for x in self.pool.values():
                x[:, targets] = x[:, sources]
        parts: dict[int, Tensor] = {}  # of each work: its rows of logits
        single = [i for i, work in enumerate(works) if len(work.tokens) == 1]
        if len(single) == len(works) and len(single) <= self.gpu.most_rows:
            return self._decode(list(works))
        for first in range(0, len(single), self.gpu.most_rows):
            group = single[first : first + self.gpu.most_rows]
            parts |= zip(group, self._decode([works[i] for i in group]).clone().split(1))
        for group in self._packs(works):
            mine = [works[i] for i in group]
            sizes = [len(work.tokens) if all_logits else 1 for work in mine]
            parts |= zip(group, self._prefill(mine, all_logits).split(sizes))
        rows = [parts[i] for i in range(len(works))]
        return rows[0] if len(rows) == 1 else torch.cat([row.float() for row in rows])

    def _packs(self, works: Sequence[Work]) -> list[list[int]]:
        """Prompts that are read in one call: of about equal lengths, because the operator pads them to the longest."""
        longer = sorted(
            (i for i, work in enumerate(works) if len(work.tokens) > 1), key=lambda i: -len(works[i].tokens)
        )
        if self.gpu.invariant:
            return [[i] for i in longer]
        packs: list[list[int]] = []
        for i in longer:
            if not packs or (len(packs[-1]) + 1) * len(works[packs[-1][0]].tokens) > MOST_TOKENS:
                packs.append([])
            packs[-1].append(i)
        return packs

    def _decode(self, works: list[Work]) -> Tensor:
        return self._stepper.step([_place(work) for work in works], [work.tokens[0] for work in works])[1]

    def _prefill(self, works: list[Work], all_logits: bool) -> Tensor:
        """A pack; invariant: one prompt, in pieces of a shape that depends on it alone, and a last single token as
        single tokens are everywhere."""
        most = PIECE if self.gpu.invariant else MOST_TOKENS
        logits = []
        for first in range(0, max(len(work.tokens) for work in works), most):
            pieces = [Work(_place(work), work.tokens[first : first + most]) for work in works]
            if len(pieces) == 1 and len(pieces[0].tokens) == 1:
                logits.append(self._decode(pieces).clone())
                continue
            starts = [0]
            for piece in pieces:
                starts.append(starts[-1] + len(piece.tokens))
            tokens = torch.tensor([token for piece in pieces for token in piece.tokens]).to(self.model.device)
            slots = [piece.slot for piece in pieces]
            logits.append(self.gpu.prefill(tokens, starts, slots, all_logits=all_logits))
        return torch.cat([x.float() for x in logits]) if all_logits and len(logits) > 1 else logits[-1]


def _place(work: Work) -> int:
    return work.slot if work.target is None else work.target
