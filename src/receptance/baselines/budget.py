"""Models of equal size: the width that meets a budget of parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from receptance.errors import ConfigError

WITHIN = 0.02


def count(model: nn.Module) -> int:
    """Parameters without those of embedding and head."""
    return sum(p.numel() for name, p in model.named_parameters() if name not in ("emb.weight", "head.weight"))


def fit_budget(make: Callable[[int], Any], build: Callable[[Any], nn.Module], budget: int, multiple: int) -> Any:
    """The config whose model comes nearest to `budget` parameters, without those of embedding and head.

    make: width → config, in the usual shape; build: config → model on the meta device. multiple: what the width is one
    of. The width nearest to the budget in the usual shape is taken, and then, where the config has it, dim_ffn is
    moved in steps of 8. Raises ConfigError when that ends more than 2 % off.
    """

    def size(config: Any) -> int:
        return count(build(config))

    widths = [multiple, 2 * multiple]
    while size(make(widths[-1])) < budget:
        widths.append(widths[-1] * 2)
    low, high = widths[-2], widths[-1]
    while high - low > multiple:
        middle = (low + high) // 2 // multiple * multiple
        low, high = (middle, high) if size(make(middle)) < budget else (low, middle)
    config = min((make(low), make(high)), key=lambda c: abs(size(c) - budget))
    if any(field.name == "dim_ffn" for field in dataclasses.fields(config)):
        wider = dataclasses.replace(config, dim_ffn=config.dim_ffn + 8)
        each = (size(wider) - size(config)) / 8
        steps = round((budget - size(config)) / each / 8)
        config = dataclasses.replace(config, dim_ffn=max(8, config.dim_ffn + 8 * steps))
    if abs((found := size(config)) - budget) > WITHIN * budget:
        raise ConfigError(
            f"model.parameters = {budget:,} cannot be met within 2 % at width {config.n_embd}, which gives {found:,}; "
            f"choose another number, a smaller model.head_size or another model.n_layer"
        )
    return config
