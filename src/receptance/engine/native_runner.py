"""The runner of the CPU engine: states are rows of one pool of arrays, stepped in place."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as deserialise
from safetensors.numpy import save as serialise

from receptance.engine import numpy_sampling
from receptance.engine.numpy_sampling import log_probabilities
from receptance.engine.plain_sampler import PlainSampler
from receptance.engine.runner import Report, Runner, Sampler, Work
from receptance.native import NativeModel, State

Floats = NDArray[np.float32]


class NativeRunner(Runner):
    """See `Runner`. Logits are float32 arrays."""

    def __init__(self, model: NativeModel, slots: int, vocab: int, token_bytes: Callable[[int], bytes], eos_id: int):
        self.model, self.slots, self.vocab = model, slots, vocab
        self._empty = model.zero_state()
        self.state_bytes = self._empty.nbytes
        self.pool = model.zero_state(slots)

        def weight() -> Floats:
            return numpy_sampling.digit_weight(map(token_bytes, range(vocab))).astype(np.float32)

        self.sampler: Sampler
        if model.core is None:
            self.sampler = PlainSampler(vocab, eos_id, weight)
        else:
            from receptance.engine.core_sampler import CoreSampler

            self.sampler = CoreSampler(model.core, model.team, model.threads, vocab, eos_id, weight)

    def reset(self, slot: int) -> None:
        self.load(slot, self._empty)

    def load(self, slot: int, state: Any) -> None:
        if not isinstance(state, State):
            state = State(state)
        self.model.check_state(state)
        for name, x in self.pool.items():
            x[:, slot] = state[name][:, 0]

    def save(self, slot: int) -> State:
        return State({name: x[:, slot : slot + 1].copy() for name, x in self.pool.items()})

    def run(self, works: Sequence[Work], *, all_logits: bool = False) -> Floats:
        tokens = np.array([token for work in works for token in work.tokens], np.int32)
        counts = np.array([len(work.tokens) for work in works], np.int32)
        rows = np.array([work.slot for work in works], np.int32)
        targets = np.array([work.slot if work.target is None else work.target for work in works], np.int32)
        logits: Floats = self.model.forward_rows(tokens, counts, self.pool, rows, targets, last_only=not all_logits)
        return logits

    def keep(self, logits: Floats, row: int) -> Floats:
        kept: Floats = logits[row].copy()
        return kept

    def join(self, rows: Sequence[Floats]) -> Floats:
        return np.stack(rows)

    def pick(self, logits: Floats, rows: Sequence[int]) -> Floats:
        return logits[list(rows)]

    def report(self, logits: Floats, row: int, token: int, n: int) -> Report:
        chosen, ids, values = log_probabilities(logits[row : row + 1, : self.vocab], [token], n)
        return float(chosen[0]), tuple(zip(ids[0].tolist(), values[0].tolist()))

    def score(self, logits: Floats, first: int, targets: Sequence[int]) -> tuple[list[float], bool]:
        x = logits[first : first + len(targets)]
        chosen, best, _ = log_probabilities(x, targets, 1)
        return chosen.tolist(), best[:, 0].tolist() == list(targets)

    def embedding(self, slot: int) -> Floats:
        vector: Floats = self.pool["ffn_shift"][-1, slot].copy()
        return vector

    def pack(self, state: State) -> bytes:
        return serialise({name: np.ascontiguousarray(x) for name, x in state.items()})

    def unpack(self, data: bytes) -> State:
        try:
            state = State(deserialise(data))
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        self.model.check_state(state)
        return state
