"""The container: what we write the package gguf reads, what it writes we read, and damage is named."""

import mmap
import struct
from pathlib import Path

import numpy as np
import pytest

from receptance.errors import CheckpointError
from receptance.gguf.reader import Header, Reader, StoredList, read_header
from receptance.gguf.writer import NewTensor, write_gguf

FIELDS = {
    "general.architecture": "rwkv7",
    "a.number": 7,
    "a.fraction": 0.5,
    "a.truth": True,
    "texts": [b"a", b"", "é".encode()],
    "numbers": [1, -2, 3],
    "fractions": [0.5, 1.5],
}


def header_of(path: Path) -> Header:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return read_header(data, path)


def example(path: Path) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.arange(15, dtype=np.float32).reshape(3, 5), np.arange(34 * 2, dtype=np.uint8)
    tensors = [NewTensor("x.weight", "float32", (3, 5)), NewTensor("y.weight", "Q8_0", (2, 32))]
    with path.open("wb") as file:
        write_gguf(file, FIELDS, tensors, [iter([x[:1].tobytes(), x[1:].tobytes()]), iter([y.tobytes()])])
    return x, y


def test_the_package_gguf_reads_what_we_write(tmp_path):
    gguf = pytest.importorskip("gguf")
    x, y = example(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {name: reader.get_field(name).contents() for name in FIELDS} == FIELDS | {"texts": ["a", "", "é"]}
    first, second = reader.tensors
    assert (first.name, list(first.shape), first.tensor_type.name) == ("x.weight", [5, 3], "F32")
    assert (second.name, list(second.shape), second.tensor_type.name) == ("y.weight", [32, 2], "Q8_0")
    assert np.array_equal(first.data, x)
    assert np.array_equal(second.data.reshape(-1), y)


def test_we_read_what_the_package_gguf_writes(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.add_custom_alignment(64)
    writer.add_float64("half", 0.5)
    writer.add_int64("below", -(1 << 40))
    writer.add_array("words", ["one", "two"])
    x = np.arange(12, dtype=np.float16).reshape(3, 4)
    writer.add_tensor("a", x)
    writer.add_tensor("b", np.ones((2, 3, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = header_of(path)
    assert (found.alignment, found.start % 64, found.version) == (64, 0, 3)
    assert (found.fields["half"], found.fields["below"]) == (0.5, -(1 << 40))
    assert (found.tensors["a"].shape, found.tensors["b"].shape) == ((3, 4), (2, 3, 4))
    content = path.read_bytes()
    assert content[found.tensors["a"].offset :][: x.nbytes] == x.tobytes()
    words = found.fields["words"]
    assert isinstance(words, StoredList)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert Reader(data, path).strings(words) == [b"one", b"two"]


def test_the_same_input_gives_the_same_file(tmp_path):
    example(tmp_path / "one.gguf")
    example(tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


# Damage --------------------------------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes = b"x", sizes: tuple[int, ...] = (4, 2), code: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, code, offset)


def file_of(*tensors: bytes, fields: bytes = b"", n_fields: int = 0, size: int = 32, count: int | None = None) -> bytes:
    count = len(tensors) if count is None else count
    header = b"GGUF" + struct.pack("<IQQ", 3, count, n_fields) + fields + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(size)


ALIGNMENT = text(b"general.alignment") + struct.pack("<I", 4)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (file_of(tensor(sizes=(4, 3))), "of shape [3, 4] in float32 ends at byte"),
        (file_of(tensor(sizes=(1 << 39, 1 << 39))), "cut short"),
        (file_of(tensor(sizes=(1 << 62, 1 << 62))), "impossible shape"),
        (file_of(tensor(sizes=(0, 4))), "impossible shape"),
        (file_of(tensor(sizes=())), "impossible shape"),
        (file_of(tensor(sizes=(1,) * 5)), "5 axes"),
        (file_of(tensor(code=8)), "rows of 4 numbers are no whole blocks of 32"),
        (file_of(tensor(code=3)), "ggml's format Q4_1"),
        (file_of(tensor(code=77)), "format number 77"),
        (file_of(tensor(offset=32), size=64), "gap or overlap"),
        (file_of(tensor(), tensor(b"y"), size=64), "gap or overlap"),
        (file_of(tensor(), tensor(offset=32), size=64), "occurs twice"),
        (file_of(tensor(), count=1 << 40), "more than 50000"),
        (file_of(tensor(), count=3), "impossible shape"),
        (file_of(tensor(), count=9, size=0)[:-8], "asks for"),
        (file_of(tensor(), fields=ALIGNMENT + struct.pack("<I", 48), n_fields=1), "power of two"),
        (file_of(tensor(), fields=ALIGNMENT + struct.pack("<I", 0), n_fields=1), "power of two"),
        (file_of(tensor(), fields=(ALIGNMENT + struct.pack("<I", 32)) * 2, n_fields=2), "occurs twice"),
        (file_of(tensor(b"\xff\x1b[31m" * 50, sizes=(0,))), "impossible shape"),
    ],
)
def test_damage_is_named(content, problem, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.gguf: ") as caught:
        header_of(path)
    message = str(caught.value)
    assert problem in message
    assert "\x1b" not in message
    assert len(message) < 500


def test_the_undamaged_example_is_read(tmp_path):
    (tmp_path / "m.gguf").write_bytes(file_of(tensor()))
    assert header_of(tmp_path / "m.gguf").tensors["x"].shape == (2, 4)
