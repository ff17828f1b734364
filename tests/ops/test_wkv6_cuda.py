"""The CUDA form of WKV-5 and 6 against the naive one in float64: on a GPU or, without one, emulated on the CPU."""

import pytest
import torch

from receptance.ops.wkv6 import cuda as module
from receptance.ops.wkv6.cuda import wkv6
from receptance.ops.wkv6.naive import wkv6 as naive

pytestmark = pytest.mark.usefixtures("kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["y", "end", "gr", "gw", "gk", "gv", "gu", "gstate"]
HALF = 4e-3  # relative RMS: y and the gradients of half-precision inputs are rounded by 1.7e-3


def draw(
    batch: int, t: int, h: int, n: int, dtype: torch.dtype = torch.bfloat16, shift: float = -2, seed: int = 0
) -> list[torch.Tensor]:
    """r, w, k, v, u, state; shift: of the logarithm of -w."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    r, k, v = (rand(batch, t, h, n).to(dtype) for _ in range(3))
    w = -(rand(batch, t, h, n) + shift).exp()
    return [x.to(DEVICE) for x in (r, w, k, v, rand(h, n), rand(batch, h, n, n))]


def results(function, inputs, resets=None, double=False) -> list[torch.Tensor]:
    leaves = [(x.double() if double else x).detach().requires_grad_() for x in inputs]
    outs = function(*leaves, resets)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g).to(DEVICE) for x in outs]
    weights[0] = weights[0].to(inputs[0].dtype)
    return [*outs, *torch.autograd.grad(outs, leaves, [a.to(x.dtype) for a, x in zip(weights, outs)])]


def check(inputs, resets=None) -> None:
    got, expected = results(wkv6, inputs, resets), results(naive, inputs, resets, double=True)
    for name, x, ref in zip(NAMES, got, expected):
        error = (x.double() - ref).norm() / ref.norm()
        assert error < HALF, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("t", [1, 15, 16, 17, 63])
def test_any_length(t):
    check(draw(2, t, 2, 32))


@pytest.mark.parametrize("n", [32, 64, 128])
def test_every_head_size(n):
    check(draw(1, 40, 2, n))


def test_float16_inputs():
    check(draw(1, 40, 2, 32, torch.float16))


def test_segments_of_a_row():
    """Rows longer than the shortest segment, on a GPU that is not filled, are cut."""
    inputs = draw(1, 600, 1, 32)
    assert module._Run(*inputs[:5], None, None).segments == 3
    check(inputs)
    resets = torch.zeros(1, 600, dtype=torch.bool, device=DEVICE)
    resets[0, [255, 256, 300, 599]] = True
    check(inputs, resets)


def test_documents_in_a_row():
    """First, adjacent, last and border tokens of chunks begin documents; one row has none."""
    resets = torch.zeros(3, 75, dtype=torch.bool, device=DEVICE)
    resets[0, [0, 3, 4, 15, 16, 31, 40]] = resets[2, [74]] = True
    check(draw(3, 75, 1, 32), resets)


@pytest.mark.parametrize("shift", [-6, 1, 4])
def test_decays_of_any_strength(shift):
    """From e^-0.002 to e^-100 and less a token: exponents that no single reference point would hold."""
    check(draw(1, 75, 1, 32, shift=shift))


def test_one_extreme_decay_does_not_blur_the_others():
    inputs = draw(1, 75, 1, 32, shift=-4)
    inputs[1][:, ::8] = -1e4
    check(inputs)
    inputs[1][:, ::8] = -torch.inf
    assert all(x.isfinite().all() for x in results(wkv6, inputs))


def test_constant_decays_are_not_copied():
    """RWKV-5: w [H, N], expanded."""
    r, w, k, v, u, state = draw(2, 40, 2, 32)
    constant = w[0, 0].clone().requires_grad_()
    expanded = constant.expand_as(r)
    y, _ = wkv6(r, expanded, k, v, u, state)
    (got,) = torch.autograd.grad(y.float().sum(), constant)
    exact = constant.detach().double().requires_grad_()
    y64, _ = naive(r.double(), exact.expand_as(r), k.double(), v.double(), u.double(), state.double())
    (expected,) = torch.autograd.grad(y64.sum(), exact)
    assert (y.double() - y64).norm() < HALF * y64.norm()
    assert (got.double() - expected).norm() < HALF * expected.norm()


def test_two_pieces_equal_one():
    r, w, k, v, u, state = draw(1, 64, 1, 32)
    whole, end = wkv6(r, w, k, v, u, state)
    first, middle = wkv6(r[:, :33], w[:, :33], k[:, :33], v[:, :33], u, state)
    second, last = wkv6(r[:, 33:], w[:, 33:], k[:, 33:], v[:, 33:], u, middle)
    pieces = torch.cat([first, second], 1)
    assert (pieces.double() - whole.double()).norm() < HALF * whole.double().norm()
    torch.testing.assert_close(last, end, rtol=2e-3, atol=2e-3)  # products of tf32 operands, cut elsewhere


def test_every_output_is_written(monkeypatch):
    """Fresh buffers hold NaN here; none may survive."""
    inputs = draw(1, 600, 1, 32)
    expected = results(wkv6, inputs)
    fresh, fresh_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: fresh_like(x, **kw).fill_(float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **kw: fresh(*a, **kw).fill_(float("nan")))
    for a, b in zip(results(wkv6, inputs), expected):
        assert a.equal(b)


def test_without_gradients_nothing_is_saved():
    inputs = draw(1, 40, 1, 32)
    assert module._forward(*inputs, None, False)[-1].numel() == 0
    assert module._forward(*inputs, None, True)[-1].shape == (1, 3, 1, 32, 32)


def test_other_inputs_are_refused():
    for inputs in (draw(1, 3, 1, 32, torch.float32), draw(1, 3, 1, 16)):
        with pytest.raises(TypeError, match="triton"):
            wkv6(*inputs)


@pytest.mark.parametrize("index", [0, 1])
def test_a_loss_of_y_or_of_the_state_alone(index):
    """Gradients that nobody hands in are zeros; in one segment and in three."""

    def gradients(function, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        loss = function(*leaves)[index].double().sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    for t in (40, 600):
        inputs = draw(1, t, 1, 32, shift=-6)
        for got, expected in zip(gradients(wkv6, inputs), gradients(naive, [x.double() for x in inputs])):
            assert (got.double() - expected).norm() <= HALF * expected.norm()


def test_the_operators_shapes_are_known_without_running_them():
    """What torch.compile asks."""
    r, w, k, v, u, _ = inputs = draw(2, 20, 2, 32)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(module._forward_op, (*inputs, None, True), **checks)
    saved = module._forward(*inputs, None, True)[-1]
    torch.library.opcheck(module._backward_op, (v, None, r, w, k, v, u, None, saved), **checks)


def test_it_compiles_without_a_graph_break():
    inputs = [x.requires_grad_() for x in draw(1, 20, 2, 32)]
    loss = lambda *inputs: wkv6(*inputs)[0].float().sum()
    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(a.equal(b) for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected))
