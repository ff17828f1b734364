"""What a server must stand: too much work, clients that leave, ends and kills under load, and very many requests.

The fast tier sends a little of each, `make test-slow` the numbers that docs/server.md reports.
"""

import asyncio
import json
import os
import random
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from server_helpers import listening

STORY = [{"role": "user", "content": "Once upon a time"}]


def full(fast, count):
    """A test of the fast tier, and the same with the whole number."""
    return [fast, pytest.param(count, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]


def port_of(where: Any) -> int:
    return int(str(getattr(where, "url", None) or where.base_url).rstrip("/").rsplit(":", 1)[1])


class Connection:
    """HTTP/1.1 by hand, since a client that costs more than the server would measure itself."""

    def __init__(self, port: int):
        self.port = port
        self.reader: asyncio.StreamReader | None = None

    async def send(self, method: str, path: str, body: Any = None) -> None:
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = b"" if body is None else json.dumps(body).encode()
        self.writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        assert self.reader is not None
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        fields = (line.split(": ", 1) for line in lines)
        return int(first.split(" ")[1]), {name.lower(): value for name, value in fields}

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
        await self.send(method, path, body)
        status, headers = await self.head()
        return status, headers, await self.rest(headers)

    async def rest(self, headers: dict[str, str]) -> bytes:
        assert self.reader is not None
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        data = b""
        while size := int(await self.reader.readline(), 16):
            data += await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)
        return data

    def leave(self) -> None:
        if self.reader is not None:
            self.writer.close()
            self.reader = None


async def crowd(port: int, count: int, at_once: int, one: Callable[[Connection, int], Awaitable[None]]) -> None:
    """`one(connection, i)` for i below `count`, by so many clients."""
    numbers = iter(range(count))

    async def work() -> None:
        connection = Connection(port)
        for i in numbers:
            await one(connection, i)
        connection.leave()

    await asyncio.gather(*(work() for _ in range(at_once)))


def text_of(data: bytes, streamed: bool) -> tuple[str, bool]:
    """The text of an answer, and whether it is whole."""
    if not streamed:
        choice = json.loads(data)["choices"][0]
        return choice["message"]["content"], choice["finish_reason"] == "length"
    *events, last = data.decode().strip().split("\n\n")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    whole = last == "data: [DONE]" and choices[-1]["finish_reason"] == "length"
    return "".join(choice["delta"].get("content") or "" for choice in choices), whole


# Too much -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", full(300, 10_000))
def test_at_four_times_its_capacity_no_answer_is_lost_or_mixed(config, served, count):
    """Each ends with its own whole text, or with 429 and the time to come again."""
    capacity, seeds = 8, 20

    def body(i):
        return {"messages": STORY, "max_tokens": 6, "seed": i % seeds, "temperature": 1.0, "stream": i % 3 == 0}

    with listening(config(f"limits.texts={capacity}"), served) as running:
        alone: dict[int, str] = {}
        codes: dict[int, int] = {}

        async def solo(connection, i):
            _, _, data = await connection.ask("POST", "/v1/chat/completions", {**body(i), "stream": False})
            alone[i], _ = text_of(data, False)

        async def one(connection, i):
            status, headers, data = await connection.ask("POST", "/v1/chat/completions", body(i))
            codes[status] = codes.get(status, 0) + 1
            if status == 200:
                assert text_of(data, i % 3 == 0) == (alone[i % seeds], True)
            else:
                assert status in (429, 503)
                assert int(headers["retry-after"]) >= 1

        asyncio.run(crowd(port_of(running), seeds, 1, solo))
        asyncio.run(crowd(port_of(running), count, 4 * capacity, one))
        assert sum(codes.values()) == count
        assert codes[200] > count // 20
        assert codes.get(429, 0) + codes.get(503, 0) > count // 20
        assert running.app.hub.models.texts == 0
        print(codes)


# Clients that leave ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", full(50, 1000))
def test_clients_that_leave_in_mid_stream_free_their_places_within_a_second(server, count):
    """And leave neither sockets nor threads behind."""
    places = server.app.hub.models
    engine = next(iter(places)).engine
    waits = []

    def open_things():
        return len(os.listdir("/proc/self/fd"))

    async def begin(i):
        connection = Connection(port_of(server))
        body = {"messages": STORY, "max_tokens": 20_000, "seed": i, "stream": True, "ignore_eos": True}
        await connection.send("POST", "/v1/chat/completions", body)
        assert (await connection.head())[0] == 200
        await connection.reader.readline()
        return connection

    async def some(first):
        connections = await asyncio.gather(*(begin(i) for i in range(first, first + 25)))
        assert places.texts == 25
        for connection in connections:
            connection.leave()
        began = time.perf_counter()
        while places.texts or engine.load != (0, 0):
            assert time.perf_counter() - began < 10
            await asyncio.sleep(0.005)
        waits.append(time.perf_counter() - began)

    asyncio.run(some(0))
    before = open_things()
    for first in range(0, count, 25):
        asyncio.run(some(first))
    assert max(waits) < 1.0, waits
    server.wait_until(lambda: open_things() <= before)
    print(f"25 places were free after {1000 * sorted(waits)[len(waits) // 2]:.0f} ms, at most {1000 * max(waits):.0f}")


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", b"GET /he"])
def test_a_request_whose_head_does_not_come_is_given_up(program, sent):
    """Connections opened and left half spoken are closed, on a new one and after an answer."""
    _, client = program("limits.header_seconds=0.5")
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for before in (b"", whole) if sent else (b"",):
        with socket.create_connection(("127.0.0.1", port_of(client))) as sock:
            sock.settimeout(20)
            if before:
                sock.sendall(before)
                answer = b""
                while not answer.endswith(b"}"):
                    answer += sock.recv(10_000)
                assert b" 200 " in answer
            began = time.monotonic()
            sock.sendall(sent)
            if sent:  # a byte now and then does not help
                time.sleep(0.3)
                sock.sendall(b"a")
            assert sock.recv(1000).startswith(b"HTTP/1.1 408")
            assert sock.recv(1000) == b""
            assert 0.3 < time.monotonic() - began < 15
    with socket.create_connection(("127.0.0.1", port_of(client))) as sock:  # a patient, complete one is served
        sock.settimeout(20)
        sock.sendall(whole[:20])
        time.sleep(0.2)
        sock.sendall(whole[20:])
        assert b" 200 " in sock.recv(10_000)


# Ends and kills -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", full(1, 100))
def test_each_sigterm_lets_what_is_under_way_end(program, tiny_folder, rounds):
    async def one(process, connection, ready):
        body = {"messages": STORY, "max_tokens": 400, "temperature": 1.0, "stream": True, "ignore_eos": True}
        await connection.send("POST", "/v1/chat/completions", body)
        status, headers = await connection.head()
        assert status == 200
        ready.append(1)
        if len(ready) == 4:
            process.send_signal(signal.SIGTERM)
        _, is_whole = text_of(await connection.rest(headers), True)
        assert is_whole

    async def run(process, port):
        ready: list[int] = []
        await asyncio.gather(*(one(process, Connection(port), ready) for _ in range(4)))

    for _ in range(rounds):
        process, client = program(tiny_folder)
        client.close()
        asyncio.run(run(process, port_of(client)))
        assert process.wait(30) == 0


@pytest.mark.parametrize("rounds", full(2, 100))
def test_a_server_killed_under_load_loses_no_turn_and_goes_on_as_if_it_had_not_been(program, tiny_folder, rounds):
    """Eight chats are written to while `kill -9` comes. What was acknowledged is there, in order, and every turn
    is what a server that nobody killed writes."""
    rng = random.Random(5)
    chats = 8
    told: list[list[str]] = [[] for _ in range(chats)]

    def said(chat, i):
        return f" {chat} and {i}"

    def body(id, chat, i):
        messages = [{"role": "user", "content": said(chat, i)}]
        return {"session_id": id, "messages": messages, "temperature": 0, "max_tokens": 6}

    def ask(client, id, chat, i):
        answer = client.post("/v1/chat/completions", json=body(id, chat, i))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    async def write(port, id, chat):
        connection = Connection(port)
        try:
            while True:
                _, _, data = await connection.ask("POST", "/v1/chat/completions", body(id, chat, len(told[chat])))
                told[chat].append(json.loads(data)["choices"][0]["message"]["content"])
        except (OSError, asyncio.IncompleteReadError):
            connection.leave()

    async def run(process, port, seconds):
        async def kill():
            await asyncio.sleep(seconds)
            process.kill()

        await asyncio.gather(kill(), *(write(port, id, chat) for chat, id in enumerate(ids)))

    process, client = program(tiny_folder)
    ids = [client.post("/v1/sessions", json={}).json()["id"] for _ in range(chats)]
    for _ in range(rounds):
        asyncio.run(run(process, port_of(client), rng.uniform(0.2, 1.0)))
        process.wait()
        process, client = program(tiny_folder)
        for chat, id in enumerate(ids):
            turns = client.get(f"/v1/sessions/{id}").json()["turns"]
            kept = [turn["assistant"] for turn in turns]
            assert kept[: len(told[chat])] == told[chat]
            assert len(kept) <= len(told[chat]) + 1  # one may have been written and not told
            assert [turn["user"] for turn in turns] == [said(chat, i) for i in range(len(turns))]
            told[chat] = kept
    assert sum(map(len, told)) > rounds
    for chat, id in enumerate(ids):  # the same conversation without a kill, and one turn more in both
        told[chat].append(ask(client, id, chat, len(told[chat])))
    ids = [client.post("/v1/sessions", json={}).json()["id"] for _ in range(chats)]
    for chat, id in enumerate(ids):
        for i, text in enumerate(told[chat]):
            assert ask(client, id, chat, i) == text
    print(f"{sum(map(len, told))} turns over {rounds} kills")


# Very many ------------------------------------------------------------------------------------------------------------


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def small(tmp_path, tiny_folder):
    """A configuration whose caches are full soon."""
    file = tmp_path / "server.toml"
    file.write_text(
        f'[models.tiny]\nmodel = "{tiny_folder}"\ncache_bytes = 1_000_000\nslots = 16\n[log]\nlevel = "warning"\n'
        "[sessions]\nmemory_bytes = 1_000_000\nresponses = 200\n"
    )
    return file


@pytest.mark.parametrize("count", full(4000, 100_000))
def test_memory_is_flat_over_many_requests(program, tiny_folder, tmp_path, count):
    """Chats, streams, sessions made, gone on with, forked and deleted, errors: after a warm-up, nothing is added."""
    process, client = program("--config", small(tmp_path, tiny_folder))
    sizes = []

    async def one(connection, i):
        chat = {"messages": [{"role": "user", "content": f"Story {i}"}], "max_tokens": 4, "ignore_eos": True}
        kind, expected = i % 8, 200
        if kind == 0:
            status, _, data = await connection.ask("POST", "/v1/sessions", {"title": str(i)})
            id = json.loads(data)["id"]
            body = {**chat, "session_id": id}
            assert (await connection.ask("POST", "/v1/chat/completions", body))[0] == 200
            _, _, data = await connection.ask("POST", f"/v1/sessions/{id}/fork", {})
            for each in (id, json.loads(data)["id"]):
                assert (await connection.ask("DELETE", f"/v1/sessions/{each}"))[0] == 200
            expected = 201
        elif kind == 1:
            status, _, _ = await connection.ask(
                "POST", "/v1/responses", {"input": f"Story {i}", "max_output_tokens": 4}
            )
        elif kind == 2:
            status, _, _ = await connection.ask("POST", "/v1/completions", {"prompt": f"{i}", "max_tokens": -1})
            expected = 400
        elif kind == 3:
            status, _, _ = await connection.ask("POST", "/v1/embeddings", {"input": f"Story {i}"})
        else:
            status, _, _ = await connection.ask("POST", "/v1/chat/completions", {**chat, "stream": kind % 2 == 0})
        assert status == expected

    part = count // 10
    for _ in range(10):
        asyncio.run(crowd(port_of(client), part, 16, one))
        sizes.append(resident(process.pid))
    print([f"{size / 1e6:.1f}" for size in sizes], "MB")
    assert max(sizes[5:]) - sizes[4] < 4e6


@pytest.mark.parametrize("tokens", full(20_000, 1_000_000))
def test_memory_is_flat_over_one_very_long_session(program, tiny_folder, tmp_path, tokens):
    """Twenty turns of a chat, however long: neither the server nor the kept state grows."""
    settings = (f"limits.max_tokens={tokens}", "limits.request_seconds=3600")
    process, client = program("--config", small(tmp_path, tiny_folder), *settings)
    id = client.post("/v1/sessions", json={}).json()["id"]
    body = {"session_id": id, "messages": STORY, "max_tokens": tokens // 20, "temperature": 1.0, "ignore_eos": True}
    sizes, states = [], set()
    for seed in range(20):
        answer = client.post("/v1/chat/completions", json={**body, "seed": seed}, timeout=3600)
        assert answer.json()["usage"]["completion_tokens"] == tokens // 20
        sizes.append(resident(process.pid))
        session = client.get("/v1/sessions").json()["data"][0]
        states.add(session["bytes"])
    assert session["tokens"] >= tokens
    assert max(states) - min(states) < 1000  # the checksums in its header have a digit more or less
    print([f"{size / 1e6:.1f}" for size in sizes], f"MB, {session['tokens']:,} tokens")
    assert max(sizes[10:]) - max(sizes[5:10]) < 4e6
