"""One request's way through the engine: tokenised and compiled off the event loop, timed, counted, cancelled."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from receptance.engine.engine import EngineError, Handle
from receptance.engine.params import SamplingParams
from receptance.engine.request import Completion, Grammar, GrammarError, Request, Token
from receptance.errors import CheckpointError, ReceptanceError
from receptance.server import codec
from receptance.server.config import LimitConfig
from receptance.server.errors import ApiError, bad
from receptance.server.metrics import Metrics
from receptance.server.schemas import Sampling
from receptance.server.served import Models, Place, ServedModel

T = TypeVar("T")
INLINE = 4000  # bytes of a request, or characters of a text, that are dealt with at once: a thread would take longer


@dataclass(eq=False)
class Generation:
    """A request that was admitted and is running. Leave it with `close`, which cancels what is still running."""

    model: ServedModel
    handle: Handle
    place: Place
    metrics: Metrics
    deadline: float
    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    is_closed: bool = False

    @property
    def completions(self) -> list[Completion]:
        return self.handle.completions

    @property
    def prompt_tokens(self) -> int:
        return len(self.completions[0].prompt_ids)

    @property
    def cached_tokens(self) -> int:
        return self.completions[0].cached_tokens

    @property
    def completion_tokens(self) -> int:
        return sum(len(completion.tokens) for completion in self.completions)

    async def events(self) -> AsyncGenerator[tuple[int, Token], None]:
        """Tokens as they are drawn. Raises ApiError after the deadline, and when the model fails."""
        last: dict[int, float] = {}
        stream = self.handle.aevents()
        try:
            async with asyncio.timeout_at(self.deadline):
                async for index, token in stream:
                    now = time.perf_counter()
                    if not self.first_token:
                        self.first_token = now
                        self.metrics.first_token(self.model.name, now - self.started)
                    if index in last:
                        self.metrics.between_tokens(self.model.name, now - last[index])
                    last[index] = now
                    yield index, token
        except TimeoutError:
            raise ApiError(504, "the request took longer than this server allows", code="timeout") from None
        except EngineError:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5) from None
        except GrammarError as error:
            raise bad(str(error), code="grammar_too_complex") from None
        except ReceptanceError as error:
            raise ApiError(500, str(error), code="model_failed") from None
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    async def finish(self) -> list[Completion]:
        async for _ in self.events():
            pass
        return self.completions

    async def state_data(self, index: int) -> str:
        """The state after a finished text, as `state_data` takes it."""
        data = await asyncio.to_thread(codec.encode, self.completions[index].state, self.model.model)
        return base64.b64encode(data).decode()

    async def cancel(self) -> list[Completion]:
        """End the texts where they are, and wait until their states are there."""
        if not self.handle.is_done:
            with suppress(EngineError):
                self.handle.cancel()
        with suppress(Exception):
            await asyncio.wrap_future(self.handle.future)
        return self.completions

    def close(self) -> None:
        """May be called again."""
        if self.is_closed:
            return
        self.is_closed = True
        left = "error"
        if not self.handle.is_done:
            left = "cancelled"  # before long
            with suppress(EngineError):
                self.handle.cancel()
        self.place.leave()
        reasons: list[str] = [completion.finish_reason or left for completion in self.completions]
        self.metrics.finished(
            self.model.name, reasons, self.prompt_tokens if self.completions else 0,
            self.cached_tokens if self.completions else 0, self.completion_tokens, time.perf_counter() - self.started,
        )  # fmt: skip


async def aside(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """What `work` gives, off the event loop where it will take long. size: of what it works on, in bytes."""
    return work(*arguments) if size <= INLINE else await asyncio.to_thread(work, *arguments)


async def tokenize(model: ServedModel, text: str, limits: LimitConfig) -> list[int]:
    """The ids of a prompt. Raises ApiError for one that is too long."""
    if len(text) > limits.prompt_bytes:
        raise bad(f"the prompt has {len(text):,} characters, at most {limits.prompt_bytes:,} are allowed", "prompt")
    try:
        return await aside(len(text), model.tokenizer.encode, text)
    except ReceptanceError as error:
        raise bad(str(error)) from None


async def start_of(model: ServedModel, request: Sampling) -> tuple[Any, str | None]:
    """The state that a request begins with (None: nothing was read), and its name for the cache of prefixes.

    Raises ApiError for a state that is not there, and for one that was sent and is none of this model's.
    """
    if request.state_data is None:
        name = request.state or ""
        state = model.start(name)
        return state, None if state is None else f"state:{name}"
    if request.state:
        raise bad("give state or state_data", "state_data")

    def read(text: str) -> Any:
        state = codec.decode(base64.b64decode(text, validate=True), model.model)
        if state is None:
            raise CheckpointError("it holds no tensors")
        return state

    try:
        return await asyncio.to_thread(read, request.state_data), None
    except (CheckpointError, ValueError) as error:
        raise bad(f"state_data: {error}", "state_data", "invalid_state") from None


def check_ids(model: ServedModel, ids: Sequence[int], limits: LimitConfig) -> list[int]:
    vocab = model.model.config.vocab_size
    if len(ids) > limits.prompt_bytes:
        raise bad(f"the prompt has {len(ids):,} tokens, at most {limits.prompt_bytes:,} are allowed", "prompt")
    wrong = next((i for i in ids if i >= vocab), None)
    if wrong is not None:
        raise bad(f"the prompt has the token id {wrong}, this model's are 0 to {vocab - 1}", "prompt")
    return list(ids)


async def start(
    models: Models,
    metrics: Metrics,
    limits: LimitConfig,
    model: ServedModel,
    ids: list[int],
    params: SamplingParams,
    *,
    id: str,
    state: Any = None,
    state_key: str | None = None,
    n: int = 1,
    priority: int = 0,
    keep_state: bool = False,
    grammar: Grammar | None = None,
) -> Generation:
    """Put it in line. Raises ApiError: 429 where there is no room, 400 for what the engine refuses."""
    deadline = asyncio.get_running_loop().time() + limits.request_seconds
    place = models.admit(n)
    try:
        if grammar is not None:
            await asyncio.to_thread(model.engine.check_grammar, grammar)
        request = Request(
            ids, params, state, state_key, n=n, priority=priority, keep_state=keep_state, grammar=grammar, id=id
        )
        handle = await model.engine.asubmit(request)
    except EngineError:
        place.leave()
        raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5) from None
    except ReceptanceError as error:
        place.leave()
        raise bad(str(error)) from None
    except BaseException:
        place.leave()
        raise
    return Generation(model, handle, place, metrics, deadline)
