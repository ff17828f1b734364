"""What happened to other servers, and must not happen to this one."""

import json
import logging
import socket
import stat

import httpx
import pytest
from server_helpers import listening

from receptance.errors import ConfigError
from receptance.server import page
from receptance.server.config import check, read_config
from receptance.server.keys import new_key, read_keys
from receptance.server.middleware import OPEN_PATHS

CHAT = {"messages": [{"role": "user", "content": "The fox"}], "max_tokens": 2}


# Keys -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(served, tmp_path_factory):
    """A server with two keys; its URL and the keys."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "bob"):
        new_key(folder / "keys", name, folder / f"{name}.key")
    secrets = {name: (folder / f"{name}.key").read_text().strip() for name in ("alice", "bob")}
    config = read_config(None, [f"sessions.folder={folder / 's'}", f"auth.keys={folder / 'keys'}"])
    with listening(config, served) as running:
        yield running, secrets, folder


def headers(secret):
    return {"Authorization": f"Bearer {secret}"}


def test_keys_are_kept_as_hashes_in_private_files(guarded):
    _, secrets, folder = guarded
    text = (folder / "keys").read_text()
    assert all(secret not in text for secret in secrets.values())
    for file in ("keys", "alice.key"):
        assert stat.S_IMODE((folder / file).stat().st_mode) == 0o600
    assert read_keys(folder / "keys").owner(secrets["bob"]) == "bob"
    assert read_keys(folder / "keys").owner(secrets["bob"][:-1]) is None


def test_keys_are_compared_in_constant_time(guarded, monkeypatch):
    """Every hash is compared, whichever matches, by the function made for it."""
    from receptance.server import keys

    compared = []
    plain = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append(1) or plain(a, b))
    _, secrets, folder = guarded
    read_keys(folder / "keys").owner(secrets["alice"])
    assert len(compared) == 2


def test_every_route_but_the_open_ones_needs_a_key(guarded):
    running, secrets, _ = guarded
    routes = [(route.path, method) for route in running.app.fastapi.routes for method in getattr(route, "methods", ())]
    paths = [(path.replace("{id}", "x").replace("{name}", "x"), method) for path, method in _all_routes(running)]
    assert len(paths) > 25, routes
    with running.client as client:
        for path, method in paths:
            code = client.request(method, path).status_code
            if path in running.app.open_paths:
                assert code != 401, path
            else:
                assert code == 401, (path, method)
        assert {"/health", "/ready", "/version"} == OPEN_PATHS
        for path in ("/nothing", "/v1/chat/completions/", "//v1/models", "/v1/../v1/models", "/health/../v1/models",
                     "/health/", "/HEALTH", "/v1/models?x=/health", "/%2e%2e/v1/models", "/metrics"):  # fmt: skip
            assert client.get(path).status_code == 401, path
        assert client.get("/v1/models", headers=headers("wrong")).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": ""}).status_code == 401
        assert client.get("/v1/models", headers=headers(secrets["alice"])).status_code == 200
        assert client.get("/v1/models", headers={"x-api-key": secrets["bob"]}).status_code == 200


def _all_routes(running):
    schema = running.app.fastapi.openapi()["paths"]
    return [(path, method.upper()) for path, methods in schema.items() for method in methods]


def test_a_path_that_proxies_rewrite_is_decided_as_it_is_routed(guarded):
    """A raw request line whose path is not normal reaches no route without a key."""
    running, _, _ = guarded
    port = int(running.url.rsplit(":", 1)[1])
    for target in ("/health%2f..%2fv1/models", "/health;/v1/models", "http://x/v1/models", "/v1/models#/health", "*"):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nX-Original-URL: /health\r\nX-Forwarded-Path: /health\r\n"
                         "Connection: close\r\n\r\n".encode())  # fmt: skip
            reply = sock.makefile("rb").read()
        assert reply.split(b" ")[1] in (b"401", b"400"), (target, reply[:100])


def test_one_key_does_not_see_the_sessions_of_another(guarded):
    running, secrets, _ = guarded
    with running.client as client:
        id = client.post("/v1/sessions", json={}, headers=headers(secrets["alice"])).json()["id"]
        bob = headers(secrets["bob"])
        assert client.get("/v1/sessions", headers=bob).json()["data"] == []
        for method, path, body in (
            ("GET", "", None), ("PATCH", "", {"title": "x"}), ("DELETE", "", None), ("POST", "/fork", {}),
            ("POST", "/rewind", {"turn": 0}), ("GET", "/export", None), ("GET", "/state", None),
        ):  # fmt: skip
            answer = client.request(method, f"/v1/sessions/{id}{path}", json=body, headers=bob)
            assert answer.status_code == 404, (method, path)
        answer = client.post("/v1/chat/completions", json={**CHAT, "session_id": id}, headers=bob)
        assert answer.status_code == 404
        assert client.get(f"/v1/sessions/{id}", headers=headers(secrets["alice"])).status_code == 200


def test_logs_hold_no_prompt_no_text_no_key_and_no_path(guarded, caplog):
    running, secrets, _ = guarded
    logging.getLogger("receptance.server").propagate = True
    logging.getLogger("receptance.server").setLevel("INFO")
    with caplog.at_level("DEBUG", "receptance.server"), running.client as client:
        body = {"messages": [{"role": "user", "content": "SECRETPROMPT fox"}], "max_tokens": 3}
        answer = client.post("/v1/chat/completions?q=SECRETQUERY", json=body, headers=headers(secrets["alice"]))
        client.get("/SECRETPATH", headers=headers(secrets["alice"]))
        client.get("/v1/models", headers=headers("SECRETKEY"))
        client.post("/v1/chat/completions", content=b'{"messages": "SECRETBODY"}', headers=headers(secrets["alice"]))
    records = "\n".join(str(vars(record)) for record in caplog.records)
    assert "request" in records
    assert "SECRET" not in records
    assert secrets["alice"] not in records
    assert answer.json()["choices"][0]["message"]["content"] not in records


# Where it listens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_open_server_needs_a_key_or_a_word(host):
    with pytest.raises(ConfigError, match="no key is needed"):
        read_config(None, [f"listen.host={host}"])
    check(read_config(None, [f"listen.host={host}", "listen.insecure=true"]))
    check(read_config(None, [f"listen.host={host}", "auth.keys=keys"]))
    assert read_config(None).listen.host == "127.0.0.1"


def test_another_web_page_cannot_use_the_server(client, server):
    evil = {"Origin": "http://evil.example"}
    answer = client.post("/v1/chat/completions", json=CHAT, headers=evil)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=evil).headers
    assert client.options("/v1/models", headers=evil).status_code != 200
    own = {"Origin": server.url}
    assert client.post("/v1/chat/completions", json=CHAT, headers=own).status_code == 200


def test_a_name_that_was_made_to_mean_this_machine_is_refused(client):
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/v1/models", headers={"Host": "localhost:1234"}).status_code == 200


def test_origins_that_are_allowed_are(config, served):
    with listening(config('listen.origins=["https://chat.example"]'), served) as running, running.client as client:
        answer = client.options("/v1/models", headers={"Origin": "https://chat.example"})
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": "https://x.y"}).headers


def test_bodies_that_are_not_json_by_name_are_refused(client):
    """A form of another web page can send text/plain without asking first."""
    answer = client.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 17}, {"n": 0}, {"max_tokens": 10**7}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": "x"},
        {"temperature": 101}, {"top_p": 2}, {"top_logprobs": 21, "logprobs": True}, {"top_logprobs": 2},
        {"stop": ["x"] * 33}, {"stop": "x" * 257}, {"stop": ""}, {"seed": 2**64}, {"seed": 1.5},
        {"logit_bias": {str(i): 1 for i in range(1025)}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"99999999": 1}},
        {"logit_bias": {"x": 1}}, {"messages": []}, {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x" * 20_001}]}, {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "user", "content": ""}] * 4097}, {"messages": "x"},
        {"regex": "("}, {"regex": "x" * 70_000}, {"grammar": "start: missing"}, {"grammar": "x", "regex": "y"},
        {"response_format": {"type": "json_schema"}}, {"response_format": {"type": "picture"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
        {"tool_choice": "required"}, {"tool_choice": {"type": "function", "function": {"name": "x"}}},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]}, {"session_id": "../x"}, {"session_id": "A"},
        {"state": "../x"}, {"thinking": "on"}, {"thinking": "hard"}, {"model": 7},
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused(client, fields):
    answer = client.post("/v1/chat/completions", json={**CHAT, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert set(error) == {"message", "type", "code", "param"}


@pytest.mark.parametrize(
    ("route", "fields", "param", "message"),
    [
        ("chat/completions", {"stop": ["x"] * 33}, "stop", "at most 32 items"),
        ("chat/completions", {"stop": 5}, "stop", "valid string"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string"),
        ("completions", {"prompt": [1, -1]}, "prompt.1", "greater than or equal to 0"),
    ],
)
def test_of_a_field_of_several_kinds_the_nearest_is_told(client, route, fields, param, message):
    error = client.post(f"/v1/{route}", json={**CHAT, **fields}).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert message in error["message"]


def test_deep_and_large_schemas_are_refused(client):
    deep: dict = {"type": "object"}
    for _ in range(40):
        deep = {"type": "object", "properties": {"x": deep}}
    large = {"type": "object", "properties": {f"p{i}" * 20: {"type": "string"} for i in range(2000)}}
    for schema in (deep, large):
        kind = {"type": "json_schema", "json_schema": {"schema": schema}}
        assert client.post("/v1/chat/completions", json={**CHAT, "response_format": kind}).status_code == 400


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"messages": ' + b"[" * 100_000,
     b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"messages": NaN}',
     b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
     b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
     b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required", "tools": [{"type": "function", '
     b'"function": {"name": "x", "parameters": {"\\ud800": 1}}}]}',
     b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_broken_bodies_are_refused(client, body):
    answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text


def test_large_bodies_are_refused_whatever_they_say_of_themselves(client):
    large = b" " * (5 << 20)
    assert client.post("/v1/chat/completions", content=large).status_code == 413
    json_type = {"Content-Type": "application/json"}
    chunked = client.post("/v1/chat/completions", content=(large[: 1 << 20] for _ in range(6)), headers=json_type)
    assert chunked.status_code == 413
    assert client.post("/v1/sessions/import", content=large).status_code == 400  # files may be larger


def test_a_body_that_never_ends_is_given_up(config, served):
    with listening(config("limits.body_seconds=1"), served) as running:
        with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1]))) as sock:
            sock.settimeout(10)
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                         b"Content-Length: 100\r\n\r\n{")  # fmt: skip
            assert b" 408 " in sock.recv(1000).split(b"\r\n")[0]
        running.wait_until(lambda: running.app.active == 0)


@pytest.mark.parametrize("id", ["..", "%2e%2e%2f", "..%2f..%2fetc%2fpasswd", "a%00b", "A", "x" * 129, "%F0%9F%A6%8A"])
def test_ids_cannot_be_paths(client, id):
    for path in (f"/v1/sessions/{id}", f"/v1/sessions/{id}/export", f"/v1/responses/{id}", f"/v1/models/{id}"):
        assert client.get(path).status_code in (400, 404, 405), path


def test_request_ids_are_echoed_unless_they_are_odd(client):
    assert client.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    odd = client.get("/health", headers={"X-Request-Id": "a b/c"}).headers["x-request-id"]
    assert odd.startswith("req-")


def test_templates_do_not_come_from_requests(client):
    plain = client.post("/v1/chat/completions", json={**CHAT, "seed": 1}).json()
    sent = client.post("/v1/chat/completions", json={**CHAT, "seed": 1, "chat_template": "{{ 7 * 7 }}"}).json()
    assert sent["usage"] == plain["usage"] or sent["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_is_strict_and_only_its_own_files(config, served, tmp_path, monkeypatch):
    web = tmp_path / "web"
    (web / "assets").mkdir(parents=True)
    (web / "index.html").write_text("<!doctype html>hello")
    (web / "assets/page.js").write_text("1")
    (web / "secret.key").write_text("no")
    (web / "link.js").symlink_to("/etc/passwd")
    monkeypatch.setattr("receptance.server.app.page_routes", lambda: page.page_routes(web))
    with listening(config(), served) as running, running.client as client:
        answer = client.get("/")
        assert "hello" in answer.text
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.get("/assets/page.js").status_code == 200
        for path in ("/secret.key", "/link.js", "/../conftest.py", "/assets/..%2f..%2fconftest.py", "/assets/"):
            assert client.get(path).status_code == 404, path
        assert client.get("/docs").status_code == 404  # its scripts would come from elsewhere


# Models ---------------------------------------------------------------------------------------------------------------


def test_nothing_in_a_model_folder_is_run(tmp_path, monkeypatch):
    import shutil

    from receptance.cli.model_source import find_model
    from receptance.cli.serve_load import load
    from receptance.server.config import ServedConfig

    folder = tmp_path / "planted"
    shutil.copytree(find_model(None).path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    for name in ("evil.py", "modeling_rwkv7.py", "__init__.py", "tokenizer.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load("x", find_model(str(folder)), ServedConfig(threads=1)).engine.close()
    assert not (tmp_path / "ran").exists()


def test_unknown_routes_and_methods_have_error_objects(client):
    assert client.get("/nothing").json()["error"]["type"] == "not_found_error"
    assert client.put("/v1/models").status_code == 405
    assert isinstance(httpx.Response(200), httpx.Response)


def test_a_fault_of_our_own_has_an_error_object_that_tells_nothing(client, server, monkeypatch):
    monkeypatch.setattr(server.app.hub.metrics, "render", lambda: 1 / 0)
    answer = client.get("/metrics")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "division" not in answer.text
    assert answer.headers["x-request-id"]
