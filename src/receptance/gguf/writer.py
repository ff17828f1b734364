"""GGUF files, written front to back: the header first, whose offsets follow from shapes, then tensor after tensor."""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from receptance.gguf.formats import FORMATS, Format
from receptance.gguf.reader import ARRAY, DEFAULT_ALIGNMENT, STRING

UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7
Value = int | float | bool | str | list[bytes] | list[int] | list[float]


@dataclass(frozen=True)
class NewTensor:
    name: str
    format: str
    shape: tuple[int, ...]  # the innermost size last


def write_gguf(
    file: BinaryIO, fields: Mapping[str, Value], tensors: list[NewTensor], contents: Iterable[Iterable[bytes]]
) -> None:
    """`contents`: the bytes of each tensor in turn, in pieces. Same input, same file."""
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]
    header += [string(name) + value(x) for name, x in fields.items()]
    offset = 0
    for tensor in tensors:
        format = FORMATS[tensor.format]
        sizes = tensor.shape[::-1]
        header.append(string(tensor.name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, format.code, offset))
        offset += padded(format.size(tensor.shape))
    text = b"".join(header)
    file.write(text + bytes(padded(len(text)) - len(text)))
    for tensor, pieces in zip(tensors, contents, strict=True):
        expected = expected_size(FORMATS[tensor.format], tensor)
        written = sum(file.write(piece) for piece in pieces)
        assert written == expected, f"{tensor.name}: {written} bytes written, {expected} announced"
        file.write(bytes(padded(written) - written))


def expected_size(format: Format, tensor: NewTensor) -> int:
    return format.size(tensor.shape)


def padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(x: Value) -> bytes:
    """Type and value; whole numbers as uint32, those of a list as int32."""
    if isinstance(x, bool):
        return struct.pack("<IB", BOOL, x)
    if isinstance(x, int):
        return struct.pack("<II", UINT32, x)
    if isinstance(x, float):
        return struct.pack("<If", FLOAT32, x)
    if isinstance(x, str):
        return struct.pack("<I", STRING) + string(x)
    if x and isinstance(x[0], bytes):
        return struct.pack("<IIQ", ARRAY, STRING, len(x)) + b"".join(map(string, x))  # type: ignore[arg-type]
    kind, letter = (FLOAT32, "f") if x and isinstance(x[0], float) else (INT32, "i")
    return struct.pack(f"<IIQ{len(x)}{letter}", ARRAY, kind, len(x), *x)
