"""`load`: from a file or folder to a model."""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

from receptance.embedded import resolve
from receptance.errors import CheckpointError, ConfigError

from . import hf
from .detect import check_sizes, compare, outline, shapes_make_sense, version_of, without_prefix
from .safetensors import OURS, open_safetensors
from .source import FLOATS, TensorSource, map_file, open_regular, show, to_torch

if TYPE_CHECKING:
    import torch

    from receptance.models import RWKV
    from receptance.native import NativeConfig, NativeModel

    from .gguf import Stored

T = TypeVar("T")

MAX_JSON = 16 << 20
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
OUR_TYPE = "receptance"  # model_type in the config.json of our own folders


@overload
def load(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    device: str | None = None,
    engine: Literal["native"],
    threads: int | None = None,
) -> "NativeModel": ...


@overload
def load(
    path: str | os.PathLike[str],
    *,
    dtype: "str | torch.dtype | None" = None,
    device: "str | torch.device | None" = None,
    engine: Literal["torch"] | None = None,
    threads: int | None = None,
) -> "RWKV": ...


def load(
    path: str | os.PathLike[str],
    *,
    dtype: "str | torch.dtype | None" = None,
    device: "str | torch.device | None" = None,
    engine: Literal["torch", "native"] | None = None,
    threads: int | None = None,
) -> "RWKV | NativeModel":
    """The model in a .pth or .safetensors file, in a folder, or of an embedded name, ready to run (in eval mode).

    Version, sizes and layout are told from the tensors; nothing in the file is executed, nothing beside it imported.
    engine: "torch", or "native": the CPU engine, which needs no torch. None = torch where it is installed, else native.
    dtype: "float32", "bfloat16", "float16", "float64" or torch's; None keeps the file's, and where a file mixes types
    takes the narrowest that holds them all exactly. The native engine has "int8" and "int4" too, and no float64.
    threads: of the native engine; None = one for each core.
    On the CPU in the file's own type the weights stay in the mapped file and are read from disk as they are touched:
    do not overwrite the file in place while the model lives (`save` never does). Checksums, where the file has them,
    are verified. Raises CheckpointError for every problem with the file, ConfigError for an unknown dtype, device or
    engine.
    """
    if engine not in (None, "torch", "native"):
        raise ConfigError(f"engine {engine!r} is unknown; use 'torch' or 'native'")
    if engine == "native" or (engine is None and find_spec("torch") is None):
        return load_native(path, dtype=dtype, device=device, threads=threads)
    if threads is not None:
        raise ConfigError("threads is for engine='native'; for torch use torch.set_num_threads")
    place = torch_device(device)
    wanted = torch_dtype(dtype)

    if (Path(path) / "config.json").is_file():
        from receptance.baselines import load_baseline
        from receptance.baselines.files import is_baseline

        if is_baseline(Path(path)):
            baseline = load_baseline(Path(path), str(place))
            return baseline if wanted is None else baseline.to(wanted)

    source = open_checkpoint(path)
    try:
        tensors = official_tensors(source)
        version, config, model = outline({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        check_folder_config(source, version, config)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    source.verify()

    stored = source.metadata.get(f"{OURS}fingerprint", "")
    identity = stored if re.fullmatch("[0-9a-f]{32}", stored) else fingerprint(tensors)
    wanted = wanted or common_dtype(tensors)
    for name in tensors:
        tensors[name] = tensors[name].to(place, wanted)
    model.load_state_dict(tensors, assign=True)
    model.fingerprint = identity
    return model.eval()  # type: ignore[no-any-return]


def load_native(
    path: str | os.PathLike[str], *, dtype: object = None, device: object = None, threads: int | None = None
) -> "NativeModel":
    """`load` for the CPU engine."""
    from receptance.native import NativeModel
    from receptance.native.arrays import fingerprint as digest

    if device is not None and str(device) != "cpu":
        raise ConfigError(f"device {str(device)!r}: the native engine runs on the CPU only; use engine='torch'")
    source = open_checkpoint(path)
    weights, config = verified_weights(source)
    stored = source.metadata.get(f"{OURS}fingerprint", "")
    identity = stored if re.fullmatch("[0-9a-f]{32}", stored) else digest(config.version, weights)
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    model = NativeModel(weights, config, identity, dtype=name, threads=threads)
    source.release()
    return model


def fingerprint(tensors: "Mapping[str, torch.Tensor]") -> str:
    """32 hex digits that name these weights, the same in every container and every lossless type.

    SHA-256 over the version and, per tensor in order of name, its name, shape and first 256 values as float32.
    """
    from receptance.models import fingerprint as digest

    names = without_prefix(tensors)
    official = {names[name]: tensor for name, tensor in tensors.items()}
    return digest(version_of({name: tuple(tensor.shape) for name, tensor in official.items()}), official)


def open_checkpoint(path: str | os.PathLike[str]) -> TensorSource:
    """The tensors of a file or folder under the names they have there. Reads only headers and needs no torch."""
    path = resolve(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    return open_folder(path) if path.is_dir() else open_file(path)


# Containers ----------------------------------------------------------------------------------------------------------


def open_file(path: Path) -> TensorSource:
    """By content, whatever the suffix says."""
    file = map_file(path)
    start = file.data[:512]
    if start.startswith(b"PK\x03\x04"):
        from .pth import open_pth  # its imports take as long as loading a small model

        return open_pth(file)
    if start[8:9] == b"{":
        return open_safetensors(file)
    if start.startswith(b"GGUF"):
        from .gguf import open_gguf

        return open_gguf(file)
    if start[:1] == b"\x80" or start[257:262] == b"ustar":
        raise file.error(
            "is in PyTorch's old format (before 1.6), which cannot be read without running code. If you trust its "
            "origin: torch.save(torch.load(old, weights_only=True), new)"
        )
    if start.startswith(b"version https://git-lfs"):
        raise file.error("is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
    if start.lstrip()[:1] == b"<":
        raise file.error("is a web page, not a checkpoint; download the file itself")
    if path.suffix == ".gguf":
        raise file.error("does not begin as a GGUF file does; it is damaged or something else, fetch it again")
    return open_safetensors(file)  # which says what is wrong


def open_folder(folder: Path) -> TensorSource:
    """The weights of a folder, and its config.json as metadata; no other file in it is opened."""
    name = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if name is None:
        others = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".pth", ".safetensors", ".bin"))
        hint = f"; give one of its files instead: {', '.join(map(show, others[:5]))}" if others else ""
        raise CheckpointError(f"{folder}: has none of {', '.join(WEIGHTS)}{hint}")
    source = open_shards(folder, name) if name.endswith(".index.json") else open_file(folder / name)
    if (folder / "config.json").exists():
        source.metadata = {**source.metadata, "config.json": json.dumps(read_json(folder / "config.json"))}
    return source


def open_shards(folder: Path, index_name: str) -> TensorSource:
    index = read_json(folder / index_name).get("weight_map")
    where = folder / index_name
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise CheckpointError(f"{where}: has no weight_map of tensor names to file names")
    merged = TensorSource(where, {})
    for shard in sorted(set(index.values())):
        # a plain file name: no folder, no "..", nothing absolute, on any system
        if PurePosixPath(shard).name != shard or shard in ("", ".", "..") or set(shard) & set("\\:\0"):
            raise CheckpointError(f"{where}: names the shard {show(shard)}, which does not stay inside the folder")
        if not (folder / shard).exists():
            raise CheckpointError(f"{where}: its shard {show(shard)} is missing; download it too")
        source = open_file(folder / shard)
        if twice := merged.tensors.keys() & source.tensors.keys():
            raise CheckpointError(f"{where}: tensor {show(min(twice))} is in more than one shard")
        merged.tensors |= source.tensors
        merged.records += source.records
    for name, shard in index.items():
        if name not in merged.tensors:
            raise CheckpointError(f"{where}: tensor {show(name)} is not in its shard {show(shard)}")
    return merged


def read_json(path: Path) -> dict[str, object]:
    try:
        with open_regular(path) as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise ValueError("is too large")
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected a table")
    return value


# Tensors -------------------------------------------------------------------------------------------------------------


def official_tensors(source: TensorSource) -> "dict[str, torch.Tensor]":
    """Torch tensors under official names and shapes, on the mapped file where they lie in order; blocks as float32."""
    found = source.official()
    if found is None:
        return renamed(source, source.read)
    return {name: to_torch(x) for name, x in found.items()}


def verified_weights(source: TensorSource) -> "tuple[dict[str, Stored], NativeConfig]":
    """A file's weights without torch, with its checksums compared. Raises CheckpointError that names the file."""
    try:
        found = official_weights(source)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    source.verify()
    return found


def official_weights(source: TensorSource) -> "tuple[dict[str, Stored], NativeConfig]":
    """The same without torch: NumPy arrays, or `Blocks` for quantised matrices, and the sizes that they tell.

    Raises CheckpointError unless they are exactly the tensors of one model.
    """
    from receptance.native import read_config, tensor_shapes

    weights: dict[str, Stored] = source.official() or {**renamed(source, source.array)}
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    version = version_of(shapes)
    check_sizes(shapes)
    with shapes_make_sense(version):
        config = read_config(version, shapes)
        expected = tensor_shapes(config)
    compare(expected, shapes, version)
    check_folder_config(source, version, config)
    return weights, config


def renamed(source: TensorSource, read: Callable[[str], T]) -> dict[str, T]:
    """Every tensor but of GGUF files, by `read`, a method of the source, under official names and shapes."""
    for name, stored in source.tensors.items():
        if stored.dtype not in FLOATS:
            raise CheckpointError(f"tensor {show(name)} is {stored.dtype}, expected one of {', '.join(FLOATS)}")
    layout = hf.layout_of(source.tensors)
    if layout is None:
        names = without_prefix(source.tensors)
        version_of(
            {names[name]: shape for name, shape in source.shapes.items()}
        )  # say so before reading a foreign file
        return {names[name]: read(name) for name in source.tensors}
    if "config.json" in source.metadata:
        hf.check_config(json.loads(source.metadata["config.json"]), layout)
    # torch and NumPy share the few methods that moving needs
    tensors: Any = {name: read(name) for name in source.tensors}
    return cast(dict[str, T], hf.to_official(tensors, layout))


def check_folder_config(source: TensorSource, version: str, config: object) -> None:
    """In a folder of our own, config.json must describe the weights beside it."""
    theirs = json.loads(source.metadata.get("config.json", "{}"))
    if theirs.get("model_type") != OUR_TYPE:
        return
    ours: dict[str, object] = {"version": version, **asdict(config)}  # type: ignore[call-overload]
    stated = theirs.get("config")
    stated = {"version": theirs.get("version"), **(stated if isinstance(stated, dict) else {})}
    for key in ours.keys() & stated.keys():
        if ours[key] != stated[key]:
            raise CheckpointError(f"config.json says {key} = {stated[key]!r}, the weights have {ours[key]!r}")


def common_dtype(tensors: "Mapping[str, torch.Tensor]") -> "torch.dtype":
    """The narrowest type that holds every tensor exactly."""
    from functools import reduce

    import torch

    return reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})


def torch_dtype(dtype: "str | torch.dtype | None") -> "torch.dtype | None":
    import torch

    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in FLOATS:
        raise ConfigError(f"dtype {name!r} is unknown; use one of {', '.join(FLOATS)}")
    return None if dtype is None else getattr(torch, name)


def torch_device(device: "str | torch.device | None") -> "torch.device":
    import torch

    try:
        return torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError) as error:  # no such word, or no such device on this machine
        raise ConfigError(f"device {str(device)!r} is unknown here: {str(error).splitlines()[0]}") from error
