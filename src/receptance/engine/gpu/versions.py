"""Which models the GPU kernels take, and each version's time mix."""

from typing import Any

import torch

from receptance.engine.gpu.layers import TimeMix
from receptance.engine.gpu.model import GpuModel
from receptance.engine.gpu.rwkv4 import TimeMix4
from receptance.engine.gpu.rwkv6 import TimeMix5, TimeMix6
from receptance.engine.gpu.rwkv7 import TimeMix7
from receptance.models import RWKV, RWKV4, RWKV5, RWKV6, RWKV7


def misfit(model: object, dtype: torch.dtype = torch.float16, state_dtype: torch.dtype = torch.float32) -> str | None:
    """Why `GpuModel` cannot take this model, or None."""
    if not isinstance(model, RWKV4 | RWKV5 | RWKV6 | RWKV7):
        return f"only RWKV-4 to 7 have GPU kernels for decoding, not {type(model).__name__}"
    c: Any = model.config
    if getattr(c, "wide_rate", False):
        return "the kernels have no wide_rate"
    if getattr(c, "pre_ffn", False):
        return "the kernels have no pre_ffn"
    if getattr(c, "dim_att", c.n_embd) != c.n_embd:
        return f"dim_att is {c.dim_att}; the kernels take it as wide as n_embd ({c.n_embd})"
    if getattr(c, "head_size", 64) not in (32, 64, 128):
        return f"heads of {c.head_size}; the kernels take 32, 64 or 128"
    ranks = {name: size for name, size in vars(c).items() if name.endswith("_rank")}
    sizes = {"n_embd": c.n_embd, "dim_ffn": c.dim_ffn, **ranks}
    if any(x % 32 for x in sizes.values()) or c.vocab_size % 16 or c.n_embd > 16384:
        text = ", ".join(f"{name} {x}" for name, x in sizes.items())
        return (
            f"sizes must be multiples of 32 and n_embd at most 16384: {text}; "
            f"and vocab_size ({c.vocab_size}) a multiple of 16"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        return f"weights of {dtype}; the kernels take float16 or bfloat16"
    if state_dtype not in (torch.float32, dtype):
        return f"a state of {state_dtype}; with weights of {dtype} it can be that or float32"
    return None


def time_mix(gpu: GpuModel, model: RWKV) -> TimeMix:
    if isinstance(model, RWKV4):
        return TimeMix4(gpu)
    if isinstance(model, RWKV7):
        return TimeMix7(gpu)
    return TimeMix6(gpu) if isinstance(model, RWKV6) else TimeMix5(gpu)
