"""Folders in the layouts of Hugging Face: their tensor names, turned into the official ones and back.

Three layouts, told apart by the name of the embedding and of the tensors in the layers:

    hf     RwkvForCausalLM (v4, in transformers) and the Rwkv5/Rwkv6ForCausalLM repositories: only names differ
    fla6   flash-linear-attention's RWKV6ForCausalLM: low-rank matrices transposed, mixes in the order r w k v g
    fla7   flash-linear-attention's RWKV7ForCausalLM, also RWKV/RWKV7-*: low-rank matrices transposed, vectors flat

Every conversion only moves elements, so going there and back gives the same bits. Names and shapes of the two sides of
each rule stand side by side in the tables below; nothing else in the package knows them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from receptance.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]
    Move = Callable[[torch.Tensor], torch.Tensor]

GROUP_NORM_EPS = 64e-5  # what every RWKV-5, 6 and 7 computes with, whatever the head size


@dataclass(frozen=True)
class Rule:
    """One tensor: its official name, its name in the layout, and what to do with the elements in both directions."""

    official: str
    theirs: str
    read: "Move" = lambda tensor: tensor
    write: "Move" = lambda tensor: tensor


def flat(official: str, theirs: str) -> Rule:
    """[1, 1, C] here, [C] there."""
    return Rule(official, theirs, lambda t: t.reshape(1, 1, -1), lambda t: t.reshape(-1))


def transposed(official: str, theirs: str) -> Rule:
    return Rule(official, theirs, lambda t: t.T, lambda t: t.T)


def norm(official: str, theirs: str) -> list[Rule]:
    return [Rule(f"{official}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def low_rank(letter: str) -> list[Rule]:
    here, there = f"blocks.*.att.{letter}", f"model.layers.*.attn.{letter}_lora.lora"
    rules = [transposed(f"{here}1", f"{there}.0.weight"), transposed(f"{here}2", f"{there}.2.weight")]
    return rules if letter == "g" else [*rules, flat(f"{here}0", f"{there}.2.bias")]


# "*" stands for the layer
HF = [
    Rule("emb.weight", "rwkv.embeddings.weight"),
    *norm("blocks.*.ln0", "rwkv.blocks.*.pre_ln"),
    *norm("blocks.*.ln1", "rwkv.blocks.*.ln1"),
    *norm("blocks.*.ln2", "rwkv.blocks.*.ln2"),
    *norm("ln_out", "rwkv.ln_out"),
    Rule("head.weight", "head.weight"),
    *(
        Rule(f"blocks.*.{part}.{name}.weight", f"rwkv.blocks.*.{theirs}.{name}.weight")
        for part, theirs in (("att", "attention"), ("ffn", "feed_forward"))
        for name in ("key", "value", "receptance", "output", "gate")
    ),
    *(
        Rule(f"blocks.*.{part}.time_mix_{name[0]}", f"rwkv.blocks.*.{theirs}.time_mix_{name}")
        for part, theirs in (("att", "attention"), ("ffn", "feed_forward"))
        for name in ("key", "value", "receptance", "gate")
    ),
    # v5 and v6
    *norm("blocks.*.att.ln_x", "rwkv.blocks.*.attention.ln_x"),
    *(
        Rule(f"blocks.*.att.{name}", f"rwkv.blocks.*.attention.{name}")
        for name in ("time_decay", "time_first", "time_faaaa", "time_decay_w1", "time_decay_w2")
    ),
    *(
        Rule(f"blocks.*.att.time_maa_{j}", f"rwkv.blocks.*.attention.time_maa_{j}")
        for j in ("x", "w", "k", "v", "r", "g", "w1", "w2")
    ),
    *(Rule(f"blocks.*.ffn.time_maa_{j}", f"rwkv.blocks.*.feed_forward.time_maa_{j}") for j in "kr"),
]

FLA_COMMON = [
    Rule("emb.weight", "model.embeddings.weight"),
    *norm("blocks.*.ln0", "model.layers.*.pre_norm"),
    *norm("blocks.*.ln1", "model.layers.*.attn_norm"),
    *norm("blocks.*.ln2", "model.layers.*.ffn_norm"),
    *norm("ln_out", "model.norm"),
    *norm("blocks.*.att.ln_x", "model.layers.*.attn.g_norm"),
    Rule("head.weight", "lm_head.weight"),
    Rule("blocks.*.att.output.weight", "model.layers.*.attn.o_proj.weight"),
    Rule("blocks.*.ffn.value.weight", "model.layers.*.ffn.value.weight"),
]


def mix_in_order(parts: "torch.Tensor", order: str, wanted: str) -> "torch.Tensor":
    """Reorder the first axis, whose entries belong to the letters of `order`."""
    return parts[[order.index(letter) for letter in wanted]]


# the five data-dependent mixes of v6: [C, 5R] and [5, R, C] in the order wkvrg here, [5R, C] and [C, 5R] in rwkvg there
def read_w1(theirs: "torch.Tensor") -> "torch.Tensor":
    parts = theirs.reshape(5, -1, theirs.shape[1])  # [5, R, C]
    return mix_in_order(parts, "rwkvg", "wkvrg").reshape(theirs.shape).T  # [C, 5R]


def write_w1(ours: "torch.Tensor") -> "torch.Tensor":
    parts = ours.T.reshape(5, -1, ours.shape[0])  # [5, R, C]
    return mix_in_order(parts, "wkvrg", "rwkvg").reshape(ours.shape[::-1])  # [5R, C]


def read_w2(theirs: "torch.Tensor") -> "torch.Tensor":
    parts = theirs.T.reshape(5, -1, theirs.shape[0])
    return mix_in_order(parts, "rwkvg", "wkvrg")  # [5, R, C]


def write_w2(ours: "torch.Tensor") -> "torch.Tensor":
    return mix_in_order(ours, "wkvrg", "rwkvg").reshape(-1, ours.shape[2]).T  # [C, 5R]


FLA6 = [
    *FLA_COMMON,
    flat("blocks.*.att.time_maa_x", "model.layers.*.attn.x_proj.0.mu"),
    *(Rule(f"blocks.*.att.time_maa_{j}", f"model.layers.*.attn.x_bias.{j}") for j in "rwkvg"),
    Rule("blocks.*.att.time_maa_w1", "model.layers.*.attn.x_proj.0.linear.weight", read_w1, write_w1),
    Rule("blocks.*.att.time_maa_w2", "model.layers.*.attn.x_proj.2.weight", read_w2, write_w2),
    *(
        Rule(f"blocks.*.att.{name}.weight", f"model.layers.*.attn.{name[0]}_proj.linear.weight")
        for name in ("receptance", "key", "value", "gate")
    ),
    transposed("blocks.*.att.time_decay_w1", "model.layers.*.attn.w_proj.linear.lora.0.weight"),
    transposed("blocks.*.att.time_decay_w2", "model.layers.*.attn.w_proj.linear.lora.2.weight"),
    flat("blocks.*.att.time_decay", "model.layers.*.attn.w_proj.linear.lora.2.bias"),
    Rule("blocks.*.att.time_faaaa", "model.layers.*.attn.bonus"),
    Rule("blocks.*.ffn.key.weight", "model.layers.*.ffn.key.linear.weight"),
    Rule("blocks.*.ffn.receptance.weight", "model.layers.*.ffn.receptance.linear.weight"),
    flat("blocks.*.ffn.time_maa_k", "model.layers.*.ffn.key.mu"),
    flat("blocks.*.ffn.time_maa_r", "model.layers.*.ffn.receptance.mu"),
]

FLA7 = [
    *FLA_COMMON,
    *(Rule(f"blocks.*.att.x_{j}", f"model.layers.*.attn.x_{j}") for j in "rwkvag"),
    *(
        Rule(f"blocks.*.att.{name}.weight", f"model.layers.*.attn.{name[0]}_proj.weight")
        for name in ("receptance", "key", "value")
    ),
    *(rule for letter in "wavg" for rule in low_rank(letter)),
    flat("blocks.*.att.k_k", "model.layers.*.attn.k_k"),
    flat("blocks.*.att.k_a", "model.layers.*.attn.k_a"),
    Rule("blocks.*.att.r_k", "model.layers.*.attn.r_k"),
    flat("blocks.*.ffn.x_k", "model.layers.*.ffn.x_k"),
    Rule("blocks.*.ffn.key.weight", "model.layers.*.ffn.key.weight"),
]

LAYOUTS = {"hf": HF, "fla6": FLA6, "fla7": FLA7}

# static mixes that a layout keeps as the rows of one tensor: its name, how the rules above name the rows, their order.
# In fla7 only older folders do; there may be axes of 1 between
FUSED = {"fla6": (".attn.x_bias", ".attn.x_bias.", "rwkvg"), "fla7": (".attn.x_x", ".attn.x_", "rwkvag")}


def layout_of(names: Mapping[str, object]) -> str | None:
    """Which of LAYOUTS the tensor names belong to; None when to none of them."""
    if "rwkv.embeddings.weight" in names:
        return "hf"
    if "model.embeddings.weight" in names:
        if any(".attn.x_proj." in name or name.endswith(".attn.bonus") for name in names):
            return "fla6"
        if any(name.endswith(".attn.r_k") or ".attn.w_lora." in name for name in names):
            return "fla7"
    return None


def expand(rules: list[Rule], layers: int) -> list[Rule]:
    """The rules with every "*" replaced by each layer."""
    return [
        Rule(rule.official.replace("*", str(layer)), rule.theirs.replace("*", str(layer)), rule.read, rule.write)
        for rule in rules
        for layer in (range(layers) if "*" in rule.official else [0])
    ]


def to_official(tensors: "Tensors", layout: str) -> "dict[str, torch.Tensor]":
    """The same weights under official names and shapes. What no rule knows keeps its name, to be reported by it."""
    rest = dict(tensors)
    if layout in FUSED:
        split_fused(rest, *FUSED[layout])
    layers = len({match[1] for name in rest if (match := re.match(r"(?:rwkv\.blocks|model\.layers)\.(\d+)\.", name))})
    official = {}
    for rule in expand(LAYOUTS[layout], layers):
        if rule.theirs in rest:
            official[rule.official] = moved(rule.theirs, rest.pop(rule.theirs), rule.read)
    return {**official, **rest}


def split_fused(tensors: "dict[str, torch.Tensor]", fused: str, part: str, letters: str) -> None:
    for name in [name for name in tensors if name.endswith(fused)]:
        parts = moved(name, tensors.pop(name), lambda t: t.reshape(len(letters), 1, 1, -1))
        for letter, tensor in zip(letters, parts):
            tensors[f"{name.removesuffix(fused)}{part}{letter}"] = tensor


def join_fused(tensors: "dict[str, torch.Tensor]", fused: str, part: str, letters: str) -> None:
    import torch

    for first in [name for name in tensors if name.endswith(part + letters[0])]:
        start = first.removesuffix(part + letters[0])
        parts = [tensors.pop(f"{start}{part}{letter}").reshape(-1) for letter in letters]
        tensors[start + fused] = torch.stack(parts)  # [letters, C]


def moved(name: str, tensor: "torch.Tensor", move: "Move") -> "torch.Tensor":
    try:
        result = move(tensor)
        return result.contiguous() if hasattr(result, "contiguous") else result  # a NumPy array lies as it may
    except (RuntimeError, IndexError, ValueError) as error:
        raise CheckpointError(f"tensor {name} has the unexpected shape {list(tensor.shape)}") from error


def from_official(tensors: "Tensors", version: str) -> "dict[str, torch.Tensor]":
    """The same weights in the layout that other software expects for this version."""
    rest = dict(tensors)
    layers = len({name.split(".")[1] for name in rest if name.startswith("blocks.")})
    layout = layout_for(version)
    theirs = {}
    for rule in expand(LAYOUTS[layout], layers):
        if version == "7" and rule.official in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"):
            rest.pop(rule.official, None)  # never used in layer 0, and fla has no place for them
        elif rule.official in rest:
            theirs[rule.theirs] = rule.write(rest.pop(rule.official)).contiguous()
    if rest:
        raise CheckpointError(f"tensor {next(iter(rest))} has no place in the Hugging Face layout of RWKV-{version}")
    if layout == "fla6":
        join_fused(theirs, *FUSED[layout])
    return theirs


def layout_for(version: str) -> str:
    return {"6": "fla6", "7": "fla7"}.get(version, "hf")


def config_for(version: str, tensors: "Tensors") -> dict[str, object]:
    """The config.json beside exported weights, read off the official tensors."""
    vocab_size, width = tensors["emb.weight"].shape
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    hidden = tensors[f"blocks.{layers - 1}.ffn.key.weight"].shape[0]
    att = f"blocks.{layers - 1}.att"  # the last layer has every tensor
    common: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": hidden,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": str(tensors["emb.weight"].dtype).removeprefix("torch."),
        "use_cache": True,
    }
    if layout_for(version) == "hf":
        common |= {
            "model_type": "rwkv" if version == "4" else "rwkv5",
            "architectures": ["RwkvForCausalLM" if version == "4" else "Rwkv5ForCausalLM"],
            "attention_hidden_size": tensors[f"{att}.key.weight"].shape[0],
            "context_length": 1024,
            "layer_norm_epsilon": 1e-5,
            "rescale_every": 6,
        }
        if version != "4":
            heads = tensors[f"{att}.time_decay"].shape[0]
            common |= {"model_version": version, "head_size": width // heads, "head_size_divisor": 8}
        return common
    common |= {
        "attn_mode": "chunk",
        "hidden_ratio": hidden / width,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "fuse_norm": False,
        # what the weights were trained with. fla itself uses norm_eps (v6) or head_dim * norm_eps (v7; the same only
        # when head_dim is 64): set it on every g_norm after loading the model there
        "group_norm_eps": GROUP_NORM_EPS,
    }
    if version == "6":
        return common | {
            "model_type": "rwkv6",
            "architectures": ["RWKV6ForCausalLM"],
            "num_heads": tensors[f"{att}.time_faaaa"].shape[0],
            "expand_k": 1.0,
            "expand_v": 1.0,
            "proj_low_rank_dim": tensors[f"{att}.time_maa_w2"].shape[1],
            "gate_low_rank_dim": tensors[f"{att}.time_decay_w1"].shape[1],
        }
    heads, head_dim = tensors[f"{att}.r_k"].shape
    value_rank = tensors[f"{att}.v1"].shape[1] if f"{att}.v1" in tensors else 32
    return common | {
        "model_type": "rwkv7",
        "architectures": ["RWKV7ForCausalLM"],
        "num_heads": heads,
        "head_dim": head_dim,
        "value_dim": [width] * layers,
        "decay_low_rank_dim": tensors[f"{att}.w1"].shape[1],
        "a_low_rank_dim": tensors[f"{att}.a1"].shape[1],
        "v_low_rank_dim": value_rank,
        "gate_low_rank_dim": tensors[f"{att}.g1"].shape[1],
    }


def check_config(config: Mapping[str, object], layout: str) -> None:
    """Refuse a folder whose config asks for another computation than the one its weights would get here."""
    if config.get("quantization_config"):
        raise CheckpointError("config.json: the weights are quantised (quantization_config); get the unquantised ones")
    if layout == "hf":
        found, expected = config.get("layer_norm_epsilon", 1e-5), 1e-5
        name = "layer_norm_epsilon"
    else:
        found, expected = config.get("norm_eps", 1e-5), 1e-5
        name = "norm_eps"
    if found != expected:
        raise CheckpointError(f"config.json: {name} is {found!r}, only {expected} is supported")
    head_dim = config.get("head_dim", 64)
    if layout == "fla7" and config.get("group_norm_eps") != GROUP_NORM_EPS and head_dim not in (64, None):
        raise CheckpointError(
            f"config.json: a head_dim of {head_dim!r} means a GroupNorm eps of head_dim * norm_eps in fla, but RWKV-7 "
            f"computes with {GROUP_NORM_EPS}. If the weights come from an official checkpoint, add "
            f'"group_norm_eps": {GROUP_NORM_EPS} to config.json'
        )
