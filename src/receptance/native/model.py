"""`NativeModel`: what `receptance.load(path, engine="native")` gives."""

import ctypes
import math
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from receptance.errors import ConfigError
from receptance.native.arrays import Array, Weights, aligned, to_float
from receptance.native.binding import Binding, addresses, type_name
from receptance.native.config import NativeConfig, Shapes
from receptance.native.library import Core, CState, NoCoreError, Request, load_core, new_team
from receptance.native.plain import PlainEngine
from receptance.native.state import State

DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
RECYCLED, RECYCLED_RESULTS = 1 << 18, 4  # numbers of a result whose memory is used again, and how many of them are kept
CHUNK_ROWS = 256  # tokens at once in the core: bounds its working memory
EMPTY = -1e38  # RWKV-4's exponent before any token, as in receptance.ops
STATE_FIELDS = ["att_shift", "ffn_shift", "wkv", "num", "den", "exp"]


class NativeModel:
    """An RWKV of any version on the CPU, without torch.

    dtype: how the large matrices are held; None = as in the file. float32 leaves narrower ones as they are (they widen
    exactly; see `is_invariant`), float16 and bfloat16 round wider ones, int8 and int4 quantise blocks of 32 numbers.
    Vectors and low-rank maps stay as in the file; arithmetic and state are float32.
    threads: None = one for each core that this process may use.
    repack: with dtype None, whether to copy matrices in GGUF's block formats (the same numbers) into the order in which
    they are read fastest, at a second or so per GB, or to read them where they lie in the file. None: copy, except Q8_0
    matrices of models with more than 1 GiB of blocks.
    engine_name: None = the best compiled engine for this machine, or "numpy" where there is none.
    Raises ConfigError for an unknown dtype, or int8 and int4 without the compiled core.
    """

    engine = "native"

    def __init__(
        self,
        weights: Weights,
        config: NativeConfig,
        fingerprint: str,
        *,
        dtype: str | None = None,
        threads: int | None = None,
        engine_name: str | None = None,
        repack: bool | None = None,
    ):
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is unknown to the native engine; use one of {', '.join(DTYPES)}")
        check_threads(threads)
        self.config = config
        self.fingerprint = fingerprint
        self.dtype = dtype or type_name(weights["head.weight"])
        self.threads = threads or available_cores()
        self.active_fraction: float | None = None  # of hidden units in the last call, where only active ones were read
        self._tuned = tuned_state(weights, config)
        self._plain: PlainEngine | None = None
        self._core: Core | None = None
        self._locks: dict[int, threading.Lock] = {}
        self._scratch: tuple[int, NDArray[np.uint8]] = (0, aligned(0))
        self._results: list[Array] = []
        try:
            self._core = None if engine_name == "numpy" else load_core(engine_name or "")
        except NoCoreError as error:
            if engine_name is not None:
                raise ConfigError(f"engine {engine_name!r} is not there: {error}") from None
            lost = "slower, with more memory, on one thread, without int8 and int4"
            warnings.warn(f"the compiled CPU engine is not there ({error}); running in NumPy: {lost}", stacklevel=2)
        if self._core is None:
            if dtype in ("int8", "int4"):
                raise ConfigError(f"dtype {dtype!r} needs the compiled CPU engine; python -m receptance.native.build")
            self._plain, self.threads = PlainEngine(weights, config), 1
            self.engine_name = "numpy"
            return
        self.engine_name = self._core.name
        self._team, self._team_process = new_team(self._core, self.threads), os.getpid()
        self._binding = Binding(self._core, self._team, weights, config, dtype, repack=repack)

    def __del__(self) -> None:
        if getattr(self, "_team", None) and self._core and self._team_process == os.getpid():
            self._core.library.receptance_team_free(self._team)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model of the CPU engine cannot be copied or pickled; share it, or load it again")

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def core(self) -> Core | None:
        """The compiled core, None where NumPy takes its place."""
        return self._core

    @contextmanager
    def team(self) -> Iterator[int]:
        """The core's threads, for one call of a function that takes them, which no other call has meanwhile."""
        assert self._core is not None
        process = os.getpid()  # a fork leaves the threads behind, and a lock that may be held
        with self._locks.setdefault(process, threading.Lock()):
            if self._team_process != process:
                self._team, self._team_process = new_team(self._core, self.threads), process
            yield self._team

    @property
    def is_invariant(self) -> bool:
        """Whether a row's logits are, bit for bit, those that it has alone, however many there are.

        So with dtype="float32", where no weight is in blocks.
        """
        return self._core is not None and self._binding.is_exact()

    @property
    def n_matrix_elements(self) -> int:
        """Numbers of all matrices that multiply a token's vector. 0 without the core."""
        return self._binding.n_elements() if self._core else 0

    def bytes_per_token(self, active: float = 1.0) -> int:
        """Of matrices read for one token, when this share of the hidden units is not zero. 0 without the core."""
        return self._binding.bytes_per_token(active) if self._core else 0

    def state_shapes(self, batch: int) -> Shapes:
        """Name → shape of each state tensor."""
        return self.config.state_shapes(batch)

    def zero_state(self, batch: int = 1) -> State:
        """The state before any token: zeros, or the tuned initial state when the checkpoint carries `time_state`."""
        arrays = {name: np.zeros(shape, np.float32) for name, shape in self.state_shapes(batch).items()}
        if "exp" in arrays:
            arrays["exp"][:] = EMPTY
        if self._tuned is not None:
            arrays["wkv"][:] = self._tuned[:, None]
        return State(arrays)

    def check_state(self, state: State, source: str = "state") -> None:
        """Raise ValueError unless the state has this model's fields and shapes."""
        found = {name: tuple(x.shape) for name, x in state.items()}
        expected = self.state_shapes(*found.get("att_shift", ())[1:2] or (1,))
        if found != expected:
            raise ValueError(f"{source}: a state with {found}; this RWKV-{self.config.version} model needs {expected}")

    def load_state(self, path: str | Path) -> State:
        """`State.load(path, self)`."""
        return State.load(path, self)

    def forward(
        self,
        tokens: list[int] | list[list[int]] | NDArray[np.integer],
        state: State | None = None,
        *,
        lengths: list[int] | NDArray[np.integer] | None = None,
        last_only: bool = False,
    ) -> tuple[Array, State]:
        """Run T tokens on from `state` (None: from the start), which is not changed; any split of T, same result.

        tokens: [T] → logits [T, V]; [B, T] → [B, T, V]. A torch state is taken too.
        lengths [B]: row i has lengths[i] tokens and padding after them; the returned state is the one after its own
        last token, and logits beyond it are zeros. last_only: logits of each row's last token alone, [V] or [B, V].
        The returned state always has a batch axis. Raises ValueError on an empty or out-of-range input.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim not in (1, 2) or ids.size == 0:
            raise ValueError(f"tokens must be [T] or [B, T] with at least one token, got shape {ids.shape}")
        single, ids = ids.ndim == 1, ids.reshape(-1, ids.shape[-1])
        batch, t = ids.shape
        if not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise ValueError(f"token ids must be in [0, {self.config.vocab_size}), got {ids.min()}..{ids.max()}")
        counts = np.full(batch, t) if lengths is None else np.asarray(lengths, dtype=np.int64)
        if counts.shape != (batch,) or not (counts.min() >= 0 and counts.max() <= t):
            raise ValueError(f"lengths must be [{batch}] with values in [0, {t}], got {counts.tolist()}")
        before = self._checked(state, batch)

        rows = ids[np.arange(t) < counts[:, None]]  # all tokens, one sequence after the other
        shape = (batch, self.config.vocab_size) if last_only else (len(rows), self.config.vocab_size)
        run = self._run_core if self._plain is None else self._run_plain
        logits, after = run(rows.astype(np.int32), counts.astype(np.int32), before, shape, last_only)
        if not last_only and len(rows) < batch * t:
            padded = np.zeros((batch, t, shape[1]), np.float32)
            padded[np.arange(t) < counts[:, None]] = logits
            logits = padded
        elif not last_only:
            logits = logits.reshape(batch, t, -1)
        return (logits[0] if single else logits), after

    def _checked(self, state: State | None, batch: int) -> State:
        if state is None:
            return self.zero_state(batch)
        if not isinstance(state, State):
            state = State(state)
        self.check_state(state)
        if state.batch != batch:
            raise ValueError(f"a state of {state.batch} rows for {batch} rows of tokens")
        return state

    def forward_rows(
        self,
        tokens: NDArray[np.int32],
        counts: NDArray[np.int32],
        pool: State,
        from_rows: NDArray[np.int32],
        to_rows: NDArray[np.int32],
        *,
        last_only: bool = True,
    ) -> Array:
        """Run sequences whose states are rows of one pool, in place: row from_rows[i] becomes row to_rows[i].

        tokens: counts[i] >= 1 tokens of each sequence, one after the other. Rows may be forked (one `from` several
        times), but a row that is written is no other sequence's. Logits of each sequence's last token, [B, V], or of
        all tokens. Nothing is checked: the batched engine's step.
        """
        logits = self._memory((len(counts) if last_only else len(tokens), self.config.vocab_size))
        rows = np.ascontiguousarray(from_rows, np.int32), np.ascontiguousarray(to_rows, np.int32)
        if self._plain is None:
            self._call(tokens, counts, pool, pool, logits, last_only, rows)
        else:
            forked = pool.select(rows[0].tolist())
            for name, x in pool.items():
                x[:, rows[1]] = forked[name]
            self._plain_rows(tokens, counts, pool, rows[1].tolist(), logits, last_only)
        return logits

    def _run_core(
        self, rows: NDArray[np.int32], counts: NDArray[np.int32], before: State, shape: tuple[int, int], last_only: bool
    ) -> tuple[Array, State]:
        given = State({name: np.ascontiguousarray(x) for name, x in before.items()})
        has_empty = not counts.all()  # rows that no token touches keep their state
        made = State({name: self._memory(x.shape) for name, x in given.items()})
        logits = self._memory(shape)
        if has_empty:
            logits[:] = 0
            for name, x in given.items():
                made[name][:] = x
        self._call(rows, counts, given, made, logits, last_only)
        return logits, made

    def _call(
        self,
        tokens: NDArray[np.int32],
        counts: NDArray[np.int32],
        given: State,
        made: State,
        logits: Array,
        last_only: bool,
        rows: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
    ) -> None:
        core = self._core
        assert core is not None
        chunk = int(max(min(CHUNK_ROWS, len(tokens)), len(counts)))
        with self.team() as team:
            if self._scratch[0] < chunk:
                need = core.library.receptance_scratch_bytes(core.engine, self._binding.model, chunk, self.threads)
                self._scratch = (chunk, aligned(need))
            request = Request(
                ctypes.pointer(self._binding.model),
                team,
                tokens.ctypes.data,
                counts.ctypes.data,
                len(counts),
                ctypes.pointer(CState(*addresses(given, STATE_FIELDS))),
                ctypes.pointer(CState(*addresses(made, STATE_FIELDS))),
                logits.ctypes.data,
                last_only,
                self._scratch[1].ctypes.data,
                chunk,
            )
            if rows is not None:
                request.from_rows, request.to_rows, request.pool = rows[0].ctypes.data, rows[1].ctypes.data, given.batch
            core.library.receptance_forward(core.engine, ctypes.byref(request))
        self.active_fraction = request.active / request.hidden if request.hidden else None

    def _memory(self, shape: tuple[int, ...]) -> Array:
        """An array of any content. A large one may be an earlier result that nobody has now: its pages are there."""
        if math.prod(shape) < RECYCLED:
            return np.empty(shape, np.float32)
        results = self._results  # the list itself is never changed
        for i in range(len(results)):
            x = results[i]
            if x.shape == shape and sys.getrefcount(x) == 3:  # the list, `x`, the argument: no other thread's
                return x
        made = np.empty(shape, np.float32)
        self._results = [*results[1 - RECYCLED_RESULTS :], made]
        return made

    def _run_plain(
        self, rows: NDArray[np.int32], counts: NDArray[np.int32], before: State, shape: tuple[int, int], last_only: bool
    ) -> tuple[Array, State]:
        after = before.clone()
        logits = np.zeros(shape, np.float32)
        self._plain_rows(rows, counts, after, range(len(counts)), logits, last_only)
        return logits, after

    def _plain_rows(
        self,
        tokens: NDArray[np.int32],
        counts: NDArray[np.int32],
        pool: State,
        rows: Iterable[int],
        logits: Array,
        last_only: bool,
    ) -> None:
        assert self._plain is not None
        ends = np.cumsum(counts)
        for i, (row, count, end) in enumerate(zip(rows, counts.tolist(), ends.tolist())):
            if count:
                place: int | slice = i if last_only else slice(end - count, end)
                fields = {name: x[:, row] for name, x in pool.items()}
                logits[place] = self._plain.forward(tokens[end - count : end].tolist(), fields, last_only)


def tuned_state(weights: Weights, config: NativeConfig) -> Array | None:
    """[L, H, N, N], value × key."""
    if not config.time_state:
        return None
    return np.stack([to_float(weights[f"blocks.{i}.att.time_state"]) for i in range(config.n_layer)])


def check_threads(threads: int | None) -> None:
    if threads is not None and not 1 <= threads <= 1024:
        raise ConfigError(f"threads is {threads}, expected 1 to 1024")


def available_cores() -> int:
    """Physical cores among those that this process may use, no more than its container's quota (rounded up) keeps busy.

    Where the system does not tell, all of its processors.
    """
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
    siblings = set()
    for cpu in cpus:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(cpu))
    return max(1, math.ceil(min(len(siblings), cpu_quota())))


def cpu_quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Processors whose time a container may use: the least of its control group (version 2) and those around it."""
    try:
        names = [line.removeprefix("0::/") for line in own.read_text().splitlines() if line.startswith("0::/")]
    except OSError:
        names = []
    quota = math.inf
    for name in names:
        for group in groups / name, *(groups / name).parents:
            try:
                microseconds, period = (group / "cpu.max").read_text().split()
            except (OSError, ValueError):  # the outermost has none
                continue
            if microseconds != "max":
                quota = min(quota, int(microseconds) / int(period))
    return quota
