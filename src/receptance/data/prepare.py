"""Texts to one token file: in several processes, with progress, and continued where it was interrupted.

Every document is tokenised by itself and written in the order of the sources, so that the token file is the same
however many processes make it and however often they are killed. While it grows there are NAME.bin.part,
NAME.sizes.part (int32, one a document) and NAME.progress.json, which says how much of both is good and what comes next.
"""

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from receptance.data.binidx import BinIdx, beside, token_dtype, write_index
from receptance.data.sources import Source, bad_row, open_source
from receptance.data.workers import Result, Workers
from receptance.errors import ConfigError
from receptance.tokenizers.base import Tokenizer

COMMIT_SECONDS = 2.0  # work that a kill can cost
KEPT_REASONS = 20  # skipped rows that the manifest names, of each source
COPY = 1 << 24  # tokens


@dataclass
class Counts:
    """Of one source. copies: how often it has been written; the rest is about one of them."""

    name: str
    copies: int = 1
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)


@dataclass
class Journal:
    """What is done. source, position: the next piece; rows: of that source before it; read: bytes, for progress."""

    settings: dict[str, object]
    counts: list[Counts]
    source: int = 0
    position: int = 0
    rows: int = 0
    read: int = 0

    @property
    def documents(self) -> int:
        return sum(counts.documents * counts.copies for counts in self.counts)

    @property
    def tokens(self) -> int:
        return sum(counts.tokens * counts.copies for counts in self.counts)

    @property
    def is_finished(self) -> bool:
        return self.source == len(self.counts)


@dataclass(frozen=True)
class Manifest:
    """NAME.json, as far as users of the tokens need it. tokenizer: see `tokenizer_identity`."""

    tokenizer: dict[str, object]
    sources: list[Counts]


@dataclass(frozen=True)
class Progress:
    """read and total are bytes of the sources as they lie on disk; the rest counts what has been written."""

    read: int
    total: int
    documents: int
    tokens: int
    text_bytes: int
    skipped: int


def prepare(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    prefix: str | Path,
    *,
    repeat: Sequence[int] = (),
    column: str = "text",
    separator: str | None = None,
    skip_bad: bool = False,
    processes: int = 1,
    restart: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> BinIdx:
    """Tokenise every document of the sources into `prefix.bin/.idx`, each followed by the end-of-document token.

    repeat[i]: how often sources[i] goes in (default once), all of it each time: a document beside its own copy would
    teach copying. column, separator: see `open_source`. skip_bad: leave out rows that are no documents, and count them.
    An interrupted call is continued by giving it again, with any number of processes; what is complete is returned as
    it is. restart: throw away what is there. More than one process needs a main module that can be imported.

    Raises ConfigError for a bad row (naming file and line), and when what is there came from other sources or settings.
    """
    times = list(repeat) or [1] * len(sources)
    if len(times) != len(sources):
        raise ConfigError(f"{len(times)} repeat counts for {len(sources)} files")
    if any(count < 1 for count in times):
        raise ConfigError(f"repeat = {times}: each count must be at least 1; leave a file out instead")
    if processes < 1:
        raise ConfigError(f"processes = {processes}, expected at least 1")
    opened = [open_source(source, column, separator) for source in sources]
    settings: dict[str, object] = {
        "sources": [{"name": source.name, "repeat": n, **source.identity()} for source, n in zip(opened, times)],
        "tokenizer": tokenizer_identity(tokenizer),
        "column": column,
        "separator": separator,
    }
    files = Files(Path(prefix))
    if restart:
        files.remove()
    if files.is_complete(settings):
        return BinIdx(prefix)
    with files.locked():
        journal = files.journal(settings) or Journal(settings, [Counts(source.name) for source in opened])
        if not journal.is_finished:
            _fill(files, journal, opened, times, tokenizer, skip_bad, processes, progress)
        files.publish(journal, token_dtype(tokenizer.vocab_size))
    return BinIdx(prefix)


def read_manifest(prefix: str | Path) -> Manifest | None:
    """What a finished token file was made from; None for one that `prepare` has not written."""
    path = Files(Path(prefix)).manifest
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(saved["settings"]["tokenizer"], [Counts(**entry) for entry in saved["counts"]])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a manifest of a token file ({error})") from None


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, object]:
    """Name, number of ids and the SHA-256 of its vocabulary file."""
    with tempfile.TemporaryDirectory() as folder:
        digest = hashlib.sha256(tokenizer.save(folder).read_bytes()).hexdigest()
    return {"name": tokenizer.name, "ids": tokenizer.vocab_size, "sha256": digest}


def _fill(files: "Files", journal: Journal, sources: Sequence[Source], times: Sequence[int], tokenizer: Tokenizer,
          skip_bad: bool, processes: int, progress: Callable[[Progress], None]) -> None:  # fmt: skip
    total = sum(source.size for source in sources)
    dtype = token_dtype(tokenizer.vocab_size)
    progress(_progress(journal, total))
    with files.open(journal, dtype) as output, Workers(tokenizer, dtype, skip_bad, processes) as workers:
        while not journal.is_finished:
            source, counts = sources[journal.source], journal.counts[journal.source]
            for piece, result in workers.run(source.pieces(journal.position)):
                _note_bad(source, journal, counts, result, skip_bad)
                output.append(result.tokens, result.sizes)
                counts.documents += len(result.sizes)
                counts.tokens += len(result.tokens)
                counts.text_bytes += result.text_bytes
                journal.position, journal.rows = piece.after, journal.rows + result.rows
                journal.read += piece.size
                output.commit(journal, COMMIT_SECONDS)
                progress(_progress(journal, total))
            while counts.copies < times[journal.source]:
                output.repeat(counts.documents, counts.tokens)
                counts.copies += 1
                output.commit(journal, COMMIT_SECONDS)
            journal.source, journal.position, journal.rows = journal.source + 1, 0, 0
            output.commit(journal, COMMIT_SECONDS)
        if not journal.documents:
            raise ConfigError(f"no text in {[source.name for source in sources]}")
        output.commit(journal, 0)
        progress(_progress(journal, total))


def _note_bad(source: Source, journal: Journal, counts: Counts, result: Result, skip_bad: bool) -> None:
    for row, reason in result.bad:
        error = bad_row(source, journal.rows + row, reason)
        if not skip_bad:
            raise error
        counts.skipped += 1
        if len(counts.reasons) < KEPT_REASONS:
            counts.reasons.append(str(error))


def _progress(journal: Journal, total: int) -> Progress:
    text = sum(counts.text_bytes for counts in journal.counts)
    skipped = sum(counts.skipped for counts in journal.counts)
    read = total if journal.is_finished else min(journal.read, total)
    return Progress(read, total, journal.documents, journal.tokens, text, skipped)


class Output:
    """The growing token file. What was written beyond the journal's last commit is cut off when it is opened."""

    def __init__(self, files: "Files", journal: Journal, dtype: type):
        self._files, self._item = files, np.dtype(dtype).itemsize
        self._tokens = _opened(files.tokens, journal.tokens * self._item)
        self._sizes = _opened(files.sizes, journal.documents * 4)
        self._committed = time.monotonic()

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._tokens, self._sizes):
            with suppress(OSError):  # what counts has been committed
                file.close()

    def append(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        with self._files.naming():
            self._tokens.write(tokens.data)
            self._sizes.write(sizes.astype("<i4").data)

    def repeat(self, documents: int, tokens: int) -> None:
        """Write the last so many documents once more."""
        with self._files.naming():
            for file, size in ((self._tokens, tokens * self._item), (self._sizes, documents * 4)):
                file.flush()
                start = file.tell() - size
                for offset in range(0, size, COPY):
                    file.write(os.pread(file.fileno(), min(COPY, size - offset), start + offset))

    def commit(self, journal: Journal, seconds: float) -> None:
        """Make all this survive, unless that was done less than `seconds` ago."""
        if time.monotonic() - self._committed < seconds:
            return
        with self._files.naming():
            for file in (self._tokens, self._sizes):
                file.flush()
                os.fsync(file.fileno())
            _replace(self._files.progress, asdict(journal))
        self._committed = time.monotonic()


class Files:
    """What lies on disk for one NAME, complete or growing."""

    def __init__(self, prefix: Path):
        self.prefix = prefix
        suffixes = (".bin", ".idx", ".json", ".bin.part", ".sizes.part", ".progress.json")
        places = [beside(prefix, suffix) for suffix in suffixes]
        self.bin, self.idx, self.manifest, self.tokens, self.sizes, self.progress = places

    def remove(self) -> None:
        with self.locked():  # the index first: a pair that does not fit together is never seen
            for path in (self.idx, self.bin, self.manifest, self.progress, self.sizes, self.tokens):
                path.unlink(missing_ok=True)

    def is_complete(self, settings: dict[str, object]) -> bool:
        """Raises ConfigError when there is a token file of unknown origin or with other settings."""
        if not self.idx.exists() or self.progress.exists():
            return False
        if not self.manifest.exists():
            raise ConfigError(f"{self.idx}: exists and does not say what it was made from; choose another name")
        _require_same(self.manifest, settings)
        self.remove_parts()
        return True

    def journal(self, settings: dict[str, object]) -> Journal | None:
        if not self.progress.exists():
            return None
        saved = _require_same(self.progress, settings)
        counts = [Counts(**entry) for entry in saved.pop("counts")]  # type: ignore[attr-defined]
        return Journal(counts=counts, **saved)  # type: ignore[arg-type]

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Around writing: a full disk becomes an error that names the file."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"{self.tokens}: could not be written ({reason}); the same command goes on from here"
            ) from error

    def locked(self) -> IO[bytes]:
        """NAME.bin.part, held by this process. Raises ConfigError while another one writes it."""
        self.tokens.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.tokens, "ab")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(f"{self.prefix}: another process is preparing it") from None
        return file

    def open(self, journal: Journal, dtype: type) -> Output:
        return Output(self, journal, dtype)

    def publish(self, journal: Journal, dtype: type) -> None:
        """Put the finished files in place. Can be interrupted anywhere and done again."""
        size = journal.tokens * np.dtype(dtype).itemsize
        if self.tokens.stat().st_size >= size:  # else it went into place already, and this one is the lock's
            os.truncate(self.tokens, size)
            os.replace(self.tokens, self.bin)
        if self.bin.stat().st_size != size:
            raise ConfigError(f"{self.bin}: is not the file that {self.progress} speaks of; delete both to start over")
        manifest = {"documents": journal.documents, "tokens": journal.tokens, **asdict(journal)}
        with self.naming():
            write_index(self.idx, np.fromfile(self.sizes, "<i4", journal.documents), dtype)
            _replace(self.manifest, {key: manifest[key] for key in ("documents", "tokens", "settings", "counts")})
        self.progress.unlink()
        self.remove_parts()

    def remove_parts(self) -> None:
        for path in (self.sizes, self.tokens):
            path.unlink(missing_ok=True)


def _opened(path: Path, size: int) -> IO[bytes]:
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
    file.truncate(size)
    file.seek(size)
    return file


def _replace(path: Path, value: object) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _require_same(path: Path, settings: dict[str, object]) -> dict[str, object]:
    """The saved record, if it was made from the same."""
    try:
        saved: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
        before = saved["settings"]
        assert isinstance(before, dict)
    except (ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"{path}: not readable ({error}); delete it to start over") from None
    for what, old, new in _differences(before, settings):
        raise ConfigError(
            f"{path}: was made with {what} = {old!r}, this is {new!r}; give the same again, choose another name, or "
            f"delete {path.name.split('.')[0]}.* to start over"
        )
    return saved


def _differences(old: object, new: object, where: str = "") -> Iterator[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from _differences(a, b, f"{where}[{i}]")
    elif old != new:
        yield where, old, new
