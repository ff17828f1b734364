"""RWKV-7 with an in-context rate up to 1 + decay: what parity and permutations need."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

import receptance as rc
from receptance.errors import CheckpointError
from receptance.models import RWKV7
from receptance.ops.prepare import decay_and_keys


def build(wide: bool, dtype: torch.dtype = torch.float64, scale: float = 0.5) -> RWKV7:
    model = RWKV7(RWKV7.Config.make(40, 2, 32, 16, wide_rate=wide), dtype=dtype)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return model


TOKENS = torch.randint(0, 40, (2, 75), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [0.5, 3.0])  # 3: rates at their bounds
def test_chunks_equal_the_plain_form_with_their_gradients(scale):
    found = {}
    for backend in ("naive", "chunk"):
        model = build(True, scale=scale)
        logits, state = model(TOKENS, backend=backend)
        (logits.square().mean() + state["wkv"].square().mean()).backward()
        used = {name: p for name, p in model.named_parameters() if not name.startswith("blocks.0.att.v")}
        grads = [p.grad for name, p in used.items() if "value.weight" in name or p.grad is not None]
        found[backend] = [logits, state["wkv"], *grads]
    for a, b in zip(*found.values()):
        assert float((a - b).detach().abs().max()) <= 1e-8 * float(a.detach().abs().max())


def test_float32_chunks_stay_near_float64():
    """Where every step turns the same key over, the inverse of a chunk alternates and must not grow."""
    exact, model = build(True, scale=3.0), build(True, torch.float32, scale=3.0)
    same = torch.full((1, 96), 7)
    (a, s), (b, t) = exact(same, backend="naive"), model(same, backend="chunk")
    assert float((a - b).detach().abs().max()) <= 1e-4 * float(a.detach().abs().max())
    assert float((s["wkv"] - t["wkv"]).abs().max()) <= 1e-4 * float(s["wkv"].abs().max())


@pytest.mark.parametrize("wide", [False, True])
def test_transitions_have_the_eigenvalues_that_are_claimed(wide):
    """With rates at their bound and the fastest decay, where a plain factor of 2 would reach -1.4."""
    g = torch.Generator().manual_seed(3)
    n, c = 200, 8
    k = torch.randn(1, n, 1, c, generator=g, dtype=torch.float64)
    k[:, ::2] = torch.eye(c, dtype=torch.float64)[torch.randint(0, c, (n // 2,), generator=g)][None, :, None]
    w = 20 * torch.randn(1, n, c, generator=g, dtype=torch.float64)
    rate = torch.full((1, n, c), 30.0, dtype=torch.float64)
    zero, one = torch.zeros(c, dtype=torch.float64), torch.ones(c, dtype=torch.float64)
    w, k, erase, write = decay_and_keys(w, k, rate, zero, zero, one, one)
    if wide:
        write = write * (1 + w.exp())
    step = torch.diag_embed(w.exp()) + erase[..., :, None] @ write[..., None, :]
    values = torch.linalg.eigvals(step)
    assert float(values.imag.abs().max()) < 1e-7
    assert float(values.real.max()) <= 1 + 1e-9
    low = float(values.real.min())
    assert -1 - 1e-9 <= low < -0.99 if wide else low > -0.46


def test_a_file_tells_that_it_is_wide(tmp_path):
    model = build(True, torch.float32)
    for name in ("folder", "model.safetensors", "model.pth"):
        rc.save(model, tmp_path / name)
        again = rc.load(tmp_path / name)
        assert again.config == model.config
        assert again.config.wide_rate
        assert_close(again(TOKENS)[0], model(TOKENS)[0])
        assert again.fingerprint != build(False, torch.float32).fingerprint
    plain = RWKV7(dataclasses.replace(model.config, wide_rate=False))
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if "rate_span" not in name})
    assert not torch.allclose(plain(TOKENS)[0], model(TOKENS)[0])
    with pytest.raises(CheckpointError, match="rate_span"):
        rc.load(tmp_path / "model.safetensors", engine="native")
    for format in ("gguf", "hf"):
        with pytest.raises(CheckpointError, match="rate_span"):
            rc.save(model, tmp_path / "other", format=format)


def test_the_engine_on_a_gpu_leaves_it_to_torch():
    from receptance.engine.gpu.versions import misfit

    wide, plain = (RWKV7(RWKV7.Config.make(64, 1, 64, wide_rate=x), device="meta") for x in (True, False))
    assert misfit(plain) is None
    assert "wide_rate" in str(misfit(wide))
