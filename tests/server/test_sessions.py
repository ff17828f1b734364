"""Conversations that are kept as states."""

import asyncio
import json
import random
import threading

import httpx
import pytest
from server_helpers import listening

from receptance import state_file
from receptance.server import codec
from receptance.server.config import read_config


def ask(client, id, text, **fields):
    body = {"session_id": id, "messages": [{"role": "user", "content": text}], "max_tokens": 6, "seed": 1, **fields}
    return client.post("/v1/chat/completions", json=body)


def content(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def new(client, **fields):
    response = client.post("/v1/sessions", json=fields)
    assert response.status_code == 201, response.text
    return response.json()["id"]


def test_a_turn_reads_only_its_own_tokens_and_writes_as_if_all_were_read(client, served):
    id = new(client, title="fox")
    first = content(ask(client, id, "The fox met a bear.", max_tokens=12))
    second = ask(client, id, " The bear said", temperature=0, max_tokens=8)
    usage = second.json()["usage"]
    whole = "The fox met a bear." + first + " The bear said"
    body = {"messages": [{"role": "user", "content": whole}], "temperature": 0, "max_tokens": 8}
    assert content(second) == content(client.post("/v1/chat/completions", json=body))
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] == len(
        served.tokenizer.encode(" The bear said")
    )


def test_a_session_tells_its_turns(client):
    id = new(client, title="a fox", tags=["a", "b"], system="")
    said = [content(ask(client, id, text)) for text in ("The fox ran.", " It saw")]
    seen = client.get(f"/v1/sessions/{id}").json()
    assert seen["object"] == "session"
    assert seen["title"] == "a fox"
    assert seen["tags"] == ["a", "b"]
    assert seen["parent"] is None
    assert seen["bytes"] > 0
    assert [turn["index"] for turn in seen["turns"]] == [0, 1]
    assert [turn["user"] for turn in seen["turns"]] == ["The fox ran.", " It saw"]
    assert [turn["assistant"] for turn in seen["turns"]] == said
    assert [turn["finish_reason"] for turn in seen["turns"]] == ["length", "length"]
    assert seen["tokens"] == sum(turn["prompt_tokens"] + turn["completion_tokens"] for turn in seen["turns"])


def test_sessions_are_listed_by_update_and_tag_in_pages(client):
    ids = [new(client, tags=["pages", "even" if i % 2 == 0 else "odd"]) for i in range(5)]
    client.patch(f"/v1/sessions/{ids[0]}", json={"title": "again"})
    found = client.get("/v1/sessions", params={"tag": "pages", "limit": 3}).json()
    assert found["object"] == "list"
    assert [session["id"] for session in found["data"]] == [ids[0], ids[4], ids[3]]
    assert found["has_more"]
    rest = client.get("/v1/sessions", params={"tag": "pages", "after": ids[3]}).json()
    assert [session["id"] for session in rest["data"]] == [ids[2], ids[1]]
    odd = client.get("/v1/sessions", params={"tag": "odd"}).json()["data"]
    assert {session["id"] for session in odd} == {ids[1], ids[3]}


def test_a_fork_and_a_rewind_go_on_from_an_earlier_turn(client):
    id = new(client)
    content(ask(client, id, "The fox ran."))
    second = content(ask(client, id, " Then it"))
    fork = client.post(f"/v1/sessions/{id}/fork", json={"turn": 1}).json()
    assert fork["parent"] == {"id": id, "turn": 1}
    assert len(fork["turns"]) == 1
    assert content(ask(client, fork["id"], " Then it")) == second
    back = client.post(f"/v1/sessions/{id}/rewind", json={"turn": 1}).json()
    assert len(back["turns"]) == 1
    assert content(ask(client, id, " Then it")) == second
    client.delete(f"/v1/sessions/{id}")
    assert len(client.get(f"/v1/sessions/{fork['id']}").json()["turns"]) == 2
    assert content(ask(client, fork["id"], " And"))
    assert client.post(f"/v1/sessions/{fork['id']}/rewind", json={"turn": 9}).status_code == 404
    assert client.post(f"/v1/sessions/{fork['id']}/rewind", json={"turn": 0}).json()["turns"] == []
    assert content(ask(client, fork["id"], "The owl"))


def test_a_session_is_carried_about_as_a_file(client, served, tmp_path):
    id = new(client, title="carried", tags=["x"])
    content(ask(client, id, "The fox ran."))
    file = client.get(f"/v1/sessions/{id}/export")
    assert "attachment" in file.headers["content-disposition"]
    other = client.post("/v1/sessions/import", content=file.content)
    assert other.status_code == 201, other.text
    assert other.json()["title"] == "carried"
    assert content(ask(client, other.json()["id"], " Then it")) == content(ask(client, id, " Then it"))
    (tmp_path / "fox.state").write_bytes(file.content)
    assert served.model.load_state(tmp_path / "fox.state").batch == 1  # `receptance chat --state` takes it too


def test_an_empty_session_is_carried_too(client):
    file = client.get(f"/v1/sessions/{new(client, title='empty')}/export").content
    assert client.post("/v1/sessions/import", content=file).json()["turns"] == []


def test_the_state_is_told_in_figures(client):
    id = new(client)
    for text in ("The fox ran.", " Then it"):
        content(ask(client, id, text))
    report = client.get(f"/v1/sessions/{id}/state", params={"turn": 2}).json()
    assert {field["name"] for field in report["fields"]} == {"att_shift", "wkv", "ffn_shift"}
    assert len(report["layers"]) == 6
    for layer in report["layers"]:
        assert layer["norm"] > 0
        assert layer["change"] > 0
        assert 0 < layer["half_life"]["p10"] <= layer["half_life"]["median"] <= layer["half_life"]["p90"]
    assert report["changed"]["norm"] > 0
    assert 0 < report["changed"]["cosine"] < 1
    assert client.get(f"/v1/sessions/{id}/state", params={"turn": 3}).status_code == 404


def test_a_turn_without_an_answer_is_read_and_kept(client):
    id, twin = new(client), new(client)
    content(ask(client, id, "A fox met a bear.", max_tokens=0))
    assert [turn["user"] for turn in client.get(f"/v1/sessions/{id}").json()["turns"]] == ["A fox met a bear."]
    answer = ask(client, id, "Then the bear", temperature=0)
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert content(answer) != content(ask(client, twin, "Then the bear", temperature=0))


def test_a_call_of_a_tool_is_kept_as_it_was_written(client):
    id, tool = new(client), {"name": "weather", "parameters": {"properties": {"hot": {"const": True}}}}
    tool["parameters"] |= {"type": "object", "required": ["hot"], "additionalProperties": False}
    fields = {"tools": [{"type": "function", "function": tool}], "tool_choice": "required", "max_tokens": 100}
    assert ask(client, id, "Weather?", **fields).json()["choices"][0]["finish_reason"] == "tool_calls"
    (turn,) = client.get(f"/v1/sessions/{id}").json()["turns"]
    assert turn["assistant"] == '<tool_call>{"name": "weather", "arguments": {"hot": true}}</tool_call>'


def test_a_stream_keeps_its_turn_before_it_says_that_it_is_finished(client):
    id = new(client)
    with client.stream("POST", "/v1/chat/completions", json=body_of(id, stream=True)) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["finish_reason"]:
                break
        assert len(client.get(f"/v1/sessions/{id}").json()["turns"]) == 1


def body_of(id, text="The fox", **fields):
    messages = [{"role": "user", "content": text}]
    return {"session_id": id, "messages": messages, "max_tokens": 5, "seed": 1, **fields}


def test_a_stopped_turn_is_kept_as_far_as_it_came(client, server):
    id = new(client)
    with client.stream("POST", "/v1/chat/completions", json=body_of(id, stream=True, max_tokens=5000)) as response:
        seen = 0
        for line in response.iter_lines():
            seen += line.startswith("data: {")
            if seen > 5:
                break
    server.wait_until(lambda: len(client.get(f"/v1/sessions/{id}").json()["turns"]) == 1)
    turn = client.get(f"/v1/sessions/{id}").json()["turns"][0]
    assert turn["finish_reason"] == "cancelled"
    assert 1 <= turn["completion_tokens"] < 5000
    assert content(ask(client, id, " Then"))


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_told_and_the_session_goes_on_when_there_is_room(client, monkeypatch):
    id = new(client)
    content(ask(client, id, "One."))
    with monkeypatch.context() as patched:
        patched.setattr("receptance.atomic.os.fsync", full)
        answer = ask(client, id, "Two.")
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "store_failed"
        lines = ask(client, id, "Two.", stream=True).text.strip().split("\n\n")
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "store_failed"
    content(ask(client, id, "Three."))
    assert [turn["user"] for turn in client.get(f"/v1/sessions/{id}").json()["turns"]] == ["One.", "Three."]


@pytest.mark.parametrize("end", ["delete", "rewind"])
def test_what_went_with_a_session_is_held_nowhere(config, served, end):
    """Neither its states in memory nor the prefixes that were read after them; those of a fork stay."""
    with listening(config(), served) as running, running.client as client:
        held, cache = running.app.hub.conversations, served.engine._core.cache

        def roots():
            return {root for root in cache._roots if str(root).startswith("turn:")}

        before = roots()
        id = new(client)
        for text in ("The fox ran.", " Then it", " So"):
            content(ask(client, id, text))
        fork = client.post(f"/v1/sessions/{id}/fork", json={"turn": 1}).json()["id"]
        assert len(held._memory) == 3
        assert len(roots() - before) == 2  # of the first and the second turn: nothing was read after the third
        size = cache.nbytes
        if end == "delete":
            client.delete(f"/v1/sessions/{id}")
        else:
            client.post(f"/v1/sessions/{id}/rewind", json={"turn": 1})
        running.wait_until(lambda: len(roots() - before) == 1)
        assert len(held._memory) == 1
        assert held._memory_bytes == sum(state.nbytes for state, _ in held._memory.values()) > 0
        assert cache.nbytes < size
        assert content(ask(client, fork, " Then it"))


def test_a_session_keeps_the_tuned_state_that_it_began_with(client):
    id = new(client)
    assert ask(client, id, "The fox", state="").status_code == 200
    answer = ask(client, id, " ran", state="pirate")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "state"


def test_two_turns_at_once_come_one_after_the_other(client):
    id = new(client)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(client, id, "The fox"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len(client.get(f"/v1/sessions/{id}").json()["turns"]) == 4


def test_dropped_states_are_made_again_from_the_text(config, served):
    """Room for two states only: sessions go on all the same, with the same texts."""
    with listening(config(), served) as plenty, plenty.client as client:
        expected = three_chats(client)
    size = 500_000
    few = config(
        "sessions.folder=" + config().sessions.folder + "2", f"sessions.state_bytes={size}", "sessions.memory_bytes=0"
    )
    with listening(few, served) as running, running.client as client:
        assert three_chats(client) == expected
        assert len(list((running.app.hub.conversations.store.folder / "states").iterdir())) == 1


def three_chats(client):
    ids = [new(client) for _ in range(3)]
    return [content(ask(client, id, text, temperature=0)) for text in ("The fox", " and", " So") for id in ids]


def test_a_restarted_server_goes_on(config, served):
    with listening(config(), served) as running, running.client as client:
        id = new(client)
        content(ask(client, id, "The fox"))
        fork = client.post(f"/v1/sessions/{id}/fork").json()["id"]
        expected = content(ask(client, id, " and", temperature=0))
    with listening(config(), served) as running, running.client as client:
        assert content(ask(client, fork, " and", temperature=0)) == expected
        assert len(client.get(f"/v1/sessions/{id}").json()["turns"]) == 2


def test_one_folder_has_one_server(config, served):
    from receptance.errors import ConfigError

    with listening(config(), served), pytest.raises(ConfigError, match="another server"), listening(config(), served):
        pass


def test_two_servers_share_their_sessions_in_redis(served, redis_url):
    """A session goes on at another server, and of two turns at the same time one is told of the other."""
    config = read_config(None, [f"sessions.redis={redis_url}"])
    with listening(config, served) as a, listening(config, served) as b, a.client as one, b.client as other:
        id = new(one, title="shared")
        first = content(ask(one, id, "The fox met a bear."))
        second = content(ask(other, id, " Then", temperature=0))
        whole = [{"role": "user", "content": "The fox met a bear." + first + " Then"}]
        alone = one.post("/v1/chat/completions", json={"messages": whole, "max_tokens": 6, "temperature": 0})
        assert second == content(alone)
        assert len(one.get(f"/v1/sessions/{id}").json()["turns"]) == 2
        answers = []
        threads = [
            threading.Thread(target=lambda c=c: answers.append(ask(c, id, " So", max_tokens=40))) for c in (one, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kept = sum(answer.status_code == 200 for answer in answers)
        assert {answer.status_code for answer in answers} <= {200, 409}
        assert kept >= 1
        assert len(other.get(f"/v1/sessions/{id}").json()["turns"]) == 2 + kept


# Hostile files --------------------------------------------------------------------------------------------------------


def test_damaged_foreign_and_odd_files_are_refused(client, served):
    id = new(client)
    content(ask(client, id, "The fox ran."))
    good = client.get(f"/v1/sessions/{id}/export").content
    flipped = bytearray(good)
    flipped[-1000] ^= 1
    state = codec.decode(good, served.model)
    session = state_file.metadata(good)["session"]

    class Other:
        fingerprint = "0" * 32

    def changed(**fields):
        return json.dumps({**json.loads(session), **fields})

    def with_nan():
        arrays = {name: x.copy() for name, x in state.items()}
        arrays["wkv"][0, 0, 0, 0, 0] = float("nan")
        return codec.encode(arrays, served.model, session=session)

    wrong = {
        "empty": b"",
        "short": good[:50],
        "cut": good[:-1],
        "flipped": bytes(flipped),
        "huge header": (1 << 60).to_bytes(8, "little") + good[8:],
        "foreign": codec.encode(state, Other, session=session),
        "shape": codec.encode({name: x[:3] for name, x in state.items()}, served.model, session=session),
        "rows": codec.encode({n: x.repeat(2, 1) for n, x in state.items()}, served.model, session=session),
        "nan": with_nan(),
        "no session": codec.encode(state, served.model),
        "not json": codec.encode(state, served.model, session="{"),
        "model": codec.encode(state, served.model, session=changed(model="../../etc/passwd")),
        "fields": codec.encode(state, served.model, session=changed(turns=[{"user": 1}])),
        "deep": codec.encode(state, served.model, session="[" * 100_000),
        "state": codec.encode(state, served.model, session=changed(state="../x")),
    }
    for name, data in wrong.items():
        answer = client.post("/v1/sessions/import", content=data)
        assert answer.status_code in (400, 404), (name, answer.status_code, answer.text)


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_flipped_bit_of_an_exported_session_is_noticed(client, count):
    """In the turns' text, in the header, in the numbers; half of the bits are of the first part, which is text."""
    id = new(client, title="flipped")
    content(ask(client, id, "The fox ran."))
    good = client.get(f"/v1/sessions/{id}/export").content
    header, rng = 8 + int.from_bytes(good[:8], "little"), random.Random(3)
    for i in range(count):
        at = rng.randrange(header if i % 2 else len(good))
        bad = bytearray(good)
        bad[at] ^= 1 << rng.randrange(8)
        answer = client.post("/v1/sessions/import", content=bytes(bad))
        assert answer.status_code in (400, 404), (at, answer.text)


# Many -----------------------------------------------------------------------------------------------------------------


def test_many_sessions_at_once_are_not_mixed_up(server):
    async def run():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def one(i):
                id = (await client.post("/v1/sessions", json={})).json()["id"]
                said = []
                for text in (f"The fox number {i}", " and"):
                    answer = await client.post("/v1/chat/completions", json=body_of(id, text, max_tokens=4, seed=i))
                    said.append(content(answer))
                turns = (await client.get(f"/v1/sessions/{id}")).json()["turns"]
                assert [turn["assistant"] for turn in turns] == said
                assert turns[0]["user"] == f"The fox number {i}"

            await asyncio.gather(*(one(i) for i in range(40)))

    asyncio.run(run())
