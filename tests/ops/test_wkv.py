"""Every back end of every operator against the independent reference outputs, and against the naive form."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from receptance.ops import BACKENDS, EMPTY, wkv4, wkv6, wkv7

OPS = {"wkv4": wkv4, "wkv6": wkv6, "wkv7": wkv7}
ALL = [(op, backend) for op, table in BACKENDS.items() for backend in table]
FAST = [(op, backend) for op, backend in ALL if backend != "naive"]
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(scope="module")
def reference(shared) -> dict[str, Tensor]:
    pytest.importorskip("triton")
    return load_file(shared / "oracles" / "ops.safetensors")


def take(reference: dict[str, Tensor], name: str, backend: str) -> dict[str, Tensor]:
    dtype = torch.float32 if backend == "triton" else torch.float64  # the kernels compute in float32
    return {
        key.split(".")[1]: value.to(dtype, copy=True) for key, value in reference.items() if key.split(".")[0] == name
    }


def assert_matches(got: Tensor, expected: Tensor) -> None:
    """To rounding: float32's is relative to the largest value."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, expected, **EXACT)
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["wkv4", "wkv4_state"])
@pytest.mark.parametrize("backend", [*BACKENDS["wkv4"], "triton"])
def test_wkv4_matches_the_reference(reference, name, backend):
    ref = take(reference, name, backend)
    raw, k, v, u = (ref[x].requires_grad_() for x in "wkvu")
    state = None
    if "aa0" in ref:
        state = ref["aa0"].requires_grad_(), ref["bb0"].requires_grad_(), ref["pp0"]
    y, (num, den, exp) = wkv4(-raw.exp(), k, v, u, state, backend=backend)
    y.backward(ref["gy"])
    assert_matches(y, ref["y"])
    assert_matches(num * exp.exp(), ref["final_aa"] * ref["final_pp"].exp())
    assert_matches(den * exp.exp(), ref["final_bb"] * ref["final_pp"].exp())
    for key in [x for x in ref if x.startswith("grad_")]:
        assert_matches(ref[key.removeprefix("grad_")].grad, ref[key])


@pytest.mark.parametrize("version", ["wkv5", "wkv6"])
@pytest.mark.parametrize("backend", [*BACKENDS["wkv6"], "triton"])
def test_wkv6_matches_the_reference(reference, version, backend):
    ref = take(reference, version, backend)
    r, raw, k, v, u, s0 = (ref[x].requires_grad_() for x in ["r", "w", "k", "v", "u", "s0"])
    y, state = wkv6(r, -raw.exp(), k, v, u, s0.mT, backend=backend)  # the reference keeps key × value
    torch.autograd.backward([y, state], [ref["gy"], ref["g_final"].mT])
    assert_matches(y, ref["y"])
    assert_matches(state.mT, ref["final"])
    for key in ["r", "w", "k", "v", "u", "s0"]:
        assert_matches(ref[key].grad, ref["grad_" + key])


@pytest.mark.parametrize("backend", [*BACKENDS["wkv7"], "triton"])
def test_wkv7_matches_the_reference(reference, backend):
    ref = take(reference, "wkv7", backend)
    r, raw, k, v, a, b, s0 = (ref[x].requires_grad_() for x in ["r", "w", "k", "v", "a", "b", "s0"])
    w = -torch.exp(-torch.nn.functional.softplus(-raw) - 0.5)
    y, state = wkv7(r, w, k, v, a, b, s0, backend=backend)
    torch.autograd.backward([y, state], [ref["gy"], ref["g_final"]])
    assert_matches(y, ref["y"])
    assert_matches(state, ref["final"])
    for key in ["r", "w", "k", "v", "a", "b", "s0"]:
        assert_matches(ref[key].grad, ref["grad_" + key])


def draw(op: str, t: int, batch: int = 2, heads: int = 2, size: int = 8, dtype=torch.float64, seed: int = 0):
    """Inputs, in the operator's order, and a start state, all requiring gradients (but wkv4's exponent)."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    c = heads * size
    if op == "wkv4":
        inputs = [-rand(c).exp(), 2 * rand(batch, t, c), rand(batch, t, c), rand(c)]
        state = [rand(batch, c), rand(batch, c).exp(), rand(batch, c)]
    else:
        r, k, v = (rand(batch, t, heads, size) for _ in range(3))
        state = [rand(batch, heads, size, size)]
        if op == "wkv6":
            inputs = [r, -(2 * rand(batch, t, heads, size) - 1).exp(), k, v, rand(heads, size)]
        else:
            kk = torch.nn.functional.normalize(rand(batch, t, heads, size), dim=-1)
            w = -0.6065 * torch.sigmoid(rand(batch, t, heads, size))
            inputs = [r, w, k, v, -kk, kk * torch.sigmoid(rand(batch, t, heads, size))]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    state = [x.float().to(dtype) if dtype != torch.float64 else x for x in state]
    for i, x in enumerate(state):
        x.requires_grad_(not (op == "wkv4" and i == 2))
    return inputs, state


def call(op: str, inputs: list[Tensor], state: list[Tensor] | None, **kwargs) -> tuple[Tensor, list[Tensor]]:
    if state is None:
        given = None
    else:
        given = tuple(state) if op == "wkv4" else state[0]
    y, end = OPS[op](*inputs, given, **kwargs)
    return y, list(end) if op == "wkv4" else [end]


def true_state(op: str, state: list[Tensor]) -> list[Tensor]:
    """Comparable across back ends: wkv4's normaliser is free."""
    return [state[0] * state[2].exp(), state[1] * state[2].exp()] if op == "wkv4" else state


def results(op: str, inputs, state, g: torch.Generator, **kwargs) -> list[Tensor]:
    """y, final state and every gradient of a fixed random loss."""
    y, end = call(op, inputs, state, **kwargs)
    outs = [y, *true_state(op, end)]
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in outs]
    leaves = [x for x in [*inputs, *state] if x.requires_grad]
    return outs + list(torch.autograd.grad(outs, leaves, weights))


@pytest.mark.parametrize("t", [1, 2, 15, 16, 17, 63, 300, 1000])
@pytest.mark.parametrize("op,backend", FAST)
def test_fast_equals_naive(op, backend, t):
    inputs, state = draw(op, t)
    expected = results(op, inputs, state, torch.Generator().manual_seed(1), backend="naive")
    got = results(op, inputs, state, torch.Generator().manual_seed(1), backend=backend)
    for a, b in zip(got, expected):
        scale = b.abs().max().clamp(min=1e-30)
        assert ((a - b).abs().max() / scale) < 1e-10


@pytest.mark.parametrize("size", [32, 64, 96, 128])
@pytest.mark.parametrize("op,backend", [x for x in FAST if x[0] != "wkv4"])
def test_any_head_size(op, backend, size):
    inputs, state = draw(op, 37, batch=1, heads=2, size=size)
    expected = results(op, inputs, state, torch.Generator().manual_seed(1), backend="naive")
    got = results(op, inputs, state, torch.Generator().manual_seed(1), backend=backend)
    for a, b in zip(got, expected):
        assert ((a - b).abs().max() / b.abs().max()) < 1e-10


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("op,backend", ALL)
def test_lower_precision_inputs(op, backend, dtype, tolerance):
    """The state stays float32; the error against float64 on the same rounded inputs is the input precision's own."""
    inputs, state = draw(op, 100, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    state32 = [x.detach().float().requires_grad_(x.requires_grad) for x in state]
    state64 = [x.detach().double().requires_grad_(x.requires_grad) for x in state]
    got = results(op, inputs, state32, torch.Generator().manual_seed(1), backend=backend)
    expected = results(op, exact, state64, torch.Generator().manual_seed(1), backend="naive")
    y, end = call(op, inputs, state32, backend=backend)
    assert y.dtype == dtype
    assert all(x.dtype == torch.float32 for x in end)
    for a, b in zip(got, expected):
        rms = (a.double() - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt()
        assert rms < tolerance


@pytest.mark.parametrize("op,backend", ALL)
def test_gradcheck(op, backend):
    inputs, state = draw(op, 5, batch=2, heads=1, size=3)

    def function(*args):
        given, start = list(args[: len(inputs)]), list(args[len(inputs) :])
        if op == "wkv4":
            start.append(state[2])
        y, end = call(op, given, start, backend=backend)
        return y, *true_state(op, end)

    leaves = [x for x in [*inputs, *state] if x.requires_grad]
    assert torch.autograd.gradcheck(function, leaves, atol=1e-7)


@pytest.mark.parametrize("cut", [1, 7, 16, 31, 32, 33, 69])
@pytest.mark.parametrize("op,backend", ALL)
def test_two_pieces_equal_one(op, backend, cut):
    inputs, state = draw(op, 70)
    cuts = lambda part: [x if x.dim() < 3 else x[:, part] for x in inputs]
    whole, end = call(op, inputs, state, backend=backend)
    first, middle = call(op, cuts(slice(None, cut)), state, backend=backend)
    second, last = call(op, cuts(slice(cut, None)), middle, backend=backend)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, **EXACT)
    for a, b in zip(true_state(op, last), true_state(op, end)):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("op,backend", ALL)
def test_ragged_rows_equal_rows_alone(op, backend):
    lengths = torch.tensor([40, 1, 33, 0])
    inputs, state = draw(op, 40, batch=4)
    got = results(op, inputs, state, torch.Generator().manual_seed(1), backend=backend, lengths=lengths)
    y, end = got[0], got[1 : 1 + len(true_state(op, state))]
    for row, n in enumerate(lengths.tolist()):
        if n == 0:
            for a, b in zip(end, true_state(op, state)):
                torch.testing.assert_close(a[row], b[row], **EXACT)
            continue
        alone = [x if x.dim() < 3 else x[row : row + 1, :n] for x in inputs]
        y1, end1 = call(op, alone, [x[row : row + 1] for x in state], backend="naive")
        torch.testing.assert_close(y[row : row + 1, :n], y1, **EXACT)
        for a, b in zip(end, true_state(op, end1)):
            torch.testing.assert_close(a[row : row + 1], b, **EXACT)


@pytest.mark.parametrize("op,backend", FAST)
def test_ragged_gradients_equal_naive(op, backend):
    lengths = torch.tensor([40, 1, 33, 0])
    inputs, state = draw(op, 40, batch=4)

    def run(name: str) -> list[Tensor]:
        y, end = call(op, inputs, state, backend=name, lengths=lengths)
        valid = (torch.arange(40) < lengths[:, None]).view(4, 40, *[1] * (y.dim() - 2))
        loss = (torch.where(valid, y, 0) * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        loss = loss + sum(
            (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in true_state(op, end)
        )
        return list(torch.autograd.grad(loss, [x for x in [*inputs, *state] if x.requires_grad]))

    for a, b in zip(run(backend), run("naive")):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("backend", BACKENDS["wkv4"])
def test_wkv4_is_finite_for_huge_keys(backend):
    inputs, _ = draw("wkv4", 50, dtype=torch.float32)
    w, k, v, u = inputs
    k = (k.detach() * 1e4).clamp(-1e4, 1e4).requires_grad_()
    y, end = call("wkv4", [w, k, v, u], None, backend=backend)
    grads = torch.autograd.grad(y.sum() + end[0].sum() + end[1].sum(), [w, k, v, u])
    assert all(x.isfinite().all() for x in [y, *end, *grads])
    assert (y.abs() <= v.abs().max() * 1.001).all()  # an average of values


def test_wkv4_is_finite_and_exact_over_a_million_tokens():
    t = 1_000_000
    g = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 1, t, 2, generator=g)
    k[:, ::1000] *= 1e3  # spikes, so that the running maximum has to move
    k, v = k.clamp(-1e4, 1e4).requires_grad_(), v.requires_grad_()
    w, u = torch.tensor([-1e-5, -0.5]).requires_grad_(), torch.tensor([0.3, -0.2]).requires_grad_()
    y, (num, den, exp) = wkv4(w, k, v, u)
    grads = torch.autograd.grad(y.square().mean(), [w, k, v, u])
    assert all(x.isfinite().all() for x in [y, num, den, exp, *grads])
    tail = 2000  # the last tokens against the naive form started from the chunked state before them
    _, before = wkv4(w, k[:, :-tail], v[:, :-tail], u)
    expected, _ = wkv4(w, k[:, -tail:], v[:, -tail:], u, before, backend="naive")
    torch.testing.assert_close(y[:, -tail:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS["wkv6"])
def test_wkv6_is_exact_for_extreme_decays(backend):
    """Decays of -1e4 beside ones of -1e-6, in float32: a huge one must not blur its neighbours."""
    inputs, state = draw("wkv6", 70, dtype=torch.float32)
    inputs[1] = torch.where(torch.rand(inputs[1].shape, generator=torch.Generator().manual_seed(5)) < 0.1, -1e4, -1e-6)
    inputs[1].requires_grad_()
    got = results("wkv6", inputs, state, torch.Generator().manual_seed(1), backend=backend)
    exact = [x.detach().double().requires_grad_() for x in [*inputs, *state]]
    expected = results("wkv6", exact[:5], exact[5:], torch.Generator().manual_seed(1), backend="naive")
    for a, b in zip(got, expected):
        assert (a.double() - b).norm() / b.norm() < 1e-5


def test_an_unknown_back_end_is_named():
    inputs, state = draw("wkv7", 3)
    with pytest.raises(ValueError, match=r"no back end 'cuda9'.*chunk"):
        call("wkv7", inputs, state, backend="cuda9")


def test_an_empty_state_is_the_default():
    inputs, _ = draw("wkv4", 4)
    zero = torch.zeros(2, 16, dtype=torch.float64)
    got, _ = call("wkv4", inputs, None)
    expected, _ = call("wkv4", inputs, [zero, zero, torch.full_like(zero, EMPTY)])
    assert torch.equal(got, expected)


def resets_at(t: int, *rows: set[int]) -> Tensor:
    return torch.tensor([[i in row for i in range(t)] for row in rows])


# at 0, adjacent, last of a chunk, first of a chunk, several in a chunk, none, all
RESETS = resets_at(100, {0, 1, 2, 31, 50, 99}, {32, 33, 64, 96}, set(), set(range(100)), {17, 40, 41, 63, 90})


@pytest.mark.parametrize("op,backend", ALL)
def test_documents_in_a_row_equal_documents_alone(op, backend):
    """Outputs, final state and the gradient of every input and of the start state, with ragged rows."""
    lengths = torch.tensor([100, 97, 100, 60, 40])
    inputs, state = draw(op, 100, batch=5)
    y, end = call(op, inputs, state, backend=backend, lengths=lengths, resets=RESETS)
    ys, ends = [], []
    for row, n in enumerate(lengths.tolist()):
        cuts = [0, *[i for i in range(1, n) if RESETS[row, i]], n]
        for first, last in pairwise(cuts):
            document = [x if x.dim() < 3 else x[row : row + 1, first:last] for x in inputs]
            fresh = first > 0 or bool(RESETS[row, 0])
            part, after = call(op, document, None if fresh else [x[row : row + 1] for x in state], backend="naive")
            ys.append(part[0])
        ends.append(true_state(op, after))
    got = [torch.cat([y[row, :n] for row, n in enumerate(lengths)]), *true_state(op, end)]
    expected = [torch.cat(ys), *(torch.cat(parts) for parts in zip(*ends))]
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in got]
    leaves = [x for x in [*inputs, *state] if x.requires_grad]
    got += torch.autograd.grad(got, leaves, weights)
    expected += torch.autograd.grad(expected, leaves, weights)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("t", [1, 2, 31, 33, 64, 300])
@pytest.mark.parametrize("op,backend", FAST)
def test_fast_equals_naive_with_resets(op, backend, t):
    inputs, state = draw(op, t)
    resets = torch.rand(2, t, generator=torch.Generator().manual_seed(t)) < 0.1
    expected = results(op, inputs, state, torch.Generator().manual_seed(1), backend="naive", resets=resets)
    got = results(op, inputs, state, torch.Generator().manual_seed(1), backend=backend, resets=resets)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("op", OPS)
def test_no_reset_equals_no_resets(op):
    inputs, state = draw(op, 70)
    none = torch.zeros(2, 70, dtype=torch.bool)
    plain = results(op, inputs, state, torch.Generator().manual_seed(1))
    given = results(op, inputs, state, torch.Generator().manual_seed(1), resets=none)
    for a, b in zip(given, plain):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
