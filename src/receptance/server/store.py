"""What is kept of conversations: a tree of turns, of which each session is a branch.

A turn knows its parent, so that a fork is a second name for the same turn and a rewind a step towards the root. A turn
that no session and no later turn leads to is removed. The state after a turn is a blob that may be dropped to make
room: the texts of the turns are then read again.
`sqlite_store.py` keeps all this in a folder, `redis_store.py` in Redis.
"""

import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from receptance.errors import ReceptanceError
from receptance.server.names import new_id


class Conflict(ReceptanceError):
    """The session has moved on since the turn began."""


class Missing(ReceptanceError):
    """There is no such session or turn."""


class Full(ReceptanceError):
    """As many sessions as are allowed."""


@dataclass(frozen=True)
class Turn:
    """raw: exactly what the model read and wrote. start: the tuned state before the first turn, "" for the model's own.

    depth: number of turns up to here. tokens: of all of them.
    """

    user: str
    assistant: str
    raw: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    reasoning: str | None = None
    start: str = ""
    parent: str | None = None
    depth: int = 1
    tokens: int = 0
    created: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: new_id("turn"))


@dataclass(frozen=True)
class Session:
    """head: its last turn. body: of a response, what was answered. bytes: of its state, when it was last written."""

    owner: str
    model: str
    title: str = ""
    tags: tuple[str, ...] = ()
    system: str | None = None
    start: str = ""
    parent_id: str | None = None
    parent_turn: int | None = None
    head: str | None = None
    depth: int = 0
    tokens: int = 0
    bytes: int = 0
    body: str | None = None
    kind: Literal["session", "response"] = "session"
    created: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: new_id("sess"))


def after(parent: Turn | None, turn: Turn) -> Turn:
    """The turn as it is when it follows `parent`."""
    read = turn.prompt_tokens + turn.completion_tokens
    if parent is None:
        return replace(turn, parent=None, depth=1, tokens=read)
    return replace(turn, parent=parent.id, depth=parent.depth + 1, tokens=parent.tokens + read)


class Store(Protocol):
    """Calls block until what they changed is on disk (or with Redis). Safe to call from several threads.

    removed: turns that went (or would have, in a change that failed), for whoever holds something of them to take out.
    """

    removed: deque[str]

    def create(self, session: Session, turns: list[Turn] | None = None, state: bytes | None = None) -> Session:
        """A new session, with turns of its own and the state after them. Raises Full, and Missing for its head."""
        ...

    def get(self, owner: str, id: str, kind: str = "session") -> Session:
        """Raises Missing, as all that take an id."""
        ...

    def find(self, owner: str, tag: str | None, limit: int, after: str | None) -> list[Session]:
        """The last updated first."""
        ...

    def patch(self, owner: str, id: str, title: str | None, tags: tuple[str, ...] | None) -> Session: ...
    def delete(self, owner: str, id: str, kind: str = "session") -> None: ...
    def fork(self, owner: str, id: str, turn: int | None) -> Session: ...
    def rewind(self, owner: str, id: str, turn: int) -> Session: ...

    def append(self, owner: str, id: str, head: str | None, turn: Turn, state: bytes | None) -> Session:
        """Add a turn after `head`. Raises Conflict if the session has another head by now."""
        ...

    def turns(self, head: str | None) -> list[Turn]:
        """From the first to `head`."""
        ...

    def ancestor(self, head: str, depth: int) -> str:
        """The turn at this depth on the way to `head`."""
        ...

    def state(self, turn: str) -> bytes | None: ...
    def has_state(self, turn: str) -> bool: ...
    def close(self) -> None: ...
