"""The server's configuration: frozen dataclasses, TOML on disk, dotted overrides on the command line."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from receptance.errors import ConfigError
from receptance.server.names import NAME
from receptance.settings import build, put, read_toml

DEFAULT_CONFIG_FOLDER = Path.home() / ".local" / "state" / "receptance" / "server"


@dataclass(frozen=True)
class ListenConfig:
    """Where to listen. insecure: allow an address that others can reach although no key is needed.

    hosts: names by which clients may call the server; without keys, others are refused where it listens on loopback (a
    web page whose name was made to mean this machine). origins: web pages elsewhere that may call it (CORS); none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    insecure: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    page: bool = True


@dataclass(frozen=True)
class AuthConfig:
    """keys: a file with a line `NAME SHA256` for each key; `receptance serve --new-key NAME` adds one."""

    keys: str | None = None


@dataclass(frozen=True)
class LimitConfig:
    """What one request may ask, and all of them together.

    texts: that run or wait at once, over all models; more are refused with 429. requests: connections in the midst of
    any request, whatever it asks. request_seconds: after which a request is ended. drain_seconds: that the requests
    under way have after SIGTERM. body_bytes: of a request; of an imported session, import_bytes.
    """

    texts: int = 1024
    requests: int = 4096
    n: int = 16
    max_tokens: int = 32_768
    prompt_bytes: int = 1 << 20
    prompts: int = 128
    messages: int = 4096
    schema_bytes: int = 65_536
    schema_depth: int = 32
    tools: int = 64
    logit_bias: int = 1024
    body_bytes: int = 4 << 20
    import_bytes: int = 256 << 20
    request_seconds: float = 600.0
    header_seconds: float = 15.0
    body_seconds: float = 30.0
    drain_seconds: float = 60.0


@dataclass(frozen=True)
class SessionConfig:
    """Where conversations are kept: a folder, or `redis` (a URL) for several replicas.

    state_bytes: of all states on disk; beyond it the least recently used go, and their turns are read again when the
    session goes on. memory_bytes: of states also held in memory. sessions: for one key. responses: of /v1/responses
    that are kept, the oldest go first.
    """

    folder: str | None = None
    redis: str | None = None
    state_bytes: int = 16 << 30
    memory_bytes: int = 256 << 20
    sessions: int = 100_000
    responses: int = 100_000


@dataclass(frozen=True)
class ServedConfig:
    """A model, and how it is run. An empty word means what the model's own files say.

    weights: as `Engine` takes them. states: names of tuned states, with their files; a request picks one with `state`.
    """

    model: str = ""
    dtype: str | None = None
    device: str | None = None
    engine: str | None = None
    threads: int | None = None
    tokenizer: str | None = None
    template: str | None = None
    thinking: str | None = None
    system: str | None = None
    slots: int | None = None
    weights: str = "full"
    cache_bytes: int = 256 << 20
    states: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RayConfig:
    """Of `receptance serve --ray`. replicas: at least so many; most_replicas: more than that lets Ray add some.

    target_requests: under way in each replica, by which Ray adds and takes away. cpus, gpus: that each replica has.
    """

    replicas: int = 1
    most_replicas: int = 1
    target_requests: float = 32.0
    cpus: float = 1.0
    gpus: float = 0.0


@dataclass(frozen=True)
class LogConfig:
    """level: of the program's own lines. prompts: also log what was asked and answered."""

    level: str = "info"
    prompts: bool = False


@dataclass(frozen=True)
class ServerConfig:
    listen: ListenConfig = field(default_factory=ListenConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    limits: LimitConfig = field(default_factory=LimitConfig)
    sessions: SessionConfig = field(default_factory=SessionConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    log: LogConfig = field(default_factory=LogConfig)
    models: dict[str, ServedConfig] = field(default_factory=dict)


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> ServerConfig:
    """The TOML file with `section.key=value` overrides on top (TOML values; bare words are strings).

    Raises ConfigError naming the unknown key, or the value's found and expected type or range.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        raw = read_toml(Path(path))
    for text in overrides:
        put(raw, text, "listen.port=9000")
    config = build(ServerConfig, raw, "")
    check(config)
    return config


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check(config: ServerConfig) -> None:
    """Raise ConfigError for a value out of range, and for an open server that nobody asked for."""
    for section in (config.limits, config.sessions, config.ray):
        for entry in fields(section):
            value = getattr(section, entry.name)
            lowest = 0 if isinstance(value, float) or entry.name in ("memory_bytes", "tools", "logit_bias") else 1
            if isinstance(value, int | float) and not lowest <= value <= 1 << 50:
                raise ConfigError(f"{entry.name} = {value!r} is out of range; expected {lowest} or more")
    if not 0 <= config.listen.port <= 65535:
        raise ConfigError(f"listen.port = {config.listen.port} is out of range; expected 0 (any free one) to 65535")
    if config.log.level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"log.level = {config.log.level!r}, expected debug, info, warning or error")
    for name, model in config.models.items():
        for word in (name, *model.states):
            if not NAME.fullmatch(word):
                raise ConfigError(f"models: the name {word!r} is not made of a-z, 0-9, '.', '_' and '-' (at most 128)")
    if not (is_loopback(config.listen.host) or config.auth.keys or config.listen.insecure):
        raise ConfigError(
            f"listen.host = {config.listen.host!r} can be reached by others, and no key is needed: make one with "
            "`receptance serve --new-key NAME`, or accept it with --insecure"
        )


def as_toml(config: object) -> str:
    """The configuration as TOML, with all defaults."""
    lines: list[str] = []
    _write(config, "", lines)
    return "\n".join(lines).strip() + "\n"


def _write(table: Any, where: str, lines: list[str]) -> None:
    values = {f.name: getattr(table, f.name) for f in fields(table)} if is_dataclass(table) else table
    if where and any(not _is_table(x) for x in values.values()):
        lines += ["", f"[{where}]"]
    lines += [f"{key} = {_value(x)}" for key, x in values.items() if x is not None and not _is_table(x)]
    for key, x in values.items():
        if _is_table(x):
            _write(x, f"{where}.{_key(key)}".strip("."), lines)


def _is_table(x: object) -> bool:
    return is_dataclass(x) or isinstance(x, dict)


def _key(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() else f'"{name}"'


def _value(x: object) -> str:
    import json

    if isinstance(x, tuple):
        return "[" + ", ".join(map(_value, x)) + "]"
    return json.dumps(x, ensure_ascii=False)
