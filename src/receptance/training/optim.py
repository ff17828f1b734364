"""The recipe's parameter groups."""

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from receptance.models import RWKV, Rule


def param_groups(
    module: nn.Module, recipe: dict[str, Rule], weight_decay: float, *, stage2: bool = False
) -> list[dict[str, object]]:
    """Groups for an optimiser, each with `params`, `weight_decay`, `lr_scale` and the `names` of its parameters.

    Raises KeyError for a trainable parameter that the recipe does not know. Order: by lr_scale, decayed last.
    """
    groups: dict[tuple[float, float], dict[str, object]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = recipe[name]
        key = (weight_decay if rule.decay else 0.0, rule.lr_stage2 if stage2 else rule.lr)
        group = groups.setdefault(key, {"params": [], "names": [], "weight_decay": key[0], "lr_scale": key[1]})
        group["params"].append(parameter)  # type: ignore[attr-defined]
        group["names"].append(name)  # type: ignore[attr-defined]
    return [groups[key] for key in sorted(groups)]


def build_optimizer(
    model: RWKV,
    recipe: dict[str, Rule],
    *,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-18,
) -> AdamW:
    """AdamW over the recipe's groups; its learning rates are set at each step.

    On CUDA they are tensors on the device, so that a CUDA graph can hold the update.
    """
    optimizer = AdamW(param_groups(model, recipe, weight_decay), lr=0.0, betas=betas, eps=eps, fused=True)
    if model.device.type == "cuda":
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros((), device=model.device)
    return optimizer


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Each group's rate, `lr` times the recipe's factor; a rate on the device is changed where it is."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]


def base_rate(optimizer: Optimizer) -> float:
    """The rate last set, without the factors."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / float(group["lr_scale"])
