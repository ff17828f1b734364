"""The runner of models that have kernels for a GPU: states stay in place, a step and its draws are one CUDA graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from receptance.engine.gpu.rwkv7 import MOST_TOKENS, GpuModel
from receptance.engine.gpu.sampler import GpuSampler
from receptance.engine.gpu.stepper import Stepper
from receptance.engine.runner import Work
from receptance.engine.scheduler import PIECE
from receptance.engine.torch_runner import TorchRunner
from receptance.models import RWKV7, State

MOST_ROWS = 1024  # that decode in one call


class GpuRunner(TorchRunner):
    """See `Runner`. invariant: every row's logits are bit by bit those it would have alone, at the price of speed."""

    def __init__(
        self,
        model: RWKV7,
        slots: int,
        vocab: int,
        token_bytes: Callable[[int], bytes],
        eos_id: int,
        *,
        invariant: bool = False,
    ):
        super().__init__(model, 0, vocab, token_bytes, eos_id)
        self.slots = slots
        self.gpu = GpuModel(model, slots=slots, dtype=model.dtype, most_rows=min(MOST_ROWS, slots), invariant=invariant)
        self.pool = State(self.gpu.state)
        assert isinstance(self.sampler, GpuSampler)  # there are kernels
        self._stepper = Stepper(self.gpu, self.sampler)

    def step(
        self,
        works: Sequence[Work],
        rows: Sequence[int],
        uniforms: Sequence[float],
        masks: Sequence[NDArray[Any] | None] | None,
    ) -> tuple[list[int], Tensor] | None:
        if len(works) > self.gpu.most_rows or any(len(work.tokens) > 1 or work.target is not None for work in works):
            return None
        entries, held = self._stepper.sampler.entries(rows, uniforms, masks)
        drawn, logits = self._stepper.step([work.slot for work in works], [work.tokens[0] for work in works], entries)
        tokens: list[int] = drawn.tolist()
        del held  # the masks, which the step has read
        return tokens, logits

    @torch.inference_mode()
    def run(self, works: Sequence[Work], *, all_logits: bool = False) -> Tensor:
        if all_logits:
            return super().run(works, all_logits=True)
        moved = [work for work in works if work.target is not None and work.target != work.slot]
        if moved:
            sources, targets = [work.slot for work in moved], [work.target for work in moved]
            for x in self.pool.values():
                x[:, targets] = x[:, sources]
        single = [i for i, work in enumerate(works) if len(work.tokens) == 1]
        longer = [i for i, work in enumerate(works) if len(work.tokens) > 1]
        parts = [self._decode([works[i] for i in single])] if single else []
        parts += [self._prefill([works[i] for i in longer])] if longer else []
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([*single, *longer], device=parts[0].device).argsort()
        return torch.cat([part.float() for part in parts])[order]

    def _decode(self, works: list[Work]) -> Tensor:
        rows = self.gpu.most_rows
        if len(works) > rows:
            return torch.cat([self._decode(works[i : i + rows]).clone() for i in range(0, len(works), rows)])
        return self._stepper.step([_place(work) for work in works], [work.tokens[0] for work in works])[1]

    def _prefill(self, works: list[Work]) -> Tensor:
        """Packed into as few calls as their tokens allow."""
        if self.gpu.invariant:
            return torch.cat([self._in_pieces(work) for work in works])
        packs: list[list[Work]] = [[]]
        for work in works:
            if sum(len(w.tokens) for w in packs[-1]) + len(work.tokens) > MOST_TOKENS and packs[-1]:
                packs.append([])
            packs[-1].append(work)
        return torch.cat([self._prefill_pack(pack) for pack in packs])

    def _in_pieces(self, work: Work) -> Tensor:
        """Each of a shape that depends on the prompt alone; a single token as it is everywhere."""
        logits: list[Tensor] = []
        for i in range(0, len(work.tokens), PIECE):
            piece = [Work(_place(work), work.tokens[i : i + PIECE])]
            logits = [self._prefill_pack(piece) if len(piece[0].tokens) > 1 else self._decode(piece).clone()]
        return logits[0]

    def _prefill_pack(self, works: list[Work]) -> Tensor:
        starts = [0]
        for work in works:
            starts.append(starts[-1] + len(work.tokens))
        tokens = torch.tensor([token for work in works for token in work.tokens]).to(self.model.device)
        logits: Tensor = self.gpu.prefill(tokens, starts, [_place(work) for work in works])
        return logits


def _place(work: Work) -> int:
    return work.slot if work.target is None else work.target
