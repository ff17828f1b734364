"""The community's token files: `name.bin` holds all tokens one after another, `name.idx` where each document lies.

Layout (little endian): magic, u64 version 1, u8 dtype, u64 items, u64 document marks, int32 sizes, int64 byte pointers,
int64 document marks. Every document ends in token 0.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from receptance.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
DTYPES: dict[int, type] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
HEADER = struct.Struct("<9sQBQQ")


def beside(prefix: Path, suffix: str) -> Path:
    """A file of the token file called `prefix`. Raises ConfigError for a path without a name, as "." is one."""
    if not prefix.name:
        raise ConfigError(f"{prefix}: is a folder; expected the NAME of NAME.bin and NAME.idx")
    return prefix.with_name(prefix.name + suffix)


class BinIdx:
    """A memory-mapped token file. `tokens` is the whole stream, `sizes` and `starts` its documents in tokens."""

    def __init__(self, prefix: str | Path):
        """Raises ConfigError when a file is missing or its index does not fit its data."""
        self.prefix = Path(prefix)
        idx, data = beside(self.prefix, ".idx"), beside(self.prefix, ".bin")
        for path in (idx, data):
            if not path.is_file():
                raise ConfigError(f"{path}: no such file; a token file is a pair NAME.bin and NAME.idx")
        raw = idx.read_bytes()
        if len(raw) < HEADER.size:
            raise ConfigError(f"{idx}: {len(raw)} bytes is too short for an index")
        magic, version, code, items, marks = HEADER.unpack_from(raw)
        expected = HEADER.size + 12 * items + 8 * marks
        if magic != MAGIC or version != 1 or code not in DTYPES or len(raw) != expected:
            raise ConfigError(
                f"{idx}: not an index of version 1 (magic {magic!r}, version {version}, dtype code {code}, "
                f"{len(raw)} bytes where {items} items and {marks} marks need {expected})"
            )
        dtype = np.dtype(DTYPES[code])
        self.sizes = np.frombuffer(raw, "<i4", items, HEADER.size).astype(np.int64)
        pointers = np.frombuffer(raw, "<i8", items, HEADER.size + 4 * items)
        size = data.stat().st_size
        if not self.sizes.any():
            raise ConfigError(f"{idx}: the index holds no tokens")
        if (self.sizes < 0).any() or (pointers < 0).any() or int((pointers + self.sizes * dtype.itemsize).max()) > size:
            raise ConfigError(f"{idx}: the index points beyond the {size} bytes of {data.name}")
        if size % dtype.itemsize or (pointers % dtype.itemsize).any():
            raise ConfigError(f"{idx}: {data.name} or a document's place is not whole tokens of {dtype.itemsize} bytes")
        self.starts = pointers // dtype.itemsize
        self.tokens = np.memmap(data, dtype, "r")

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, document: int) -> np.ndarray:
        start = int(self.starts[document])
        return self.tokens[start : start + int(self.sizes[document])]


def token_dtype(vocab_size: int) -> type:
    """The type that a vocabulary's ids are stored in."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def write_index(idx: Path, sizes: npt.NDArray[np.int32], dtype: type) -> None:
    """The index of documents of `sizes` tokens that lie one after another. Appears whole or not at all."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    pointers = np.zeros(len(sizes), "<i8")
    np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= np.dtype(dtype).itemsize
    part = idx.with_name(idx.name + ".part")
    with open(part, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(sizes), len(sizes) + 1))
        for numbers in (sizes.astype("<i4"), pointers, np.arange(len(sizes) + 1, dtype="<i8")):
            numbers.tofile(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, idx)


class BinIdxWriter:
    """Appends documents to `prefix.bin`; `close` puts both files in place, so an interrupted pair is never seen."""

    def __init__(self, prefix: str | Path, vocab_size: int):
        self.prefix = Path(prefix)
        self.dtype = token_dtype(vocab_size)
        self._part = beside(self.prefix, ".bin.part")
        self._part.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._part, "wb")  # noqa: SIM115
        self._sizes: list[int] = []

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """One document; the end-of-document token is the caller's."""
        np.asarray(tokens, self.dtype).tofile(self._file)
        self._sizes.append(len(tokens))

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, beside(self.prefix, ".bin"))
        write_index(beside(self.prefix, ".idx"), np.array(self._sizes, np.int32), self.dtype)
