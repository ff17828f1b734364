"""A run's checkpoints on disk: whole or absent, verified when read, newest good one first.

    checkpoints/step-00000200/
      model.safetensors, optimizer.safetensors     or, when the parameters are sharded, shards/ (torch's DCP)
      manifest.json                                step, SHA-256 and size of every file, configuration, score, notes

All of it is written into a temporary folder, each file synced and the manifest last; then the folder gets its name.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from receptance.atomic import sync
from receptance.checkpoint.safetensors import write_safetensors
from receptance.errors import CheckpointError
from receptance.models import RWKV
from receptance.training.distributed import Parallel
from receptance.training.master import MasterAdamW
from receptance.training.optim import publish
from receptance.training.shards import read_shards, shard_names, write_shards

MANIFEST, SHARDS = "manifest.json", "shards"
MINIMUM = 2  # checkpoints left on disk: one survives damage to the other


@dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back besides weights and moments. step 0: there was none."""

    step: int = 0
    warnings: list[str] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run. All processes of the run make the same calls; the first decides and names.

    keep: the newest ones left on disk, at least two; the one with the lowest score stays as well.
    in_background: `save` copies the tensors to main memory and returns; writing goes on while training does.
    """

    def __init__(self, out: Path, parallel: Parallel, *, keep: int = MINIMUM, in_background: bool = False):
        self.root = out / "checkpoints"
        self.keep = max(keep, MINIMUM)
        self._parallel = parallel
        self._damaged: set[Path] = set()  # seen by `load`
        self._writer = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._pending: Future[None] | None = None
        self._group = None
        if parallel.size > 1:  # of its own: writing in the background must not mix with what training says
            self._group = torch.distributed.new_group(backend="gloo")

    def save(
        self,
        step: int,
        model: RWKV,
        optimizer: Optimizer,
        config: str,
        *,
        score: float | None = None,
        notes: Mapping[str, object] | None = None,
    ) -> None:
        """Save after `step` steps. score: lower is better. notes: anything JSON, given back by `load`.

        Raises CheckpointError when this one, or the one still being written, fails; those before it are untouched.
        """
        self.wait()
        sharded = self._parallel.is_sharded
        tensors: dict[str, Tensor] = {}
        if sharded or self._parallel.is_first:
            tensors = {f"model/{name}": x for name, x in _model_tensors(model, optimizer).items()}
            tensors |= {f"optimizer/{name}": x for name, x in _optimizer_tensors(optimizer).items()}
            tensors = {name: _in_memory(x, copy=self._writer is not None) for name, x in tensors.items()}
        about = {"step": step, "score": score, "notes": dict(notes or {}), "config": json.loads(config)}
        if self._writer is None:
            self._write(step, tensors, about, sharded)
        else:
            self._pending = self._writer.submit(self._write, step, tensors, about, sharded)

    def wait(self) -> None:
        """Until the checkpoint in the background is on disk. Raises CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def is_best(self, score: float) -> bool:
        """Whether no checkpoint on disk has a score as low, damaged ones aside. The first process's answer."""
        best = min(self._scores().values(), default=float("inf"))
        return self._parallel.agree(score < best)

    def load(self, model: RWKV, optimizer: Optimizer, *, best: bool = False) -> Restored:
        """Put the newest intact checkpoint into model and optimizer, however it was sharded.

        best: instead the intact one with the lowest score; those without a score are left out. Raises CheckpointError
        when there are checkpoints and all are damaged, unless the best is asked for.
        """
        problems: list[str] = []
        found: Path | None = None
        manifest: dict[str, object] = {}
        if self._parallel.is_first:
            for folder in _by_score(folders(self.root)) if best else folders(self.root):
                try:
                    manifest, found = _verify(folder), folder
                    break
                except CheckpointError as error:
                    problems.append(str(error))
                    self._damaged.add(folder)
        found, manifest, problems = self._parallel.agree((found, manifest, problems))
        if found is None and problems and not best:
            raise _none_intact(self.root, "; ".join(problems))
        warnings = [f"{problem}; falling back to the one before it" for problem in problems]
        if found is None:
            return Restored(warnings=warnings)
        if (found / SHARDS).is_dir():
            wanted = _templates(found / SHARDS, model, optimizer)
            read_shards(found / SHARDS, wanted, self._group)
        else:
            wanted = {f"model/{name}": x for name, x in load_file(found / "model.safetensors").items()}
            wanted |= {f"optimizer/{name}": x for name, x in load_file(found / "optimizer.safetensors").items()}
        _restore_model(_model_tensors(model, optimizer), _of_kind("model", wanted))
        _restore_optimizer(optimizer, _of_kind("optimizer", wanted))
        publish(optimizer)
        step, notes = manifest["step"], manifest["notes"]
        assert isinstance(step, int)
        assert isinstance(notes, dict)
        return Restored(step, warnings, notes)

    def _write(self, step: int, tensors: dict[str, Tensor], about: dict[str, object], sharded: bool) -> None:
        target, part = self.root / f"step-{step:08d}", self.root / f".step-{step:08d}.part"
        first = self._parallel.is_first
        try:
            self._make(part)
            if sharded:
                write_shards(part / SHARDS, tensors, self._group)
            if not first:
                return
            files = {} if sharded else _write_files(part, tensors)
            files |= {str(path.relative_to(part)): _checksum(path) for path in (part / SHARDS).glob("*")}
            for path in [*part.rglob("*"), part]:
                sync(path)
            manifest = {**about, "files": files}
            text = json.dumps({**manifest, "checksum": _own_checksum(manifest)}, indent=2)
            with open(part / MANIFEST, "wb") as file:
                file.write(text.encode())
            for path in (part / MANIFEST, part):
                sync(path)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(part, target)
            self._damaged.discard(target)
            sync(self.root)
            self._prune()
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{target}: the checkpoint could not be written ({error})") from error
        finally:
            if first:
                shutil.rmtree(part, ignore_errors=True)

    def _make(self, part: Path) -> None:
        """An empty folder to write into; the others wait for it, and hear if there is none."""
        problem: OSError | None = None
        if self._parallel.is_first:
            try:
                for old in self.root.glob(".step-*.part"):  # left by a run that was killed
                    shutil.rmtree(old, ignore_errors=True)
                part.mkdir(parents=True)
            except OSError as error:
                problem = error
        if self._parallel.is_sharded:
            problem = self._parallel.agree(problem, self._group)
        if problem is not None:
            raise problem

    def _prune(self) -> None:
        scores = self._scores()
        best = min(scores, key=lambda folder: scores[folder], default=None)
        for old in folders(self.root)[self.keep :]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)

    def _scores(self) -> dict[Path, float]:
        """Of those that have one and are not known to be damaged."""
        intact = [folder for folder in folders(self.root) if folder not in self._damaged]
        return {folder: score for folder in intact if (score := _score(folder)) is not None}


def folders(root: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted(root.glob("step-*"), reverse=True) if root.is_dir() else []


def saved_config(out: Path) -> dict[str, object] | None:
    """The configuration that the newest readable checkpoint was made with; None if there is no checkpoint.

    Raises CheckpointError when there are some and none is readable.
    """
    root = out / "checkpoints"
    found = folders(root)
    for folder in found:
        try:
            config = json.loads((folder / MANIFEST).read_text())["config"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(config, dict):
            return config
    if found:
        raise _none_intact(root, f"no {MANIFEST} in {', '.join(folder.name for folder in found)} is readable")
    return None


def _none_intact(root: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{root}: no checkpoint is intact ({why}); put back a copy of one, or move this folder away to start over"
    )


def _verify(folder: Path) -> dict[str, object]:
    """The manifest of a checkpoint whose files are all there and match it."""
    try:
        manifest: dict[str, object] = json.loads((folder / MANIFEST).read_text())
        checksum, files = manifest.pop("checksum"), manifest["files"]
        if checksum != _own_checksum(manifest) or not isinstance(files, dict):
            raise CheckpointError(f"{folder / MANIFEST}: does not match its own checksum")
        for name, expected in files.items():
            if _checksum(folder / name) != expected:
                raise CheckpointError(f"{folder / name}: does not match its checksum")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: damaged checkpoint ({error})") from None


def _own_checksum(manifest: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _score(folder: Path) -> float | None:
    try:
        score = json.loads((folder / MANIFEST).read_text())["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # a NaN compares with nothing, so it would hide the best
    return float(score) if isinstance(score, (int, float)) and math.isfinite(score) else None


def _by_score(checkpoints: list[Path]) -> list[Path]:
    """Those that have a score, the best first."""
    scores = {folder: score for folder in checkpoints if (score := _score(folder)) is not None}
    return sorted(scores, key=lambda folder: scores[folder])


def _write_files(part: Path, tensors: dict[str, Tensor]) -> dict[str, list[object]]:
    files = {}
    for kind in ("model", "optimizer"):
        name = f"{kind}.safetensors"
        with open(part / name, "wb") as file:
            hashed = _Hashed(file)
            write_safetensors(cast(BinaryIO, hashed), _of_kind(kind, tensors), {"format": "pt"})
        files[name] = hashed.checksum
    return files


def _of_kind(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those under "model/" or "optimizer/", by the rest of their names."""
    return {name.removeprefix(f"{kind}/"): x for name, x in tensors.items() if name.startswith(f"{kind}/")}


class _Hashed:
    """A file that knows the checksum of what it was asked to write, not of what arrived."""

    def __init__(self, file: BinaryIO):
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        self._size += len(data)
        return self._file.write(data)

    @property
    def checksum(self) -> list[object]:
        return [self._digest.hexdigest(), self._size]


def _checksum(path: Path) -> list[object]:
    """SHA-256 and size."""
    with open(path, "rb") as file:
        return [hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size]


def _in_memory(x: Tensor, copy: bool) -> Tensor:
    """The tensor, or this process's shard of it, in main memory; a copy that later steps do not change, if asked."""
    if isinstance(x, DTensor):
        mine = x.to_local().detach().to("cpu", copy=copy)
        return DTensor.from_local(mine, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())
    return x.detach().to("cpu", copy=copy)


def _named(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    return [(name, p) for group in optimizer.param_groups for name, p in zip(group["names"], group["params"])]


def _model_tensors(model: RWKV, optimizer: Optimizer) -> dict[str, Tensor]:
    """The model's, in float32 where the optimiser has them so: a checkpoint does not depend on run.weights."""
    tensors = model.state_dict()
    return {**tensors, **optimizer.masters()} if isinstance(optimizer, MasterAdamW) else tensors


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}/{name}": value
        for name, parameter in _named(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _templates(shards: Path, model: RWKV, optimizer: Optimizer) -> dict[str, Tensor]:
    """Empty tensors for everything a sharded checkpoint holds; those as large as a parameter, sharded as it is now."""
    parameters = {f"model/{name}": x for name, x in _model_tensors(model, optimizer).items()}
    owner = dict(_named(optimizer))
    templates = {}
    for name, (shape, dtype) in shard_names(shards).items():
        like = parameters.get(name) if name.startswith("model/") else owner.get(name.split("/", 2)[-1])
        if like is not None and like.shape == shape:
            templates[name] = torch.zeros_like(like, dtype=dtype)
        else:
            templates[name] = torch.zeros(shape, dtype=dtype)
    return templates


def _like(x: Tensor, parameter: Tensor) -> Tensor:
    """`x` on the parameter's device, sharded like it if it is as large."""
    if isinstance(parameter, DTensor) and not isinstance(x, DTensor) and x.shape == parameter.shape:
        return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements)
    return x if isinstance(x, DTensor) else x.to(parameter.device)


@torch.no_grad()
def _restore_model(current: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    if current.keys() != tensors.keys():
        wrong = sorted(current.keys() ^ tensors.keys())
        raise CheckpointError(f"the checkpoint's tensors are not this model's: {', '.join(wrong[:5])}")
    for name, x in current.items():
        x.copy_(_like(tensors[name], x))


def _restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    kept: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        kind, name = key.split("/", 1)
        kept.setdefault(name, {})[kind] = x
    for name, parameter in _named(optimizer):
        old = optimizer.state.get(parameter, {})
        state = {kind: _like(x, parameter) for kind, x in kept.get(name, {}).items()}
        if isinstance(optimizer, MasterAdamW):  # whose tensors stay where they are
            state = {kind: old[kind].copy_(x) if kind in old else x for kind, x in state.items()}
        optimizer.state[parameter] = state
