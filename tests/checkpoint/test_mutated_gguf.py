"""Damaged GGUF and safetensors files by the thousand, through the native engine: refused, or loaded and run.

What reaches the compiled core are addresses; a length that was not checked before would be a crash here.
"""

import contextlib
import json
import random
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoint_helpers import changed, tiny_model, within_a_second
from test_mutated_files import changed_header, damage, flip

from receptance.checkpoint import load, save
from receptance.checkpoint.gguf import recipe_named, save_gguf
from receptance.checkpoint.load import open_checkpoint, verified_weights
from receptance.errors import CheckpointError
from receptance.gguf.reader import Reader
from receptance.tokenizers import ByteTokenizer
from receptance.tokenizers.gguf import gguf_fields

SIZES = {"vocab_size": 260, "n_embd": 32, "dim_ffn": 256}  # rows that are whole blocks of 32, and of 256


def files(folder: Path) -> dict[str, bytes]:
    """{kind: contents}: the formats, and the versions whose names llama.cpp has or not."""
    found = {}
    for version in ("4", "5.2", "6", "7"):
        sizes = SIZES | ({"dim_att": 32} if version == "4" else {"head_size": 16})
        save(tiny_model(version, config=changed(version, **sizes)), folder / f"{version}.safetensors")
        if version in "67":
            found[f"{version} safetensors"] = without_checksums((folder / f"{version}.safetensors").read_bytes())
        weights, config = verified_weights(open_checkpoint(folder / f"{version}.safetensors"))
        fields, _ = gguf_fields(ByteTokenizer(), 260)
        for type in ("bfloat16", "q8_0", "q4_k", "q5_k", "q6_k") if version == "7" else ("q8_0",):
            save_gguf(folder / "m.gguf", weights, config, recipe_named(type), fields)
            found[f"{version} {type}"] = (folder / "m.gguf").read_bytes()
    return found


def without_checksums(data: bytes) -> bytes:
    """They would refuse nearly everything before its shapes are looked at."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def changed_entry(rng: random.Random, data: bytes) -> bytes:
    """Damage where a GGUF file says what a tensor is: its name, sizes, type or offset."""
    starts = [match.start() for match in re.finditer(rb"blk\.|blocks\.|token_embd|output", data)]
    if not starts:
        return data
    at = max(0, rng.choice(starts) + rng.randrange(-8, 70))
    value = rng.choice([rng.randrange(40), rng.randrange(1 << 16), 1 << 31, 1 << 63, (1 << 64) - 32, 32, 256, 0])
    size = rng.choice([4, 8])
    return data[:at] + (value & (1 << 8 * size) - 1).to_bytes(size, "little") + data[at + size :]


def shuffled_type(rng: random.Random, data: bytes) -> bytes:
    """A tensor's type number exchanged for another that is known, the rest left alone."""
    known = [struct.pack("<I", code) for code in (0, 1, 30, 2, 8, 12, 13, 14)]
    at = data.find(struct.pack("<Q", 32), rng.randrange(len(data) // 3)) + 8
    return data[:at] + rng.choice(known) + data[at + 4 :]


def mutated(rng: random.Random, kind: str, data: bytes) -> bytes:
    head = min(len(data), 14_000)
    ways: list[Callable[[], bytes]] = [
        lambda: flip(rng, data),
        lambda: damage(rng, data),
        lambda: flip(rng, data[:head]) + data[head:],
        lambda: damage(rng, data[:head]) + data[head:],
    ]
    if "safetensors" in kind:
        ways.append(lambda: changed_header(rng, data))
    else:
        ways += [lambda: changed_entry(rng, data), lambda: shuffled_type(rng, data)]
    result = rng.choice(ways)()
    return result if rng.randrange(4) or "safetensors" in kind else changed_entry(rng, result)


def run(count: int, seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    whole = files(folder)
    refused = 0
    path = folder / "mutated"
    for _ in range(count):
        kind = rng.choice(list(whole))
        path.unlink(missing_ok=True)  # a new file, as the old one is still mapped
        path.write_bytes(mutated(rng, kind, whole[kind]))
        with within_a_second():
            try:
                with warnings.catch_warnings(), np.errstate(all="ignore"):
                    warnings.simplefilter("ignore")
                    model = load(path, engine="native", threads=1)
                    logits, _ = model.forward(list(range(min(9, model.config.vocab_size))))
                assert logits.shape[1] == model.config.vocab_size
            except CheckpointError:
                refused += 1
    assert count * 0.2 < refused < count * 0.9  # much is refused, and much still reaches the core


def test_a_thousand_mutated_files_through_the_native_engine(tmp_path):
    run(1000, seed=1, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
def test_a_hundred_thousand_mutated_files_through_the_native_engine(seed, tmp_path):
    run(5000, seed, tmp_path)


def test_torch_reads_no_other_files_than_the_native_engine(tmp_path):
    """Both engines refuse the same ones."""
    rng = random.Random(3)
    whole = files(tmp_path)
    for _ in range(200):
        kind = rng.choice(list(whole))
        path = tmp_path / "mutated"
        path.unlink(missing_ok=True)
        path.write_bytes(mutated(rng, kind, whole[kind]))
        verdicts = []
        for engine in ("torch", "native"):
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                try:
                    load(path, engine=engine)
                    verdicts.append(True)
                except CheckpointError:
                    verdicts.append(False)
        assert verdicts[0] == verdicts[1]


def test_lists_of_strings_are_stepped_over_to_the_end(tmp_path):
    """The loop without checks inside ends where the file does."""
    import mmap

    path = tmp_path / "x"
    for lengths, is_whole in (
        ([3, 0, 5], True),
        ([3, 0, 6], False),
        ([3, 1 << 63, 0], False),
        ([2, 3, 1 << 62], False),
    ):
        path.write_bytes(b"".join(struct.pack("<Q", n) + b"x" * min(n, 5) for n in lengths))
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = Reader(data, path)
            with contextlib.nullcontext() if is_whole else pytest.raises(CheckpointError, match="cut short"):
                reader.skip_strings(3)
            assert reader.position <= len(data)
