"""`receptance chat --url`: the conversation is a session of a server."""

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from receptance.cli.errors import complain
from receptance.cli.terminal import interruptible, write
from receptance.errors import ReceptanceError

HELP = """/undo           take back the last turn
/regenerate     another reply to the last message
/fork           go on in a copy; the session stays as it is
/list           sessions of the server
/load ID        go on with a session
/save FILE      export the session
/new            begin a new session
/set NAME=VALUE a sampling field, such as temperature=0.5
/show           what was said
/bye            leave"""


class Server:
    """A server's routes. Raises ReceptanceError with what it answered."""

    def __init__(self, url: str, key: str | None):
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        if not self.url.startswith(("http://", "https://")):
            raise ReceptanceError(f"--url is {url!r}, expected http://… or https://…")

    def open(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=600)
        except urllib.error.HTTPError as error:
            raise ReceptanceError(f"{self.url}: {_told(error)}") from None
        except (urllib.error.URLError, OSError) as error:
            raise ReceptanceError(f"{self.url} does not answer ({getattr(error, 'reason', error)})") from None

    def call(self, method: str, path: str, body: object = None) -> Any:
        with self.open(method, path, body) as answer:
            return json.load(answer)

    def stream(self, body: Mapping[str, object], usage: dict[str, Any]) -> Iterator[str]:
        """The pieces of a reply; its thoughts first, if it has any. usage: is filled in at the end."""
        wanted = {"stream": True, "stream_options": {"include_usage": True}}
        with self.open("POST", "/v1/chat/completions", {**body, **wanted}) as answer:
            thinks = False
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ReceptanceError(event["error"]["message"])
                usage.update(event.get("usage") or {})
                for choice in event["choices"]:
                    thought = choice["delta"].get("reasoning_content") or ""
                    text = choice["delta"].get("content") or ""
                    if thought:
                        yield thought if thinks else f"<think>{thought}"
                        thinks = True
                    if text:
                        yield f"</think>\n{text}" if thinks else text
                        thinks = False


def _told(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"{error.code} {error.reason}"


class RemoteChat:
    """fields: of each request. stats: tell the speed of each turn."""

    def __init__(
        self, server: Server, model: str | None, system: str | None, fields: dict[str, object], stats: bool = False
    ):
        self.server, self.fields, self.stats = server, fields, stats
        self._asked = 0
        self._new = {"model": model, "system": system}
        self.id = self.begin()

    def begin(self) -> str:
        return str(self.server.call("POST", "/v1/sessions", self._new)["id"])

    @property
    def turns(self) -> list[dict[str, Any]]:
        return list(self.server.call("GET", f"/v1/sessions/{self.id}")["turns"])

    def ask(self, text: str) -> None:
        body = {**self.fields, "session_id": self.id, "messages": [{"role": "user", "content": text}]}
        if isinstance(
            seed := self.fields.get("seed"), int
        ):  # of its own for every reply, or /regenerate would repeat it
            body["seed"] = (seed + self._asked) % 2**64
        self._asked += 1
        began, first, usage = time.perf_counter(), 0.0, dict[str, Any]()
        with interruptible() as interrupted:
            for piece in self.server.stream(body, usage):
                first = first or time.perf_counter()
                write(piece)
                if interrupted():  # the server keeps what was said so far
                    break
        write("\n")
        if self.stats and usage:
            seconds = time.perf_counter() - first
            new = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
            count = usage["completion_tokens"]
            typer.echo(
                f"prompt {new} tokens, first after {1000 * (first - began):.0f} ms · "
                f"text {count} tokens, {(count - 1) / max(seconds, 1e-9):.1f} tok/s",
                err=True,
            )

    def undo(self) -> str:
        turns = self.turns
        if not turns:
            raise ReceptanceError("there is no turn to take back")
        self.server.call("POST", f"/v1/sessions/{self.id}/rewind", {"turn": len(turns) - 1})
        return str(turns[-1]["user"])

    def command(self, word: str, argument: str) -> str:
        if word == "/help":
            return HELP
        if word == "/undo":
            return f"took back: {self.undo()}"
        if word == "/fork":
            self.id = str(self.server.call("POST", f"/v1/sessions/{self.id}/fork", {})["id"])
            return f"in the fork {self.id}"
        if word in ("/new", "/reset"):
            self.id = self.begin()
            return f"in the new session {self.id}"
        if word == "/load":
            self.id = str(self.server.call("GET", f"/v1/sessions/{argument}")["id"])
            return f"in the session {self.id}, {len(self.turns)} turns"
        if word == "/list":
            found = self.server.call("GET", "/v1/sessions")["data"]
            return "\n".join(
                f"{'>' if s['id'] == self.id else ' '} {s['id']}  {s['depth']:4} turns  {s['title']}" for s in found
            )
        if word == "/show":
            return "\n".join(f"> {turn['user']}\n{turn['assistant']}" for turn in self.turns)
        if word == "/save":
            if not argument:
                raise ReceptanceError("/save needs the name of a file")
            with self.server.open("GET", f"/v1/sessions/{self.id}/export") as answer:
                Path(argument).write_bytes(answer.read())
            return f"saved to {argument}"
        if word == "/set":
            name, equals, value = argument.partition("=")
            if not equals:
                raise ReceptanceError("/set needs NAME=VALUE")
            try:
                self.fields[name.strip()] = json.loads(value)
            except ValueError:
                self.fields[name.strip()] = value
            return f"{name.strip()} = {value}"
        raise ReceptanceError(f"there is no command {word}; /help lists them")


def converse(chat: RemoteChat) -> None:
    """Read messages and commands until there are no more."""
    from receptance.cli.chat import read_message

    if sys.stdin.isatty():
        typer.echo(f"{chat.server.url}, session {chat.id}. /help for help, /bye to leave.", err=True)
    while (line := read_message()) is not None:
        word, _, argument = line.partition(" ")
        try:
            if word in ("/bye", "/exit", "/quit"):
                return
            if word == "/regenerate":
                chat.ask(chat.undo())
            elif line.startswith("/") and not line.startswith("//"):
                typer.echo(chat.command(word, argument.strip()), err=True)
            elif line.strip():
                chat.ask(line.removeprefix("/") if line.startswith("//") else line)
        except (ReceptanceError, OSError) as error:  # the conversation goes on
            complain(str(error))
        except KeyboardInterrupt:
            typer.echo("\n(dropped)", err=True)
