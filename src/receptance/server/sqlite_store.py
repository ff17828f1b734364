"""Conversations in a folder: an index in SQLite and one file for each state.

A state's file is on disk, whole, before the transaction that names it; files that nothing names are removed at the
start. So whatever is acknowledged survives a crash at any moment, and no crash leaves anything half done.
"""

import fcntl
import json
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from receptance.atomic import replacing
from receptance.errors import CheckpointError, ConfigError
from receptance.server.names import new_id
from receptance.server.store import Conflict, Full, Missing, Session, Turn, after

SCHEMA = """
CREATE TABLE IF NOT EXISTS turns (
  id TEXT PRIMARY KEY, parent TEXT, depth INTEGER NOT NULL, refs INTEGER NOT NULL DEFAULT 0, user TEXT NOT NULL,
  assistant TEXT NOT NULL, reasoning TEXT, raw TEXT NOT NULL, start TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
  completion_tokens INTEGER NOT NULL, finish_reason TEXT NOT NULL, tokens INTEGER NOT NULL, created REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sessions (
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, owner TEXT NOT NULL, model TEXT NOT NULL, title TEXT NOT NULL,
  tags TEXT NOT NULL, system TEXT, start TEXT NOT NULL, parent_id TEXT, parent_turn INTEGER, head TEXT,
  depth INTEGER NOT NULL, tokens INTEGER NOT NULL, bytes INTEGER NOT NULL, body TEXT,
  created REAL NOT NULL, updated REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_update ON sessions (owner, kind, updated DESC, id);
CREATE TABLE IF NOT EXISTS states (turn TEXT PRIMARY KEY, bytes INTEGER NOT NULL, used REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON states (used);
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO totals VALUES ('state_bytes', 0);
PRAGMA user_version = 1;
"""
VERSION = 1
TURN_FIELDS = [f.name for f in fields(Turn)]
SESSION_FIELDS = [f.name for f in fields(Session)]


class SqliteStore:
    """folder: is made. One server at a time uses it. Raises ConfigError where it cannot be used."""

    def __init__(self, folder: Path, state_bytes: int, sessions: int, responses: int):
        self.folder, self.state_bytes = folder, state_bytes
        self.most = {"session": sessions, "response": responses}
        self._files = folder / "states"
        try:
            self._files.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_file = open(folder / "lock", "a")  # noqa: SIM115  held until close
        except OSError as error:
            raise ConfigError(f"{folder}: sessions cannot be kept there ({error})") from None
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise ConfigError(
                f"{folder}: another server keeps its sessions there; use sessions.folder or redis"
            ) from None
        self._local = threading.local()
        self._open: list[sqlite3.Connection] = []
        self.removed: deque[str] = deque()
        self._used: dict[str, float] = {}  # states that were read since the last write
        self._writing = threading.Lock()
        try:
            with closing(self._connect()) as db:
                found = db.execute("PRAGMA user_version").fetchone()[0]
                if found not in (0, VERSION):
                    raise ConfigError(f"{folder}: written by another version of receptance (format {found})")
                db.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{folder / 'index.sqlite'}: not a readable index of sessions ({error})") from None
        self._sweep()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.folder / "index.sqlite", timeout=30, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns
        return db

    @property
    def _db(self) -> sqlite3.Connection:
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = self._local.db = self._connect()
            self._open.append(db)
        return db

    @contextmanager
    def _transaction(self) -> Iterator[tuple[sqlite3.Connection, list[str]]]:
        """The connection, and a list for turns whose state files are to go once it is certain that they may."""
        gone: list[str] = []
        with self._writing:
            db = self._db
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db, gone
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise
        for turn in gone:
            with suppress(OSError):
                self._file(turn).unlink()

    def _file(self, turn: str) -> Path:
        return self._files / f"{turn}.safetensors"  # ids of turns are our own

    def _sweep(self) -> None:
        """Remove files that nothing names, and names without a file."""
        with self._transaction() as (db, _):
            named = {row["turn"]: row["bytes"] for row in db.execute("SELECT turn, bytes FROM states")}
            there = set()
            for file in self._files.iterdir():
                if file.suffix == ".safetensors" and file.stat().st_size == named.get(file.stem, -1):
                    there.add(file.stem)
                else:
                    file.unlink(missing_ok=True)
            db.executemany("DELETE FROM states WHERE turn = ?", [(turn,) for turn in named.keys() - there])
            total = "UPDATE totals SET value = (SELECT COALESCE(SUM(bytes), 0) FROM states) WHERE name = 'state_bytes'"
            db.execute(total)

    # Sessions ---------------------------------------------------------------------------------------------------------

    def create(self, session: Session, turns: list[Turn] | None = None, state: bytes | None = None) -> Session:
        made = []
        parent = None if session.head is None else self._turn(self._db, session.head)
        for turn in turns or []:
            parent = after(parent, turn)
            made.append(parent)
        session = replace(session, head=parent.id if parent else None, depth=parent.depth if parent else 0)
        session = replace(session, tokens=parent.tokens if parent else 0, bytes=len(state or b"") or session.bytes)
        self._write_state(session.head, state)
        try:
            self._add(session, made, state)
        except Exception:
            if session.head is not None and state is not None:
                with suppress(OSError):
                    self._file(session.head).unlink()
            raise
        return session

    def _add(self, session: Session, made: list[Turn], state: bytes | None) -> None:
        with self._transaction() as (db, gone):
            kind, owner = session.kind, session.owner
            count = "SELECT COUNT(*) FROM sessions WHERE owner = ? AND kind = ?"
            if db.execute(count, (owner, kind)).fetchone()[0] >= self.most[kind]:
                if kind == "session":
                    raise Full(f"there are {self.most[kind]:,} sessions; delete some")
                oldest = "SELECT id FROM sessions WHERE owner = ? AND kind = ? ORDER BY updated LIMIT 1"
                self._remove(db, db.execute(oldest, (owner, kind)).fetchone()["id"], gone)
            for turn in made:
                self._insert_turn(db, turn)
            self._insert_session(db, session)
            self._add_state(db, session.head, state, gone)

    def get(self, owner: str, id: str, kind: str = "session") -> Session:
        return self._session(self._db, owner, id, kind)

    def find(self, owner: str, tag: str | None, limit: int, after: str | None) -> list[Session]:
        where, values = "owner = ? AND kind = 'session'", [owner]
        if tag is not None:
            where += " AND EXISTS (SELECT 1 FROM json_each(tags) WHERE value = ?)"
            values.append(tag)
        if after is not None:
            last = self.get(owner, after)
            where += " AND (updated, id) < (?, ?)"
            values += [last.updated, last.id]  # type: ignore[list-item]
        query = f"SELECT * FROM sessions WHERE {where} ORDER BY updated DESC, id DESC LIMIT ?"
        return [_session_of(row) for row in self._db.execute(query, [*values, limit])]

    def patch(self, owner: str, id: str, title: str | None, tags: tuple[str, ...] | None) -> Session:
        with self._transaction() as (db, _):
            session = self._session(db, owner, id)
            session = replace(
                session,
                title=session.title if title is None else title,
                tags=session.tags if tags is None else tags,
                updated=time.time(),
            )
            self._update(db, session)
        return session

    def delete(self, owner: str, id: str, kind: str = "session") -> None:
        with self._transaction() as (db, gone):
            self._session(db, owner, id, kind)
            self._remove(db, id, gone)

    def fork(self, owner: str, id: str, turn: int | None) -> Session:
        with self._transaction() as (db, _):
            source = self._session(db, owner, id)
            count = "SELECT COUNT(*) FROM sessions WHERE owner = ? AND kind = 'session'"
            if db.execute(count, (owner,)).fetchone()[0] >= self.most["session"]:
                raise Full(f"there are {self.most['session']:,} sessions; delete some")
            turn = source.depth if turn is None else turn
            now = time.time()
            made = replace(self._at(db, source, turn), id=new_id("sess"), created=now, updated=now)
            made = replace(made, parent_id=source.id, parent_turn=turn)
            self._insert_session(db, made)
        return made

    def rewind(self, owner: str, id: str, turn: int) -> Session:
        with self._transaction() as (db, gone):
            before = self._session(db, owner, id)
            after = replace(self._at(db, before, turn), updated=time.time())
            self._retain(db, after.head)
            self._update(db, after)
            self._release(db, before.head, gone)
        return after

    def append(self, owner: str, id: str, head: str | None, turn: Turn, state: bytes | None) -> Session:
        parent = None if head is None else self._turn(self._db, head)
        turn = after(parent, turn)
        self._write_state(turn.id, state)
        try:
            with self._transaction() as (db, gone):
                session = self._session(db, owner, id)
                if session.head != head:
                    raise Conflict("the session has moved on since this turn began; the turn was not kept")
                self._insert_turn(db, turn)
                session = replace(session, head=turn.id, depth=turn.depth, tokens=turn.tokens, updated=time.time())
                session = replace(session, bytes=len(state or b"") or session.bytes)
                self._retain(db, turn.id)
                self._release(db, head, gone)
                self._update(db, session)
                self._add_state(db, turn.id, state, gone)
        except Exception:
            with suppress(OSError):
                self._file(turn.id).unlink()
            raise
        return session

    # Turns and states -------------------------------------------------------------------------------------------------

    def turns(self, head: str | None) -> list[Turn]:
        rows = self._db.execute(
            "WITH RECURSIVE way(id) AS (SELECT ? UNION ALL SELECT turns.parent FROM turns JOIN way "
            "ON turns.id = way.id WHERE turns.parent IS NOT NULL) "
            "SELECT turns.* FROM turns JOIN way ON turns.id = way.id ORDER BY depth",
            (head,),
        )
        return [Turn(**{name: row[name] for name in TURN_FIELDS}) for row in rows]

    def ancestor(self, head: str, depth: int) -> str:
        return self._ancestor(self._db, head, depth)

    def state(self, turn: str) -> bytes | None:
        self._used[turn] = time.time()
        try:
            return self._file(turn).read_bytes()
        except FileNotFoundError:
            return None

    def has_state(self, turn: str) -> bool:
        return self._file(turn).exists()

    def close(self) -> None:
        for db in self._open:
            db.close()
        self._lock_file.close()

    def _write_state(self, turn: str | None, state: bytes | None) -> None:
        if turn is None or state is None:
            return
        try:
            with replacing(self._file(turn)) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(state)
        except CheckpointError as error:
            raise OSError(str(error)) from None

    def _add_state(self, db: sqlite3.Connection, turn: str | None, state: bytes | None, gone: list[str]) -> None:
        """Name a written state, and make room for it."""
        if turn is None or state is None:
            return
        used, self._used = self._used, {}
        db.executemany("UPDATE states SET used = ? WHERE turn = ?", [(when, name) for name, when in used.items()])
        db.execute("INSERT INTO states VALUES (?, ?, ?)", (turn, len(state), time.time()))
        total = self._count_bytes(db, len(state))
        if total > self.state_bytes:
            for row in db.execute("SELECT turn, bytes FROM states WHERE turn != ? ORDER BY used", (turn,)).fetchall():
                if total <= self.state_bytes:
                    break
                total = self._drop_state(db, row["turn"], gone)

    def _drop_state(self, db: sqlite3.Connection, turn: str, gone: list[str]) -> int:
        row = db.execute("DELETE FROM states WHERE turn = ? RETURNING bytes", (turn,)).fetchone()
        if row is not None:
            gone.append(turn)
        return self._count_bytes(db, 0 if row is None else -row["bytes"])

    def _count_bytes(self, db: sqlite3.Connection, more: int) -> int:
        query = "UPDATE totals SET value = value + ? WHERE name = 'state_bytes' RETURNING value"
        return int(db.execute(query, (more,)).fetchone()[0])

    def _turn(self, db: sqlite3.Connection, id: str) -> Turn:
        row = db.execute("SELECT * FROM turns WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise Conflict("the turn that this one follows is gone")
        return Turn(**{name: row[name] for name in TURN_FIELDS})

    def _ancestor(self, db: sqlite3.Connection, head: str, depth: int) -> str:
        row = db.execute(
            "WITH RECURSIVE way(id, parent, depth) AS (SELECT id, parent, depth FROM turns WHERE id = ?1 UNION ALL "
            "SELECT turns.id, turns.parent, turns.depth FROM turns JOIN way ON turns.id = way.parent "
            "WHERE turns.depth >= ?2) SELECT id FROM way WHERE depth = ?2",
            (head, depth),
        ).fetchone()
        if row is None:
            raise Missing(f"there is no turn {depth}")
        return str(row["id"])

    def _at(self, db: sqlite3.Connection, session: Session, turn: int) -> Session:
        """The session as it was after so many turns."""
        if not 0 <= turn <= session.depth:
            raise Missing(f"there is no turn {turn}; the session has {session.depth}")
        if turn == 0 or session.head is None:
            return replace(session, head=None, depth=0, tokens=0, bytes=0)
        head = self._turn(db, self._ancestor(db, session.head, turn))
        return replace(session, head=head.id, depth=turn, tokens=head.tokens)

    def _insert_turn(self, db: sqlite3.Connection, turn: Turn) -> None:
        names = ", ".join(TURN_FIELDS)
        values = [getattr(turn, name) for name in TURN_FIELDS]
        db.execute(f"INSERT INTO turns ({names}) VALUES ({', '.join('?' * len(values))})", values)
        self._retain(db, turn.parent)

    def _retain(self, db: sqlite3.Connection, turn: str | None) -> None:
        if turn is not None and db.execute("UPDATE turns SET refs = refs + 1 WHERE id = ?", (turn,)).rowcount != 1:
            raise Conflict("the turn that this one follows is gone")

    def _release(self, db: sqlite3.Connection, turn: str | None, gone: list[str]) -> None:
        """One fewer leads to this turn; what nothing leads to goes."""
        while turn is not None:
            query = "UPDATE turns SET refs = refs - 1 WHERE id = ? RETURNING refs, parent"
            row = db.execute(query, (turn,)).fetchone()
            if row["refs"] > 0:
                return
            db.execute("DELETE FROM turns WHERE id = ?", (turn,))
            self._drop_state(db, turn, gone)
            self.removed.append(turn)
            turn = row["parent"]

    def _session(self, db: sqlite3.Connection, owner: str, id: str, kind: str = "session") -> Session:
        query = "SELECT * FROM sessions WHERE id = ? AND owner = ? AND kind = ?"
        row = db.execute(query, (id, owner, kind)).fetchone()
        if row is None:
            raise Missing(f"there is no {kind} {id[:128]!r}")
        return _session_of(row)

    def _insert_session(self, db: sqlite3.Connection, session: Session) -> None:
        values = _row_of(session)
        names = ", ".join(SESSION_FIELDS)
        db.execute(f"INSERT INTO sessions ({names}) VALUES ({', '.join('?' * len(values))})", values)
        self._retain(db, session.head)

    def _update(self, db: sqlite3.Connection, session: Session) -> None:
        names = ", ".join(f"{name} = ?" for name in SESSION_FIELDS)
        db.execute(f"UPDATE sessions SET {names} WHERE id = ?", [*_row_of(session), session.id])

    def _remove(self, db: sqlite3.Connection, id: str, gone: list[str]) -> None:
        row = db.execute("DELETE FROM sessions WHERE id = ? RETURNING head", (id,)).fetchone()
        self._release(db, row["head"], gone)


def _row_of(session: Session) -> list[Any]:
    return [json.dumps(session.tags) if name == "tags" else getattr(session, name) for name in SESSION_FIELDS]


def _session_of(row: sqlite3.Row) -> Session:
    values = {name: row[name] for name in SESSION_FIELDS}
    return Session(**{**values, "tags": tuple(json.loads(values["tags"]))})
