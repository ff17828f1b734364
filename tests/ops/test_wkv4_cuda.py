"""The CUDA form of WKV-4 against the naive one in float64: on a GPU or, without one, in the emulation on the CPU."""

from functools import partial

import pytest
import torch

from receptance.ops.wkv4 import cuda as module
from receptance.ops.wkv4.cuda import wkv4
from receptance.ops.wkv4.naive import EMPTY
from receptance.ops.wkv4.naive import wkv4 as naive

pytestmark = pytest.mark.usefixtures("kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["y", "num", "den", "gw", "gk", "gv", "gu", "gnum", "gden"]
FLOAT32 = 1e-5  # relative RMS
HALF = 4e-3


def draw(batch: int, t: int, c: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """w, k, v, u and the initial num, den, exp."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    shared = [-rand(c).exp(), rand(c), rand(batch, c), rand(batch, c).exp(), rand(batch, c)]
    w, u, num, den, exp = (x.float().to(DEVICE) for x in shared)
    k, v = (x.to(dtype).to(DEVICE) for x in (2 * rand(batch, t, c), rand(batch, t, c)))
    return [w, k, v, u, num, den, exp]


def results(function, inputs, lengths=None, double=False) -> list[torch.Tensor]:
    """y, the true final state and all gradients of a fixed random loss that does not look at the padding."""
    *leaves, exp = [x.double() if double else x for x in inputs]
    leaves = [x.detach().requires_grad_() for x in leaves]
    w, k, v, u, num, den = leaves
    y, (num, den, exp) = function(w, k, v, u, (num, den, exp), lengths)
    outs = [y, num * exp.exp(), den * exp.exp()]
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(DEVICE) for x in outs]
    weights[0] = weights[0].to(inputs[2].dtype)
    if lengths is not None:
        pad = (torch.arange(k.shape[1], device=DEVICE) >= lengths[:, None])[:, :, None]
        weights[0] = weights[0].masked_fill(pad, 0)
        outs[0] = outs[0].masked_fill(pad, 0)
    return [*outs, *torch.autograd.grad(outs, leaves, [a.to(x.dtype) for a, x in zip(weights, outs)])]


def check(inputs, tolerance, lengths=None, resets=None) -> None:
    got = results(partial(wkv4, resets=resets), inputs, lengths)
    expected = results(partial(naive, resets=resets), inputs, lengths, double=True)
    for name, x, ref in zip(NAMES, got, expected):
        error = (x.double() - ref).norm() / ref.norm().clamp(min=1e-30)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("t", [1, 8, 9, 16, 128, 129])
def test_any_length(t):
    check(draw(2, t, 6), FLOAT32)


def test_several_groups_of_chunks():
    check(draw(1, 2500, 6), FLOAT32)


@pytest.mark.parametrize("c", [1, 130])
def test_any_number_of_channels(c):
    check(draw(2, 70, c), FLOAT32)


@pytest.mark.parametrize("dtype, c", [(torch.bfloat16, 6), (torch.float16, 7)])
def test_half_precision_inputs(dtype, c):
    inputs = draw(2, 150, c, dtype)
    check(inputs, HALF)
    y, state = wkv4(*inputs[:4], tuple(inputs[4:]), None)
    assert y.dtype == dtype
    assert all(x.dtype == torch.float32 for x in state)


def test_documents_in_a_row():
    """First, adjacent, last and border tokens of chunks begin documents; one row has none, one ends early."""
    resets = torch.zeros(3, 1300, dtype=torch.bool, device=DEVICE)
    resets[0, [0, 5, 6, 15, 16, 64, 127, 128, 199, 1299]] = resets[2, [20, 69, 1024]] = True
    lengths = torch.tensor([1300, 1300, 1100], device=DEVICE)
    check(draw(3, 1300, 6), FLOAT32, lengths, resets)


def test_ragged_rows():
    lengths = torch.tensor([180, 0, 129, 128, 1, 15], device=DEVICE)
    inputs = draw(6, 180, 6)
    check(inputs, FLOAT32, lengths)
    y, _ = wkv4(*inputs[:4], tuple(inputs[4:]), lengths)
    assert all((y[row, n:] == 0).all() for row, n in enumerate(lengths.tolist()))


def test_padding_is_never_looked_at():
    lengths = torch.tensor([37, 0], device=DEVICE)
    clean = draw(2, 170, 6)
    dirty = [x.clone() for x in clean]
    for row, n in enumerate(lengths.tolist()):
        dirty[1][row, n:] = dirty[2][row, n:] = float("nan")
    for a, b in zip(results(wkv4, dirty, lengths), results(wkv4, clean, lengths)):
        assert a.equal(b)


def test_empty_state():
    inputs = draw(2, 170, 6)
    inputs[4:] = [torch.zeros_like(inputs[4]), torch.zeros_like(inputs[5]), torch.full_like(inputs[6], EMPTY)]
    check(inputs, FLOAT32)


def test_huge_keys():
    """Exponents up to 1e4: float32 resolves them to 1e-3, so y to about that; nothing overflows."""
    inputs = draw(1, 200, 6)
    inputs[1] = (inputs[1] * 2500).clamp(-1e4, 1e4)
    *_, exp = inputs
    for scale in (1.0, 1e4):
        inputs[6] = exp * scale
        y, state = wkv4(*inputs[:4], tuple(inputs[4:]), None)
        expected, _ = naive(*(x.double() for x in inputs[:4]), tuple(x.double() for x in inputs[4:]), None)
        assert (y.double() - expected).norm() < 2e-3 * expected.norm()
        leaves = [x.detach().requires_grad_() for x in inputs[:6]]
        y, state = wkv4(*leaves[:4], (*leaves[4:], inputs[6]), None)
        grads = torch.autograd.grad(y.sum() + state[0].sum() + state[1].sum(), leaves)
        assert all(x.isfinite().all() for x in (y, *state, *grads))


def test_two_pieces_equal_one():
    w, k, v, u, *state = draw(1, 300, 6)
    whole, end = wkv4(w, k, v, u, tuple(state), None)
    first, middle = wkv4(w, k[:, :133], v[:, :133], u, tuple(state), None)
    second, last = wkv4(w, k[:, 133:], v[:, 133:], u, middle, None)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    for a, b in zip(last, end):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ragged", [False, True])
def test_every_output_is_written(ragged, monkeypatch):
    """Fresh buffers hold NaN here; none may survive."""
    lengths = torch.tensor([170, 20, 0], device=DEVICE) if ragged else None
    inputs = draw(3, 170, 6)
    expected = results(wkv4, inputs, lengths)
    fresh, fresh_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: fresh_like(x, **kw).fill_(float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **kw: fresh(*a, **kw).fill_(float("nan")))
    y, _ = wkv4(*inputs[:4], tuple(inputs[4:]), lengths)
    assert y.isfinite().all()  # past a row's length too
    for a, b in zip(results(wkv4, inputs, lengths), expected):
        assert a.equal(b)


def test_without_gradients_nothing_is_saved():
    inputs = draw(1, 70, 6)
    args = *inputs, None, None
    assert module._forward(*args, False)[-1].numel() == 0
    assert module._forward(*args, True)[-1].shape == (1, 9, 6, 2)


def test_float64_is_refused():
    inputs = [x.double() for x in draw(1, 3, 5)]
    with pytest.raises(TypeError, match="chunk"):
        wkv4(*inputs[:4], tuple(inputs[4:]), None)


@pytest.mark.parametrize("index", [0, 1])
def test_a_loss_of_y_or_of_the_state_alone(index):
    """Gradients that nobody hands in are zeros."""
    inputs = draw(2, 70, 6)

    def gradients(function, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        *leaves, exp = (x.to(dtype, copy=True) for x in inputs)
        leaves = [x.requires_grad_() for x in leaves]
        y, (num, den, _) = function(*leaves[:4], (*leaves[4:], exp), None)
        loss = (y, num / den)[index].sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    for got, expected in zip(gradients(wkv4, torch.float32), gradients(naive, torch.float64)):
        assert (got.double() - expected).norm() <= FLOAT32 * expected.norm() + 1e-6


def test_the_operators_shapes_are_known_without_running_them():
    """What torch.compile asks."""
    w, k, v, u, num, den, _ = inputs = draw(2, 20, 6)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(module._forward_op, (*inputs, None, None, True), **checks)
    saved = module._forward(*inputs, None, None, True)[-1]
    torch.library.opcheck(module._backward_op, (v, num, None, w, k, v, u, den, None, None, saved), **checks)


def test_it_compiles_without_a_graph_break():
    *inputs, exp = (x.requires_grad_() for x in draw(2, 20, 6))
    loss = lambda *inputs: wkv4(*inputs[:4], (*inputs[4:], exp.detach()), None)[0].sum()
    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(a.equal(b) for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected))
