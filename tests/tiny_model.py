"""A random model so small that it costs nothing, for tests of what surrounds models."""

from pathlib import Path

import torch

import receptance
from receptance.models import RWKV7
from receptance.tokenizers import tokenizer


def tiny(seed: int) -> RWKV7:
    """A random model that writes bytes, with all the variety that a seed can show."""
    generator = torch.Generator().manual_seed(seed)
    model = RWKV7(RWKV7.Config.make(257, n_layer=2, n_embd=32, head_size=16))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.dim() < 2 else 0.5))
        model.head.weight *= 0.3
        # one channel is always 1 and speaks against all but printable ASCII, so that text and bytes are the same thing
        model.ln_out.weight[0], model.ln_out.bias[0] = 0.0, 1.0
        model.head.weight[:, 0] = -100.0
        model.head.weight[ord(" ") + 1 : ord("~") + 2, 0] = 0.0
    return model.eval()


def write(model: RWKV7, path: Path) -> Path:
    receptance.save(model, path, "folder")
    tokenizer("byte").save(path)
    return path
