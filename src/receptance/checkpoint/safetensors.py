"""Safetensors files, with our checksums: every flipped bit of a file that we wrote is noticed when it is loaded.

The format: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}, "__metadata__": {str: str}},
then the tensors without gaps. The checksums and the model's identity are entries of `__metadata__`, so that every other
reader of safetensors reads our files as well:

    receptance.kind         "model"
    receptance.version      "7"
    receptance.config       the model's Config as JSON, for people and tools; loading trusts the tensors' shapes
    receptance.fingerprint  see `fingerprint`
    receptance.crc32        {"tensor name": "8 hex digits"} as JSON
    receptance.header       CRC-32 of the whole header but this entry, so that the entries above are covered too
"""

import json
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, BinaryIO

from .source import MAX_TENSORS, MappedFile, Record, StoredTensor, TensorSource, check_total, show

if TYPE_CHECKING:
    import torch

MAX_HEADER = 8 << 20  # the largest released models need 0.4 MB
ALIGNMENT = 64
OURS = "receptance."

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
CODES = {name: code for code, name in DTYPES.items()}


def open_safetensors(file: MappedFile) -> TensorSource:
    start, header = read_header(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise file.error("its __metadata__ is not a table of strings")

    source = TensorSource(file.path, {}, metadata)
    for name, entry in header.items():
        source.tensors[name] = stored_tensor(file, name, entry, start)
    end = start
    for name, tensor in sorted(source.tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end:
            raise file.error(f"tensor {show(name)} begins at byte {tensor.offset}, expected {end}: gap or overlap")
        end += tensor.nbytes
    if end != file.size:
        raise file.error(f"the tensors end at byte {end} but the file has {file.size}; it is damaged, get it again")
    if any(key.startswith(OURS) for key in metadata):
        source.records = checksums(file, header, metadata, source.tensors)
    return check_total(source)


def read_header(file: MappedFile) -> tuple[int, dict[str, object]]:
    """Where the tensors begin, and the parsed header."""
    length = int.from_bytes(file.data[:8], "little")
    if file.size < 8 or length > file.size - 8:
        raise file.error(
            f"its header claims {length} bytes, the file has {file.size}; it is cut short or no safetensors"
        )
    if length > MAX_HEADER:
        raise file.error(f"its header claims {length} bytes, more than {MAX_HEADER}; refusing it")
    try:
        header = json.loads(file.data[8 : 8 + length].decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError covers JSON, UTF-8 and overlong integers
        raise file.error(f"its header is damaged ({str(error)[:200]}); get the file again") from None
    if not isinstance(header, dict):
        raise file.error("its header is not a table")
    if len(header) > MAX_TENSORS:
        raise file.error(f"names {len(header)} tensors, more than {MAX_TENSORS}; refusing it")
    return 8 + length, header


def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def stored_tensor(file: MappedFile, name: str, entry: object, start: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise file.error(f"tensor {show(name)}: its header entry is damaged, expected dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise file.error(f"tensor {show(name)} has the type {show(code)}, expected one of {', '.join(DTYPES)}")
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
        raise file.error(f"tensor {show(name)}: its shape or data_offsets are not sizes")
    first, last = offsets
    tensor = StoredTensor(file, DTYPES[code], tuple(shape), start + first)
    tensor.check(name, start + first, start + last)
    if tensor.nbytes != last - first:
        raise file.error(
            f"tensor {show(name)} of shape {shape} and type {tensor.dtype} needs {tensor.nbytes} bytes, "
            f"found {last - first} for it; the file is damaged, get it again"
        )
    return tensor


def is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def checksums(
    file: MappedFile, header: dict[str, object], metadata: dict[str, str], tensors: Mapping[str, StoredTensor]
) -> list[Record]:
    """The CRC-32 of each tensor, from a header that is first checked itself."""
    if metadata.get(OURS + "kind") == "state":
        raise file.error("is a saved state, not a model; load it with State.load and the model that wrote it")
    if metadata.get(OURS + "header") != header_crc(header, metadata):
        raise file.error(
            "its header does not match its own checksum: the file is damaged (get it again), or another tool changed "
            "it (then let that tool drop the metadata entries that begin with 'receptance.')"
        )
    try:
        sums = {name: int(digits, 16) for name, digits in json.loads(metadata[OURS + "crc32"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        sums = {}
    if sums.keys() != tensors.keys():
        raise file.error("its table of checksums is damaged; get the file again")
    return [Record(file, name, tensor.offset, tensor.nbytes, sums[name]) for name, tensor in tensors.items()]


def header_crc(header: Mapping[str, object], metadata: Mapping[str, str]) -> str:
    rest = {key: value for key, value in metadata.items() if key != OURS + "header"}
    return f"{zlib.crc32(json.dumps([header, rest], sort_keys=True).encode()):08x}"


# Writing -------------------------------------------------------------------------------------------------------------


def write_safetensors(file: BinaryIO, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]) -> None:
    """Same tensors and metadata, same bytes: the widest types first (so that every tensor is aligned), then by name."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {}
    end, sums = 0, {}
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        code = CODES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        sums[name] = f"{zlib.crc32(tensor_bytes(tensor)):08x}"
    metadata = {**metadata, OURS + "crc32": json.dumps(sums)}
    metadata[OURS + "header"] = header_crc(header, metadata)
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(tensor_bytes(tensors[name]))


def tensor_bytes(tensor: "torch.Tensor") -> memoryview:
    """The tensor's elements in order, as bytes; a copy only where they do not lie so in main memory already."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
