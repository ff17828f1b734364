"""API keys: random, shown to nobody but their owner, and kept as hashes."""

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from receptance.atomic import replacing
from receptance.errors import ConfigError
from receptance.server.names import is_name


@dataclass(frozen=True)
class Keys:
    """hashes: name of a key → SHA-256 of it. A key has 256 random bits, so that a plain hash is enough."""

    hashes: dict[str, bytes]

    def owner(self, key: str) -> str | None:
        """The name of this key, or None. Takes as long for every wrong key."""
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for name, expected in self.hashes.items():
            if hmac.compare_digest(given, expected):
                found = name
        return found


def read_keys(path: Path) -> Keys:
    """Raises ConfigError for a file that is missing, empty or not of lines `NAME SHA256`."""
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `receptance serve --new-key NAME` makes a key") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    hashes = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        try:
            name, value = words
            hashes[name] = bytes.fromhex(value)
        except ValueError:
            raise ConfigError(f"{path}, line {number}: expected NAME SHA256") from None
        if not is_name(name) or len(hashes[name]) != 32:
            raise ConfigError(f"{path}, line {number}: expected a name of a-z, 0-9, '.', '_', '-' and 64 hex digits")
    if not hashes:
        raise ConfigError(f"{path}: holds no key; `receptance serve --new-key NAME` makes one")
    return Keys(hashes)


def new_key(path: Path, name: str, secret: Path) -> None:
    """Make a key: its hash goes into the file `path`, itself into the new file `secret`, for its owner alone."""
    if not is_name(name):
        raise ConfigError(f"the name of the key is {name!r}, expected a-z, 0-9, '.', '_' and '-'")
    known = read_keys(path).hashes if path.exists() else {}
    if name in known:
        raise ConfigError(f"{path} has a key named {name!r} already")
    key = "rk-" + secrets.token_urlsafe(32)
    try:
        descriptor = os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{secret} exists already; move it away first") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(key + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    known[name] = hashlib.sha256(key.encode()).digest()
    with replacing(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write("".join(f"{word} {value.hex()}\n" for word, value in known.items()).encode())
