"""Whole models on the kernels of the fused pieces (without a GPU, interpreted) against the plain forms in float64."""

import os
from importlib import import_module

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from receptance.models import RWKV, VERSIONS, apply_recipe
from receptance.models.base import Call
from receptance.ops import BACKENDS
from receptance.ops.pieces import PIECES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-4  # relative L2 of the loss and of each gradient in float32


def lively(version: str, **sizes: int) -> RWKV:
    """By the recipe plus noise, so that no branch is zero."""
    config = VERSIONS[version].Config.make(vocab_size=60, n_layer=2, n_embd=64, **sizes)
    model = VERSIONS[version](config)
    generator = torch.Generator().manual_seed(0)
    apply_recipe(model, VERSIONS[version].recipe(config), generator)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


def learn(model: RWKV, tokens: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
    """Loss, end state and gradients, from a state that is not empty."""
    state = model.zero_state(len(tokens))
    g = torch.Generator().manual_seed(5)
    state = type(state)(
        {k: x + 0.1 * torch.randn(x.shape, generator=g).to(x) if k.endswith("shift") else x for k, x in state.items()}
    )
    loss, end = model.loss(tokens[:, :-1], tokens[:, 1:], state, lengths=lengths, logit_penalty=1e-2, backend="chunk")
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{f"state {k}": x.detach() for k, x in end.items()}, **gradients}


@pytest.mark.parametrize("recompute", [False, True])
def test_joined_maps_learn_the_same(recompute, monkeypatch):
    """RWKV-7's low-rank maps as one product; otherwise they are in half precision alone."""
    tokens = torch.randint(60, (2, 41), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    model = lively("7").to(DEVICE)
    model.recompute = recompute
    exact = learn(lively("7").double().to(DEVICE), tokens, None)
    for piece in PIECES.keys() - BACKENDS.keys():
        monkeypatch.setattr(import_module(f"receptance.ops.{piece}"), "uses_triton", lambda *_: True)
    monkeypatch.setattr(Call, "joins_maps", lambda *_: True)
    got = learn(model, tokens, None)
    assert got.keys() == exact.keys()
    for name, reference in exact.items():
        error = (got[name].double() - reference).norm() / reference.norm().clamp(min=1e-12)
        assert error < TOLERANCE, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_and_plain_forms_learn_the_same(version, recompute, monkeypatch):
    tokens = torch.randint(60, (2, 41), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    lengths = torch.tensor([40, 23], device=DEVICE)
    model = lively(version).to(DEVICE)
    model.recompute = recompute
    exact = learn(lively(version).double().to(DEVICE), tokens, lengths)
    for piece in PIECES.keys() - BACKENDS.keys():
        monkeypatch.setattr(import_module(f"receptance.ops.{piece}"), "uses_triton", lambda *_: True)
    got = learn(model, tokens, lengths)
    assert got.keys() == exact.keys()
    for name, reference in exact.items():
        error = (got[name].double() - reference).norm() / reference.norm().clamp(min=1e-12)
        assert error < TOLERANCE, f"{name}: relative error {error:.1e}"
