"""The optimiser over the recipe's parameter groups, and the average of the weights that lives beside its moments."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from receptance.errors import ConfigError
from receptance.models import RWKV, Rule
from receptance.training.config import OptimConfig
from receptance.training.guard import new_statistics
from receptance.training.master import MasterAdamW
from receptance.training.muon import MuonAdamW


def param_groups(
    module: nn.Module, recipe: dict[str, Rule], weight_decay: float, *, stage2: bool = False, muon: bool = False
) -> list[dict[str, Any]]:
    """Groups for an optimiser, each with `params` and their `names`, `weight_decay`, `lr_scale` and `muon`.

    Raises KeyError for a trainable parameter that the recipe does not know. Order: by lr_scale, decayed last.
    muon: the matrices that decay, except embedding and head, form groups of their own.
    """
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = recipe[name]
        is_muon = muon and rule.decay and name not in ("emb.weight", "head.weight")
        key = (weight_decay if rule.decay else 0.0, rule.lr_stage2 if stage2 else rule.lr, is_muon)
        new = {"params": [], "names": [], "weight_decay": key[0], "lr_scale": key[1], "muon": is_muon}
        group = groups.setdefault(key, new)
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(model: RWKV, recipe: dict[str, Rule], config: OptimConfig, *, masters: bool = False) -> AdamW:
    """AdamW, with Muon for the hidden matrices if wanted, over the recipe's groups.

    masters: the model becomes one of bfloat16 weights, and what is optimised are float32 copies of them.

    Learning rates are set at each step; on CUDA they are tensors on the device, so that a graph can hold the update.
    All state exists from the start: moments, the average of the weights (`ema`), and beside the first parameter's the
    statistics of the guard (`guard`), so that whatever saves the optimiser's state saves them too.
    """
    groups = param_groups(model, recipe, config.weight_decay, muon=config.optimizer == "muon")
    betas = (config.beta1, config.beta2)
    if masters:
        optimizer: AdamW = MasterAdamW(groups, betas=betas, eps=config.eps, clip=config.grad_clip, ema=config.ema > 0)
        model.to(torch.bfloat16)  # what is not trained
    elif config.optimizer == "muon":
        if any(hasattr(p, "device_mesh") for p in model.parameters()):
            raise ConfigError("optim.optimizer = 'muon' needs whole matrices on each process; shard with adamw only")
        for group in groups:
            group["muon_momentum"] = config.muon_momentum
        optimizer = MuonAdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)
    else:
        optimizer = AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)
    for group in optimizer.param_groups:
        if model.device.type == "cuda":
            group["lr"] = torch.zeros((), device=model.device)
        for parameter in () if masters else group["params"]:
            optimizer.state[parameter] = _first_state(parameter, group["muon"], config.ema > 0)
    first = optimizer.param_groups[0]["params"][0]
    optimizer.state[first]["guard"] = new_statistics(model.device)
    return optimizer


def _first_state(parameter: Tensor, muon: bool, ema: bool) -> dict[str, Tensor]:
    """What the optimisers would make at their first step, under their names for it."""
    if muon:
        state = {"momentum_buffer": torch.zeros_like(parameter)}
    else:
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state = {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return {**state, "ema": torch.zeros_like(parameter)} if ema else state


def guard_statistics(optimizer: Optimizer) -> Tensor:
    """Looked up each time: loading a checkpoint replaces it."""
    statistics: Tensor = optimizer.state[optimizer.param_groups[0]["params"][0]]["guard"]
    return statistics


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Each group's rate, `lr` times the recipe's factor; a rate on the device is changed where it is."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]


def set_weight_decay(optimizer: Optimizer, weight_decay: float) -> None:
    """For the groups that have any."""
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay


def update_average(optimizer: Optimizer, decay: float) -> None:
    """ema ← decay · ema + (1 - decay) · weights. It starts at zero; `averaged` makes up for that."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    torch._foreach_lerp_([optimizer.state[p]["ema"] for p in params], params, 1 - decay)


@contextmanager
@torch.no_grad()
def averaged(optimizer: Optimizer, decay: float, steps: int) -> Iterator[None]:
    """The averaged weights in place of the weights, which come back at the end. steps: its updates so far."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [p.detach().clone() for p in params]
    for parameter in params:
        parameter.copy_(optimizer.state[parameter]["ema"] / (1 - decay**steps))
    publish(optimizer)
    try:
        yield
    finally:
        for parameter, weight in zip(params, weights):
            parameter.copy_(weight)
        publish(optimizer)


def publish(optimizer: Optimizer) -> None:
    """Bring the model's weights up to date where the optimiser's parameters are not the model's own."""
    if isinstance(optimizer, MasterAdamW):
        optimizer.publish()
