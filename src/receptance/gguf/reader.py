"""The header of a GGUF file: metadata, and where its tensors lie (ggml-org/ggml, docs/gguf.md, versions 2 and 3).

Little-endian throughout: "GGUF", version, number of tensors, number of fields; the fields (name, type, value); for each
tensor its name, sizes (the innermost first), type and offset; then, from a multiple of the alignment on, the tensors.
Every length is compared with what is left of the file, in Python's unbounded integers, before it is used.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from receptance.errors import CheckpointError
from receptance.gguf.formats import BY_CODE, OTHER_CODES, Format

NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
LAYOUTS = {kind: struct.Struct(layout) for kind, layout in NUMBERS.items()}
BOOL, STRING, ARRAY = 7, 8, 9
LENGTH = struct.Struct("<Q")

MAX_NESTING = 4
MAX_TENSORS = 50_000
MAX_FIELDS = 50_000
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32

Scalar = int | float | bool | str


@dataclass(frozen=True)
class StoredList:
    """A list in the metadata, still in the file: lists of tokens are long, and few readers want them."""

    kind: int
    count: int
    offset: int  # of its first element


@dataclass(frozen=True)
class TensorInfo:
    """`shape` has the innermost size last; `offset` counts from the start of the file."""

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return self.format.size(self.shape)


@dataclass(frozen=True)
class Header:
    """What `read_header` found. A list is a StoredList, or None where it holds lists."""

    version: int
    fields: dict[str, Scalar | StoredList | None]
    tensors: dict[str, TensorInfo]
    alignment: int
    start: int  # of the tensors


def read_header(data: mmap.mmap, path: Path) -> Header:
    """Raises CheckpointError, naming the place, for everything that is not as it should be."""
    reader = Reader(data, path)
    if reader.take(4) != b"GGUF":
        raise reader.error(f"begins with {data[:4]!r}, expected b'GGUF'; is it a GGUF file?")
    version = reader.whole(4)
    if version not in (2, 3):
        raise reader.error(f"GGUF version {version}, expected 2 or 3 (little-endian); convert the model again")
    n_tensors, n_fields = reader.whole(10), reader.whole(10)
    fields: dict[str, Scalar | StoredList | None] = {}
    for index in range(n_fields):  # each step reads on, so a false count ends at the end of the file
        name = reader.text()
        if name in fields or index >= MAX_FIELDS:
            raise reader.error(f"the metadata field {show(name)} occurs twice, or there are too many; it is damaged")
        fields[name] = reader.value(reader.whole(4))
    if n_tensors > MAX_TENSORS:
        raise reader.error(f"claims {n_tensors} tensors, more than {MAX_TENSORS}; refusing it")
    alignment = fields.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not (0 < alignment <= 1 << 20 and alignment & (alignment - 1) == 0):
        raise reader.error(f"general.alignment is {show(alignment)}, expected a power of two")
    stated = [reader.tensor() for _ in range(n_tensors)]
    start = -(-reader.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    end = start
    for name, format, shape, offset in stated:
        tensor = TensorInfo(name, format, shape, start + offset)
        if name in tensors:
            raise reader.error(f"tensor {show(name)} occurs twice; the file is damaged")
        if tensor.offset != end:
            raise reader.error(f"tensor {show(name)} begins at byte {tensor.offset}, expected {end}: gap or overlap")
        if tensor.offset + tensor.nbytes > len(data):
            raise reader.error(
                f"tensor {show(name)} of shape {list(shape)} in {format.name} ends at byte "
                f"{tensor.offset + tensor.nbytes} of {len(data)}; the file is cut short or damaged, fetch it again"
            )
        end = -(-(tensor.offset + tensor.nbytes) // alignment) * alignment
        tensors[name] = tensor
    return Header(version, fields, tensors, alignment, start)


def show(value: object) -> str:
    """Something from a file, safe to print: escaped and short."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


class Reader:
    """A position in the file that never leaves it."""

    def __init__(self, data: mmap.mmap, path: Path, position: int = 0):
        self.data = data
        self.path = path
        self.position = position

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")

    def tensor(self) -> tuple[str, Format, tuple[int, ...], int]:
        """Name, format, shape, and the offset from where the tensors begin."""
        name = self.text()
        dims = self.whole(4)
        if dims > MAX_DIMS:
            raise self.error(f"tensor {show(name)} has {dims} axes, expected at most {MAX_DIMS}; the file is damaged")
        shape = tuple(self.whole(10) for _ in range(dims))[::-1]
        code, offset = self.whole(4), self.whole(10)
        if code not in BY_CODE:
            what = OTHER_CODES.get(code, f"number {code}")
            known = ", ".join(format.name for format in BY_CODE.values())
            raise self.error(f"tensor {show(name)} is in ggml's format {what}, which is not read here; known: {known}")
        if not shape or not all(0 < size < 1 << 40 for size in shape):
            raise self.error(f"tensor {show(name)} has the impossible shape {list(shape)}; the file is damaged")
        try:
            BY_CODE[code].size(shape)
        except ValueError as error:
            raise self.error(f"tensor {show(name)}: {error}; the file is damaged") from None
        return name, BY_CODE[code], shape, offset

    def value(self, kind: int) -> Scalar | StoredList | None:
        """Read a number or a text; note where a list lies and step over it."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(kind)
        inner, count = self.whole(4), self.whole(10)
        stored = StoredList(inner, count, self.position)
        self.skip_list(inner, count, 0)
        return None if inner == ARRAY else stored

    def skip_list(self, inner: int, count: int, depth: int) -> None:
        if depth == MAX_NESTING:
            raise self.error(f"lists nested deeper than {MAX_NESTING}; the file is damaged")
        if inner == STRING:
            self.skip_strings(count)
        elif inner == ARRAY:
            for _ in range(count):
                self.skip_list(self.whole(4), self.whole(10), depth + 1)
        else:
            self.skip(self.layout(inner).size * count)

    def skip_strings(self, count: int) -> None:
        """In a tight loop: vocabularies have 65,536."""
        position, last, data, unpack = self.position, len(self.data) - 8, self.data, LENGTH.unpack_from
        for _ in range(count):
            if position > last:
                break
            position += 8 + unpack(data, position)[0]
        else:
            if position <= last + 8:
                self.position = position
                return
        self.position = min(position, last + 8)
        self.skip(8 if position >= last else position - self.position)  # which says that the file ends

    def strings(self, stored: StoredList) -> list[bytes]:
        """The texts of a list, as bytes."""
        self.position = stored.offset
        return [self.take(self.whole(10)) for _ in range(stored.count)]

    def text(self) -> str:
        return self.take(self.whole(10)).decode("utf-8", "replace")

    def layout(self, kind: int) -> struct.Struct:
        if kind not in LAYOUTS:
            raise self.error(f"unknown value type {kind} at byte {self.position}; the file is damaged")
        return LAYOUTS[kind]

    def number(self, kind: int) -> int | float | bool:
        layout = self.layout(kind)
        start = self.position
        self.skip(layout.size)
        return layout.unpack_from(self.data, start)[0]  # type: ignore[no-any-return]

    def whole(self, kind: int) -> int:
        """A number of a type without fractions."""
        return int(self.number(kind))

    def take(self, size: int) -> bytes:
        start = self.position
        self.skip(size)
        return self.data[start : self.position]

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.position:
            raise self.error(
                f"the metadata asks for {size} bytes at byte {self.position} of {len(self.data)}; "
                "the file is cut short or damaged, fetch it again"
            )
        self.position += size
