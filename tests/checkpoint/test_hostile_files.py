"""Files made to attack the reader: each raises CheckpointError, quickly, and nothing in them ever runs."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import archive, assert_same, saved_by_torch, tiny_weights, within_a_second

from receptance.checkpoint import load, open_checkpoint, save
from receptance.errors import CheckpointError

END = b"."


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data  # LONG1


def tuple_(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def tensor(
    shape: list[int], stride: list[int], *, offset: int = 0, numel: int = 4, key: str = "0", kind: str = "FloatStorage"
) -> bytes:
    """The pickle instructions of one tensor, whatever its numbers."""
    storage = tuple_(text("storage"), global_("torch", kind), text(key), text("cpu"), integer(numel)) + b"Q"
    args = (storage, integer(offset), tuple_(*map(integer, shape)), tuple_(*map(integer, stride)), b"\x89", b"N")
    return global_("torch._utils", "_rebuild_tensor_v2") + tuple_(*args) + b"R"


def dict_of(**entries: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u" + END


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def refused(path: Path, message: str = "") -> None:
    with within_a_second(), pytest.raises(CheckpointError, match=message or None) as error:
        load(path)
    assert len(str(error.value)) < 3000
    assert str(path.parent) in str(error.value)


# Pickles that would run code -----------------------------------------------------------------------------------------


def attacks(canary: Path) -> dict[str, bytes]:
    command = f"touch {canary}"
    python = f"open({str(canary)!r}, 'w').close()"

    class Call:
        def __init__(self, function: object, *args: object) -> None:
            self.call = function, args

        def __reduce__(self) -> tuple[object, ...]:
            return self.call

    run = [Call(os.system, command), Call(eval, python), Call(exec, python), Call(os.popen, command)]
    pickles = {
        f"reduce {i} protocol {protocol}": pickle.dumps(call, protocol)
        for i, call in enumerate(run)
        for protocol in range(6)
    }
    pickles |= {
        "in a dict": pickle.dumps({"emb.weight": run[0]}, 2),
        "deep in lists": pickle.dumps([[[[run[0]]]]], 2),
        "inst": b"(" + text(command) + b"ios\nsystem\n" + END,
        "obj": b"(" + global_("os", "system") + text(command) + b"o" + END,
        "newobj": global_("os", "system") + tuple_(text(command)) + b"\x81" + END,
        "newobj_ex": global_("os", "system") + tuple_(text(command)) + b"}\x92" + END,
        "ext1": b"\x82\x01" + tuple_(text(command)) + b"R" + END,
        "ext2": b"\x83\x01\x00" + END,
        "ext4": b"\x84\x01\x00\x00\x00" + END,
        "stack_global": text("builtins") + text("eval") + b"\x93" + tuple_(text(python)) + b"R" + END,
        "dotted name": global_("torch._utils", "_rebuild_tensor_v2.__globals__") + END,
        "name with space": global_("collections OrderedDict", "x") + END,
        "text persid": b"Pos.system\n" + END,
        "reduce a string": text("os.system") + tuple_(text(command)) + b"R" + END,
        "reduce a storage class": global_("torch", "FloatStorage") + tuple_(integer(4)) + b"R" + END,
        "ordered dict of pairs": global_("collections", "OrderedDict") + tuple_(b"]") + b"R" + END,
        "build on a dict": b"}}b" + END,
        "build on a class": global_("collections", "OrderedDict") + b"}b" + END,
        "build with a tuple": global_("collections", "OrderedDict") + b")R" + tuple_(b"N", b"}") + b"b" + END,
        "buffers": b"\x97" + END,
        "unsafe torch": global_("torch", "load") + tuple_(text("x")) + b"R" + END,
        "torch.serialization": global_("torch.serialization", "load") + tuple_(text("x")) + b"R" + END,
    }
    return pickles


def test_no_pickle_ever_runs(canary):
    programs = attacks(canary)
    path = canary.with_name("model.pth")
    for name, program in programs.items():
        refused(archive(path, program), "")
        assert not canary.exists(), name
        # also behind a healthy dict, as its last value
        healthy = b"\x80\x02}(" + text("emb.weight") + tensor([4], [1]) + text("x") + program[:-1] + b"u" + END
        refused(archive(path, healthy, {"data/0": bytes(16)}))
        assert not canary.exists(), name


def test_the_refused_name_is_told(tmp_path):
    program = pickle.dumps(Path("x"), 2)
    refused(archive(tmp_path / "m.pth", program), r"asks for 'pathlib\.PosixPath'.*refusing to run code")
    refused(archive(tmp_path / "m.pth", b"(ios\nsystem\n."), r"uses the instruction INST; refusing to run code")


def test_the_attacks_are_real(canary):
    """Python's own pickle runs them: the canary can sing."""
    pickle.loads(attacks(canary)["reduce 1 protocol 2"])  # eval: creates the file
    assert canary.exists()


# Pickles that would eat memory or time -------------------------------------------------------------------------------


def test_bombs_do_not_explode(tmp_path):
    laughs = b")" + b"".join(b"q\x00h\x00h\x00\x86" for _ in range(59_000))  # each tuple holds the last one twice
    deep_lists = b"]" * 100_000 + b"a" * 99_999
    bombs = {
        "laughs as value": b"}" + text("emb.weight") + laughs + b"s" + END,
        "laughs as key": b"}" + laughs + b"Ns" + END,
        "laughs as shape": b"}" + text("w") + tensor([4], [1])[:-3] + laughs + b"tR" + b"s" + END,
        "deep tuples": b")" + b"\x85" * 239_000 + END,
        "deep lists": deep_lists + END,
        "list in itself": b"]q\x00h\x00a" + END,
        "dict in itself": b"}q\x00" + text("state_dict") + b"h\x00s" + END,
        "marks": b"(" * 239_000 + END,
        "memo": b"N" + b"".join(b"r" + struct.pack("<I", 4_000_000_000 - i) for i in range(90_000)) + END,
        "endless": b"N0" * 600_000 + END,
        "too many": b"N" * 600_000 + END,
        "long string": b"X" + struct.pack("<I", 2**32 - 1) + b"x" + END,
        "longer string": b"\x8d" + struct.pack("<Q", 2**63) + b"x" + END,
        "long integer": b"\x8b" + struct.pack("<I", 1_000_000) + b"\xff" * 999_999 + b"\x7f" + END,
        "decimal integer": b"I" + b"9" * 1_000_000 + b"\n" + END,
        "decimal long": b"L" + b"9" * 1_000_000 + b"L\n" + END,
        "wide integer": b"}" + text("w") + integer(2**1000) + b"s" + END,
        "float": b"F" + b"9" * 100_000 + b"\n" + END,
        "long key": b"}" + text("k" * 1_000_000) + b"Ns" + END,
        "prefixes": b"}" + text("module." * 100_000 + "emb.weight") + tensor([4], [1]) + b"s" + END,
        "no stop": b"\x80\x02}",
        "only stop": END,
        "nothing": b"",
        "pop below": b"}" + b"u" * 10 + END,
        "absent memo": b"h\x07" + END,
    }
    for program in bombs.values():
        refused(archive(tmp_path / "m.pth", program, {"data/0": bytes(16)}))
    refused(archive(tmp_path / "m.pth", b"N" * (17 << 20)), "its pickle has")


# Tensors that do not fit their bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": [5], "stride": [1]},
        {"shape": [10**12], "stride": [1]},
        {"shape": [2**31, 2**33], "stride": [2**33, 1]},
        {"shape": [2**62, 4], "stride": [0, 1]},
        {"shape": [1000], "stride": [0]},
        {"shape": [4], "stride": [-1]},
        {"shape": [-4], "stride": [1]},
        {"shape": [-2, -2], "stride": [2, 1]},
        {"shape": [0], "stride": [1]},
        {"shape": [0, 2**62], "stride": [1, 1]},
        {"shape": [2, 2], "stride": [1]},
        {"shape": [2], "stride": [4]},
        {"shape": [2], "stride": [2**62]},
        {"shape": [4], "stride": [1], "offset": 1},
        {"shape": [4], "stride": [1], "offset": -1},
        {"shape": [1], "stride": [1], "offset": 2**62},
        {"shape": [1] * 70, "stride": [1] * 70},
        {"shape": [4], "stride": [1], "numel": 5},
        {"shape": [4], "stride": [1], "numel": 3},
        {"shape": [4], "stride": [1], "numel": -4},
        {"shape": [4], "stride": [1], "numel": 2**61},
        {"shape": [4], "stride": [1], "key": "1"},
        {"shape": [4], "stride": [1], "key": "../../../etc/passwd"},
        {"shape": [4], "stride": [1], "kind": "DoubleStorage"},
        {"shape": [4], "stride": [1], "kind": "UntypedStorage"},
    ],
)
def test_lying_tensors_are_refused_before_anything_is_mapped(lie, tmp_path):
    path = archive(tmp_path / "m.pth", dict_of(**{"emb.weight": tensor(**lie)}), {"data/0": bytes(16)})
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    refused(path)


def test_honest_hand_made_tensors_are_read(tmp_path):
    program = dict_of(a=tensor([2, 2], [1, 2]), b=tensor([2], [2], offset=1, key="1"))
    records = {"data/0": struct.pack("<4f", 0, 1, 2, 3), "data/1": struct.pack("<4f", 4, 5, 6, 7)}
    source = open_checkpoint(archive(tmp_path / "m.pth", program, records))
    assert source.read("a").tolist() == [[0, 2], [1, 3]]
    assert source.read("b").tolist() == [5, 7]


def test_many_names_for_the_same_bytes_are_no_way_to_grow(tmp_path):
    entries = {f"blocks.{i}.x": tensor([1_000_000], [1], numel=1_000_000) for i in range(100)}
    path = archive(tmp_path / "m.pth", dict_of(**entries), {"data/0": bytes(4_000_000)})
    refused(path, "its tensors claim 400000000 bytes")


def test_duplicate_names_are_refused(tmp_path):
    twice = b"\x80\x02}(" + (text("emb.weight") + tensor([4], [1])) * 2 + b"u" + END
    refused(archive(tmp_path / "m.pth", twice, {"data/0": bytes(16)}), "'emb.weight' occurs twice")


def test_other_contents_are_named(tmp_path):
    for value, message in [
        ([1, 2], "a list, expected a dict"),
        (torch.zeros(2), "a TensorPlan|expected a dict"),
        ({}, "no tensors"),
        ({"a": 1}, "no tensors; its entries are 'a'"),
        ({"a": {"b": torch.zeros(2)}}, "no tensors"),
        ({"a": torch.zeros(2), "b": 3}, "entry 'b' is a int"),
        ({"a": torch.zeros(2), 5: torch.zeros(2)}, "entry a int"),
        ({"a": torch.zeros(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
        (torch.nn.Linear(2, 2), r"asks for 'torch\.nn\.modules\.linear\.Linear'"),
    ]:
        (tmp_path / "m.pth").write_bytes(saved_by_torch(value))
        refused(tmp_path / "m.pth", message)


# Archives ------------------------------------------------------------------------------------------------------------


def test_damaged_and_deceitful_archives(weights, tmp_path):
    path = tmp_path / "m.pth"
    good = saved_by_torch(weights)
    contents = {
        name: zipfile.ZipFile(io.BytesIO(good)).read(name) for name in zipfile.ZipFile(io.BytesIO(good)).namelist()
    }
    program = contents.pop("archive/data.pkl")
    records = {name.removeprefix("archive/"): content for name, content in contents.items()}
    assert_same(load(archive(path, program, records)).state_dict(), weights)

    refused(archive(path, program, records, zipfile.ZIP_DEFLATED), "is compressed")  # a zip bomb needs this
    refused(archive(path, program, {**records, "byteorder": b"big"}), "byte order is 'big'")
    refused(archive(path, program, {**records, "constants.pkl": b""}), "TorchScript")
    refused(archive(path, program, {name: records[name] for name in records if name != "data/3"}), "record data/'3'")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("archive/data.pkl", b"N.")
    refused(path, "'archive/data.pkl' occurs twice")
    archive(path, program, records)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", program)
    refused(path, "no single <root>/data.pkl")
    archive(path, program, records)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("../../escape", b"x")  # nothing is ever unpacked, so its name is harmless
    assert_same(load(path).state_dict(), weights)
    assert not (tmp_path.parent.parent / "escape").exists()


def test_zip64_archives_are_read(weights, tmp_path, monkeypatch):
    good = zipfile.ZipFile(io.BytesIO(saved_by_torch(weights)))
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # so that every size and offset takes the 64-bit fields
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    records = {name.removeprefix("archive/"): good.read(name) for name in good.namelist() if "data.pkl" not in name}
    path = archive(tmp_path / "m.pth", good.read("archive/data.pkl"), records)
    assert b"PK\x06\x06" in path.read_bytes()
    assert_same(load(path).state_dict(), weights)


def test_lying_zip_directories(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    good = saved_by_torch(weights)
    central = good.index(b"PK\x01\x02")
    end = good.rindex(b"PK\x05\x06")

    def patched(at: int, data: bytes) -> Path:
        path.write_bytes(good[:at] + data + good[at + len(data) :])
        return path

    refused(patched(central + 8, b"\x01\x08"), "encrypted|damaged")
    refused(patched(central + 20, b"\xff\xff\xff\x7f" * 2), "beyond the end|overlap|damaged")
    refused(patched(central + 42, b"\xff\xff\xff\x7f"), "does not begin")
    for cut in (4, 30, 1000, len(good) // 2, end, len(good) - 1):
        path.write_bytes(good[:cut])
        refused(path)
    # two directory entries that share one record's bytes
    second = good.index(b"PK\x01\x02", central + 4)
    third = good.index(b"PK\x01\x02", second + 4)
    refused(patched(third + 42, good[second + 42 : second + 46]), "overlap|CRC|missing|damaged|record")


def test_a_huge_directory_is_not_read(tmp_path):
    directory = b"\0" * (5 << 20)
    end = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 1, 1, len(directory), 4, 0)
    path = tmp_path / "m.pth"
    path.write_bytes(b"PK\x03\x04" + directory + end)
    refused(path, "zip directory claims 5242880 bytes")
    records = {f"{i}": b"" for i in range(30_000)}
    refused(archive(path, dict_of(a=tensor([4], [1])), records), "are missing")
    archive(path, dict_of(a=tensor([4], [1])), {"data/0": bytes(16)})
    good = path.read_bytes()
    end_at = good.rindex(b"PK\x05\x06")
    for at, data in ((12, b"\xff\xff\xff\x7f"), (16, b"\xff\xff\xff\x7f"), (12, b"\1\0\0\0"), (20, b"\x20\0")):
        path.write_bytes(good[: end_at + at] + data + good[end_at + at + len(data) :])
        refused(path)


def test_a_damaged_record_is_named(weights, tmp_path):
    save(weights, tmp_path / "m.pth")
    source = open_checkpoint(tmp_path / "m.pth")
    data = bytearray((tmp_path / "m.pth").read_bytes())
    data[source.tensors["head.weight"].offset + 5] ^= 1
    (tmp_path / "m.pth").write_bytes(data)
    refused(tmp_path / "m.pth", r"'archive/data/\d+' is damaged: CRC-32 \w{8}, expected \w{8}")


# Files of other kinds ------------------------------------------------------------------------------------------------


def test_other_kinds_of_files_are_named(weights, tmp_path):
    path = tmp_path / "m.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    refused(path, "old format")
    for content, message in [
        (b"", "empty"),
        (b"GGUF\x03\0\0\0", "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"hello", "safetensors"),
        (bytes(257) + b"ustar" + bytes(1000), "old format"),
        (b"\xff" * 100, "header claims"),
    ]:
        path.write_bytes(content)
        refused(path, message)
    (tmp_path / "m.gguf").write_bytes(b"GGUX" + bytes(100))
    refused(tmp_path / "m.gguf", "does not begin as a GGUF file does")
    path.unlink()
    os.mkfifo(path)
    refused(path, "not a regular file")


# Safetensors ---------------------------------------------------------------------------------------------------------


def safetensors_file(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16), **more: object) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ([], b""),
        (b"", b""),
        (b"[" * 1_000_000, b""),
        (b'{"a":' * 100_000, b""),
        (b'{"a":' + b"9" * 100_000 + b"}", b""),
        (b"\xff{}", b""),
        (b'{"x": 1, "x": 1}', b""),
        ({"x": 1}, b""),
        ({"x": {}}, b""),
        ({"x": entry(extra=1)}, bytes(16)),
        ({"x": entry(dtype="F31")}, bytes(16)),
        ({"x": entry(dtype=["F32"])}, bytes(16)),
        ({"x": entry(shape=5)}, bytes(16)),
        ({"x": entry(shape=[4.0])}, bytes(16)),
        ({"x": entry(shape=[True, 4])}, bytes(16)),
        ({"x": entry(shape=[-4])}, bytes(16)),
        ({"x": entry(shape=[-2, -2])}, bytes(16)),
        ({"x": entry(shape=["4"])}, bytes(16)),
        ({"x": entry(shape=[5])}, bytes(16)),
        ({"x": entry(shape=[3])}, bytes(16)),
        ({"x": entry(shape=[10**12])}, bytes(16)),
        ({"x": entry(shape=[2**62, 2**62])}, bytes(16)),
        ({"x": entry(shape=[2**64, 0])}, bytes(16)),
        ({"x": entry(shape=[1] * 100 + [4])}, bytes(16)),
        ({"x": entry(shape=[0], offsets=[0, 0])}, b""),
        ({"x": entry(offsets=[0, 15])}, bytes(16)),
        ({"x": entry(offsets=[16, 0])}, bytes(16)),
        ({"x": entry(offsets=[-16, 0])}, bytes(16)),
        ({"x": entry(offsets=[0])}, bytes(16)),
        ({"x": entry(offsets=[0, 2**63])}, bytes(16)),
        ({"x": entry(offsets=[8, 24])}, bytes(24)),
        ({"x": entry()}, bytes(15)),
        ({"x": entry()}, bytes(17)),
        ({"x": entry(), "y": entry()}, bytes(16)),
        ({"x": entry(), "y": entry(offsets=[8, 24])}, bytes(24)),
        ({"x": entry(), "__metadata__": []}, bytes(16)),
        ({"x": entry(), "__metadata__": {"a": 1}}, bytes(16)),
        ({"x": entry(), "__metadata__": {"receptance.version": "7"}}, bytes(16)),
        ({"x": entry(), "__metadata__": {"receptance.crc32": "{}"}}, bytes(16)),
        ({"\ud800": entry()}, bytes(16)),
        ({"__metadata__": {}}, b""),
        ({}, b""),
    ],
)
def test_lying_safetensors_headers(header, data, tmp_path):
    refused(safetensors_file(tmp_path / "m.safetensors", header, data))


def test_header_lengths_are_checked(tmp_path):
    path = tmp_path / "m.safetensors"
    for length in (0, 3, 2**24, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        refused(path)
    path.write_bytes(struct.pack("<Q", 9 << 20) + b"{" + b" " * (9 << 20))
    refused(path, "more than 8388608")


def test_many_small_tensors_do_not_take_long(tmp_path):
    header = {f"blocks.{i}.x": entry("U8", [1], [i, i + 1]) for i in range(90_000)}
    refused(safetensors_file(tmp_path / "m.safetensors", header, bytes(90_000)))


def test_a_saved_state_is_no_model(tmp_path):
    from checkpoint_helpers import tiny_model

    model = tiny_model("7")
    model([1, 2, 3])[1].save(tmp_path / "chat.state", model)
    refused(tmp_path / "chat.state", "is a saved state, not a model")


def test_checksums_of_ours_are_checked_against_the_tensors(tmp_path):
    path = tmp_path / "m.safetensors"
    save(tiny_weights(), path)
    good = path.read_bytes()
    offset = open_checkpoint(path).tensors["blocks.1.att.w2"].offset
    path.write_bytes(good[:offset] + bytes([good[offset] ^ 0x10]) + good[offset + 1 :])
    refused(path, r"'blocks\.1\.att\.w2' is damaged: CRC-32")
    path.write_bytes(good.replace(b'"receptance.version":"7"', b'"receptance.version":"6"'))
    refused(path, "does not match its own checksum")
