"""Documents out of text files."""

import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from receptance.errors import ConfigError

OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


def documents(path: str | Path) -> Iterator[str]:
    """The documents of a .jsonl file (one object with a "text" per line) or a .txt file (one document), .xz or .gz too.

    Raises ConfigError naming the file and line of anything else.
    """
    path = Path(path)
    suffixes = path.suffixes
    compressed = bool(suffixes) and suffixes[-1] in OPENERS
    kind = suffixes[-2] if compressed and len(suffixes) > 1 else path.suffix
    if kind not in (".jsonl", ".txt"):
        raise ConfigError(f"{path}: expected .jsonl or .txt, or one of them compressed as .xz or .gz")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    opener = OPENERS[suffixes[-1]] if compressed else open
    try:
        with cast(IO[str], opener(path, "rt", encoding="utf-8")) as file:
            if kind == ".txt":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                yield _row(path, number, line)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def _row(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {number}: not JSON ({error})") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f'{path}, line {number}: expected an object with a string "text", found {line[:60]!r}')
    return text
