"""Which form of an operator or fused piece runs: plain torch on any device, or CUDA or Triton kernels on a GPU."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

# Operator or fused piece → module of its Triton form, imported on first use. The plain form lies beside it.
PIECES: dict[str, str] = {
    "adamw": "receptance.ops.adamw.triton",
    "ffn": "receptance.ops.ffn.triton",
    "head_loss": "receptance.ops.head_loss.triton",
    "heads": "receptance.ops.heads.triton",
    "low_rank": "receptance.ops.low_rank.triton",
    "norm": "receptance.ops.norm.triton",
    "prepare": "receptance.ops.prepare.triton",
    "products": "receptance.ops.products.triton",
    "shift": "receptance.ops.shift.triton",
    "wkv4": "receptance.ops.wkv4.triton",
    "wkv6": "receptance.ops.wkv6.triton",
    "wkv7": "receptance.ops.wkv7.triton",
}

# Operator → module of its form in CUDA C++, where there is one; it comes before Triton's.
CUDA: dict[str, str] = {
    "wkv4": "receptance.ops.wkv4.cuda",
    "wkv6": "receptance.ops.wkv6.cuda",
    "wkv7": "receptance.ops.wkv7.cuda",
}


def uses_triton(piece: str, x: Tensor, backend: str = "auto") -> bool:
    """Whether `piece` runs its Triton kernels on a tensor like x.

    backend: what the model was called with. "auto", "triton" and "cuda" take the kernels on CUDA tensors of up to 32
    bits; the operators' any-device forms ("naive", "chunk") stand for plain pieces too.
    """
    if backend not in ("auto", "triton", "cuda") or not x.is_cuda or x.dtype == torch.float64:
        return False
    return torch.compiler.is_compiling() or _builds(piece, PIECES[piece], "Triton", "the plain form")


def uses_cuda(op: str, x: Tensor) -> bool:
    """Whether the operator's CUDA C++ kernels run on inputs like x [B, T, ...]."""
    if op not in CUDA or not x.is_cuda or torch.version.cuda is None or not import_module(CUDA[op]).fits(x):
        return False
    return torch.compiler.is_compiling() or _builds(op, CUDA[op], "CUDA", "the Triton form")


@cache
def _builds(piece: str, module: str, kind: str, instead: str) -> bool:
    """Try the kernels once, forward and backward, on a few numbers; a failure costs speed, not the run."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def probe() -> None:
        with nullcontext() if device is None else torch.cuda.device(device):
            import_module(module).probe()

    try:
        with ThreadPoolExecutor(1) as other:  # whatever modes and hooks the first caller is in
            other.submit(probe).result()
    except Exception as error:  # whatever a compiler, a driver or a missing package raises
        reason = str(error).strip().splitlines() or [""]
        warnings.warn(
            f"{piece}: the {kind} kernel cannot be built ({type(error).__name__}: {reason[0]}); "
            f"{instead} runs instead, slower",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


def upcast(x: Tensor) -> Tensor:
    """float32, unless already float64: the precision of decays, states and norms."""
    return x if x.dtype == torch.float64 else x.float()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with x runs: autocast's when it is on and x is not float64, else x's own."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
