"""Training: configuration, recipe groups, schedule, loss, the loop and its checkpoints."""

from receptance.training.config import TrainConfig, read_config
from receptance.training.loop import announce_memory, set_up, train

__all__ = ["TrainConfig", "announce_memory", "read_config", "set_up", "train"]
