"""Conversations in Redis or Valkey, for several servers that share them. Needs the extra `redis`.

What Redis acknowledges is as safe as its own persistence: run it with `appendonly yes` and `appendfsync always` for
what a folder gives. Changes are transactions that are tried again when another server was quicker.
"""

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, TypeVar

from receptance.errors import ConfigError
from receptance.server.names import new_id
from receptance.server.store import Conflict, Full, Missing, Session, Turn, after

T = TypeVar("T")
PREFIX = "receptance:"
TRIES = 50


class RedisStore:
    """url: redis://[:password@]host:port/db. Raises ConfigError where no server answers."""

    def __init__(self, url: str, state_bytes: int, sessions: int, responses: int):
        try:
            import redis
        except ModuleNotFoundError:
            raise ConfigError("sessions.redis needs the package redis: pip install 'receptance[redis]'") from None
        self._library = redis
        self.removed: deque[str] = deque()
        self.state_bytes, self.most = state_bytes, {"session": sessions, "response": responses}
        try:
            self._redis: Any = redis.Redis.from_url(url, socket_timeout=30, health_check_interval=30)
            self._redis.ping()
        except (redis.RedisError, ValueError) as error:  # the URL may hold a password
            raise ConfigError(f"sessions.redis: no Redis answers there ({type(error).__name__})") from None

    # Keys -------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _session_key(owner: str, id: str, kind: str) -> str:
        return f"{PREFIX}{kind}:{owner}:{id}"

    @staticmethod
    def _listing(owner: str, kind: str) -> str:
        return f"{PREFIX}{kind}s:{owner}"

    @staticmethod
    def _turn_key(id: str) -> str:
        return f"{PREFIX}turn:{id}"

    @staticmethod
    def _state_key(id: str) -> str:
        return f"{PREFIX}state:{id}"

    _used, _sizes, _total = f"{PREFIX}used", f"{PREFIX}sizes", f"{PREFIX}bytes"

    def _change(self, work: "Callable[[Any, Plan], T]") -> T:
        """Read with `work`'s first argument, plan writes with its second; all of them are made, or none."""
        for _ in range(TRIES):
            with self._redis.pipeline() as pipe:
                plan = Plan(self, pipe)
                try:
                    result = work(pipe, plan)
                    plan.write()
                    return result
                except self._library.WatchError:
                    continue
        raise Conflict("the session is being changed by others")

    # Sessions ---------------------------------------------------------------------------------------------------------

    def create(self, session: Session, turns: list[Turn] | None = None, state: bytes | None = None) -> Session:
        def work(pipe: Any, plan: Plan) -> Session:
            parent = None if session.head is None else plan.turn(session.head)
            for turn in turns or []:
                parent = after(parent, turn)
                plan.add_turn(parent)
            made = replace(session, head=parent.id if parent else None, depth=parent.depth if parent else 0)
            made = replace(made, tokens=parent.tokens if parent else 0, bytes=len(state or b"") or session.bytes)
            self._make_room(pipe, plan, made)
            plan.put_session(made)
            plan.retain(made.head)
            plan.add_state(made.head, state)
            return made

        made = self._change(work)
        self._trim()
        return made

    def _make_room(self, pipe: Any, plan: "Plan", session: Session) -> None:
        listing = self._listing(session.owner, session.kind)
        if pipe.zcard(listing) < self.most[session.kind]:
            return
        if session.kind == "session":
            raise Full(f"there are {self.most['session']:,} sessions; delete some")
        for oldest in pipe.zrange(listing, 0, 0):
            gone = plan.session(session.owner, oldest.decode(), session.kind)
            plan.drop_session(gone)
            plan.release(gone.head)

    def get(self, owner: str, id: str, kind: str = "session") -> Session:
        data = self._redis.get(self._session_key(owner, id, kind))
        if data is None:
            raise Missing(f"there is no {kind} {id[:128]!r}")
        return _session_of(data)

    def find(self, owner: str, tag: str | None, limit: int, after: str | None) -> list[Session]:
        listing = self._listing(owner, "session")
        found: list[Session] = []
        start = 0
        if after is not None:
            rank = self._redis.zrevrank(listing, after)
            if rank is None:
                raise Missing(f"there is no session {after[:128]!r}")
            start = rank + 1
        while len(found) < limit:
            ids = self._redis.zrevrange(listing, start, start + 199)
            if not ids:
                break
            start += len(ids)
            rows = self._redis.mget([self._session_key(owner, id.decode(), "session") for id in ids])
            sessions = [_session_of(row) for row in rows if row is not None]
            found += [session for session in sessions if tag is None or tag in session.tags]
        return found[:limit]

    def patch(self, owner: str, id: str, title: str | None, tags: tuple[str, ...] | None) -> Session:
        def work(pipe: Any, plan: Plan) -> Session:
            session = plan.session(owner, id)
            made = replace(
                session,
                title=session.title if title is None else title,
                tags=session.tags if tags is None else tags,
                updated=time.time(),
            )
            plan.put_session(made)
            return made

        return self._change(work)

    def delete(self, owner: str, id: str, kind: str = "session") -> None:
        def work(pipe: Any, plan: Plan) -> None:
            session = plan.session(owner, id, kind)
            plan.drop_session(session)
            plan.release(session.head)

        self._change(work)

    def fork(self, owner: str, id: str, turn: int | None) -> Session:
        made_id = new_id("sess")

        def work(pipe: Any, plan: Plan) -> Session:
            source = plan.session(owner, id)
            depth = source.depth if turn is None else turn
            now = time.time()
            made = replace(plan.at(source, depth), id=made_id, created=now, updated=now)
            made = replace(made, parent_id=source.id, parent_turn=depth)
            self._make_room(pipe, plan, made)
            plan.put_session(made)
            plan.retain(made.head)
            return made

        return self._change(work)

    def rewind(self, owner: str, id: str, turn: int) -> Session:
        def work(pipe: Any, plan: Plan) -> Session:
            before = plan.session(owner, id)
            made = replace(plan.at(before, turn), updated=time.time())
            plan.retain(made.head)
            plan.put_session(made)
            plan.release(before.head)
            return made

        return self._change(work)

    def append(self, owner: str, id: str, head: str | None, turn: Turn, state: bytes | None) -> Session:
        def work(pipe: Any, plan: Plan) -> Session:
            session = plan.session(owner, id)
            if session.head != head:
                raise Conflict("the session has moved on since this turn began; the turn was not kept")
            added = after(None if head is None else plan.turn(head), turn)
            plan.add_turn(added)
            made = replace(session, head=added.id, depth=added.depth, tokens=added.tokens, updated=time.time())
            made = replace(made, bytes=len(state or b"") or session.bytes)
            plan.retain(added.id)
            plan.release(head)
            plan.put_session(made)
            plan.add_state(added.id, state)
            return made

        made = self._change(work)
        self._trim()
        return made

    # Turns and states -------------------------------------------------------------------------------------------------

    def turns(self, head: str | None) -> list[Turn]:
        found: list[Turn] = []
        while head is not None:
            data = self._redis.hget(self._turn_key(head), "turn")
            if data is None:
                break
            found.append(Turn(**json.loads(data)))
            head = found[-1].parent
        return found[::-1]

    def ancestor(self, head: str, depth: int) -> str:
        return self._change(lambda pipe, plan: plan.ancestor(head, depth))

    def state(self, turn: str) -> bytes | None:
        data: bytes | None = self._redis.get(self._state_key(turn))
        if data is not None:
            self._redis.zadd(self._used, {turn: time.time()}, xx=True)
        return data

    def has_state(self, turn: str) -> bool:
        return bool(self._redis.exists(self._state_key(turn)))

    def _trim(self) -> None:
        """Drop the states that were not used for longest, until there is room."""
        while int(self._redis.get(self._total) or 0) > self.state_bytes:
            oldest = self._redis.zrange(self._used, 0, 0)
            if not oldest or self._redis.zcard(self._used) == 1:
                return
            turn = oldest[0].decode()

            def work(pipe: Any, plan: Plan, turn: str = turn) -> None:
                pipe.watch(self._used)
                plan.drop_state(turn)

            self._change(work)

    def close(self) -> None:
        self._redis.close()


class Plan:
    """What a transaction will write. What it reads is watched: a change by somebody else makes it start again."""

    def __init__(self, store: RedisStore, pipe: Any):
        self._store, self._pipe = store, pipe
        self._refs: dict[str, int] = {}
        self._new: dict[str, Turn] = {}
        self._writes: list[Callable[[], object]] = []
        pipe.watch(f"{PREFIX}nothing")  # a pipeline that watches answers at once

    def session(self, owner: str, id: str, kind: str = "session") -> Session:
        key = self._store._session_key(owner, id, kind)
        self._pipe.watch(key)
        data = self._pipe.get(key)
        if data is None:
            raise Missing(f"there is no {kind} {id[:128]!r}")
        return _session_of(data)

    def turn(self, id: str) -> Turn:
        if id in self._new:
            return self._new[id]
        key = self._store._turn_key(id)
        self._pipe.watch(key)
        data = self._pipe.hget(key, "turn")
        if data is None:
            raise Conflict("the turn that this one follows is gone")
        return Turn(**json.loads(data))

    def ancestor(self, head: str, depth: int) -> str:
        found = self.turn(head)
        while found.depth > depth and found.parent is not None:
            found = self.turn(found.parent)
        if found.depth != depth:
            raise Missing(f"there is no turn {depth}")
        return found.id

    def at(self, session: Session, turn: int) -> Session:
        if not 0 <= turn <= session.depth:
            raise Missing(f"there is no turn {turn}; the session has {session.depth}")
        if turn == 0 or session.head is None:
            return replace(session, head=None, depth=0, tokens=0, bytes=0)
        head = self.turn(self.ancestor(session.head, turn))
        return replace(session, head=head.id, depth=turn, tokens=head.tokens)

    def put_session(self, session: Session) -> None:
        key = self._store._session_key(session.owner, session.id, session.kind)
        listing = self._store._listing(session.owner, session.kind)
        data = json.dumps(asdict(session))
        self._writes += [
            lambda: self._pipe.set(key, data),
            lambda: self._pipe.zadd(listing, {session.id: session.updated}),
        ]

    def drop_session(self, session: Session) -> None:
        key = self._store._session_key(session.owner, session.id, session.kind)
        listing = self._store._listing(session.owner, session.kind)
        self._writes += [lambda: self._pipe.delete(key), lambda: self._pipe.zrem(listing, session.id)]

    def add_turn(self, turn: Turn) -> None:
        self._new[turn.id], self._refs[turn.id] = turn, 0
        key, data = self._store._turn_key(turn.id), json.dumps(asdict(turn))
        self._writes.append(lambda: self._pipe.hset(key, "turn", data))
        self.retain(turn.parent)

    def _count(self, id: str) -> int:
        if id not in self._refs:
            self.turn(id)
            self._refs[id] = int(self._pipe.hget(self._store._turn_key(id), "refs") or 0)
        return self._refs[id]

    def retain(self, id: str | None) -> None:
        if id is not None:
            self._refs[id] = self._count(id) + 1

    def release(self, id: str | None) -> None:
        while id is not None:
            self._refs[id] = self._count(id) - 1
            if self._refs[id] > 0:
                return
            turn = self.turn(id)
            key = self._store._turn_key(id)
            del self._refs[id]
            self._writes.append(lambda key=key: self._pipe.delete(key))  # type: ignore[misc]
            self.drop_state(id)
            self._store.removed.append(id)
            id = turn.parent

    def add_state(self, id: str | None, state: bytes | None) -> None:
        if id is None or state is None:
            return
        store, pipe = self._store, self._pipe
        self._writes += [
            lambda: pipe.set(store._state_key(id), state),
            lambda: pipe.hset(store._sizes, id, len(state)),
            lambda: pipe.zadd(store._used, {id: time.time()}),
            lambda: pipe.incrby(store._total, len(state)),
        ]

    def drop_state(self, id: str) -> None:
        store, pipe = self._store, self._pipe
        size = int(pipe.hget(store._sizes, id) or 0)
        self._writes += [
            lambda: pipe.delete(store._state_key(id)),
            lambda: pipe.hdel(store._sizes, id),
            lambda: pipe.zrem(store._used, id),
            lambda: pipe.decrby(store._total, size),
        ]

    def write(self) -> None:
        if not (self._writes or self._refs):
            return
        self._pipe.multi()
        for write in self._writes:
            write()
        for id, count in self._refs.items():
            self._pipe.hset(self._store._turn_key(id), "refs", count)
        self._pipe.execute()


def _session_of(data: bytes) -> Session:
    values = json.loads(data)
    return Session(**{**values, "tags": tuple(values["tags"])})
