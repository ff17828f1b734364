"""Tiny random models of every version, and .pth archives made by hand."""

import io
import pickletools
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from receptance.models import RWKV, VERSIONS, RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config

Config = RWKV4Config | RWKV5Config | RWKV6Config | RWKV7Config

CONFIGS: dict[str, Config] = {
    "4": RWKV4Config(vocab_size=11, n_layer=2, n_embd=8, dim_att=12, dim_ffn=20),
    "5.0": RWKV5Config(vocab_size=11, n_layer=2, n_embd=8, dim_ffn=20, head_size=4, version="5.0"),
    "5.1": RWKV5Config(vocab_size=11, n_layer=2, n_embd=8, dim_ffn=20, head_size=4, version="5.1"),
    "5.2": RWKV5Config(vocab_size=11, n_layer=2, n_embd=8, dim_ffn=20, head_size=4, version="5.2"),
    "6": RWKV6Config(vocab_size=11, n_layer=2, n_embd=8, dim_ffn=20, mix_rank=3, decay_rank=5, head_size=4),
    "7": RWKV7Config(
        vocab_size=11,
        n_layer=2,
        n_embd=8,
        dim_ffn=20,
        decay_rank=3,
        rate_rank=5,
        value_rank=2,
        gate_rank=6,
        head_size=4,
        first_value=False,
    ),
}


def changed(version: str, **changes: int | bool) -> Config:
    return replace(CONFIGS[version], **changes)  # type: ignore[arg-type]


def tiny_model(version: str, dtype: torch.dtype = torch.bfloat16, config: Config | None = None) -> RWKV:
    model = VERSIONS[version](config or CONFIGS[version], dtype=dtype)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def tiny_weights(version: str = "7") -> dict[str, torch.Tensor]:
    """A state dict of one's own, free to be changed."""
    return {name: tensor.clone() for name, tensor in tiny_model(version).state_dict().items()}


@contextmanager
def within_a_second() -> Iterator[None]:
    """Of this thread's processor time. A busy machine stretches even that: what takes longer is held against 30 times
    the listing, at that moment, of as many instructions as a pickle may have: 0.07 s each on an idle core."""
    start = time.thread_time()
    try:
        yield
    finally:
        seconds = time.thread_time() - start
        if seconds >= 1.0:
            start = time.thread_time()
            for _ in pickletools.genops(b"N" * 240_000 + b"."):
                pass
            listing = time.thread_time() - start
            assert seconds < 30 * listing, (
                f"took {seconds:.1f} s of processor time, listing instructions {listing:.1f} s"
            )


def archive(
    path: Path, pickle: bytes, records: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED
) -> Path:
    """A zip file laid out like a .pth, with a pickle of one's own."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("archive/data.pkl", pickle)
        for name, content in (records or {}).items():
            file.writestr(f"archive/{name}", content)
    return path


def saved_by_torch(value: object, checksums: bool = True) -> bytes:
    from torch.utils.serialization import config

    file = io.BytesIO()
    config.save.compute_crc32 = checksums
    try:
        torch.save(value, file)
    finally:
        config.save.compute_crc32 = True
    return file.getvalue()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, shapes, types and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(
            found[name].contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        ), name
