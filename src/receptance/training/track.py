"""TensorBoard and Weights & Biases, each imported only when a run asks for it."""

import json
from pathlib import Path
from typing import Protocol

from receptance.errors import ConfigError
from receptance.training.config import TrainConfig, to_json


class Tracker(Protocol):
    def write(self, row: dict[str, float]) -> None: ...
    def close(self) -> None: ...


def trackers(config: TrainConfig, out: Path) -> list[Tracker]:
    """Those that the configuration asks for. Raises ConfigError when a package is missing."""
    found: list[Tracker] = []
    if config.run.tensorboard:
        found.append(TensorBoard(out / "tensorboard"))
    if config.run.wandb is not None:
        found.append(WeightsAndBiases(config, out))
    return found


class TensorBoard:
    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(f"run.tensorboard: {error}; pip install 'receptance[tensorboard]'") from None
        self._writer = SummaryWriter(folder)

    def write(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run of the project, named after the folder; a continued run goes on under its id."""

    def __init__(self, config: TrainConfig, out: Path):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"run.wandb: {error}; pip install 'receptance[wandb]'") from None
        id_file = out / "wandb.id"
        known = id_file.read_text().strip() if id_file.exists() else None
        self._run = wandb.init(
            project=config.run.wandb, name=out.resolve().name, id=known, resume="allow", dir=str(out),
            mode=config.run.wandb_mode, config=json.loads(to_json(config)),
        )  # fmt: skip
        id_file.write_text(self._run.id)
        self._run.define_metric("*", step_metric="step")  # rows of a continued run may come twice, which steps may not

    def write(self, row: dict[str, float]) -> None:
        self._run.log(dict(row))

    def close(self) -> None:
        self._run.finish()
