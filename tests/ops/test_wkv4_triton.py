"""The Triton form of WKV-4 against the naive one in float64, on a GPU or, without one, in Triton's interpreter."""

import os
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before ours is imported
pytest.importorskip("triton")

from receptance.ops.wkv4 import triton as module
from receptance.ops.wkv4.naive import EMPTY
from receptance.ops.wkv4.naive import wkv4 as naive
from receptance.ops.wkv4.triton import wkv4

# lanes past the last channel and tokens past a row's end compute 0/0 in the interpreter; nothing of it is stored
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["y", "num", "den", "gw", "gk", "gv", "gu", "gnum", "gden"]
FLOAT32 = 1e-5  # relative RMS
BFLOAT16 = 4e-3 if torch.cuda.is_available() else 8e-3  # the interpreter truncates where a GPU rounds


@pytest.fixture(params=["chunks", "short chunks", "one pass"])
def plan(request, monkeypatch) -> None:
    """Chunks of 64 tokens; of 16, so that the chains take several groups; and the kernels that need no chains."""
    if request.param == "one pass":
        monkeypatch.setattr(module, "LANES_ONE_PASS", 1)
    if request.param == "short chunks":
        monkeypatch.setattr(module, "MIN_CHUNK", 16)


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


def check(inputs: list[torch.Tensor], tolerance: float, lengths: torch.Tensor | None = None) -> None:
    got, expected = results(wkv4, inputs, lengths), results(naive, inputs, lengths, double=True)
    for name, x, ref in zip(NAMES, got, expected):
        error = (x.double() - ref).norm() / ref.norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("t", [1, 15, 16, 17, 63])
def test_any_length(t):
    check(draw(2, t, 5), FLOAT32)


def test_many_chunks(plan):
    check(draw(1, 300, 5), FLOAT32)


def test_documents_in_a_row(plan):
    """First, adjacent, last and border tokens of chunks begin documents; one row has none, one ends early."""
    resets = torch.zeros(3, 200, dtype=torch.bool, device=DEVICE)
    resets[0, [0, 5, 6, 15, 16, 64, 127, 199]] = resets[2, [20, 69]] = True
    lengths = torch.tensor([200, 200, 70], device=DEVICE)
    inputs = draw(3, 200, 5)
    got = results(partial(wkv4, resets=resets), inputs, lengths)
    expected = results(partial(naive, resets=resets), inputs, lengths, double=True)
    for name, x, ref in zip(NAMES, got, expected):
        assert (x.double() - ref).norm() <= FLOAT32 * ref.norm(), name


@pytest.mark.parametrize("c", [1, 37, 130])
def test_any_number_of_channels(c):
    check(draw(1, 70, c), FLOAT32)


def test_ragged_rows(plan):
    lengths = torch.tensor([80, 0, 65, 64, 1, 15], device=DEVICE)
    inputs = draw(6, 80, 5)
    check(inputs, FLOAT32, lengths)
    y, (num, den, exp) = wkv4(*inputs[:4], tuple(inputs[4:]), lengths)
    assert all((y[row, n:] == 0).all() for row, n in enumerate(lengths.tolist()))
    assert all((end[1] == start[1]).all() for end, start in zip((num, den, exp), inputs[4:]))


def test_padding_is_never_looked_at(plan):
    lengths = torch.tensor([37, 0], device=DEVICE)
    clean = draw(2, 70, 5)
    dirty = [x.clone() for x in clean]
    for row, n in enumerate(lengths.tolist()):
        dirty[1][row, n:] = dirty[2][row, n:] = float("nan")
    for a, b in zip(results(wkv4, dirty, lengths), results(wkv4, clean, lengths)):
        assert a.equal(b)


def test_empty_state(plan):
    inputs = draw(2, 70, 5)
    inputs[4:] = [torch.zeros_like(inputs[4]), torch.zeros_like(inputs[5]), torch.full_like(inputs[6], EMPTY)]
    got, expected = results(wkv4, inputs), results(naive, inputs, double=True)
    for name, x, ref in zip(NAMES[:7], got, expected):
        assert (x.double() - ref).norm() <= FLOAT32 * ref.norm(), name
    assert all((x == 0).all() for x in got[7:])  # e^-1e38 of nothing reaches an output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    inputs = draw(2, 70, 6, dtype)
    check(inputs, BFLOAT16)
    y, state = wkv4(*inputs[:4], tuple(inputs[4:]), None)
    assert y.dtype == dtype
    assert all(x.dtype == torch.float32 for x in state)


def test_two_pieces_equal_one():
    w, k, v, u, *state = draw(1, 100, 5)
    whole, end = wkv4(w, k, v, u, tuple(state), None)
    first, middle = wkv4(w, k[:, :33], v[:, :33], u, tuple(state), None)
    second, last = wkv4(w, k[:, 33:], v[:, 33:], u, middle, None)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    for a, b in zip(last, end):
        torch.testing.assert_close(a, b)


def test_huge_keys(plan):
    """Exponents up to 1e4: float32 resolves them to 1e-3, so y to about that; nothing overflows."""
    inputs = draw(1, 100, 5)
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


@pytest.mark.parametrize("ragged", [False, True])
def test_every_output_is_written(plan, ragged, monkeypatch):
    """Fresh buffers hold NaN here; none may survive."""
    lengths = torch.tensor([70, 20, 0], device=DEVICE) if ragged else None
    inputs = draw(3, 70, 5)
    expected = results(wkv4, inputs, lengths)
    poisoned = lambda x, **_: torch.full(x.shape, float("nan"), dtype=x.dtype, device=x.device)
    monkeypatch.setattr(torch, "empty_like", poisoned)
    monkeypatch.setattr(torch, "empty", lambda shape, **kw: torch.full(shape, float("nan"), **kw))
    y, _ = wkv4(*inputs[:4], tuple(inputs[4:]), lengths)
    assert y.isfinite().all()  # past a row's length too
    for a, b in zip(results(wkv4, inputs, lengths), expected):
        assert a.equal(b)


def test_without_gradients_nothing_is_saved(monkeypatch):
    inputs = draw(1, 70, 5)
    leaf = inputs[1].requires_grad_()
    sizes = []
    buffers = module._buffers
    monkeypatch.setattr(module, "_buffers", lambda n, shape, like: sizes.append(shape) or buffers(n, shape, like))
    with torch.no_grad():
        wkv4(*inputs[:4], tuple(inputs[4:]), None)
    assert sizes == [(1, 5), (1, 2, 5), (0, 5, 5)]  # the final state, two chunks' starts, and nothing
    y, _ = wkv4(*inputs[:4], tuple(inputs[4:]), None)
    assert torch.autograd.grad(y.sum(), leaf)[0].isfinite().all()


def test_float64_is_refused():
    inputs = [x.double() for x in draw(1, 3, 5)]
    with pytest.raises(TypeError, match="chunk"):
        wkv4(*inputs[:4], tuple(inputs[4:]), None)
