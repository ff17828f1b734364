"""The runner of torch models on any device: rows are gathered from a pool of states, run, and put back in place."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor

from receptance.engine import numpy_sampling
from receptance.engine.plain_sampler import PlainSampler
from receptance.engine.runner import Report, Runner, Sampler, Work
from receptance.engine.sampling import log_probabilities
from receptance.models import RWKV, State
from receptance.native import NoCoreError, load_core
from receptance.native.library import new_team


class TorchRunner(Runner):
    """See `Runner`. Logits are tensors on the model's device."""

    def __init__(self, model: RWKV, slots: int, vocab: int, token_bytes: Callable[[int], bytes], eos_id: int):
        self.model, self.slots, self.vocab = model, slots, vocab
        self._empty = model.zero_state()
        self.state_bytes = self._empty.nbytes
        self.pool = model.zero_state(slots).clone()  # a tuned initial state is one row seen many times

        def weight() -> NDArray[np.float32]:
            return numpy_sampling.digit_weight(map(token_bytes, range(vocab))).astype(np.float32)

        self.sampler = self._make_sampler(weight, eos_id)

    def _make_sampler(self, weight: Callable[[], NDArray[np.float32]], eos_id: int) -> Sampler:
        if self.model.device.type == "cuda":
            from receptance.engine.gpu.sampler import GpuSampler
            from receptance.ops.cuda import CudaError

            dtype = torch.bfloat16 if self.model.dtype == torch.bfloat16 else torch.float16
            try:
                return GpuSampler(self.vocab, eos_id, weight, self.model.device, dtype)
            except CudaError:
                pass
        return _HostSampler(self.vocab, eos_id, weight)

    @torch.inference_mode()
    def reset(self, slot: int) -> None:
        self.load(slot, self._empty)

    @torch.inference_mode()
    def load(self, slot: int, state: Any) -> None:
        if not isinstance(state, State):
            state = State(state)
        self.model.check_state(state)
        for name, x in self.pool.items():
            x[:, slot] = state[name][:, 0].to(x)

    @torch.inference_mode()
    def save(self, slot: int) -> State:
        return State({name: x[:, slot : slot + 1].to("cpu", copy=True) for name, x in self.pool.items()})

    @torch.inference_mode()
    def run(self, works: Sequence[Work], *, all_logits: bool = False) -> Tensor:
        """Works of about equal length share a call: single tokens, and the others by the power of two below."""
        groups: dict[int, list[int]] = {}
        for i, work in enumerate(works):
            groups.setdefault(len(work.tokens).bit_length(), []).append(i)
        parts: list[Tensor | None] = [None] * len(works)
        for group in groups.values():
            for i, logits in zip(group, self._forward([works[i] for i in group], all_logits)):
                parts[i] = logits
        rows = [part for part in parts if part is not None]
        return torch.cat(rows)

    def _forward(self, works: list[Work], all_logits: bool) -> list[Tensor]:
        lengths = [len(work.tokens) for work in works]
        width = max(lengths)
        tokens = torch.tensor([[*work.tokens, *[0] * (width - len(work.tokens))] for work in works])
        ragged = min(lengths) < width
        logits, after = self.model.forward(
            tokens,
            self.pool.select([work.slot for work in works]),
            lengths=torch.tensor(lengths) if ragged else None,
            last_only=not all_logits,
        )
        targets = [work.slot if work.target is None else work.target for work in works]
        index = torch.tensor(targets, device=logits.device)
        for name, x in self.pool.items():
            x.index_copy_(1, index, after[name].to(x))
        if all_logits:
            return [row[:length] for row, length in zip(logits, lengths)]
        return list(logits.split(1))

    def keep(self, logits: Tensor, row: int) -> Tensor:
        return logits[row].clone()

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(rows))

    def pick(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        return logits[list(rows)]

    def report(self, logits: Tensor, row: int, token: int, n: int) -> Report:
        chosen, ids, values = log_probabilities(
            logits[row : row + 1, : self.vocab], torch.tensor([token], device=logits.device), n
        )
        return float(chosen[0]), tuple(zip(ids[0].tolist(), values[0].tolist()))

    def score(self, logits: Tensor, first: int, targets: Sequence[int]) -> tuple[list[float], bool]:
        x = logits[first : first + len(targets)]
        chosen, best, _ = log_probabilities(x, torch.tensor(list(targets), device=x.device), 1)
        return chosen.tolist(), best[:, 0].tolist() == list(targets)

    def embedding(self, slot: int) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = self.pool["ffn_shift"][-1, slot].float().cpu().numpy().copy()
        return vector

    def pack(self, state: State) -> bytes:
        return serialise({name: x.contiguous() for name, x in state.items()})

    def unpack(self, data: bytes) -> State:
        try:
            state = State(deserialise(data))
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        self.model.check_state(state)
        return state


class _HostSampler:
    """Drawing on the CPU: by the core, or by NumPy where there is none."""

    def __init__(self, vocab: int, eos_id: int, weight: Callable[[], NDArray[np.float32]]):
        try:
            from receptance.engine.core_sampler import CoreSampler

            core, threads = load_core(), torch.get_num_threads()
            team = new_team(core, threads)
            weakref.finalize(self, core.library.receptance_team_free, team)
            self._inner: Sampler = CoreSampler(core, lambda: nullcontext(team), threads, vocab, eos_id, weight)
        except NoCoreError:
            self._inner = PlainSampler(vocab, eos_id, weight)
        self.admit, self.free = self._inner.admit, self._inner.free

    def draw(
        self,
        logits: Tensor,
        rows: Sequence[int],
        uniforms: Sequence[float],
        masks: Sequence[NDArray[Any] | None] | None,
    ) -> list[int]:
        return self._inner.draw(logits.float().cpu().contiguous().numpy(), rows, uniforms, masks)
