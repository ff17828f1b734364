"""`Engine`: many requests at once on one model, from any thread or event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack, cast

from numpy.typing import NDArray

from receptance.engine.core import Core, Stats
from receptance.engine.params import SamplingFields, SamplingParams
from receptance.engine.protocols import Model
from receptance.engine.request import Completion, Grammar, Prompt, Request, Score, Scored, Token
from receptance.engine.runner import Runner
from receptance.engine.scheduler import PIECE, Limits
from receptance.engine.scheduler import Sequence as Scheduled
from receptance.engine.speculation import Drafter, DraftModel, PromptLookup
from receptance.errors import ConfigError, ReceptanceError
from receptance.tokenizers import Tokenizer

SLOTS = {"cpu": 64, "cuda": 256}
CHUNKS = {"cpu": (512, 128), "cuda": (8192, 2048)}  # tokens of a step, and of one in which texts are written


class EngineError(ReceptanceError):
    """The engine was closed, or what it was doing failed."""


class Waiting:
    """A task of an event loop that waits for news. future: done when there may be some."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.future: asyncio.Future[None] = loop.create_future()


class Handle:
    """A request that was submitted: its texts as they grow. Iterate over it, or over it in an event loop.

    completions: one for each of the request's n texts, each with its tokens, its finish reason and its state.
    future: gives them when all are finished, or raises what made one fail.
    """

    def __init__(self, engine: "Engine", request: Request):
        self.request = request
        self.completions: list[Completion] = []
        self.future: Future[list[Completion]] = Future()
        self.future.set_running_or_notify_cancel()  # a cancelled waiter must not cancel what the engine's thread sets
        self._engine = engine
        self._news: deque[int] = deque()  # the texts of tokens that nobody has taken yet, in the order of drawing
        self._taken = [0] * request.n  # tokens of each text
        self._changed = threading.Condition()
        self._waiting: list[Waiting] = []
        self._open = request.n
        self.is_done = False
        self._scheduled: list[Scheduled] = []

    def result(self, timeout: float | None = None) -> list[Completion]:
        """Wait for all texts. Raises what made one fail, and TimeoutError."""
        return self.future.result(timeout)

    def cancel(self) -> None:
        """End all its texts with the finish reason "cancelled"; their places are free before the next step."""

        def stop() -> None:
            for sequence in self._scheduled:
                self._engine._core.cancel(sequence)

        self._engine._do(stop)

    def events(self) -> Iterator[tuple[int, Token]]:
        """(index of the text, token), as they are drawn."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._news) or self.is_done)
                if not self._news:
                    break
                event = self._take()
            yield event
        self.result()

    def __iter__(self) -> Iterator[str]:
        """The pieces of the text, none of them empty; of a request with n = 1."""
        return (token.text for _, token in self.events() if token.text)

    async def aevents(self) -> AsyncIterator[tuple[int, Token]]:
        """`events` without blocking the event loop. Leaving it early cancels the request."""
        waiting = Waiting(asyncio.get_running_loop())
        with self._changed:
            self._waiting.append(waiting)
        try:
            while True:
                waiting.future = waiting.loop.create_future()
                while self._news:
                    yield self._take()
                if self.is_done and not self._news:
                    break
                await waiting.future
        finally:
            with self._changed:
                self._waiting.remove(waiting)
            if not self.is_done:
                self.cancel()
        self.result()

    async def __aiter__(self) -> AsyncIterator[str]:
        async for _, token in self.aevents():
            if token.text:
                yield token.text

    async def aresult(self) -> list[Completion]:
        async for _ in self.aevents():
            pass
        return self.completions

    def _take(self) -> tuple[int, Token]:
        index = self._news.popleft()
        self._taken[index] += 1
        return index, self.completions[index].tokens[self._taken[index] - 1]

    def _tell(self, index: int, token: Token | None) -> None:
        """From the engine's thread: a token of a text, which is in its completion by now, or its end."""
        if token is not None:
            self._news.append(index)
        else:
            self._open -= 1
            if self._open == 0:
                self._scheduled = []  # they refer to us: the texts would wait for the garbage collector
                error = next((c.error for c in self.completions if c.error is not None), None)
                self._finish(error)
        self._engine._told.add(self)

    def _finish(self, error: Exception | None) -> None:
        if error is None:
            self.future.set_result(self.completions)
        else:
            self.future.set_exception(error)
        self.is_done = True

    def _wake(self) -> list[Waiting]:
        """Wake the threads that wait for it. Gives who waits in event loops."""
        with self._changed:
            self._changed.notify_all()
            return list(self._waiting)


class Engine:
    """Runs any number of requests at once on one model; each text is the one that its request gives alone.

    model, tokenizer: as `receptance.load` and `receptance.tokenizer` give them; or a model's path or name, whose
    tokenizer is found beside it.
    slots: sequences that have a state in the model's batch at once; more wait. None: 64 on a CPU, 256 on a GPU.
    cache_bytes: of prefixes that were read, kept for requests that begin alike; 0: none.
    host_bytes: of states put aside, beyond which they go to files in `folder` (None: a temporary one).
    speculate: "lookup" guesses what was written before; a model (smaller, of the same tokenizer) guesses itself; None.
    limits: how many tokens a step takes; None: by device.
    invariant: every text is, token for token, the one that its request gives alone, where products of other sizes round
    otherwise. On a GPU it costs speed; on a CPU it needs a native model whose `is_invariant` holds, as with
    dtype="float32".
    weights: "int8" or "float8": on a GPU, steps of few texts read the large matrices in 8 bits; docs/engine.md has the
    price. "full": in the model's own dtype.
    Use it as a context manager, or close it.
    """

    def __init__(
        self,
        model: Model | str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int | None = None,
        cache_bytes: int = 256 << 20,
        host_bytes: int = 2 << 30,
        folder: str | Path | None = None,
        speculate: Literal["lookup"] | Model | None = "lookup",
        limits: Limits | None = None,
        invariant: bool = False,
        weights: str = "full",
    ):
        if isinstance(model, str | Path):
            from receptance.checkpoint import load
            from receptance.tokenizers import tokenizer as find_tokenizer

            tokenizer = tokenizer or find_tokenizer(model)
            model = load(model)
        if tokenizer is None:
            raise ConfigError("the engine needs the model's tokenizer")
        device = "cuda" if "cuda" in str(getattr(model, "device", "cpu")) else "cpu"
        slots = SLOTS[device] if slots is None else slots
        if not isinstance(slots, int) or not 1 <= slots <= 1 << 20:
            raise ConfigError(f"slots is {slots!r}, expected a whole number from 1")
        if cache_bytes < 0 or host_bytes < 0:
            raise ConfigError("cache_bytes and host_bytes are sizes: 0 or more")
        step, busy = CHUNKS[device]
        limits = replace(limits or Limits(slots, step, busy), slots=slots)
        if invariant and device == "cuda":  # one token is another kernel than several: drafts would round otherwise
            limits, speculate = replace(limits, align=PIECE), None
        drafter: Drafter | None = None
        if speculate == "lookup":
            drafter = PromptLookup()
        elif speculate is not None:
            drafter = DraftModel(make_runner(speculate, 16, tokenizer))
        self.model, self.tokenizer = model, tokenizer
        self._core = Core(
            model,
            tokenizer,
            make_runner(model, slots, tokenizer, invariant, weights),
            limits,
            cache_bytes=cache_bytes,
            host_bytes=host_bytes,
            folder=None if folder is None else str(folder),
            drafter=drafter,
        )
        self._lock = threading.Condition()
        self._asked: deque[Callable[[], object]] = deque()  # to be done between steps
        self._told: set[Handle] = set()  # who has news since the last `_wake_told`
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="receptance-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> Stats:
        return self._core.stats

    @property
    def load(self) -> tuple[int, int]:
        """Sequences that run, and that wait."""
        return len(self._core.scheduler.running), len(self._core.scheduler.waiting)

    # One request ------------------------------------------------------------------------------------------------------

    def submit(self, request: Request | Prompt, **fields: Unpack[SamplingFields]) -> Handle:
        """Put a request in line. Raises ConfigError and GenerationError for what cannot be run."""
        handle, started = self._start(request, fields)
        started.result()
        return handle

    async def asubmit(self, request: Request | Prompt, **fields: Unpack[SamplingFields]) -> Handle:
        """`submit` without blocking the event loop. A cancelled task cancels the request."""
        handle, started = self._start(request, fields)
        try:
            await asyncio.wrap_future(started)
        except asyncio.CancelledError:
            with suppress(EngineError):
                handle.cancel()
            raise
        return handle

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile it, in the caller's thread, for requests to come. Raises ConfigError for one that is wrong."""
        self._core.constraint().matcher(grammar)

    def forget(self, state_key: str) -> None:
        """Drop the prefixes that were read after the state of this name, which will not be asked for again."""
        self._do(lambda: self._core.cache.drop_root(state_key))

    def submit_unchecked(self, request: Request) -> Handle:
        """`submit` without waiting for the engine to look at it: what is wrong comes with the result."""
        handle, started = self._start(request, {})
        started.add_done_callback(lambda done: handle._finish(error) if (error := done.exception()) else None)  # type: ignore[arg-type]
        return handle

    def _start(self, request: Request | Prompt, fields: SamplingFields) -> tuple[Handle, Future[None]]:
        if not isinstance(request, Request):
            request = Request(request, SamplingParams(**fields))
        elif fields:
            request = replace(request, params=replace(request.params, **fields))
        handle = Handle(self, request)

        def watch(completion: Completion) -> Callable[[Token | None], None]:
            handle.completions.append(completion)
            return partial(handle._tell, completion.index)

        def start() -> None:
            handle._scheduled = self._core.submit(request, watch)

        return handle, self._do(start)

    def generate(
        self,
        requests: Request | Prompt | Sequence[Request | Prompt],
        params: SamplingParams | None = None,
        **fields: Unpack[SamplingFields],
    ) -> list[Completion]:
        """Run one or many requests to their ends: their texts in order (n for each request).

        params, fields: of prompts that are no `Request`. A list of numbers is one prompt of token ids.
        """
        params = replace(params or SamplingParams(), **fields)
        asked: list[Any] = (
            list(requests) if isinstance(requests, Sequence) and not isinstance(requests, str) else [requests]
        )
        if asked and isinstance(asked[0], int):
            asked = [asked]
        handles: list[Handle] = []
        try:
            for one in asked:
                handles.append(self.submit(one if isinstance(one, Request) else Request(one, params)))
            return [completion for handle in handles for completion in handle.result()]
        except BaseException:  # nobody will take the others
            with suppress(EngineError):
                for handle in handles:
                    handle.cancel()
            raise

    async def agenerate(self, request: Request | Prompt, **fields: Unpack[SamplingFields]) -> list[Completion]:
        """`generate` for one request, without blocking the event loop; a cancelled task cancels the request."""
        return await (await self.asubmit(request, **fields)).aresult()

    # Whole texts ------------------------------------------------------------------------------------------------------

    def score(self, scores: Iterable[Score | tuple[Prompt, Prompt]]) -> list[Scored]:
        """Log-likelihoods of continuations; contexts that begin alike are read once."""
        futures = [self.submit_score(score if isinstance(score, Score) else Score(*score)) for score in scores]
        return [future.result() for future in futures]

    def submit_score(self, score: Score) -> Future[Scored]:
        return self._future(partial(self._core.submit_score, score))

    def embed(self, prompts: Iterable[Prompt]) -> list[NDArray[Any]]:
        """A vector [C] for each text, of length 1: what the last layer's channel mix reads at its last token."""
        futures = [self.submit_embedding(prompt) for prompt in prompts]
        return [future.result() for future in futures]

    def submit_embedding(self, prompt: Prompt) -> Future[NDArray[Any]]:
        return self._future(partial(self._core.submit_embedding, prompt))

    def _future(self, start: Callable[[Callable[[Any], None]], object]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def done(result: Any) -> None:
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        def begin() -> None:
            try:
                start(done)
            except Exception as error:
                future.set_exception(error)

        self._do(begin)
        return future

    # The thread -------------------------------------------------------------------------------------------------------

    def _do(self, action: Callable[[], object]) -> Future[None]:
        """Have the engine's thread do something between two steps."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()

        def run() -> None:
            try:
                action()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed")
            self._asked.append(run)
            self._lock.notify()
        return done

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: bool(self._asked) or self._closed or self._core.has_work)
                if self._closed:
                    break
                asked, self._asked = self._asked, deque()
            while asked:
                asked.popleft()()  # nothing of it is held while the thread sleeps
            self._wake_told()
            try:
                if self._core.has_work:
                    self._core.step()
            except (
                Exception
            ) as error:  # the model or the machine failed: what was under way is lost, the engine goes on
                self._core.fail_all(error)
            self._wake_told()
        for action in self._asked:
            action()
        self._core.fail_all(EngineError("the engine was closed before the text was finished"))
        self._wake_told()

    def _wake_told(self) -> None:
        """Once a step, and each event loop once: a wake-up costs as much as drawing some tokens."""
        loops: dict[asyncio.AbstractEventLoop, list[Waiting]] = {}
        while self._told:
            for waiting in self._told.pop()._wake():
                loops.setdefault(waiting.loop, []).append(waiting)
        for loop, found in loops.items():
            with suppress(RuntimeError):  # it was closed meanwhile
                loop.call_soon_threadsafe(_wake_all, found)

    def close(self) -> None:
        """End: requests under way fail with EngineError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.notify()
        self._thread.join()
        self._core.pool.close()


def _wake_all(found: list[Waiting]) -> None:
    for waiting in found:
        if not waiting.future.done():
            waiting.future.set_result(None)


def make_runner(model: Any, slots: int, tokenizer: Tokenizer, invariant: bool = False, weights: str = "full") -> Runner:
    """The runner of this model, on its device. Raises ConfigError where there is none of the kind that is asked for."""
    if weights not in ("full", "int8", "float8"):
        raise ConfigError(f"weights is {weights!r}, expected full, int8 or float8")
    vocab = min(tokenizer.vocab_size, model.config.vocab_size)
    if model.engine != "native" and model.device.type == "cuda":
        from receptance.engine.gpu.versions import misfit

        if misfit(model, model.dtype) is None:
            from receptance.engine.gpu_runner import GpuRunner

            bits = cast(Literal["full", "int8", "float8"], weights)
            return GpuRunner(
                model, slots, vocab, tokenizer.token_bytes, tokenizer.eos_id, invariant=invariant, weights=bits
            )
    if weights != "full":
        raise ConfigError(
            f"weights={weights!r} needs a model with kernels for a GPU, in float16 or bfloat16 there; "
            "on a CPU, 8 bits are a model's dtype"
        )
    if invariant and not (model.engine == "native" and model.is_invariant):
        raise ConfigError(
            "invariant=True needs a model with kernels for a GPU, in float16 or bfloat16 there; "
            "or on a CPU one loaded with engine='native' and dtype='float32', from weights that are not in blocks"
        )
    if model.engine == "native":
        from receptance.engine.native_runner import NativeRunner

        return NativeRunner(model, slots, vocab, tokenizer.token_bytes, tokenizer.eos_id)
    from receptance.engine.torch_runner import TorchRunner

    return TorchRunner(model, slots, vocab, tokenizer.token_bytes, tokenizer.eos_id)
