"""Tensors lying in a mapped file: what they are and where, known without reading them and without torch.

Every container (`pth`, `safetensors`) is parsed into a `TensorSource`. Positions and sizes are checked here, with
Python's unbounded integers, before anything is mapped to a tensor; torch is imported only when a tensor is read.
"""

import math
import mmap
import stat
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from receptance.errors import CheckpointError
from receptance.gguf.formats import BLOCK_FORMATS

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from receptance.native.arrays import Weight
    from receptance.native.blocks import Blocks

# torch's names; weights must be one of FLOATS, the others are known only so that the message can say what was found
FLOATS = ("float64", "float32", "bfloat16", "float16")
ITEM_SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
ITEM_SIZE |= {"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}

MAX_DIMS = 8
MAX_TENSORS = 50_000  # released models have at most 2,200


def show(name: object) -> str:
    """A name from a file, safe to print: quoted, escaped and short."""
    text = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
    return text if len(text) <= 120 else text[:117] + "...'"


@dataclass(frozen=True, eq=False)
class MappedFile:
    """A whole file as private memory: writing to a tensor on it never reaches the file."""

    path: Path
    data: mmap.mmap

    @property
    def size(self) -> int:
        return len(self.data)

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")


def map_file(path: Path) -> MappedFile:
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            if size == 0:
                raise CheckpointError(f"{path}: the file is empty; download or save it again")
            return MappedFile(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def open_regular(path: Path) -> BinaryIO:
    """Open for reading, but never wait on a pipe or a device."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"{path}: is not a regular file")
    return path.open("rb")


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a file; `stride` (in elements) is None when the elements lie in order without gaps.

    `dtype` is one of ITEM_SIZE, or the name of a GGUF block format, whose rows are whole blocks.
    """

    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes, from the start of the file to the first element
    stride: tuple[int, ...] | None = None
    is_shared: bool = False  # other tensors lie on the same bytes

    @cached_property
    def elements(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        if self.dtype in BLOCK_FORMATS:
            return BLOCK_FORMATS[self.dtype].size(self.shape)
        return self.elements * ITEM_SIZE[self.dtype]

    @property
    def span(self) -> int:
        """How many elements lie between the first and the last, both counted."""
        if self.elements == 0:
            return 0
        if self.stride is None:
            return self.elements
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride))

    def check(self, name: str, start: int, end: int) -> None:
        """Raise unless the tensor lies within bytes start..end of the file and has a shape torch can hold."""
        if len(self.shape) > MAX_DIMS or any(size < 0 for size in self.shape):
            raise self.file.error(f"tensor {show(name)} has the impossible shape {list(self.shape)[:MAX_DIMS]}")
        if self.elements == 0:
            raise self.file.error(f"tensor {show(name)} is empty: shape {list(self.shape)}")
        if self.stride is not None and (len(self.stride) != len(self.shape) or any(step < 0 for step in self.stride)):
            raise self.file.error(f"tensor {show(name)} has impossible strides for shape {list(self.shape)}")
        last = self.offset + (self.nbytes if self.stride is None else self.span * ITEM_SIZE[self.dtype])
        if last > self.file.size:
            raise self.file.error(
                f"tensor {show(name)} ends at byte {last:,}, but the file has {self.file.size:,}; "
                "it is cut short, get it again"
            )
        if not start <= self.offset <= last <= end <= self.file.size or self.nbytes > end - start:
            raise self.file.error(
                f"tensor {show(name)} of shape {list(self.shape)} and type {self.dtype} needs {self.nbytes} bytes, "
                f"found {end - start} for it; the file is damaged, get it again"
            )

    def read(self) -> "torch.Tensor":
        """The tensor, on the mapped bytes themselves where that is sound (copy-on-write), else a copy."""
        import torch

        if self.dtype in BLOCK_FORMATS:
            return to_torch(self.stored())
        dtype: torch.dtype = getattr(torch, self.dtype)
        size = ITEM_SIZE[self.dtype]
        buffer: mmap.mmap | bytearray = self.file.data
        offset = self.offset
        # torch may assume aligned data, and training must not update two tensors through one memory
        if self.offset % size or self.is_shared:
            buffer, offset = bytearray(memoryview(self.file.data)[offset : offset + self.span * size]), 0
        flat = torch.frombuffer(buffer, dtype=dtype, count=self.span, offset=offset)
        if self.stride is None:
            return flat.view(self.shape)
        return flat.as_strided(self.shape, self.stride).contiguous()

    def array(self) -> "NDArray[np.generic]":
        """The tensor without torch, on the mapped bytes where they lie in order; bfloat16 as uint16."""
        import numpy as np

        dtype = np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)
        flat = np.frombuffer(self.file.data, dtype, self.span, self.offset)
        if self.stride is None:
            return flat.reshape(self.shape)
        steps = [step * dtype.itemsize for step in self.stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, steps))

    def stored(self) -> "NDArray[np.generic] | Blocks":
        """`array`, or for a block format the blocks themselves, on the mapped bytes, as rows of the last axis."""
        if self.dtype not in BLOCK_FORMATS:
            return self.array()
        import numpy as np

        from receptance.native.blocks import Blocks

        data = np.frombuffer(self.file.data, np.uint8, self.nbytes, self.offset)
        return Blocks(self.dtype, (self.elements // self.shape[-1], self.shape[-1]), data)


def to_torch(x: "NDArray[np.generic] | Blocks") -> "torch.Tensor":
    """On the same memory where that is possible; blocks become float32."""
    import numpy as np
    import torch

    if not isinstance(x, np.ndarray):
        from receptance.gguf.quantise import dequantise

        x = dequantise(x)
    tensor = torch.from_numpy(x)
    return tensor.view(torch.bfloat16) if x.dtype == np.uint16 else tensor


@dataclass(frozen=True)
class Record:
    """A range of bytes whose CRC-32 is known."""

    file: MappedFile
    name: str
    offset: int
    size: int
    crc32: int


@dataclass
class TensorSource:
    """The tensors of one checkpoint, whatever the container: names, shapes and types at once, contents on demand.

    The tensors that `read` returns keep the mapping alive, so the source itself may be dropped.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read(self, name: str) -> "torch.Tensor":
        return self.tensors[name].read()

    def array(self, name: str) -> "NDArray[np.generic]":
        return self.tensors[name].array()

    def official(self) -> "dict[str, Weight] | None":
        """All tensors under official names and shapes, where the container has its own; None: renaming is enough."""
        return None

    def release(self) -> None:
        """Give back the memory of what has been read; it is read from the file again where it is still used."""
        for file in {id(tensor.file): tensor.file for tensor in self.tensors.values()}.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                file.data.madvise(mmap.MADV_DONTNEED)

    def verify(self) -> None:
        """Compare every stored CRC-32 with the bytes (about 4 GB/s a core); raise naming the first that differs."""

        def crc32(record: Record) -> int:
            return zlib.crc32(memoryview(record.file.data)[record.offset : record.offset + record.size])

        if sum(record.size for record in self.records) < 1 << 25:
            found: Iterable[int] = map(crc32, self.records)  # threads would cost more than the sums
        else:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor() as pool:
                found = list(pool.map(crc32, self.records))
        for record, value in zip(self.records, found):
            if value != record.crc32:
                raise record.file.error(
                    f"{show(record.name)} is damaged: CRC-32 {value:08x}, expected {record.crc32:08x}; "
                    "download or copy the file again"
                )


def check_total(source: TensorSource) -> TensorSource:
    """Refuse a small file that unfolds into huge tensors by naming the same bytes again and again."""
    size = sum({id(tensor.file): tensor.file.size for tensor in source.tensors.values()}.values())
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    if total > 2 * size:
        raise CheckpointError(f"{source.path}: its tensors claim {total} bytes, the file has {size}; refusing it")
    return source
