from collections.abc import Callable

import numpy as np
import pytest
import torch

from receptance.models import RWKV, VERSIONS
from receptance.native import NativeModel, NoCoreError, load_core, read_config
from receptance.native.arrays import Weights

Make = Callable[..., NativeModel]


def engines() -> list[str]:
    """NumPy, and those of the compiled core that this machine can run."""
    found = ["numpy"]
    for name in ("portable", "avx2", "avx512", "amx", "neon"):
        try:
            found.append(load_core(name).name)
        except NoCoreError:
            continue
    return found


COMPILED = [name for name in engines() if name != "numpy"]
needs_core = pytest.mark.skipif(not COMPILED, reason="the C++ core is not compiled here")


def version_of(model: RWKV) -> str:
    return str(model.config.version)


def weights_of(model: RWKV) -> Weights:
    """A torch model's tensors as the native engine takes them."""
    return {
        name: (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).detach().numpy()
        for name, x in model.state_dict().items()
    }


def native(model: RWKV, **options: object) -> NativeModel:
    """The same model in the native engine."""
    weights = weights_of(model)
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    options.setdefault("threads", 2)
    return NativeModel(weights, read_config(version_of(model), shapes), model.fingerprint, **options)  # type: ignore[arg-type]


def random_model(version: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> RWKV:
    """A model with nothing left at zero; sizes: those of the version's Config."""
    cls = VERSIONS[version]
    given: dict[str, object] = {"vocab_size": 61, "n_layer": 3, "n_embd": 64, "dim_ffn": 128}
    if version == "4":
        given |= {"dim_att": 64}
    else:
        given |= {"head_size": 32}
    if version[0] == "5":
        given |= {"version": version}
    if version == "6":
        given |= {"mix_rank": 8, "decay_rank": 12}
    if version == "7":
        given |= {"decay_rank": 8, "rate_rank": 12, "value_rank": 4, "gate_rank": 16}
    model = cls(cls.Config(**{**given, **sizes}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.5 if p.dim() == 1 or p.shape[0] == 1 else p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if name.endswith(("ln0.weight", "ln1.weight", "ln2.weight", "ln_x.weight", "ln_out.weight")):
                p += 1
            if name.endswith("head.weight"):
                p *= 4
    return model.to(dtype).eval()


def tokens(n: int, vocab: int = 61, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, n).tolist()  # type: ignore[no-any-return]


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to 8 bits of mantissa, halves away from zero: x and quantised weights where the processor has AMX."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
