"""Watching losses and gradient norms on the device: an update that would do harm is skipped and counted."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from receptance.training.config import OptimConfig

MEAN_OVER = 100  # steps that the running means remember
SETTLED = 20  # updates before a spike can be told from a beginning


@dataclass(frozen=True)
class Verdict:
    """What has happened by a step: its loss and gradient norm, updates skipped in a row up to it, and in all."""

    loss: float
    grad_norm: float
    in_a_row: int
    skipped: int

    @property
    def is_sound(self) -> bool:
        """Whether the update was taken and nothing was wrong with it."""
        return not self.in_a_row and math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def new_statistics(device: torch.device) -> Tensor:
    """Mean loss, mean norm, updates taken, skipped in a row, skipped in all: [5], float32."""
    return torch.zeros(5, device=device)


def judge(statistics: Tensor, loss: Tensor, norm: Tensor, config: OptimConfig) -> Tensor:
    """Whether to skip this update (bool, on the device); brings the statistics up to date in place.

    The means leave out the steps that are skipped, so one spike does not excuse the next.
    """
    mean_loss, mean_norm, taken, in_a_row, skipped = statistics.unbind()
    bad = torch.zeros_like(loss, dtype=torch.bool)
    if config.skip_nonfinite:
        bad = ~(loss.isfinite() & norm.isfinite())
    for value, mean, factor in ((loss, mean_loss, config.loss_spike), (norm, mean_norm, config.grad_spike)):
        if factor:
            bad = bad | ((taken >= SETTLED) & (value > factor * mean))
    share = 1 / (taken + 1).clamp(max=MEAN_OVER)  # the plain mean at first, an exponential one later
    zero = torch.zeros_like(taken)
    after = [mean_loss + share * (loss - mean_loss), mean_norm + share * (norm - mean_norm), taken + 1, zero, skipped]
    kept = [mean_loss, mean_norm, taken, in_a_row + 1, skipped + 1]
    statistics.copy_(torch.where(bad, torch.stack(kept), torch.stack(after)))
    return bad


def verdict(outcome: Tensor) -> Verdict:
    """The numbers of a step's outcome (loss, norm, in a row, skipped: [4]); waits for the device."""
    loss, norm, in_a_row, skipped = outcome.tolist()
    return Verdict(loss, norm, int(in_a_row), int(skipped))
