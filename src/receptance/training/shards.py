"""Sharded tensors on disk in the format of torch.distributed.checkpoint (DCP), written by all processes at once.

DCP's table of contents, `.metadata`, is a pickle. It is read here first by an unpickler that knows nothing but the
classes such a table consists of, so a checkpoint from elsewhere cannot run code; only then is DCP let at it.
"""

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from receptance.errors import CheckpointError

METADATA = ".metadata"
DCP = "torch.distributed.checkpoint"
KNOWN = {
    f"{DCP}.metadata": {
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    f"{DCP}.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device", "float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


def write_shards(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Each process writes its shards; tensors that all hold are written once. Raises RuntimeError or OSError."""
    try:
        with quiet():
            save(dict(tensors), checkpoint_id=str(folder), process_group=group)
    except CheckpointException as error:  # a BaseException that gathers those of all processes
        rank, (cause, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"process {rank}: {cause}") from None


def shard_names(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name → whole shape and type of every tensor. Raises CheckpointError for a table that holds anything else."""
    try:
        metadata = _Unpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
    except Exception as error:  # damaged pickles raise anything
        raise CheckpointError(f"{folder / METADATA}: not the table of a checkpoint ({error})") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{folder / METADATA}: not the table of a checkpoint")
    found = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{folder / METADATA}: {name!r} is no tensor")
        found[name] = entry.size, entry.properties.dtype
    return found


def read_shards(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill `tensors`, whole ones or shards of any layout, in place. Call shard_names first: it makes this safe."""
    with quiet():
        load(dict(tensors), checkpoint_id=str(folder), process_group=group)


@contextmanager
def quiet() -> Iterator[None]:
    """One process alone is no mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)
