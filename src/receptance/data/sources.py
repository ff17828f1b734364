"""Documents out of texts and tables, in pieces that several processes can read.

A source cuts itself into pieces: `pieces(position)` gives those from a position on, each of which knows the position
after it, and where they lie depends on the content alone. Finding the documents in a piece is left to whoever gets it.
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol, cast

from receptance.errors import ConfigError

PIECE = 1 << 20  # bytes of text
ROWS = 1024  # of a data set
SAMPLED = 64  # blocks of a megabyte that stand for a file's content; smaller files are looked at in full
COMPRESSED = (".xz", ".gz", ".zst")
HUB = "hf:"


@dataclass(frozen=True)
class Bad:
    """A row that is no document, and why."""

    reason: str


class Piece(Protocol):
    """A share of a source. size: how much of `Source.size` it stands for."""

    @property
    def after(self) -> int: ...
    @property
    def size(self) -> int: ...
    def rows(self) -> Iterator[str | Bad]:
        """Every row in order: a document, or what is wrong with it. Empty ones are to be left out."""


class Source(Protocol):
    """`unit` is what its rows are called in errors; `size`, in bytes, is for progress alone."""

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def size(self) -> int: ...
    def identity(self) -> dict[str, object]:
        """What tells whether the content has changed."""

    def pieces(self, position: int = 0) -> Iterator[Piece]: ...


def open_source(name: str | Path, column: str = "text", separator: str | None = None) -> Source:
    """A .txt, .jsonl or .parquet file, a folder that `datasets` saved, or hf:ORG/NAME[@CONFIG][:SPLIT].

    column: where tables and JSON objects have their text. separator: what stands between the documents of a .txt file;
    without one the file is one
    document, with one they are stripped of white space. Raises ConfigError for anything else, and for a missing file.
    """
    if str(name).startswith(HUB):
        return Table(str(name), column)
    path = Path(name)
    if path.is_dir():
        return Table(str(path), column)
    compressed = path.suffix in COMPRESSED
    kind = path.with_suffix("").suffix if compressed else path.suffix
    if kind not in (".jsonl", ".txt", ".parquet") or (compressed and kind == ".parquet"):
        raise ConfigError(
            f"{path}: expected .txt or .jsonl, perhaps compressed as .xz, .gz or .zst, .parquet, a folder saved by "
            "datasets, or hf:ORG/NAME"
        )
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    if kind == ".parquet":
        return Parquet(str(path), column)
    return Text(str(path), kind == ".jsonl", column, separator)


def documents(
    name: str | Path, column: str = "text", separator: str | None = None, skip_bad: bool = False
) -> Iterator[str]:
    """The documents of a source. Raises ConfigError naming the file and line of the first that is none."""
    source, number = open_source(name, column, separator), 0
    for piece in source.pieces():
        for row in piece.rows():
            number += 1
            if not isinstance(row, Bad):
                if row:
                    yield row
            elif not skip_bad:
                raise bad_row(source, number, row.reason)


def bad_row(source: Source, number: int, reason: str) -> ConfigError:
    return ConfigError(f"{source.name}, {source.unit} {number}: {reason}")


def checked(text: object, column: str) -> str | Bad:
    """A column's value, if it is text that UTF-8 can carry."""
    if not isinstance(text, str):
        return Bad(f"expected a string {column!r}, found {str(text)[:60]!r}")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Bad(f"half a surrogate pair ({text[error.start]!a}), which is no character")
    return text


# Text files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Lines of JSON, or plain text. Positions are bytes of the uncompressed text."""

    name: str
    is_jsonl: bool
    column: str
    separator: str | None

    @property
    def unit(self) -> str:
        return "line" if self.is_jsonl else "document"

    @property
    def size(self) -> int:
        return os.stat(self.name).st_size

    def identity(self) -> dict[str, object]:
        return file_identity(Path(self.name))

    def pieces(self, position: int = 0) -> Iterator["TextPiece"]:
        mark = b"\n" if self.is_jsonl else None if self.separator is None else self.separator.encode()
        try:
            with open(self.name, "rb") as raw, _uncompressed(raw, Path(self.name)) as file:
                start, read = position, raw.tell()
                _skip(file, position)
                for block in _blocks(file, mark):
                    consumed, read = raw.tell() - read, raw.tell()
                    yield TextPiece(self, start + len(block), consumed, block)
                    start += len(block)
        except _damage(self.name) as error:
            raise ConfigError(f"{self.name}: cannot be read ({error})") from None


@dataclass(frozen=True)
class TextPiece:
    source: Text
    after: int
    size: int
    content: bytes

    def rows(self) -> Iterator[str | Bad]:
        if self.source.is_jsonl:
            yield from (self._json(line) for line in self.content.removesuffix(b"\n").split(b"\n"))
            return
        parts = [self.content]
        if self.source.separator is not None:
            mark = self.source.separator.encode()
            parts = self.content.removesuffix(mark).split(mark)
        for part in parts:
            try:
                yield part.decode() if self.source.separator is None else part.decode().strip()
            except UnicodeDecodeError as error:
                yield Bad(f"not UTF-8 at its byte {error.start}")

    def _json(self, line: bytes) -> str | Bad:
        if not line.strip():
            return ""
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            return Bad(f"not UTF-8 at its byte {error.start}")
        except (json.JSONDecodeError, RecursionError) as error:
            return Bad(f"not JSON ({error})")
        column = self.source.column
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            return Bad(f'expected an object with a string "{column}", found {line[:60].decode(errors="replace")!r}')
        return checked(row[column], column)


def _uncompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    if path.suffix == ".xz":
        return cast(IO[bytes], lzma.open(raw))
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(raw))
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstandard(raw, _needed("zstandard", path)))
    return raw


class _Zstandard(io.RawIOBase):
    """Frames one after another. The library's own reader does not notice that the last one is cut short."""

    def __init__(self, raw: IO[bytes], zstandard: Any):
        self._raw, self._library = raw, zstandard
        self._frame: Any = None
        self._text = self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            block = self._rest or self._raw.read(1 << 17)
            if not block:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            self._text, self._rest = self._frame.decompress(block), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size


def _damage(name: str) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    errors = (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError)
    return (*errors, _needed("zstandard", name).ZstdError) if name.endswith(".zst") else errors


def _skip(file: IO[bytes], position: int) -> None:
    """Go to a position; what is compressed has to be read again up to it."""
    if file.seekable() and not isinstance(file, (lzma.LZMAFile, gzip.GzipFile)):
        file.seek(position)
        return
    while position and (block := file.read(min(position, PIECE))):
        position -= len(block)


def _blocks(file: IO[bytes], mark: bytes | None) -> Iterator[bytes]:
    """The rest of a file in blocks that end with `mark`, of at most PIECE bytes unless the marks lie further apart.

    Without a mark all of it at once. Each block is a function of the bytes from its start on: reading can stop and
    start between any two without changing the others.
    """
    if mark is None:
        yield file.read()
        return
    kept = b""
    while block := file.read(PIECE - len(kept) % PIECE):
        kept += block
        end = kept.rfind(mark) if len(kept) % PIECE == 0 else -1
        if end >= 0:
            yield kept[: end + len(mark)]
            kept = kept[end + len(mark) :]
    while kept:  # the file's end
        end = kept.rfind(mark) + len(mark) if mark in kept else len(kept)
        yield kept[:end]
        kept = kept[end:]


# Tables --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parquet:
    """A parquet file. Positions are row groups."""

    name: str
    column: str
    unit: str = "row"

    @property
    def size(self) -> int:
        return os.stat(self.name).st_size

    def identity(self) -> dict[str, object]:
        return file_identity(Path(self.name))

    def pieces(self, position: int = 0) -> Iterator["Rows"]:
        file = _parquet(self.name)
        if self.column not in file.schema_arrow.names:
            raise _no_column(self.name, self.column, file.schema_arrow.names)
        size = self.size // max(file.num_row_groups, 1)
        for group in range(position, file.num_row_groups):
            yield Rows(self, group, group + 1, size)

    def texts(self, first: int, last: int) -> Iterator[object]:
        file = _parquet(self.name)
        for batch in file.iter_batches(ROWS, row_groups=list(range(first, last)), columns=[self.column]):
            yield from batch.column(0).to_pylist()


@dataclass(frozen=True)
class Table:
    """A data set of the `datasets` library, saved in a folder or named on the hub. Positions are rows."""

    name: str
    column: str
    unit: str = "row"

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self._files())

    def identity(self) -> dict[str, object]:
        return {path.name: file_identity(path) for path in self._files()}

    def pieces(self, position: int = 0) -> Iterator["Rows"]:
        table = _data_set(self.name)
        if self.column not in table.column_names:
            raise _no_column(self.name, self.column, table.column_names)
        size = self.size * ROWS // max(len(table), 1)
        for first in range(position, len(table), ROWS):
            yield Rows(self, first, min(first + ROWS, len(table)), size)

    def texts(self, first: int, last: int) -> Iterator[object]:
        yield from _data_set(self.name).select_columns([self.column])[first:last][self.column]

    def _files(self) -> list[Path]:
        return [Path(entry["filename"]) for entry in _data_set(self.name).cache_files]


@dataclass(frozen=True)
class Rows:
    source: Parquet | Table
    first: int
    after: int
    size: int

    def rows(self) -> Iterator[str | Bad]:
        for text in self.source.texts(self.first, self.after):
            yield checked(text, self.source.column)


def _no_column(name: str, column: str, found: list[str]) -> ConfigError:
    return ConfigError(f"{name}: has no column {column!r}; it has {', '.join(found)}: choose one with --column")


@lru_cache(maxsize=4)
def _parquet(name: str) -> Any:
    parquet = _needed("pyarrow.parquet", name)
    try:
        return parquet.ParquetFile(name)
    except (OSError, ValueError) as error:  # what pyarrow's exceptions derive from
        raise ConfigError(f"{name}: not a readable parquet file ({error})") from None


@lru_cache(maxsize=4)
def _data_set(name: str) -> Any:
    """Opened once in a process; memory-mapped by the library."""
    datasets = _needed("datasets", name)
    try:
        if not name.startswith(HUB):
            table, split = datasets.load_from_disk(name), ""
        else:
            place, _, split = name.removeprefix(HUB).partition(":")
            repo, _, config = place.partition("@")
            table = datasets.load_dataset(repo, config or None, split=split or None)
    except Exception as error:  # the library, its file systems and its transport raise dozens of types
        lines = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"{name}: cannot be opened as a data set ({lines[0]})") from None
    if isinstance(table, dict):
        example = f"{name}:{next(iter(table))}" if name.startswith(HUB) else f"{name}/{next(iter(table))}"
        raise ConfigError(f"{name}: holds the splits {', '.join(table)}; choose one, as in {example}")
    return table


def _needed(module: str, name: str | Path) -> Any:
    """A module of the [data] extra."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{name}: needs {error.name}, which is not installed: pip install 'receptance[data]'"
        ) from None


def file_identity(path: Path) -> dict[str, object]:
    """Bytes and SHA-256; above 64 MiB of 64 blocks spread over the file, and the time of its last change as well."""
    digest, facts = hashlib.sha256(), path.stat()
    with open(path, "rb") as file:
        for i in range(SAMPLED):
            file.seek(max(i << 20, (facts.st_size - (1 << 20)) * i // (SAMPLED - 1)))
            digest.update(file.read(1 << 20))
    identity: dict[str, object] = {"bytes": facts.st_size, "sha256": digest.hexdigest()}
    return identity if facts.st_size <= SAMPLED << 20 else {**identity, "modified": facts.st_mtime_ns}
