"""Damaged files by the thousand: each raises CheckpointError or loads as the right tensors. No crash, no hang.

Files with checksums load bit for bit or not at all.
"""

import io
import json
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import archive, assert_same, saved_by_torch, tiny_weights, within_a_second

from receptance.checkpoint import load, open_checkpoint, save
from receptance.errors import CheckpointError

INTERESTING = [b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8, b"\x01\0\0\0", b"\0" * 16]


def flip(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def damage(rng: random.Random, data: bytes) -> bytes:
    """Cut, remove, repeat, overwrite or swap something."""
    at = rng.randrange(len(data))
    length = min(rng.choice([1, 2, 4, 8, 64, 1000]), len(data) - at)
    other = rng.randrange(len(data))
    match rng.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[: at + length] + data[at:]
        case 3:
            return data[:at] + rng.randbytes(length) + data[at + length :]
        case 4:
            value = rng.choice(INTERESTING)
            return data[:at] + value + data[at + len(value) :]
        case 5:
            return data[:at] + data[other : other + length] + data[at + length :]
        case _:
            return data + rng.randbytes(length)


def near_the_end(rng: random.Random, data: bytes) -> bytes:
    """Damage the zip directory, which lies there."""
    start = len(data) * 3 // 4
    return data[:start] + damage(rng, data[start:])


def changed_pickle(rng: random.Random, data: bytes, path: Path) -> bytes:
    """The pickle damaged, in an archive that is whole otherwise and has correct checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as good:
        contents = {name.removeprefix("archive/"): good.read(name) for name in good.namelist()}
    program = contents.pop("data.pkl")
    for _ in range(rng.choice([1, 1, 2, 5])):
        program = rng.choice([flip, damage])(rng, program) or b"."
    return archive(path, program, contents).read_bytes()


def changed_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors header that is valid JSON but lies."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    one, two = rng.sample(names, 2)
    field = rng.choice(["dtype", "shape", "data_offsets"])
    match rng.randrange(5):
        case 0:
            header[one][field], header[two][field] = header[two][field], header[one][field]
        case 1:
            header[one], header[two] = header[two], header[one]
        case 2:
            header[one][field] = rng.choice([None, [], [0], [-1, 2], [2**63, 2**63], "F32", 7, [1.5], {}, [2**31] * 8])
        case 3:
            header[one]["shape"] = header[one]["shape"][::-1]
        case 4:
            header[rng.choice(["", "blocks.0", "\0", "emb.weight.x", "blocks.7.ln1.weight"])] = header.pop(one)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def files(folder: Path) -> dict[str, tuple[bytes, bool]]:
    """{kind: (contents, whether every byte of every tensor has a checksum)}."""
    from safetensors.torch import save as save_plain

    weights = tiny_weights()
    save(weights, folder / "ours.safetensors")
    return {
        "pth": (saved_by_torch(weights), True),
        "pth without checksums": (saved_by_torch(weights, checksums=False), False),
        "safetensors": (save_plain(weights), False),
        "our safetensors": ((folder / "ours.safetensors").read_bytes(), True),
    }


def check(path: Path, data: bytes, expected: dict[str, torch.Tensor], is_exact: bool) -> bool:
    """Whether the file was refused."""
    path.unlink(missing_ok=True)  # a new file, as the loaded tensors keep the old one mapped
    path.write_bytes(data)
    try:
        with within_a_second():
            found = load(path).state_dict()
    except CheckpointError:
        return True
    if is_exact:
        assert_same(found, expected)
    else:
        assert {name: tensor.shape for name, tensor in found.items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }
        sum(tensor.float().sum() for tensor in found.values())  # every byte can be read
    return False


def mutated(rng: random.Random, kind: str, whole: dict[str, tuple[bytes, bool]], way: int, scratch: Path) -> bytes:
    data = whole[kind][0]
    if way < 2:
        return (flip, damage)[way](rng, data)
    if "pth" in kind:
        return near_the_end(rng, data) if way == 2 else changed_pickle(rng, whole["pth"][0], scratch)
    return flip(rng, data[:3000]) + data[3000:] if way == 2 else changed_header(rng, data)


def run(count: int, seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    expected = tiny_weights()
    whole = files(folder)
    refused = 0
    for _ in range(count):
        kind, way = rng.choice(list(whole)), rng.randrange(4)
        data = mutated(rng, kind, whole, way, folder / "archive")
        # a repacked pickle has new checksums, and the damage of whole runs of bytes may wipe a checksum out
        is_exact = whole[kind][1] and (kind == "our safetensors" or way == 0)
        refused += check(folder / "mutated", data, expected, is_exact)
    assert refused > count * 0.7


def test_two_thousand_mutated_files(tmp_path):
    run(2000, seed=1, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
def test_a_hundred_thousand_mutated_files(seed, tmp_path):
    run(5000, seed, tmp_path)


def every_bit(path: Path, places: range, original: bytes) -> None:
    for at in places:
        for bit in range(8):
            changed = original[:at] + bytes([original[at] ^ 1 << bit]) + original[at + 1 :]
            path.unlink(missing_ok=True)
            path.write_bytes(changed)
            with pytest.raises(CheckpointError):
                load(path)


@pytest.mark.parametrize("part", range(4))
def test_any_flipped_bit_of_our_safetensors_is_noticed(part, tmp_path):
    save(tiny_weights(), tmp_path / "m.safetensors")
    original = (tmp_path / "m.safetensors").read_bytes()
    every_bit(tmp_path / "m.safetensors", range(part, len(original), 4 * 41), original)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_single_flipped_bit_of_our_safetensors_is_noticed(part, tmp_path):
    save(tiny_weights(), tmp_path / "m.safetensors")
    original = (tmp_path / "m.safetensors").read_bytes()
    every_bit(tmp_path / "m.safetensors", range(part, len(original), 8), original)


def test_any_flipped_bit_of_a_tensor_in_a_pth_is_noticed(tmp_path):
    save(tiny_weights(), tmp_path / "m.pth")
    original = (tmp_path / "m.pth").read_bytes()
    for tensor in open_checkpoint(tmp_path / "m.pth").tensors.values():
        every_bit(tmp_path / "m.pth", range(tensor.offset, tensor.offset + tensor.nbytes, 97), original)
