"""The Triton form of WKV-6 against the naive one in float64, on a GPU or, without one, in Triton's interpreter."""

import os
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before ours is imported
pytest.importorskip("triton")

from receptance.ops.wkv6.naive import wkv6 as naive
from receptance.ops.wkv6.triton import wkv6

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["y", "end", "r", "w", "k", "v", "u", "state"]


def draw(batch: int, t: int, heads: int, size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    r, k, v = (rand(batch, t, heads, size).to(dtype) for _ in range(3))
    w = -(2 * rand(batch, t, heads, size) - 2).exp()  # from hardly any decay to hardly any memory
    inputs = [r, w.float(), k, v, rand(heads, size).float(), rand(batch, heads, size, size).float()]
    return [x.to(DEVICE) for x in inputs]


def results(function, inputs: list[torch.Tensor], dtype: torch.dtype | None = None, expand: bool = False):
    """y, the final state and all gradients of a random loss of both; expand: w is [H, N], one for all tokens."""
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in inputs]
    r, w, *rest = leaves
    outs = function(r, w.expand_as(r) if expand else w, *rest)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g).bfloat16().to(x) for x in outs]  # exact in every precision
    return [*outs, *torch.autograd.grad(outs, leaves, weights)]


def check(inputs: list[torch.Tensor], tolerance: float, expand: bool = False) -> None:
    got, expected = results(wkv6, inputs, expand=expand), results(naive, inputs, torch.float64, expand)
    for name, x, ref in zip(NAMES, got, expected):
        error = (x.double() - ref).norm() / ref.norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("t", [1, 15, 16, 17, 63, 130])
def test_any_length(t, size):
    check(draw(1, t, 2, size), 1e-5)


@pytest.mark.parametrize("size", [96, 128])
def test_any_head_size(size):
    check(draw(1, 70, 1, size), 1e-5)


def test_batches_and_heads_do_not_mix():
    check(draw(3, 70, 2, 32), 1e-5)


def test_documents_in_a_row():
    """First, adjacent, last and border tokens of chunks and blocks begin documents; one row has none."""
    resets = torch.zeros(2, 100, dtype=torch.bool, device=DEVICE)
    resets[0, [0, 5, 6, 16, 31, 32, 99]] = True
    inputs = draw(2, 100, 1, 32)
    got = results(partial(wkv6, resets=resets), inputs)
    for name, x, ref in zip(NAMES, got, results(partial(naive, resets=resets), inputs, torch.float64)):
        assert (x.double() - ref).norm() <= 1e-5 * ref.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    inputs = draw(2, 130, 1, 64, dtype)
    check(inputs, 4e-3)
    y, end = wkv6(*inputs)
    assert y.dtype == dtype
    assert end.dtype == torch.float32


def test_decay_and_bonus_in_bfloat16():
    inputs = draw(1, 130, 1, 64, torch.bfloat16)
    inputs[1], inputs[4] = inputs[1].bfloat16(), inputs[4].bfloat16()
    check(inputs, 4e-3)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # above the diagonal, where it is masked
@pytest.mark.parametrize("strong", [-1e4, -30.0, -float("inf")])
def test_extreme_decays_are_right(strong):
    """Full erasure and none at all, side by side in every channel."""
    inputs = draw(1, 130, 1, 32)
    coin = torch.rand(inputs[1].shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    inputs[1] = torch.where(coin < 0.2, strong, -1e-6)
    got = results(wkv6, inputs)
    assert all(x.isfinite().all() for x in got)
    check([x.clamp(min=-1e4) for x in inputs], 1e-5)
    if strong < -1e4:
        assert all(torch.equal(a, b) for a, b in zip(got, results(wkv6, [x.clamp(min=-1e4) for x in inputs])))


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("decay", [0.0, -1e4])
def test_no_decay_and_no_memory(decay):
    inputs = draw(1, 130, 1, 32)
    inputs[1] = torch.full_like(inputs[1], decay)
    got, expected = results(wkv6, inputs), results(naive, inputs, torch.float64)
    for name, x, ref in zip(NAMES, got, expected):
        scale = max(ref.norm(), ref.numel() ** 0.5)  # without memory the gradient of the decay is zero
        error = (x.double() - ref).norm() / scale
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


def test_a_constant_decay_is_expanded_but_not_copied():
    inputs = draw(2, 70, 2, 32)
    inputs[1] = inputs[1][0, 0].clone()
    check(inputs, 1e-5, expand=True)


def test_views_of_larger_tensors():
    """Inputs cut out of one projection, a transposed state, a gradient of y that is one expanded number."""
    inputs = draw(1, 70, 2, 32)
    expected = naive(*(x.double() for x in inputs))
    r, _, k, v = torch.cat(inputs[:4], -1).split(32, -1)
    w = inputs[1].transpose(1, 2).contiguous().transpose(1, 2)
    state = inputs[5].mT.contiguous().mT.requires_grad_()
    y, end = wkv6(r, w, k, v, inputs[4], state)
    assert (y - expected[0]).norm() / expected[0].norm() < 1e-5
    assert (end - expected[1]).norm() / expected[1].norm() < 1e-5
    (y.sum() + end.sum()).backward()
    assert state.grad is not None


def test_every_output_is_written(monkeypatch):
    """Fresh buffers hold NaN here; none may survive."""
    inputs = draw(1, 70, 1, 32)
    expected = results(wkv6, inputs)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, float("nan")))
    monkeypatch.setattr(torch, "empty", lambda shape, **kw: torch.full(shape, float("nan"), **kw))
    assert all(torch.equal(a, b) for a, b in zip(results(wkv6, inputs), expected))
