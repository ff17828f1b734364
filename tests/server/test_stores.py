"""What is kept of conversations, in a folder and in Redis: the same facts hold of both."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from server_helpers import REDISES, redis_name

from receptance.errors import ConfigError
from receptance.server.sqlite_store import SqliteStore
from receptance.server.store import Conflict, Full, Missing, Session, Turn

BIG = 1 << 40


@pytest.fixture(params=["folder", *REDISES], ids=lambda x: x if x == "folder" else redis_name(x))
def make(request, tmp_path, redis_at):
    """Makes a store; what it held before is gone."""
    opened = []

    def make(state_bytes=BIG, sessions=1000, responses=1000):
        if request.param == "folder":
            store = SqliteStore(tmp_path / str(len(opened)), state_bytes, sessions, responses)
        else:
            from receptance.server.redis_store import RedisStore

            store = RedisStore(redis_at(request.param), state_bytes, sessions, responses)
            store._redis.flushall()
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


def turn(text, tokens=3):
    return Turn(f"user {text}", f"said {text}", f"raw {text}", tokens, 1, "stop")


def grow(store, session, *texts, state=b"x" * 100):
    for text in texts:
        session = store.append(session.owner, session.id, session.head, turn(text), state)
    return session


def texts(store, session):
    return [t.raw.removeprefix("raw ") for t in store.turns(store.get(session.owner, session.id).head)]


def test_turns_are_kept_in_order_with_their_states(make):
    store = make()
    session = grow(store, store.create(Session("me", "m", "title", ("a",))), "1", "2", "3")
    assert store.get("me", session.id) == session
    turns = store.turns(session.head)
    assert [t.depth for t in turns] == [1, 2, 3]
    assert [t.tokens for t in turns] == [4, 8, 12]
    assert session.tokens == 12
    assert session.bytes == 100
    assert all(store.state(t.id) == b"x" * 100 for t in turns)
    assert store.ancestor(session.head, 2) == turns[1].id


def test_a_fork_shares_its_turns_until_nobody_needs_them(make):
    store = make()
    first = grow(store, store.create(Session("me", "m")), "1", "2")
    fork = grow(store, store.fork("me", first.id, 1), "3")
    assert texts(store, fork) == ["1", "3"]
    heads = [t.id for t in store.turns(first.head)]
    store.delete("me", first.id)
    assert texts(store, fork) == ["1", "3"]
    assert store.has_state(heads[0])
    assert not store.has_state(heads[1])
    store.delete("me", fork.id)
    assert not store.has_state(heads[0])
    assert store.turns(fork.head) == []


def test_a_rewind_forgets_later_turns(make):
    store = make()
    session = grow(store, store.create(Session("me", "m")), "1", "2", "3")
    back = store.rewind("me", session.id, 1)
    assert (back.depth, back.tokens) == (1, 4)
    assert texts(store, back) == ["1"]
    assert not store.has_state(session.head)
    assert store.rewind("me", session.id, 0).head is None
    with pytest.raises(Missing):
        store.rewind("me", session.id, 1)


def test_a_turn_after_another_head_is_a_conflict(make):
    store = make()
    session = grow(store, store.create(Session("me", "m")), "1")
    grow(store, session, "2")
    late = turn("late")
    with pytest.raises(Conflict):
        store.append("me", session.id, session.head, late, b"x")
    assert texts(store, session) == ["1", "2"]
    assert not store.has_state(late.id)
    store.delete("me", session.id)
    with pytest.raises((Conflict, Missing)):
        store.append("me", session.id, session.head, turn("later"), b"x")


def test_of_turns_at_the_same_time_one_is_kept(make):
    store = make()
    session = store.create(Session("me", "m"))
    kept = []

    def add(i):
        with contextlib.suppress(Conflict):
            kept.append(store.append("me", session.id, None, turn(str(i)), b"x"))

    threads = [threading.Thread(target=add, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 1
    assert len(texts(store, session)) == 1


def test_states_are_bounded_and_the_least_used_go_first(make):
    store = make(state_bytes=350)
    session = grow(store, store.create(Session("me", "m")), "1", "2", "3")
    ids = [t.id for t in store.turns(session.head)]
    assert store.state(ids[0])  # used again
    session = grow(store, session, "4")
    assert [store.has_state(id) for id in (*ids, session.head)] == [True, False, True, True]
    assert texts(store, session) == ["1", "2", "3", "4"]


def test_sessions_are_bounded_and_the_oldest_response_goes(make):
    store = make(sessions=2, responses=2)
    for _ in range(2):
        store.create(Session("me", "m"))
    store.create(Session("you", "m"))
    with pytest.raises(Full):
        store.create(Session("me", "m"))
    with pytest.raises(Full):
        store.fork("me", store.find("me", None, 1, None)[0].id, None)
    made = [store.create(Session("me", "m", kind="response"), [turn(str(i))], b"x") for i in range(3)]
    with pytest.raises(Missing):
        store.get("me", made[0].id, "response")
    assert not store.has_state(made[0].head)
    assert store.get("me", made[2].id, "response") == made[2]


def test_responses_share_what_they_follow(make):
    store = make()
    first = store.create(Session("me", "m", kind="response"), [turn("1")], b"x")
    second = store.create(replace(first, id="resp-2"), [turn("2")], b"y")
    store.delete("me", first.id, "response")
    assert [t.raw for t in store.turns(second.head)] == ["raw 1", "raw 2"]


def test_random_work_leaves_exactly_what_a_plain_model_says(make):
    store, rng, model = make(), random.Random(5), {}
    for step in range(250):
        kind = rng.choice(["create", "append", "append", "append", "fork", "rewind", "delete"])
        if kind == "create" or not model:
            session = store.create(Session("me", "m"))
            model[session.id] = []
            continue
        id = rng.choice(list(model))
        if kind == "append":
            grow(store, store.get("me", id), str(step))
            model[id] = [*model[id], str(step)]
        elif kind == "fork":
            depth = rng.randint(0, len(model[id]))
            model[store.fork("me", id, depth).id] = model[id][:depth]
        elif kind == "rewind":
            depth = rng.randint(0, len(model[id]))
            store.rewind("me", id, depth)
            model[id] = model[id][:depth]
        else:
            store.delete("me", id)
            del model[id]
    for id, expected in model.items():
        session = store.get("me", id)
        assert texts(store, session) == expected
        assert session.depth == len(expected)
    assert {s.id for s in store.find("me", None, 1000, None)} == set(model)
    if isinstance(store, SqliteStore):  # nothing is left of what nobody needs
        alive = {t.id for id in model for t in store.turns(store.get("me", id).head)}
        assert {row[0] for row in store._db.execute("SELECT id FROM turns")} == alive
        assert {file.stem for file in (store.folder / "states").iterdir()} == alive
        assert store._db.execute("SELECT value FROM totals").fetchone()[0] == 100 * len(alive)


# Crashes --------------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from receptance.server.sqlite_store import SqliteStore
from receptance.server.store import Session, Turn
store = SqliteStore(Path(sys.argv[1]), 200_000, 10**6, 10**6)
session = store.create(Session("me", "m")) if sys.argv[2] == "new" else store.get("me", sys.argv[2])
print(session.id, flush=True)
while True:
    i = session.depth
    turn = Turn(f"{i}", "a", f"raw {i}", 1, 1, "stop")
    session = store.append("me", session.id, session.head, turn, bytes([i % 256]) * 10_000)
    if i % 7 == 3:
        fork = store.fork("me", session.id, i)
        store.delete("me", fork.id)
    print(session.depth, flush=True)
"""


def write_and_kill(folder, id, seconds):
    """Add turns in a process that is killed; the session's id and how many turns were acknowledged."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder), id], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    id = process.stdout.readline().strip()
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    lines = process.stdout.read().splitlines()
    process.wait()
    complete = [line for line in lines if line.isdigit()]
    return id, int(complete[-1]) if complete else 0


@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_writer_loses_no_turn_that_it_acknowledged(tmp_path, rounds):
    rng, id, least = random.Random(1), "new", 0
    for _ in range(rounds):
        id, said = write_and_kill(tmp_path, id, rng.uniform(0.05, 0.4))
        least = max(least, said)
        store = SqliteStore(tmp_path, 200_000, 10**6, 10**6)
        session = store.get("me", id)
        assert session.depth >= least
        turns = store.turns(session.head)
        assert [t.raw for t in turns] == [f"raw {i}" for i in range(session.depth)]
        for number, t in enumerate(turns):
            state = store.state(t.id)
            assert state is None or state == bytes([number % 256]) * 10_000
        assert session.depth == 0 or store.has_state(turns[-1].id)
        files = {file.stem: file.stat().st_size for file in (tmp_path / "states").iterdir()}
        assert files.keys() <= {t.id for t in turns}
        assert sum(files.values()) <= 200_000
        least = session.depth
        store.close()
    assert least > 0


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    store = SqliteStore(tmp_path, BIG, 10, 10)
    session = grow(store, store.create(Session("me", "m")), "1")
    plain = os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("receptance.atomic.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        grow(store, session, "2")
    monkeypatch.setattr("receptance.atomic.os.fsync", plain)
    assert texts(store, session) == ["1"]
    assert len(list((tmp_path / "states").iterdir())) == 1
    assert texts(store, grow(store, session, "2")) == ["1", "2"]
    store.close()


def test_a_damaged_index_is_told(tmp_path):
    (tmp_path / "index.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match="not a readable index"):
        SqliteStore(tmp_path, BIG, 10, 10)


def test_a_redis_that_does_not_answer_is_told_without_its_password():
    pytest.importorskip("redis")
    from receptance.server.redis_store import RedisStore

    with pytest.raises(ConfigError, match="no Redis answers") as caught:
        RedisStore("redis://:hunter2@127.0.0.1:1/0", BIG, 10, 10)
    assert "hunter2" not in str(caught.value)
