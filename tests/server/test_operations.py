"""Load, departures, ends and figures."""

import asyncio
import gc
import json
import os
import re
import signal
import time

import httpx
import pytest
from server_helpers import listening

from receptance.engine.request import Token
from receptance.server.config import read_config

STORY = [{"role": "user", "content": "Once upon a time"}]


def chat(**fields):
    return {"messages": STORY, "max_tokens": 6, "seed": 1, **fields}


async def stream(client, seed, tokens=12):
    """The text and the finish reason of a stream."""
    body = chat(stream=True, seed=seed, max_tokens=tokens, temperature=1.0)
    text, reason, done = "", None, False
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            return response.status_code, response.headers.get("retry-after"), None
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                choice = json.loads(line[6:])["choices"][0]
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
    assert done
    return 200, text, reason


def run_streams(url, count, tokens=12):
    async def run():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(stream(client, seed, tokens) for seed in range(count)))

    return asyncio.run(run())


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_streams_at_once_are_complete_and_those_of_one_alone(server, count):
    together = run_streams(server.url, count)
    assert {(status, reason) for status, _, reason in together} == {(200, "length")}
    with server.client as client:
        for seed in range(count):
            alone = client.post("/v1/chat/completions", json=chat(seed=seed, max_tokens=12, temperature=1.0)).json()
            assert together[seed][1] == alone["choices"][0]["message"]["content"]


def test_what_is_too_much_is_told_to_come_again_and_the_rest_is_whole(config, served):
    with listening(config("limits.texts=8"), served) as running:
        answers = run_streams(running.url, 60)
        assert {answer[0] for answer in answers} == {200, 429}
        for status, text, reason in answers:
            if status == 200:
                assert text
                assert reason == "length"
            else:
                assert int(text) >= 1  # Retry-After
        assert running.app.hub.models.texts == 0
        assert run_streams(running.url, 4)[0][0] == 200


def test_departed_clients_free_their_places(server):
    """In the middle of a stream, before an answer without one, and while a request waits."""
    places = server.app.hub.models

    async def leave(i):
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            body = chat(stream=i % 2 == 0, max_tokens=20_000, seed=i)
            try:
                async with asyncio.timeout(0.05 + 0.01 * (i % 20)):
                    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                        async for _ in response.aiter_lines():
                            pass
            except TimeoutError:
                pass

    async def run():
        await asyncio.gather(*(leave(i) for i in range(40)))

    asyncio.run(run())
    server.wait_until(lambda: places.texts == 0, 10)
    engine = next(iter(places)).engine
    server.wait_until(lambda: engine.load == (0, 0), 10)


def test_nothing_of_a_finished_request_waits_for_the_garbage_collector(server, client):
    """Or a server of long texts would hold many of them at once."""
    id = client.post("/v1/sessions", json={}).json()["id"]
    body = {"max_tokens": 20, "ignore_eos": True}
    asked = [("/v1/chat/completions", chat(**body)), ("/v1/chat/completions", chat(**body, stream=True)),
             ("/v1/chat/completions", chat(**body, session_id=id)), ("/v1/completions", {**body, "prompt": "x"}),
             ("/v1/completions", {**body, "prompt": ["x", "y"], "stream": True}),
             ("/v1/responses", {"input": "x", "max_output_tokens": 20, "stream": True}),
             ("/api/chat", {"model": "rwkv7-stories", "messages": STORY, "options": {"num_predict": 20}})]  # fmt: skip

    def alive():
        return sum(type(thing) is Token for thing in gc.get_objects())

    for path, fields in asked:  # what is made once
        client.post(path, json=fields)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for path, fields in asked * 3:
            assert client.post(path, json=fields).status_code == 200
        server.wait_until(lambda: alive() <= before + 20)
    finally:
        gc.enable()


def test_a_request_that_takes_too_long_is_ended(config, served):
    with listening(config("limits.request_seconds=0.3"), served) as running, running.client as client:
        answer = client.post("/v1/chat/completions", json=chat(max_tokens=30_000))
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        text = client.post("/v1/chat/completions", json=chat(max_tokens=30_000, stream=True)).text
        assert '"code":"timeout"' in text
        assert "[DONE]" not in text
        running.wait_until(lambda: running.app.hub.models.texts == 0)


def test_while_loading_and_draining_requests_are_put_off(config, served):
    with listening(config(), served) as running, running.client as client:
        models = running.app.hub.models
        models.is_loaded = False
        assert client.get("/health").status_code == 503
        assert client.get("/ready").status_code == 503
        answer = client.post("/v1/chat/completions", json=chat())
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        models.is_loaded, models.is_draining = True, True
        running.server._until = time.monotonic() + 60
        running.app.active += 1  # as if one were under way, or the server would end
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        for path, body in (("/v1/chat/completions", chat()), ("/v1/completions", {"prompt": "x"}),
                           ("/v1/embeddings", {"input": "x"}), ("/v1/sessions", {})):  # fmt: skip
            assert client.post(path, json=body).status_code == 503, path
        running.app.active -= 1


def test_figures_are_told_by_vllms_names(client):
    client.post("/v1/chat/completions", json=chat())
    text = client.get("/metrics").text
    for name in (
        "num_requests_running", "num_requests_waiting", "prompt_tokens_total", "generation_tokens_total",
        "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "request_success_total",
        "e2e_request_latency_seconds_bucket", "prefix_cache_queries_total", "prefix_cache_hits_total",
    ):  # fmt: skip
        assert re.search(rf'^receptance:{name}{{.*model_name="rwkv7-stories".*}} \d', text, re.M), name


def figure(client, name, **labels):
    found = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"receptance:{name}{{")]
    return sum(float(line.split()[-1]) for line in found if all(f'{k}="{v}"' in line for k, v in labels.items()))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/api/generate"])
def test_a_stream_is_counted_once(client, path):
    fields = {"prompt": "Once", "input": "Once", "messages": chat()["messages"], "model": "rwkv7-stories"}
    before = figure(client, "generation_tokens_total")
    tokens = {"max_tokens": 5, "max_output_tokens": 5, "options": {"num_predict": 5}}
    assert client.post(path, json={**fields, **tokens, "stream": True}).status_code == 200
    assert figure(client, "generation_tokens_total") - before <= 5


def test_who_leaves_is_counted_as_cancelled(server, client):
    before = figure(client, "request_success_total", finished_reason="cancelled")
    body = chat(stream=True, max_tokens=20_000, ignore_eos=True)
    with server.client as leaving, leaving.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    server.wait_until(
        lambda: figure(client, "request_success_total", finished_reason="cancelled") == before + 1,
    )


# The program ----------------------------------------------------------------------------------------------------------


def test_sigterm_lets_streams_end(program):
    process, client = program()
    with client.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=300)) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        try:
            late = httpx.post(f"{client.base_url}/v1/chat/completions", json=chat())
            assert late.status_code == 503
        except httpx.TransportError:
            pass  # it has ended already
        assert "data: [DONE]" in list(lines)
    assert process.wait(20) == 0


def test_sigterm_ends_what_takes_too_long(program):
    process, client = program("limits.drain_seconds=0.5")
    with client.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=30_000)) as response:
        lines = response.iter_lines()
        next(lines)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            text = "".join(lines)
        except httpx.TransportError:
            text = ""
    assert "[DONE]" not in text
    assert process.wait(20) == 0
    assert time.monotonic() - began < 15


def test_a_killed_server_keeps_every_turn_that_it_told_of(program):
    process, client = program()
    id = client.post("/v1/sessions", json={}).json()["id"]
    told = []
    for text in ("The fox", " and", " So"):
        answer = client.post("/v1/chat/completions", json=chat(
            session_id=id, temperature=0, messages=[{"role": "user", "content": text}]))  # fmt: skip
        told.append(answer.json()["choices"][0]["message"]["content"])
    with client.stream(
        "POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=3000, session_id=id)
    ) as response:
        next(response.iter_lines())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    _, client = program()
    turns = client.get(f"/v1/sessions/{id}").json()["turns"]
    assert [turn["assistant"] for turn in turns] == told
    body = chat(session_id=id, temperature=0, messages=[{"role": "user", "content": " Then"}])
    said = client.post("/v1/chat/completions", json=body).json()
    whole = "".join(turn["user"] + turn["assistant"] for turn in turns) + " Then"
    alone = client.post("/v1/chat/completions", json=chat(temperature=0, messages=[{"role": "user", "content": whole}]))
    assert said["choices"][0]["message"]["content"] == alone.json()["choices"][0]["message"]["content"]


def test_the_defaults_are_a_configuration(tmp_path):
    from receptance.server.config import ServerConfig, as_toml

    (tmp_path / "server.toml").write_text(as_toml(ServerConfig()))
    assert read_config(tmp_path / "server.toml") == ServerConfig()


# Commands that speak to a server --------------------------------------------------------------------------------------


def run_cli(*arguments, stdin=""):
    from typer.testing import CliRunner

    from receptance.cli import build

    return CliRunner().invoke(build(), [str(a) for a in arguments], input=stdin)


def test_chat_with_a_server(server, tmp_path):
    lines = ["The fox ran.", "/fork", " Then it", "/undo", "/regenerate", "/set temperature=0", "/show",
             f"/save {tmp_path / 'fox.safetensors'}", "/load ../x", "/bye"]  # fmt: skip
    result = run_cli("chat", "--url", server.url, "--seed", 1, "-n", 5, "--stats", stdin="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    assert "took back:  Then it" in result.stderr
    assert "in the fork sess-" in result.stderr
    assert "> The fox ran." in result.stderr
    assert (tmp_path / "fox.safetensors").stat().st_size > 100_000
    assert result.stderr.count("error:") == 1  # of /load ../x
    assert (
        len(re.findall(r"^prompt \d+ tokens, first after \d+ ms · text 5 tokens, [\d.]+ tok/s$", result.stderr, re.M))
        == 3
    )


def test_flags_of_a_model_that_is_loaded_here_are_refused_beside_a_url(server):
    result = run_cli("chat", "--url", server.url, "--dtype", "int8")
    assert result.exit_code == 2
    assert "--dtype and --url exclude each other" in result.stderr


def test_bench_serve_tells_what_the_server_says(server):
    for arguments, said in (
        (("--url", server.url, "--model", "nope"), "there is no model 'nope'"),
        (("--url", "http://127.0.0.1:1"), "does not answer"),
    ):
        result = run_cli("bench", "serve", "--rate", 1, "--seconds", 1, *arguments)
        assert result.exit_code == 1
        assert said in result.stderr


def test_chat_with_no_server_is_one_line():
    result = run_cli("chat", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "does not answer" in result.stderr


def test_bench_serve_counts_every_request(server, tmp_path):
    result = run_cli("bench", "serve", "--url", server.url, "--rate", "20", "--seconds", "1", "--prompt", "4,8",
                     "--output", "3,5", "--json", "--plot", tmp_path / "x.png")  # fmt: skip
    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)["runs"]
    assert run["answered"] > 5
    assert run["failed"] == run["refused"] == 0
    assert 0 < run["first_token_s"]["p50"] <= run["first_token_s"]["p99"]
    assert run["between_tokens_s"]["p50"] > 0
    assert (tmp_path / "x.png").stat().st_size > 5000
