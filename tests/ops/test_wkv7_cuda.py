"""The CUDA form of WKV-7 against the naive one in float64: on a GPU or, without one, emulated on the CPU."""

import pytest
import torch

from receptance.ops.wkv7 import cuda as module
from receptance.ops.wkv7.cuda import wkv7
from receptance.ops.wkv7.naive import wkv7 as naive

pytestmark = pytest.mark.usefixtures("kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["y", "end", "gr", "gw", "gk", "gv", "ga", "gb", "gstate"]
ROUNDED = {torch.bfloat16: 2.1e-3, torch.float16: 1e-3}  # writing bfloat16 alone costs 1.7e-3


def draw(
    batch: int, t: int, h: int, dtype: torch.dtype = torch.bfloat16, shift: float = 0, scale: float = 1, seed: int = 0
) -> list[torch.Tensor]:
    """r, w, k, v, a, b, state; shift: of the decay's logit; scale: of r, k, v and the state."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    shape = batch, t, h, 64
    kk = torch.nn.functional.normalize(rand(*shape), dim=-1)
    r, k, v = (rand(*shape) * scale for _ in range(3))
    inputs = r, -0.6065 * torch.sigmoid(rand(*shape) * 3 + shift), k, v, -kk, kk * torch.sigmoid(rand(*shape))
    return [*(x.to(DEVICE, dtype) for x in inputs), (rand(batch, h, 64, 64) * scale).to(DEVICE)]


def results(function, inputs, resets=None, double=False, g_scale=1.0) -> list[torch.Tensor]:
    leaves = [(x.double() if double else x).detach().requires_grad_() for x in inputs]
    outs = function(*leaves, resets)
    g = torch.Generator().manual_seed(1)
    weights = [(torch.randn(x.shape, generator=g) * g_scale).to(DEVICE) for x in outs]
    weights[0] = weights[0].to(inputs[0].dtype)
    return [*outs, *torch.autograd.grad(outs, leaves, [a.to(x.dtype) for a, x in zip(weights, outs)])]


def check(inputs, resets=None, g_scale=1.0, bound=None) -> None:
    got = results(wkv7, inputs, resets, g_scale=g_scale)
    expected = results(naive, inputs, resets, double=True, g_scale=g_scale)
    for name, x, ref in zip(NAMES, got, expected):
        error = (x.double() - ref).norm() / ref.norm()
        assert error < (bound or ROUNDED[inputs[0].dtype]), f"{name}: relative error {error:.2e}"


@pytest.fixture(params=["few", "many"])
def heads(request, monkeypatch) -> None:
    """Each head has a multiprocessor for itself, or not."""
    monkeypatch.setattr(module, "ALONE", module.ALONE if request.param == "few" else 0)


@pytest.mark.parametrize("t", [1, 15, 16, 17, 63])
def test_any_length(t, heads):
    check(draw(2, t, 2), bound=2.6e-3 if t == 1 else None)  # 256 numbers: rounding errors are not yet averaged


def test_float16_inputs():
    check(draw(1, 40, 2, torch.float16))


@pytest.mark.parametrize("shift", [-8, 8])
def test_slow_and_fast_decays(shift):
    check(draw(1, 100, 1, shift=shift), bound=2.5e-3)  # at e^-0.6 a token w's gradient is small beside its terms


@pytest.mark.parametrize(("scale", "g_scale"), [(100, 1), (1e-3, 1e-6), (1, 1e4)])
def test_any_magnitude(scale, g_scale):
    """float16 operands are kept in units that each chunk chooses."""
    check(draw(1, 50, 1, scale=scale), g_scale=g_scale)


@pytest.fixture
def short_segments(monkeypatch) -> None:
    monkeypatch.setattr(module, "MIN_SEGMENT", 3)


def test_a_row_in_segments(short_segments):
    cut = module.Cut(1, 150, 1)
    assert (cut.segments, cut.length, cut.piece, cut.pieces) == (4, 3, 2, 8)
    check(draw(1, 150, 1))


@pytest.mark.parametrize(("scale", "g_scale"), [(100, 1), (1e-3, 1e-6), (1, 1e4)])
def test_segments_of_any_magnitude(short_segments, scale, g_scale):
    check(draw(1, 150, 1, scale=scale), g_scale=g_scale)


@pytest.mark.parametrize("segmented", [False, True])
def test_documents_in_a_row(segmented, heads, request):
    """First, adjacent, last and border tokens of chunks begin documents; one row has none."""
    if segmented:
        request.getfixturevalue("short_segments")
    resets = torch.zeros(2, 100, dtype=torch.bool, device=DEVICE)
    resets[0, [0, 5, 6, 15, 16, 47, 99]] = True
    check(draw(2, 100, 1), resets)


def test_repeated_keys_stay_exact():
    """The same key at every step, fully erased each time: the triangular inverse at its worst."""
    inputs = draw(1, 64, 1)
    kk = torch.nn.functional.normalize(inputs[2][:, :1].float(), dim=-1).expand_as(inputs[2]).bfloat16()
    inputs[1], inputs[4], inputs[5] = torch.full_like(inputs[1], -1e-4), -kk.contiguous(), kk.contiguous()
    check(inputs, bound=4e-3)


def widened(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """In-context rates of up to 1 + decay instead of 1: eigenvalues of the transitions reach down to -1."""
    r, w, k, v, a, b, state = inputs
    return [r, w, k, v, a, (b.float() * (1 + w.float().exp())).to(b.dtype), state]


@pytest.mark.parametrize("t", [17, 100])
def test_wide_rates(t):
    check(widened(draw(2, t, 1)))


def test_wide_rates_at_their_bound():
    """Slow decays and rates near 2: the state turns over and forgets next to nothing."""
    inputs = draw(1, 100, 2, shift=-8)
    inputs[5] = -inputs[4]
    check(widened(inputs), bound=2.5e-3)


def test_a_key_turned_over_at_every_step_stays_exact():
    """The triangular inverse alternates, 1, -2, 2, …, and must not grow; sums of 16 terms of ±2 that nearly cancel
    magnify float16's rounding of each."""
    inputs = draw(1, 64, 1)
    kk = torch.nn.functional.normalize(inputs[2][:, :1].float(), dim=-1).expand_as(inputs[2]).bfloat16()
    inputs[1], inputs[4], inputs[5] = torch.full_like(inputs[1], -1e-4), -kk.contiguous(), kk.contiguous()
    check(widened(inputs), bound=6e-3)


def test_wide_rates_in_segments(short_segments):
    check(widened(draw(1, 150, 1)))


@pytest.mark.parametrize("segmented", [False, True])
def test_an_end_state_that_nobody_reads_has_a_gradient_of_zero(segmented, request):
    if segmented:
        request.getfixturevalue("short_segments")
    inputs = draw(1, 70, 1)
    alone = results(lambda *x: wkv7(*x)[:1], inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    y, end = wkv7(*leaves)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, y.dtype)
    zeros = torch.autograd.grad([y, end], leaves, [g, torch.zeros_like(end)])
    assert all(a.equal(b) for a, b in zip(alone[1:], zeros, strict=True))


def test_zeros_give_zeros():
    inputs = [torch.zeros_like(x) for x in draw(1, 20, 1)]
    assert all((x == 0).all() for x in results(wkv7, inputs, g_scale=0.0))


def test_it_says_what_it_takes():
    with pytest.raises(TypeError, match=r"heads of 64, found torch\.float32"):
        wkv7(*draw(1, 4, 1, torch.float32))
