"""The Triton form of WKV-7 against the naive one, on a GPU or, without one, in Triton's interpreter."""

import os
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before ours is imported
pytest.importorskip("triton")

from receptance.ops.wkv7 import triton as module
from receptance.ops.wkv7.naive import wkv7 as naive
from receptance.ops.wkv7.triton import wkv7

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(batch: int, t: int, heads: int, size: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rand = lambda: torch.randn(batch, t, heads, size, generator=g, dtype=torch.float64)
    kk = torch.nn.functional.normalize(rand(), dim=-1)
    inputs = [rand(), -0.6065 * torch.sigmoid(rand()), rand(), rand(), -kk, kk * torch.sigmoid(rand())]
    state = torch.randn(batch, heads, size, size, generator=g, dtype=torch.float64)
    return [x.to(dtype).to(DEVICE) for x in inputs] + [state.float().to(DEVICE)]


def results(function, inputs: list[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in inputs]
    outs = function(*leaves)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, weights)]


def check(inputs: list[torch.Tensor], tolerance: float, resets: torch.Tensor | None = None) -> None:
    got = results(partial(wkv7, resets=resets), inputs)
    expected = results(partial(naive, resets=resets), inputs, torch.float64)
    names = ["y", "end", "r", "w", "k", "v", "a", "b", "state"]
    for name, x, ref in zip(names, got, expected):
        error = (x.double() - ref).norm() / ref.norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("t", [1, 15, 16, 17, 63, 64, 130])
def test_any_length(t):
    check(draw(1, t, 2, 32, torch.float32), 1e-5)


@pytest.mark.parametrize("size", [64, 96, 128])
def test_any_head_size(size):
    check(draw(1, 70, 1, size, torch.float32), 1e-5)


def test_bfloat16_inputs():
    rounding = 4e-3 if torch.cuda.is_available() else 8e-3  # the interpreter truncates where a GPU rounds
    check(draw(2, 100, 1, 64, torch.bfloat16), rounding)


def test_a_row_in_segments(monkeypatch):
    monkeypatch.setattr(module, "MIN_SEGMENT", 1)
    check(draw(1, 200, 1, 32, torch.float32), 1e-5)


@pytest.mark.parametrize("segment", [1, 16])
def test_documents_in_a_row(segment, monkeypatch):
    """First, adjacent, last and border tokens of chunks begin documents; one row has none."""
    monkeypatch.setattr(module, "MIN_SEGMENT", segment)
    resets = torch.zeros(2, 130, dtype=torch.bool, device=DEVICE)
    resets[0, [0, 5, 6, 31, 32, 64, 129]] = True
    check(draw(2, 130, 1, 32, torch.float32), 1e-5, resets)


def test_repeated_keys_stay_exact():
    """The same key at every step, fully erased each time: the triangular inverse at its worst."""
    inputs = draw(1, 128, 1, 32, torch.float32)
    kk = torch.nn.functional.normalize(inputs[2][:, :1], dim=-1).expand_as(inputs[2])
    inputs[1], inputs[4], inputs[5] = torch.full_like(inputs[1], -1e-4), -kk, kk.clone()
    check([x.contiguous() for x in inputs], 1e-4)


def widened(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """In-context rates of up to 1 + decay instead of 1: eigenvalues of the transitions reach down to -1."""
    r, w, k, v, a, b, state = inputs
    return [r, w, k, v, a, b * (1 + w.exp()), state]


@pytest.mark.parametrize("segment", [1, 16])
def test_wide_rates(segment, monkeypatch):
    monkeypatch.setattr(module, "MIN_SEGMENT", segment)
    check(widened(draw(1, 130, 2, 32, torch.float32)), 1e-5)


def test_a_key_turned_over_at_every_step_stays_exact():
    """The triangular inverse alternates, 1, -2, 2, …, and must not grow."""
    inputs = draw(1, 128, 1, 32, torch.float32)
    kk = torch.nn.functional.normalize(inputs[2][:, :1], dim=-1).expand_as(inputs[2])
    inputs[1], inputs[4], inputs[5] = torch.full_like(inputs[1], -1e-4), -kk, kk.clone()
    check([x.contiguous() for x in widened(inputs)], 1e-4)


def test_every_output_is_written(monkeypatch):
    """Fresh buffers hold NaN here; none may survive."""
    poisoned = lambda x, **_: torch.full(x.shape, float("nan"), dtype=x.dtype, device=x.device)
    monkeypatch.setattr(torch, "empty_like", poisoned)
    monkeypatch.setattr(torch, "empty", lambda shape, **kw: torch.full(shape, float("nan"), **kw))
    assert all(x.isfinite().all() for x in results(wkv7, draw(1, 70, 1, 32, torch.float32)))


def test_it_is_reached_through_the_operator():
    from receptance.ops import wkv7 as operator

    inputs = draw(1, 40, 1, 32, torch.bfloat16)
    y, state = operator(*inputs, backend="triton")
    expected, _ = operator(*(x.double() for x in inputs), backend="naive")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (y.double() - expected).norm() / expected.norm() < 6e-3
