"""Training: configuration, recipe groups, schedule, loss, the loop and its checkpoints."""

from receptance.training.config import TrainConfig, read_config
from receptance.training.loop import train

__all__ = ["TrainConfig", "read_config", "train"]
