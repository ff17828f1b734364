"""Which model a set of tensors is: told from names and shapes alone, never from a file's word for it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from receptance.errors import CheckpointError

from .source import MAX_TENSORS, show

if TYPE_CHECKING:
    from torch.overrides import TorchFunctionMode

    from receptance.models import RWKV
    from receptance.models.base import Config

Shapes = dict[str, tuple[int, ...]]

MAX_LAYERS = 1024
MAX_SIZE = 1 << 40
PREFIX = re.compile(r"(_forward_module\.|_orig_mod\.|module\.|model\.){1,4}")

# part of a tensor's name -> the experiment it belongs to; first match wins
UNSUPPORTED = {
    r"\.lora_[AB]|\.disha$|\.lora_magnitude": "a LoRA-style adapter: merge it into its base model first",
    r"\.enn\.": "RWKV-v8 (ffn.enn), an experiment",
    r"\.qkv\.": "RWKV-v7b (DeepEmbed attention, qkv) or a v8 hybrid, an experiment",
    r"\.s_emb": "RWKV-v7a (DeepEmbed, ffn.s_emb), an experiment",
    r"\.att\.gate_w1$": "RWKV-6.0a (att.gate_w1), an experiment",
    r"\.att\.time_maa_rkvw_w1$": "RWKV-6.0b/c (att.time_maa_rkvw_w1), an experiment",
    r"^head_[qk]\.|^copy_mask$": "an RWKV with the head-QK trick (head_q, head_k), an experiment",
    r"(^|\.)tiny_": "an RWKV with tiny attention (tiny_*), an experiment",
    r"\.pos_emb_[xy]$": "an RWKV with position embeddings (pos_emb_x/y), an experiment",
    r"rosa|(^|\.)emb[01]$": "an RWKV with ROSA layers, an experiment",
}

FOREIGN = {
    r"^gpt_neox\.": "a GPT-NeoX or Pythia checkpoint",
    r"(^|\.)h\.0\.attn\.c_attn\.": "a GPT-2 checkpoint",
    r"layers\.0\.self_attn\.time_maa|layers\.0\.self_attn\.[wavg]_lora|layers\.0\.self_attn\.r_k": (
        "a hybrid of RWKV and a Transformer (QRWKV/ARWKV)"
    ),
    r"layers\.0\.self_attn\.q_proj\.": "a LLaMA-style Transformer checkpoint",
    r"mixer\.A_log$": "a Mamba checkpoint",
    r"encoder\.layer\.0\.attention": "a BERT-style checkpoint",
    r"^weight_ih_l0$|\.weight_ih_l0$": "an LSTM or GRU checkpoint",
}


def without_prefix(names: Iterable[str]) -> dict[str, str]:
    """{name in the file: official name}, where a training framework may have put a PREFIX before every name."""
    names = list(names)
    embeddings = (name.removesuffix("emb.weight") for name in names if name.endswith("emb.weight"))
    prefix = next((before for before in embeddings if PREFIX.fullmatch(before)), "")
    return {name: name.removeprefix(prefix) for name in names}


def version_of(names: Mapping[str, object]) -> str:
    """The version that official tensor names and shapes tell. Raises CheckpointError when they are no RWKV's."""
    if len(names) > MAX_TENSORS:
        raise CheckpointError(f"has {len(names)} tensors, more than {MAX_TENSORS}; this is no RWKV checkpoint")
    any_of_them = re.compile("|".join(UNSUPPORTED))
    if found := next((name for name in names if any_of_them.search(name)), None):
        what = next(what for pattern, what in UNSUPPORTED.items() if re.search(pattern, found))
        raise CheckpointError(f"tensor {show(found)}: this is {what}; not supported")
    if names and all(name.endswith(".att.time_state") for name in names):
        raise CheckpointError("holds only att.time_state: a tuned state, not a model; load its base model first")
    if "emb.weight" not in names or not any(name.startswith("blocks.") for name in names):
        for pattern, what in FOREIGN.items():
            if any(re.search(pattern, name) for name in names):
                raise CheckpointError(f"looks like {what}, not like RWKV-4, 5, 6 or 7")
        first = ", ".join(show(name) for name in list(names)[:5])
        raise CheckpointError(f"is no RWKV checkpoint: expected tensors like emb.weight, blocks.0.*; found {first}")

    def has(ending: str) -> bool:
        return any(name.endswith(ending) for name in names)

    if has(".att.r_k") or has(".att.k_k"):
        return "7"
    if any(".time_maa_" in name for name in names):
        return "6"
    if has(".att.ln_x.weight"):
        if not has(".att.gate.weight"):
            return "5.0"
        shape = names.get("blocks.0.att.time_decay")
        return "5.2" if isinstance(shape, tuple) and len(shape) == 2 and shape[1] > 1 else "5.1"
    return "4"


def detect(shapes: Shapes) -> tuple[str, "Config"]:
    """(version, Config) of a model with these official tensor names and shapes.

    Raises CheckpointError unless they are exactly the tensors of one version: it names what is missing, unexpected or
    of the wrong shape. Nothing is allocated.
    """
    version, config, _ = outline(shapes)
    return version, config


def outline(shapes: Shapes) -> "tuple[str, Config, RWKV]":
    """detect, with the model itself on the meta device, ready to receive its tensors."""
    from receptance.models import VERSIONS

    version = version_of(shapes)
    check_sizes(shapes)
    cls = VERSIONS[version]
    with shapes_make_sense(version):
        config = cls.Config.from_shapes(shapes)
        head_size = getattr(config, "head_size", 1)
        if config.n_embd % head_size:
            raise ValueError(f"a head size of {head_size} does not divide the width {config.n_embd}")
        with without_normal_init():
            model = cls(config, device="meta")  # type: ignore[arg-type]  # each class has its own Config
    compare({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, shapes, version)
    return version, config, model


@contextmanager
def shapes_make_sense(version: str) -> Iterator[None]:
    """What reading a Config from shapes can raise, as the CheckpointError that it means."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"looks like RWKV-{version}, but tensor {error.args[0]} is missing") from error
    # nonsense shapes: too few axes to unpack, sizes that overflow, heads that do not divide
    except (IndexError, ValueError, TypeError, RuntimeError, OverflowError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"looks like RWKV-{version}, but its shapes are not those of one ({str(error)[:200]})"
        ) from error


def without_normal_init() -> "TorchFunctionMode":
    """On the meta device there is nothing to initialise, and normal_ would import torch's compiler there (1 s)."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            kwargs = kwargs or {}
            return kwargs["tensor"] if function is torch.nn.init.normal_ else function(*args, **kwargs)

    return Mode()


def check_sizes(shapes: Shapes) -> None:
    """Before anything is built: sizes that can be, and layers 0 to L-1 without gaps, not absurdly many."""
    for name, shape in shapes.items():
        if not all(0 < size <= MAX_SIZE for size in shape):
            raise CheckpointError(f"tensor {show(name)} has the impossible shape {list(shape)}")
    try:
        layers = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    except (ValueError, IndexError):
        raise CheckpointError("has a tensor 'blocks.*' without a layer number") from None
    if len(layers) > MAX_LAYERS:
        raise CheckpointError(f"has {len(layers)} layers, more than {MAX_LAYERS}")
    missing = sorted(set(range(len(layers))) - layers)
    if missing:
        raise CheckpointError(
            f"blocks.{missing[0]} is missing although blocks.{max(layers)} is there; get the file again"
        )


def compare(expected: Shapes, found: Shapes, version: str, limit: int = 5) -> None:
    """Raise one CheckpointError that lists the first differences."""
    problems = [f"tensor {name}: missing, expected {list(expected[name])}" for name in expected if name not in found]
    problems += [
        f"tensor {name}: found {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems += [
        f"tensor {show(name)}: found {list(found[name])}, unknown to RWKV-{version}"
        for name in found
        if name not in expected
    ]
    if problems:
        more = f"\n  … and {len(problems) - limit} more" if len(problems) > limit else ""
        raise CheckpointError(
            f"looks like RWKV-{version}, but {len(problems)} tensors differ (official names):\n  "
            + "\n  ".join(problems[:limit])
            + more
        )
