"""A recipe without one of its ideas, to see what that idea is worth."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from receptance.errors import ConfigError
from receptance.models import RWKV
from receptance.models.base import Recipe, Rule

DECAYS = ("att.w0", "att.time_decay")
PAST = {"4": 1.0, "5": 1.0, "7": 0.0}  # the mix at which a token sees nothing of the one before it


def without(recipe: Recipe, model: RWKV, ideas: tuple[str, ...]) -> Recipe:
    """The recipe with these ideas (`config.IDEAS`) taken out.

    small-embedding: N(0, 0.02) instead of U(±1e-4) or so. zero-matrices: U(±1/sqrt(inputs)), as torch has it, for every
    matrix that starts at zero. decay-spread, mix-spread: one value for all channels of a layer, their mean. lr-groups:
    one learning rate. token-shift: mixes at the present token, not trained (call `freeze` too). ln0: no norm after the
    embedding (`freeze`); the result is for comparison only, for no file format leaves it out. Raises ConfigError.
    """
    version = str(model.config.version)[0]
    if ideas and version not in "4567":
        raise ConfigError("model.without takes ideas out of RWKV's recipe; this model has another")
    if "token-shift" in ideas and version not in PAST:
        raise ConfigError("the token shift of RWKV-6 depends on the data and cannot be taken out")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    changed: Recipe = {}
    for name, rule in recipe.items():
        shape = shapes.get(name, torch.Size())
        if name == "emb.weight" and "small-embedding" in ideas:
            rule = replace(rule, init=("normal", 0.02))
        is_matrix = sum(size > 1 for size in shape) > 1
        if "zero-matrices" in ideas and rule.init == ("zero", 0.0) and is_matrix and "time_state" not in name:
            inputs = shape[0] if name.endswith("1") else shape[-1]  # low-rank maps are stored transposed
            rule = replace(rule, init=("uniform", 1 / math.sqrt(inputs)))
        if "decay-spread" in ideas and name.endswith(DECAYS):
            rule = _flat(rule)
        if "mix-spread" in ideas and is_mix(name):
            rule = _flat(rule)
        if "token-shift" in ideas and is_mix(name) and isinstance(rule.init, Tensor):
            rule = replace(rule, init=torch.full_like(rule.init, PAST[version]))
        if "lr-groups" in ideas:
            rule = replace(rule, lr=1.0, lr_stage2=1.0)
        changed[name] = rule
    return changed


def is_mix(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last.startswith(("time_mix_", "time_maa_")) or last in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


def freeze(model: RWKV, ideas: tuple[str, ...]) -> None:
    """What training must leave alone, or do without."""
    if "token-shift" in ideas:
        for name, parameter in model.named_parameters():
            if is_mix(name):
                parameter.requires_grad_(False)
    if "ln0" in ideas:
        model.blocks[0].ln0 = nn.Identity()


def _flat(rule: Rule) -> Rule:
    if not isinstance(rule.init, Tensor):
        return rule
    return replace(rule, init=torch.full_like(rule.init, float(rule.init.mean())))
