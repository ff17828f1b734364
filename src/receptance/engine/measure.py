"""What the engine reaches with a model on this machine, beside the physical limit: behind `receptance bench engine`."""

import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from receptance.engine.core import Core
from receptance.engine.engine import CHUNKS, make_runner
from receptance.engine.params import SamplingParams
from receptance.engine.request import Request
from receptance.engine.scheduler import Limits, Sequence
from receptance.tokenizers import Tokenizer


class UnsoundError(Exception):
    """A request gets other tokens in a batch than alone; no speed of it means anything."""


@dataclass(frozen=True)
class Machine:
    """bytes/s read from memory, and operations/s of products in the model's own type (a multiply-add is two)."""

    read: float
    operations: float


@dataclass(frozen=True)
class Decode:
    """batch sequences that write. own: the share of a step spent neither in the model nor in drawing.

    limit: tokens/s if weights once and states twice crossed memory at its rate, or products ran at theirs.
    """

    batch: int
    tokens_per_s: float
    step_ms: float
    draw_ms: float
    own: float
    limit: float

    @property
    def reached(self) -> float:
        return self.tokens_per_s / self.limit


@dataclass(frozen=True)
class Prefill:
    batch: int
    length: int
    tokens_per_s: float
    limit: float

    @property
    def reached(self) -> float:
        return self.tokens_per_s / self.limit


@dataclass(frozen=True)
class Mixed:
    """Sequences that come and go: as many as `batch` at all times, with prompts and texts of many lengths.

    Quantiles 0.5, 0.95, 0.99 in milliseconds: to the first token of a request, and between tokens.
    """

    batch: int
    requests: int
    read_per_s: float
    written_per_s: float
    first_token_ms: tuple[float, ...]
    between_ms: tuple[float, ...]


class Bench:
    def __init__(self, model: Any, tokenizer: Tokenizer, slots: int):
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.device = "cuda" if "cuda" in str(model.device) else "cpu"
        self.runner = make_runner(model, slots, tokenizer)
        self.vocab = self.runner.vocab

    def core(self) -> Core:
        step, busy = CHUNKS[self.device]
        limits = Limits(self.slots, step, busy)
        return Core(self.model, self.tokenizer, self.runner, limits, cache_bytes=0, host_bytes=1 << 30)

    def check(self) -> None:
        """Raise UnsoundError unless some requests have the same tokens together as alone."""
        prompts = [[(7 * i + j) % self.vocab for j in range(3 + 5 * i)] for i in range(min(8, self.slots))]
        together = self._greedy(prompts)
        different = sum(self._greedy([prompt]) != [ids] for prompt, ids in zip(prompts, together))
        if different > len(prompts) // 4:  # random weights in half precision have ties
            raise UnsoundError(f"{different} of {len(prompts)} requests have other tokens in a batch than alone")

    def _greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        core = self.core()
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        jobs = [core.submit(Request(prompt, params))[0].job for prompt in prompts]
        while core.has_work:
            core.step()
        return [job.completion.ids for job in jobs]

    def decode(self, batch: int, seconds: float, machine: Machine) -> Decode:
        core = self.core()
        params = SamplingParams(max_tokens=10**6, temperature=1.0, top_p=0.9, ignore_eos=True)
        for i in range(batch):
            core.submit(Request([i % self.vocab], params))
        for _ in range(6):  # reads all prompts, and warms what is to be measured
            core.step()
        steps: list[float] = []
        before = (core.stats.run_seconds, core.stats.draw_seconds)
        end = time.perf_counter() + seconds
        while len(steps) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            core.step()
            steps.append(time.perf_counter() - start)
        run, draw = core.stats.run_seconds - before[0], core.stats.draw_seconds - before[1]
        step = float(np.median(steps))
        floor = max(self.bytes_of_step(batch) / machine.read, 2 * self.elements() * batch / machine.operations)
        own = max(0.0, 1 - (run + draw) / sum(steps))
        return Decode(batch, batch / step, 1e3 * step, 1e3 * draw / len(steps), own, batch / floor)

    def prefill(self, batch: int, length: int, seconds: float, machine: Machine) -> Prefill:
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 2 or time.perf_counter() < end:
            core = self.core()
            for i in range(batch):
                core.submit(Request([(i + 3 * j) % self.vocab for j in range(length)], SamplingParams(max_tokens=1)))
            start = time.perf_counter()
            while core.has_work:
                core.step()
            times.append(time.perf_counter() - start)
        tokens = batch * length
        head = self.model.config.vocab_size * self.model.config.n_embd
        return Prefill(batch, length, tokens / min(times), machine.operations / (2 * (self.elements() - head)))

    def mixed(self, batch: int, seconds: float) -> Mixed:
        core, rng = self.core(), random.Random(1)
        came: dict[int, tuple[Sequence, float]] = {}
        last: dict[int, float] = {}
        first, between, requests = [], [], 0
        start, read, written = time.perf_counter(), core.stats.read, core.stats.written
        while time.perf_counter() - start < seconds or not requests:
            while len(came) < batch:
                length, tokens = rng.choice([16, 64, 256, 1024]), rng.choice([8, 32, 128])
                prompt = [rng.randrange(self.vocab) for _ in range(length)]
                params = SamplingParams(max_tokens=tokens, top_p=0.9, ignore_eos=True)
                sequence = core.submit(Request(prompt, params))[0]
                came[id(sequence)] = sequence, time.perf_counter()
            core.step()
            now = time.perf_counter()
            for key, (sequence, at) in list(came.items()):
                count = len(sequence.job.completion.tokens)
                if count == 1 and key not in last:
                    first.append(now - at)
                elif key in last:
                    between.append(now - last[key])
                if count:
                    last[key] = now
                if sequence.job.completion.is_done:
                    requests += 1
                    del came[key]
                    last.pop(key, None)
        passed = time.perf_counter() - start
        return Mixed(
            batch,
            requests,
            (core.stats.read - read) / passed,
            (core.stats.written - written) / passed,
            quantiles(first),
            quantiles(between),
        )

    def bytes_of_step(self, batch: int) -> int:
        """That cross memory at least: weights once, states read and written."""
        states = 2 * batch * self.runner.state_bytes
        if self.model.engine == "native":
            return int(self.model.bytes_per_token()) + states
        rows = [p for name, p in self.model.named_parameters() if name != "emb.weight"]
        return int(sum(p.numel() * p.element_size() for p in rows)) + states

    def elements(self) -> int:
        """Numbers of all matrices that multiply a token's vector."""
        if self.model.engine == "native":
            return int(self.model.n_matrix_elements)
        return int(sum(p.numel() for name, p in self.model.named_parameters() if name != "emb.weight" and p.dim() > 1))


def quantiles(seconds: list[float]) -> tuple[float, ...]:
    if not seconds:
        return ()
    return tuple(float(x) for x in 1e3 * np.quantile(seconds, [0.5, 0.95, 0.99]))


def machine_limits(model: Any, seconds: float) -> Machine:
    """Of the model's device, measured."""
    if model.engine == "native":
        from receptance.native.measure import limits

        found = limits(model.threads, seconds)
        is_plain = model.dtype in ("float32", "float16", "bfloat16")
        return Machine(found.read, found.float32 if is_plain else found.int8)
    import torch

    device, dtype = model.device, model.dtype
    size = (256 << 20) if device.type == "cuda" else (64 << 20)
    x, y = torch.ones(size, device=device), torch.empty(size, device=device)
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.ones(n, n, device=device, dtype=dtype), torch.ones(n, n, device=device, dtype=dtype)

    def best(call: Any) -> float:
        times = []
        for _ in range(6):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.inference_mode():
        return Machine(8 * size / best(lambda: y.copy_(x)), 2 * n**3 / best(lambda: a @ b))
