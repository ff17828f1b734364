"""The file of a state, alike for every engine and the server: safetensors, checked before anything of it is used.

Its metadata has a kind, a checksum for each tensor, the fingerprint of the model that the state belongs to, and the
words that the server keeps with a conversation, each with a checksum. None of this needs torch.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, deserialize

from receptance.atomic import replacing
from receptance.errors import CheckpointError

PREFIX = "receptance."
MAX_HEADER = 64 << 20  # bytes


DTYPES = ("F64", "F32", "F16", "BF16", "I64")


class Stored(NamedTuple):
    """A tensor as the file has it: little-endian, row by row."""

    dtype: str  # of DTYPES
    shape: list[int]
    data: bytes


def pack(tensors: Mapping[str, Stored], fingerprint: str, words: Mapping[str, str] | None = None) -> bytes:
    sums = {name: zlib.crc32(x.data) for name, x in tensors.items()}
    meta = {"kind": "state", "fingerprint": fingerprint, "crc32": json.dumps(sums, sort_keys=True)}
    for name, text in (words or {}).items():
        meta |= {name: text, f"{name}.crc32": str(zlib.crc32(text.encode()))}
    header: dict[str, object] = {"__metadata__": {PREFIX + name: text for name, text in meta.items()}}
    end = 0
    for name, x in tensors.items():
        header[name] = {"dtype": x.dtype, "shape": x.shape, "data_offsets": [end, end := end + len(x.data)]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *(x.data for x in tensors.values())])


def unpack(data: bytes, fingerprint: str) -> dict[str, Stored]:
    """The tensors of a state of this very model. Raises CheckpointError for anything else."""
    meta = metadata(data)
    if meta.get("kind") != "state":
        raise CheckpointError("a safetensors file, but not a state saved by receptance")
    if (found := meta.get("fingerprint")) != fingerprint:
        raise CheckpointError(
            f"this state belongs to another model (its fingerprint is {found}, this model's is {fingerprint}); load it "
            "with the model that wrote it"
        )
    tensors = {}
    try:
        sums = json.loads(meta.get("crc32", "{}"))
        for name, entry in deserialize(data):  # type: ignore[no-untyped-call]
            if sums.get(name) != zlib.crc32(entry["data"]):
                raise CheckpointError(f"tensor {name} does not match its checksum; the file is damaged")
            if entry["dtype"] not in DTYPES or not entry["data"]:
                raise CheckpointError(
                    f"tensor {name} of type {entry['dtype']} and shape {entry['shape']} is of no state"
                )
            tensors[name] = Stored(entry["dtype"], entry["shape"], entry["data"])
    except (SafetensorError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"not a readable state ({error})") from None
    return tensors


def metadata(data: bytes) -> dict[str, str]:
    """Our words in a file's header. Raises CheckpointError for what is no safetensors file."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, MAX_HEADER):
        raise CheckpointError("not a safetensors file")
    try:
        meta = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        if not all(isinstance(text, str) for text in meta.values()):
            raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError("not a safetensors file: its header cannot be read") from None
    return {name.removeprefix(PREFIX): text for name, text in meta.items() if name.startswith(PREFIX)}


def word(meta: Mapping[str, str], name: str) -> str | None:
    """A word that `pack` was given, or None. Raises CheckpointError if it is not what was written."""
    text = meta.get(name)
    if text is not None and meta.get(f"{name}.crc32") != str(zlib.crc32(text.encode("utf-8", "replace"))):
        raise CheckpointError(f"its {name} does not match its checksum; the file is damaged")
    return text


def write(path: str | Path, data: bytes) -> None:
    """All or nothing."""
    path = Path(path)
    if path.exists() and not path.is_file():  # replacing a device or a pipe would remove it
        raise CheckpointError(f"{path}: is not a regular file; give the name of a file to write")
    with replacing(path) as file:
        file.write(data)


def read(path: str | Path, fingerprint: str) -> dict[str, Stored]:
    """`unpack` of a file; errors name it."""
    try:
        return unpack(Path(path).read_bytes(), fingerprint)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such state file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: not a readable state file ({error})") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
