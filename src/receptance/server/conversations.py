"""Sessions as the routes use them: the state to go on from, and a turn that is kept when it has ended."""

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from receptance.engine.engine import EngineError
from receptance.engine.request import Completion
from receptance.errors import CheckpointError
from receptance.server import codec
from receptance.server.errors import ApiError, bad
from receptance.server.schemas import ImportedSession
from receptance.server.served import ServedModel
from receptance.server.store import Conflict, Full, Missing, Session, Store, Turn
from receptance.state_file import metadata, word

log = logging.getLogger("receptance.server")
T = TypeVar("T")
WAIT_SECONDS = 10.0  # for another turn of the same session


@dataclass(frozen=True, eq=False)
class Position:
    """Where a session is. state: after the turns so far, None at the very start. unread: text that it has not read yet,
    because its state was dropped to make room. key: names the state, so that prefixes after it can be shared."""

    session: Session
    state: Any
    unread: str
    key: str | None

    @property
    def is_begun(self) -> bool:
        return self.session.depth > 0


class Conversations:
    """models: those whose caches forget what went with a session."""

    def __init__(self, store: Store, memory_bytes: int, models: Iterable[ServedModel] = ()):
        self.store, self._models = store, models
        self._memory: OrderedDict[str, Any] = OrderedDict()  # states by turn, the least recently used first
        self._memory_bytes, self._most_bytes = 0, memory_bytes
        self._threads = ThreadPoolExecutor(4, "receptance-store")
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """A call of the store, off the event loop. Its errors become the client's."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        except Missing as error:
            raise ApiError(404, str(error), code="session_not_found") from None
        except Conflict as error:
            raise ApiError(409, str(error), code="session_changed") from None
        except Full as error:
            raise ApiError(429, str(error), code="too_many_sessions", retry_after=60) from None
        except Exception:  # a full disk, a Redis that is gone
            log.exception("the store of sessions failed")
            message = "the store of sessions failed; the server's log says more"
            raise ApiError(500, message, code="store_failed") from None
        finally:
            self._forget()

    def _forget(self) -> None:
        """What is held in memory of turns that went."""
        while self.store.removed:
            turn = self.store.removed.popleft()
            state, _ = self._memory.pop(turn, (None, None))
            self._memory_bytes -= 0 if state is None else state.nbytes
            for model in self._models:
                with suppress(EngineError):
                    model.engine.forget(f"turn:{turn}")

    def close(self) -> None:
        self._threads.shutdown()
        self.store.close()

    @asynccontextmanager
    async def turn_of(self, id: str) -> AsyncIterator[None]:
        """One turn of a session at a time. Raises ApiError 409 if another does not end soon."""
        lock, users = self._locks.get(id, (asyncio.Lock(), 0))
        self._locks[id] = (lock, users + 1)
        try:
            try:
                await asyncio.wait_for(lock.acquire(), WAIT_SECONDS)
            except TimeoutError:
                raise ApiError(409, "another turn of this session is under way", code="session_busy") from None
            try:
                yield
            finally:
                lock.release()
        finally:
            lock, users = self._locks.pop(id)
            if users > 1:
                self._locks[id] = (lock, users - 1)

    # States -----------------------------------------------------------------------------------------------------------

    async def position(self, session: Session, model: ServedModel) -> Position:
        """The nearest turn whose state is there, and what came after it."""
        if session.head is None:
            return Position(
                session, model.start(session.start), "", f"state:{session.start}" if session.start else None
            )
        state = await self.state(session.head, model)
        if state is not None:
            return Position(session, state, "", f"turn:{session.head}")
        unread: list[str] = []
        for turn in reversed(await self.call(self.store.turns, session.head)):
            if unread and (state := await self.state(turn.id, model)) is not None:
                return Position(session, state, "".join(reversed(unread)), f"turn:{turn.id}")
            unread.append(turn.raw)
        return Position(session, model.start(session.start), "".join(reversed(unread)), None)

    async def state(self, turn: str, model: ServedModel) -> Any:
        """The state after a turn, or None if it was dropped, is damaged, or belongs to other weights."""
        if turn in self._memory:
            self._memory.move_to_end(turn)
            state, fingerprint = self._memory[turn]
            return state if fingerprint == model.model.fingerprint else None
        return await self.call(self._read, turn, model)

    def _read(self, turn: str, model: ServedModel) -> Any:
        data = self.store.state(turn)
        if data is None:
            return None
        try:
            return codec.decode(data, model.model)
        except CheckpointError:
            return None

    def _remember(self, turn: str, state: Any, model: ServedModel) -> None:
        if state is None or state.nbytes > self._most_bytes:
            return
        self._memory[turn] = (state, model.model.fingerprint)
        self._memory_bytes += state.nbytes
        while self._memory_bytes > self._most_bytes:
            _, (oldest, _) = self._memory.popitem(last=False)
            self._memory_bytes -= oldest.nbytes

    # Turns ------------------------------------------------------------------------------------------------------------

    async def keep(self, position: Position, turn: Turn, completion: Completion, model: ServedModel) -> Session:
        """Make a finished turn part of its session; it is on disk when this returns."""
        session = position.session

        def write() -> Session:
            data = None if completion.state is None else codec.encode(completion.state, model.model)
            return self.store.append(session.owner, session.id, session.head, turn, data)

        kept = await self.call(write)
        self._remember(turn.id, completion.state, model)
        return kept

    async def keep_response(self, session: Session, turn: Turn, completion: Completion, model: ServedModel) -> None:
        """A response: a session of its own, whose last turn this is."""

        def write() -> None:
            data = None if completion.state is None else codec.encode(completion.state, model.model)
            self.store.create(session, [turn], data)

        await self.call(write)
        self._remember(turn.id, completion.state, model)

    # Files ------------------------------------------------------------------------------------------------------------

    async def export(self, session: Session, model: ServedModel) -> bytes:
        """One safetensors file: the state after the last turn, with the turns as JSON in its metadata."""
        state = None if session.head is None else await self.state(session.head, model)
        turns = await self.call(self.store.turns, session.head)
        names = (
            "user",
            "assistant",
            "raw",
            "reasoning",
            "prompt_tokens",
            "completion_tokens",
            "finish_reason",
            "created",
        )
        about = {
            "model": session.model,
            "title": session.title,
            "tags": session.tags,
            "system": session.system,
            "state": session.start,
            "turns": [{name: getattr(turn, name) for name in names} for turn in turns],
        }
        return await asyncio.to_thread(lambda: codec.encode(state, model.model, session=json.dumps(about)))

    async def read_file(self, data: bytes, owner: str, find: Callable[[str], ServedModel]) -> Session:
        """A new session from an exported file. Raises ApiError for anything that is none, or of another model."""

        def read() -> tuple[ImportedSession, ServedModel, Any]:
            session = word(metadata(data), "session")
            if session is None:
                raise CheckpointError("a safetensors file, but not an exported session")
            about = ImportedSession.model_validate_json(session)
            model = find(about.model or "")
            return about, model, codec.decode(data, model.model)

        try:
            about, model, state = await asyncio.to_thread(read)
        except CheckpointError as error:
            raise bad(f"the file cannot be imported: {error}", code="invalid_file") from None
        except ValidationError as error:
            raise bad(
                f"the file cannot be imported: {error.error_count()} fields are wrong", code="invalid_file"
            ) from None
        model.start(about.state)
        session = Session(owner, model.name, about.title, tuple(about.tags), about.system, about.state)
        turns = [Turn(**turn.model_dump(), start=about.state) for turn in about.turns]
        if not turns and state is not None:
            raise bad("the file cannot be imported: a state without turns", code="invalid_file")
        data_of_state = None if state is None else await asyncio.to_thread(codec.encode, state, model.model)
        return await self.call(self.store.create, session, turns, data_of_state)


def as_json(session: Session, turns: list[Turn] | None = None) -> dict[str, Any]:
    """As clients see it."""
    parent = None if session.parent_id is None else {"id": session.parent_id, "turn": session.parent_turn}
    seen: dict[str, Any] = {
        "id": session.id,
        "object": "session",
        "model": session.model,
        "title": session.title,
        "tags": list(session.tags),
        "system": session.system,
        "state": session.start,
        "created": session.created,
        "updated": session.updated,
        "parent": parent,
        "tokens": session.tokens,
        "bytes": session.bytes,
        "depth": session.depth,
    }
    if turns is not None:
        names = ("user", "assistant", "reasoning", "prompt_tokens", "completion_tokens", "finish_reason", "created")
        seen["turns"] = [{"index": i, **{name: getattr(turn, name) for name in names}} for i, turn in enumerate(turns)]
    return seen


def check_model(session: Session, asked: str | None, find: Callable[[str], ServedModel]) -> ServedModel:
    """The session's model. Raises ApiError if the request names another."""
    model = find(session.model)
    if asked and find(asked) is not model:
        raise bad(f"the session belongs to the model {session.model!r}, not {asked[:200]!r}", "model")
    return model
