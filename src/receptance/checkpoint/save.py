"""`save`: a model into a file or folder, exactly and all at once."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from receptance.atomic import replacing
from receptance.errors import CheckpointError, ConfigError

from . import hf
from .detect import detect, without_prefix
from .load import OUR_TYPE, fingerprint
from .safetensors import OURS, write_safetensors
from .source import FLOATS

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

FORMATS = ("pth", "safetensors", "folder", "hf", "gguf")


def save(
    model: "nn.Module | Mapping[str, torch.Tensor]", path: str | os.PathLike[str], format: str | None = None
) -> None:
    """Write a model, or a state dict with official names, bit for bit.

    format: "pth" (a plain dict, for torch and the `rwkv` package), "safetensors" (with checksums), "folder"
    (model.safetensors and config.json), "hf" (a folder for transformers or flash-linear-attention), "gguf" (for
    llama.cpp; without a tokenizer, which `receptance convert` adds, and with float64 rounded to float32). None goes by
    the suffix, and means a folder where there is none. What was at `path` stays untouched until the new file is whole.
    The same weights give the same bytes. Raises CheckpointError when the tensors are no RWKV model or when they cannot
    be written.
    """
    path = Path(path)
    format = format or format_of(path)
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is unknown; use one of {', '.join(FORMATS)}")
    tensors: Mapping[str, torch.Tensor] = model if isinstance(model, Mapping) else model.state_dict()
    names = without_prefix(tensors)
    tensors = {names[name]: tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in FLOATS:
            raise CheckpointError(f"tensor {name} is {tensor.dtype}, expected one of {', '.join(FLOATS)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    version, config = detect(shapes)
    if format in ("gguf", "hf") and getattr(config, "wide_rate", False):
        raise CheckpointError(f"{path}: format {format!r} has no place for rate_span (model.wide_rate); use a folder")
    if format == "gguf":
        from receptance.native import read_config

        from .gguf import save_gguf

        arrays = {name: to_numpy(tensor) for name, tensor in tensors.items()}
        save_gguf(path, arrays, read_config(version, shapes), None, {"tokenizer.ggml.model": "none"})
        return
    metadata = {
        "format": "pt",  # transformers refuses files without it
        f"{OURS}kind": "model",
        f"{OURS}version": version,
        f"{OURS}config": json.dumps(asdict(config)),  # type: ignore[call-overload]
        f"{OURS}fingerprint": fingerprint(tensors),
    }

    if format == "pth":
        from .pth import write_pth

        with replacing(path) as file:
            write_pth(file, tensors)
    elif format == "safetensors":
        with replacing(path) as file:
            write_safetensors(file, tensors, metadata)
    elif format == "folder":
        described = {"model_type": OUR_TYPE, "version": version, "config": asdict(config)}  # type: ignore[call-overload]
        save_folder(path, tensors, metadata, described)
    else:
        save_folder(path, hf.from_official(tensors, version), metadata, hf.config_for(version, tensors))


def format_of(path: Path) -> str:
    suffix = path.suffix.lower()
    if path.is_dir():
        return "folder"
    if suffix in (".pth", ".pt", ".bin"):
        return "pth"
    if suffix == ".safetensors":
        return "safetensors"
    if suffix == ".gguf":
        return "gguf"
    if suffix[1:].isalpha():  # the ".4b" of a model's name is no suffix
        raise ConfigError(f"{path}: the suffix {suffix} is unknown; use .pth, .safetensors, .gguf, or a folder's name")
    return "folder"


def to_numpy(tensor: "torch.Tensor") -> "NDArray[np.generic]":
    """On the CPU, without a gradient; bfloat16 as its bits."""
    import torch

    tensor = tensor.detach().to("cpu")
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def save_folder(
    folder: Path, tensors: "Mapping[str, torch.Tensor]", metadata: dict[str, str], config: Mapping[str, object]
) -> None:
    """Each file replaces its predecessor whole; the weights first, for they suffice to load the folder's model."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made a folder: {error}") from error
    with replacing(folder / "model.safetensors") as file:
        write_safetensors(file, tensors, metadata)
    with replacing(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")
