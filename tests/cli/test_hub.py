"""`pull`, `list` and hub names, against a stub of the hub on this machine."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import Result

from receptance.cli import hub
from receptance.cli.hub import HubError, choose, parse

Cli = Callable[..., Result]


COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER, SINGLE, MANY = "some/folder-model", "some/one-file", "some/many-files"


class Stub(ThreadingHTTPServer):
    """Repositories as {name: {file: bytes}}; `lies` are files whose stated SHA-256 is wrong."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.lies: set[str] = set()
        self.refuses: str | None = None  # an error code, with status 401 or 403, that answers everything
        self.cut_after: int | None = None  # bytes after which a download breaks off, once
        self.requests: list[tuple[str, str, str | None, str | None]] = []  # method, path, Range, Authorization

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        if self.server.refuses is not None:
            self.fail(403 if self.server.refuses == "GatedRepo" else 401, self.server.refuses)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self.describe(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.send_file(match[1], match[2])
        else:
            self.fail(404, "EntryNotFound")

    def describe(self, repo: str) -> None:
        if repo not in self.server.repositories:
            return self.fail(404, "RepoNotFound")
        siblings = []
        for name, data in self.server.repositories[repo].items():
            sibling: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            if name.endswith(hub.WEIGHT_SUFFIXES):
                sum_ = hashlib.sha256(b"other" if name in self.server.lies else data).hexdigest()
                sibling["lfs"] = {"sha256": sum_, "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        body = json.dumps({"_id": "1", "id": repo, "sha": COMMIT, "siblings": siblings, "tags": []}).encode()
        self.reply(200, {"Content-Type": "application/json"}, body)

    def send_file(self, repo: str, name: str) -> None:
        data = self.server.repositories.get(repo, {}).get(name)
        if data is None:
            return self.fail(404, "EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(span[1]) if span else 0
        if span:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.reply(206 if span else 200, headers, data[start:])

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut, self.server.cut_after = self.server.cut_after, None if len(body) > 1000 else self.server.cut_after
        if cut is not None and len(body) > 1000:
            self.wfile.write(body[:cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(body)

    def fail(self, status: int, code: str) -> None:
        self.reply(status, {"X-Error-Code": code, "X-Error-Message": code}, b"")


@pytest.fixture
def stub(folder: Path) -> Iterator[Stub]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = files["model.safetensors"]
    server = Stub(
        {
            FOLDER: {**files, "modeling_evil.py": b"raise SystemExit", "README.md": b"hello"},
            SINGLE: {"tiny.safetensors": weights, "rwkv_vocab_v20230424.txt": files["rwkv_vocab_v20230424.txt"]},
            MANY: {"a.pth": b"a" * 10, "b.pth": b"b" * 20},
        }
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pull(cli: Cli, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return lambda name, *more: cli("pull", name, "--endpoint", stub.url, *more)


def test_a_folder_model_is_pulled_listed_and_run_by_its_name(cli: Cli, pull: Cli, stub: Stub, folder: Path) -> None:
    result = pull(FOLDER)
    assert result.exit_code == 0, result.output
    where = Path(result.stdout.strip().splitlines()[-1])
    assert (where / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    names = {path.name for path in where.iterdir()}
    assert names == {path.name for path in folder.iterdir()}, "code and cards are not fetched"
    listed = json.loads(cli("list", "--json").stdout)
    assert [row["name"] for row in listed if row["kind"] == "hub"] == [FOLDER]
    assert FOLDER in cli("list").stdout
    by_name = cli("run", FOLDER, "Once", "--seed", "1", "-n", "9")
    assert by_name.exit_code == 0, by_name.stderr
    assert by_name.stdout == cli("run", folder, "Once", "--seed", "1", "-n", "9").stdout


def test_a_single_file_comes_with_its_tokenizer(cli: Cli, pull: Cli, folder: Path) -> None:
    expected = cli("run", folder, "Once", "--seed", "1", "-n", "9").stdout
    result = pull(f"{SINGLE}:tiny.safetensors")
    assert result.stdout.strip().endswith("tiny.safetensors")
    assert pull(SINGLE).stdout == result.stdout, "the only weight file needs no name"
    for name in (SINGLE, f"{SINGLE}:tiny.safetensors"):
        assert cli("run", name, "Once", "--seed", "1", "-n", "9").stdout == expected


def test_a_second_pull_downloads_nothing(pull: Cli, stub: Stub) -> None:
    pull(FOLDER)
    stub.requests.clear()
    assert pull(FOLDER).exit_code == 0
    assert not [path for method, path, *_ in stub.requests if method == "GET" and "/resolve/" in path]


def test_a_broken_connection_is_taken_up_again(
    pull: Cli, stub: Stub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    stub.cut_after = 950
    result = pull(FOLDER)
    where = Path(result.stdout.strip().splitlines()[-1])
    assert (where / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert "bytes=900-" in {span for *_, span, _ in stub.requests}


@pytest.mark.parametrize("done", [1, 5000, None])
def test_what_an_ended_process_had_fetched_is_not_fetched_again(
    pull: Cli, stub: Stub, folder: Path, done: int | None
) -> None:
    data = (folder / "model.safetensors").read_bytes()
    blobs = hub.cache_folder() / "models--some--folder-model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(data).hexdigest()}.part").write_bytes(data[:done])
    result = pull(FOLDER)
    where = Path(result.stdout.strip().splitlines()[-1])
    assert (where / "model.safetensors").read_bytes() == data
    spans = [span for method, path, span, _ in stub.requests if method == "GET" and path.endswith("model.safetensors")]
    assert spans == ([f"bytes={done}-"] if done else [])
    assert not list(blobs.glob("*.part"))


def test_a_wrong_sum_deletes_the_file(cli: Cli, pull: Cli, stub: Stub) -> None:
    stub.lies.add("model.safetensors")
    result = pull(FOLDER)
    assert result.exit_code == 1
    assert "SHA-256" in result.stderr
    assert not [path for path in hub.cache_folder().rglob("*") if path.is_file() and path.stat().st_size > 10_000]
    stub.lies.clear()
    assert pull(FOLDER).exit_code == 0


def test_a_choice_is_listed_with_sizes(pull: Cli) -> None:
    result = pull(MANY)
    assert result.exit_code == 1
    assert f"name one, as in {MANY}:a.pth" in result.stderr
    assert "b.pth (0 MB)" in result.stderr
    assert pull(f"{MANY}:c.pth").stderr.startswith(f"error: {MANY} has no file 'c.pth'; it has a.pth")


@pytest.mark.parametrize("name, words", [("no/where", "no such model on the hub"), ("nonsense", "expected org/name")])
def test_unknown_names(pull: Cli, name: str, words: str) -> None:
    result = pull(name)
    assert result.exit_code == 1
    assert words in result.stderr


@pytest.mark.parametrize(
    "code,words",
    [("", "answered with an error"), ("RepoNotFound", "it is private (set HF_TOKEN)"), ("GatedRepo", "asked for on")],
)
def test_a_refusal_says_what_to_do(pull: Cli, stub: Stub, code: str, words: str) -> None:
    stub.refuses = code
    result = pull(FOLDER)
    assert result.exit_code == 1
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_the_token_is_sent(pull: Cli, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = pull(FOLDER)
    assert "Bearer hf_secret" in {authorization for *_, authorization in stub.requests}
    assert "hf_secret" not in result.output


def test_offline_asks_nobody(cli: Cli, pull: Cli, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    pull(FOLDER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    stub.requests.clear()
    result = pull(MANY)
    assert result.exit_code == 1
    assert "offline" in result.stderr.lower()
    assert cli("run", FOLDER, "Once", "-n", "2").exit_code == 0
    assert stub.requests == []


def test_a_dead_endpoint_is_one_line(cli: Cli) -> None:
    result = cli("pull", FOLDER, "--endpoint", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {FOLDER}: ")


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/etc/evil.safetensors", "..\\evil.safetensors"])
def test_a_file_outside_the_folder_is_refused(pull: Cli, stub: Stub, name: str) -> None:
    stub.repositories["some/evil"] = {name: b"x"}
    result = pull("some/evil")
    assert result.exit_code == 1
    assert "does not stay inside" in result.stderr


def test_a_model_that_is_not_cached_says_how_to_get_it(cli: Cli) -> None:
    result = cli("run", "some/model", "x")
    assert result.exit_code == 1
    assert "receptance pull some/model" in result.stderr


def test_a_name_of_the_hub_has_an_owner_and_perhaps_a_file() -> None:
    assert parse("org/name") == ("org/name", None)
    assert parse("org/name:a/b.pth") == ("org/name", "a/b.pth")
    assert parse("name") is parse("a/b/c") is parse("a b/c") is parse("") is None


def test_shards_come_with_their_index() -> None:
    shards = {"model-00001-of-00002.safetensors": 1, "model-00002-of-00002.safetensors": 1}
    assert choose("r", None, {**shards, "model.safetensors.index.json": 1, "x.py": 1, "other.safetensors": 1}) == [
        "model.safetensors.index.json",
        *shards,
    ]
    with pytest.raises(HubError, match="no weight file"):
        choose("r", None, {"README.md": 1})
