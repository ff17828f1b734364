"""A run's checkpoints on disk: whole or absent, verified when read, newest good one first."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from receptance.errors import CheckpointError
from receptance.models import RWKV

MANIFEST = "manifest.json"


def save_checkpoint(out: Path, step: int, model: RWKV, optimizer: Optimizer, config: str, keep: int) -> Path:
    """Write `out`/checkpoints/step-N: into a temporary folder, synced, manifest last, then renamed; prune to `keep`."""
    root = out / "checkpoints"
    target, part = root / f"step-{step:08d}", root / f".step-{step:08d}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, part / "model.safetensors")
        save_file(_optimizer_tensors(optimizer), part / "optimizer.safetensors")
        files = {name: _sha256(part / name) for name in ("model.safetensors", "optimizer.safetensors")}
        (part / MANIFEST).write_text(json.dumps({"step": step, "files": files, "config": json.loads(config)}, indent=2))
        for path in [*part.iterdir(), part]:
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
        _sync(root)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in _folders(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(out: Path, model: RWKV, optimizer: Optimizer) -> tuple[int, list[str]]:
    """Put the newest intact checkpoint into model and optimizer: (its step, warnings about damaged ones); 0 if none."""
    warnings = []
    for folder in _folders(out / "checkpoints"):
        try:
            step, weights, moments = _read(folder)
        except CheckpointError as error:
            warnings.append(f"{error}; falling back to the one before it")
            continue
        model.load_state_dict(weights, strict=True)
        _restore(optimizer, moments)
        return step, warnings
    return 0, warnings


def saved_config(out: Path) -> dict[str, object] | None:
    """The configuration that the newest readable checkpoint was made with."""
    for folder in _folders(out / "checkpoints"):
        try:
            config = json.loads((folder / MANIFEST).read_text())["config"]
        except (OSError, ValueError, KeyError):
            continue
        return config if isinstance(config, dict) else None
    return None


def _folders(root: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted(root.glob("step-*"), reverse=True) if root.is_dir() else []


def _read(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, expected in manifest["files"].items():
            if _sha256(folder / name) != expected:
                raise CheckpointError(f"{folder / name}: does not match its checksum")
        return (
            int(manifest["step"]),
            load_file(folder / "model.safetensors"),
            load_file(folder / "optimizer.safetensors"),
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: damaged checkpoint ({error})") from None


def _named(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    return [(name, p) for group in optimizer.param_groups for name, p in zip(group["names"], group["params"])]


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in _named(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    return tensors


def _restore(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in _named(optimizer):
        keys = {key.split("/", 1)[0] for key in tensors if key.split("/", 1)[1] == name}
        optimizer.state[parameter] = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in keys}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
