"""A baseline's folder: model.safetensors, and config.json that says what it is, for its tensors alone do not."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from receptance.errors import CheckpointError

if TYPE_CHECKING:
    from receptance.baselines.rnn import RNN
    from receptance.baselines.transformer import Transformer

TYPE = "receptance-baseline"  # model_type in config.json


def save_baseline(tensors: Mapping[str, Tensor], config: Any, folder: Path) -> None:
    """Weights first, each file whole or not at all."""
    from receptance.atomic import replacing
    from receptance.checkpoint.safetensors import write_safetensors

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.safetensors") as file:
        write_safetensors(file, dict(tensors), {"format": "pt"})
    described = {"model_type": TYPE, "config": dataclasses.asdict(config)}
    with replacing(folder / "config.json") as file:
        file.write(json.dumps(described, indent=2).encode())


def is_baseline(folder: Path) -> bool:
    from receptance.checkpoint.load import read_json

    try:
        return read_json(folder / "config.json").get("model_type") == TYPE
    except CheckpointError:
        return False


def load_baseline(folder: str | Path, device: str | None = None) -> "Transformer | RNN":
    """The model in a folder that `save_baseline` wrote, in eval mode. Raises CheckpointError for every problem."""
    from receptance.baselines import BASELINES

    folder = Path(folder)
    if not is_baseline(folder):
        raise CheckpointError(f"{folder}: holds no baseline; its config.json must have model_type = {TYPE!r}")
    try:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        cls = BASELINES[stated["version"]]
        config: Any = cls.Config(**stated)
        model = cls(config, device="meta")
        tensors = load_file(folder / "model.safetensors")
        model.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: is no intact baseline: {str(error)[:300]}") from error
    return model.to(device or "cpu").eval()
