"""A server that speaks just enough of the API for the page, and misbehaves on demand. Standard library only."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import receptance

WEB = Path(receptance.__file__).parent / "server/web"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# the strictest policy that the page must work under
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


class FakeServer(ThreadingHTTPServer):
    """`answers` maps a message to its answer; every other message gets the default one, piece by piece."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.sessions: dict[str, dict[str, Any]] = {}
        self.models = ["rwkv7-stories"]
        self.key = ""  # wanted, if not empty
        self.busy = 0  # so many chat requests are turned away with 429
        self.retry_after = 1
        self.break_after = 0  # the connection is cut after so many pieces
        self.pause = 0.0  # seconds between two pieces
        self.answers: dict[str, str] = {}
        self.reasoning = ""
        self.default = "Once there was a *fox* who kept everything it heard in a **fixed** number of bytes."
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        self.clock = time.time() - 7200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no news."""

    def now(self) -> float:
        self.clock += 61
        return self.clock

    def session(self, **fields: Any) -> dict[str, Any]:
        now = self.now()
        made = {
            "id": f"s-{len(self.sessions) + 1:04d}",
            "model": self.models[0],
            "title": "",
            "tags": [],
            "system": None,
            "created": now,
            "updated": now,
            "parent": None,
            "tokens": 0,
            "bytes": 1_351_680,
            "turns": [],
            **fields,
        }
        self.sessions[made["id"]] = made
        return made

    def turn(self, session: dict[str, Any], user: str, assistant: str, reasoning: str = "") -> None:
        turn = {
            "index": len(session["turns"]),
            "user": user,
            "assistant": assistant,
            "reasoning": reasoning or None,
            "prompt_tokens": len(user) // 4 + 3,
            "completion_tokens": len(assistant) // 4 + 1,
            "finish_reason": "stop",
            "created": self.now(),
        }
        session["turns"].append(turn)
        session["updated"] = turn["created"]
        count(session)


def count(session: dict[str, Any]) -> None:
    session["tokens"] = sum(t["prompt_tokens"] + t["completion_tokens"] for t in session["turns"])


def summary(session: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in session.items() if key != "turns"}


def state_report(turn: int, layers: int = 12) -> dict[str, Any]:
    norms = [4 + 30 * (1 - math.exp(-i / 4)) + 4 * math.sin(i * 1.7 + turn) for i in range(layers)]
    return {
        "fields": [
            {"name": "att_shift", "shape": [layers, 512], "bytes": layers * 512 * 4},
            {"name": "wkv", "shape": [layers, 8, 64, 64], "bytes": layers * 8 * 64 * 64 * 4},
            {"name": "ffn_shift", "shape": [layers, 512], "bytes": layers * 512 * 4},
        ],
        "layers": [
            {
                "layer": i,
                "norm": norm,
                "change": norm * (0.15 + 0.5 * abs(math.sin(i + turn))),
                "half_life": {"median": 1.5 * 1.7**i, "p10": 1.1 + 0.2 * i, "p90": 20 * 2.1**i},
            }
            for i, norm in enumerate(norms)
        ],
        "changed": {"norm": 21.4 / turn, "cosine": 1 - 0.4 / turn},
    }


class Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send(
        self, status: int, body: Any, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def fail(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.send(status, {"error": {"message": message, "type": "error", "code": None, "param": None}}, headers)

    def page(self, path: str) -> None:
        file = WEB / ("index.html" if path == "/" else path.lstrip("/"))
        if ".." in path or not file.is_file():
            return self.fail(404, "no such file")
        self.send(200, file.read_bytes(), {"Content-Security-Policy": POLICY}, TYPES[file.suffix])

    def handle_any(self) -> None:
        fake = self.server
        path, _, query = self.path.partition("?")
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(raw) if raw else {}
        except ValueError:
            body = {}
        fake.requests.append((self.command, self.path, body if isinstance(body, dict) else {}))
        if not path.startswith("/v1"):
            return self.send(200, {"status": "ok"}) if path == "/health" else self.page(path)
        if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
            return self.fail(401, "wrong or missing API key")
        match self.command, path.removeprefix("/v1").strip("/").split("/"):
            case "GET", ["models"]:
                self.send(200, {"object": "list", "data": [{"id": name} for name in fake.models]})
            case "POST", ["chat", "completions"]:
                self.chat(body)
            case "GET", ["sessions"]:
                self.send(200, {"object": "list", "data": [summary(s) for s in fake.sessions.values()]})
            case "POST", ["sessions"]:
                self.send(201, fake.session(**body))
            case "POST", ["sessions", "import"]:
                if "turns" not in body:
                    return self.fail(400, "this file is not a saved chat")
                fields = {**body, "id": f"s-{len(fake.sessions) + 1:04d}", "parent": None}
                self.send(201, fake.session(**fields))
            case method, ["sessions", key, *rest]:
                session = fake.sessions.get(key)
                if session is None:
                    return self.fail(404, f"there is no session {key}")
                self.session(method, session, rest, body, query)
            case _:
                self.fail(404, "no such route")

    do_GET = do_POST = do_PATCH = do_DELETE = handle_any

    def session(self, method: str, session: dict[str, Any], rest: list[str], body: Any, query: str) -> None:
        fake = self.server
        match method, rest:
            case "GET", []:
                self.send(200, session)
            case "PATCH", []:
                session.update(body)
                self.send(200, summary(session))
            case "DELETE", []:
                del fake.sessions[session["id"]]
                self.send(204, b"")
            case "POST", ["fork"]:
                turns = json.loads(json.dumps(session["turns"][: body["turn"]]))
                parent = {"id": session["id"], "turn": body["turn"]}
                fields = {"model": session["model"], "title": session["title"], "system": session["system"]}
                made = fake.session(**fields, parent=parent, turns=turns)
                count(made)
                self.send(201, made)
            case "POST", ["rewind"]:
                del session["turns"][body["turn"] :]
                count(session)
                self.send(200, summary(session))
            case "GET", ["export"]:
                self.send(200, json.dumps(session).encode(), kind="application/octet-stream")
            case "GET", ["state"]:
                self.send(200, state_report(int(query.partition("=")[2])))
            case _:
                self.fail(404, "no such route")

    def chat(self, body: dict[str, Any]) -> None:
        fake = self.server
        if fake.busy:
            fake.busy -= 1
            return self.fail(429, "too many requests", {"Retry-After": str(fake.retry_after)})
        session = fake.sessions[body["session_id"]]
        user = body["messages"][-1]["content"]
        answer = fake.answers.get(user, fake.default)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

        def event(delta: dict[str, str], finish: str | None = None) -> None:
            self.data({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        event({"role": "assistant", "content": ""})
        if fake.reasoning:
            for piece in pieces(fake.reasoning):
                event({"reasoning_content": piece})
        for i, piece in enumerate(pieces(answer)):
            if fake.break_after and i >= fake.break_after:
                self.connection.close()
                return
            event({"content": piece})
            time.sleep(fake.pause)
        event({}, "stop")
        fake.turn(session, user, answer, fake.reasoning)
        last = session["turns"][-1]
        usage = {
            "prompt_tokens": session["tokens"] - last["completion_tokens"],
            "completion_tokens": last["completion_tokens"],
            "prompt_tokens_details": {
                "cached_tokens": session["tokens"] - last["completion_tokens"] - last["prompt_tokens"]
            },
        }
        self.data({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def data(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()


def pieces(text: str) -> list[str]:
    return [text[i : i + 4] for i in range(0, len(text), 4)]


if __name__ == "__main__":
    fake = FakeServer(8765)
    fake.pause = 0.03
    print(fake.url)
    fake.serve_forever()
