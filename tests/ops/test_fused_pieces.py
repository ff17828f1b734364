"""The Triton forms of the fused pieces against the plain ones in float64; without a GPU, in the interpreter."""

import os
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before ours is imported
pytest.importorskip("triton")

from receptance.ops import ffn, heads, low_rank, norm, pieces, prepare, products, shift
from receptance.ops.ffn import triton as ffn_kernels
from receptance.ops.heads import triton as heads_kernels
from receptance.ops.low_rank import triton as low_rank_kernels
from receptance.ops.norm import triton as norm_kernels
from receptance.ops.prepare import triton as prepare_kernels
from receptance.ops.products import triton as product_kernels
from receptance.ops.shift import triton as shift_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative L2: rounding of the dtype
# The interpreter truncates where hardware rounds to bfloat16, and counts float16 as the half-precision case.
DTYPES = [torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16]
Function = Callable[..., Tensor | Sequence[Tensor]]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def results(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradient of every input for fixed random gradients of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = [out] if isinstance(out, Tensor) else list(out)
    weights = [rand(*x.shape, seed=i).to(x) for i, x in enumerate(outs)]
    return [*outs, *torch.autograd.grad(outs, leaves, weights)]


def check(kernel: Function, plain: Function, inputs: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> None:
    cast = [x.to(dtype).to(DEVICE) for x in inputs]
    again = lambda *x: checkpoint(kernel, *x, use_reentrant=False)  # lets what is saved be asked for only once
    for i, (got, exact) in enumerate(zip(results(again, cast), results(plain, [x.double() for x in cast]))):
        assert got.shape == exact.shape
        assert got.dtype == dtype
        error = ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()
        assert error < TOLERANCE[dtype], f"result {i}: relative error {error:.1e}"


SHAPES = [(1, 1, 64), (2, 37, 64), (3, 5, 100), (1, 33, 20)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_token_shift_and_mixes(shape, present, dtype):
    b, _, c = shape
    inputs = [rand(*shape), rand(b, c), *(rand(1, 1, c, seed=j) for j in range(6 if present else 3))]
    kernel = lambda x, last, *mixes: shift_kernels.shift_mix(x, last, mixes, present=present)
    plain = lambda x, last, *mixes: shift.shift_mix(x, last, mixes, present=present)
    check(kernel, plain, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 37, 64), (3, 40, 100)])
def test_low_rank_maps_with_the_shift_behind_the_product(shape, dtype):
    b, t, c = shape
    resets = torch.zeros(b, t, dtype=torch.bool, device=DEVICE)
    resets[0, [0, t // 2, t - 1]] = t > 1
    ranks, activations = (8, 96, 33), ("none", "tanh", "sigmoid")
    mixes, maps = [rand(1, 1, c, seed=j) for j in range(3)], [rand(c, r) / c**0.5 for r in ranks]
    for cut in (None, resets):

        def call(function, cut=cut):
            return lambda x, last, *rest: function(x, last, rest[:3], rest[3:], activations, resets=cut)

        inputs = [rand(*shape), rand(b, c), *mixes, *maps]
        check(call(low_rank_kernels.shifted_maps), call(low_rank.shifted_maps), inputs, dtype)


@pytest.mark.parametrize("own", [False, True])
def test_token_shift_stops_at_a_document(own):
    resets = torch.zeros(2, 37, dtype=torch.bool, device=DEVICE)
    resets[0, [0, 5, 6]] = resets[1, [31, 36]] = True
    inputs = [rand(2, 37, 64), rand(2, 64), rand(1, 1, 64), rand(1, 1, 64, seed=1)]
    more = rand(2, 2, 37, 64, seed=4).to(DEVICE) if own else None
    kernel = lambda x, last, *mixes: shift_kernels.shift_mix(x, last, mixes, more, resets)
    plain = lambda x, last, *mixes: shift.shift_mix(x, last, mixes, more, resets=resets)
    check(kernel, plain, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_norm_shift_and_mixes_in_one(shape, adds, dtype):
    b, t, c = shape
    n_mixes, present = (1, True) if adds else (6, False)
    resets = torch.zeros(b, t, dtype=torch.bool, device=DEVICE)
    resets[0, [0, t // 2, t - 1]] = t > 1
    inputs = [rand(*shape), rand(*shape, seed=1), rand(c), rand(c, seed=1), rand(b, c)]
    inputs += [rand(1, 1, c, seed=j) for j in range(n_mixes)]

    def flat(function, cut):
        def call(x, delta, weight, bias, last, *mixes):
            delta, rest = (delta, 0) if adds else (None, delta.sum())
            total, end, mixed = function(x, delta, weight, bias, 1e-5, last, mixes, resets=cut, present=present)
            return total + rest, end, *mixed

        return call

    for cut in (None, resets):
        check(flat(shift_kernels.norm_mix, cut), flat(shift.norm_mix, cut), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_mixes_of_each_position_its_own(shape, present, dtype):
    b, _, c = shape
    inputs = [rand(*shape), rand(b, c), rand(5, *shape, seed=9), *(rand(1, 1, c, seed=j) for j in range(5))]
    kernel = lambda x, last, own, *mixes: shift_kernels.shift_mix(x, last, mixes, own, present=present)
    plain = lambda x, last, own, *mixes: shift.shift_mix(x, last, mixes, own, present=present)
    check(kernel, plain, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b, t, h, n", [(1, 1, 1, 64), (2, 40, 2, 64), (1, 33, 3, 32), (1, 9, 2, 20), (1, 5, 1, 128)])
def test_decay_and_keys(b, t, h, n, dtype):
    c = h * n
    vectors = [rand(1, 1, c, seed=j) for j in range(4)]
    inputs = [rand(b, t, c), rand(b, t, h, n), rand(b, t, c, seed=1), *vectors]
    check(prepare_kernels.decay_and_keys, prepare.decay_and_keys, inputs, dtype)

    def typed(function):
        """The bonus is of float32 whatever the rest is."""

        def call(r, r_k, w, k, a, *vectors):
            *outs, bonus = function(w, k, a, r, *vectors, r_k)
            return *outs, bonus.to(k.dtype)

        return call

    inputs = [rand(b, t, h, n, seed=7), rand(h, n, seed=8), *inputs]
    check(typed(prepare_kernels.keys_and_bonus), typed(prepare.keys_and_bonus), inputs, dtype)


def test_a_removal_key_of_zeros_has_a_finite_gradient():
    inputs = [rand(1, 3, 16), rand(1, 3, 1, 16), rand(1, 3, 16), *(rand(1, 1, 16, seed=j) for j in range(4))]
    inputs[1][0, 1] = 0
    got = results(prepare_kernels.decay_and_keys, [x.float().to(DEVICE) for x in inputs])
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_residual(shape, dtype):
    inputs = [*(rand(*shape, seed=j) for j in range(3)), rand(1, 1, shape[2])]
    check(prepare_kernels.value_residual, prepare.value_residual, inputs, dtype)
    check(prepare_kernels.value_residual_twice, prepare.value_residual_twice, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "plain", "silu"])
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("b, t, h, n", [(1, 1, 1, 64), (2, 40, 2, 64), (1, 33, 3, 20)])
def test_group_norm_bonus_and_gate(b, t, h, n, bonus, activation, dtype):
    inputs = [rand(b, t, h, n), rand(h * n), rand(h * n, seed=1)]
    inputs += [] if activation == "none" else [rand(b, t, h * n)]
    inputs += [rand(b, t, h, seed=1), rand(b, t, h, n, seed=2)] if bonus else []

    def split(rest: Sequence[Tensor]) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
        gate, rest = (None, rest) if activation == "none" else (rest[0], rest[1:])
        return gate, tuple(rest) if bonus else None

    def kernel(y, weight, bias, *rest):
        gate, extra = split(rest)
        return heads_kernels.norm_and_gate(y, weight, bias, 1e-5, gate, activation, extra)

    def plain(y, weight, bias, *rest):
        gate, extra = split(rest)
        return heads.norm_and_gate(y, weight, bias, 1e-5, gate, activation, bonus=extra)

    check(kernel, plain, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 37, 64), (3, 5, 100), (1, 3, 3000)])
def test_layer_norm_with_and_without_a_sum(shape, dtype):
    c = shape[2]
    inputs = [rand(*shape), rand(*shape, seed=1), rand(c), rand(c, seed=1)]
    eps = 1e-5
    check(lambda *a: norm_kernels.add_norm(*a, eps), lambda *a: norm.add_norm(*a, eps), inputs, dtype)
    del inputs[1]
    check(lambda *a: norm_kernels.layer_norm(*a, eps), lambda *a: norm.layer_norm(*a, eps), inputs, dtype)


def test_layer_norm_gradients_add_up_over_many_programs(monkeypatch):
    monkeypatch.setattr(norm_kernels, "PROGRAMS", 3)
    inputs = [rand(4, 100, 64), rand(64), rand(64, seed=1)]
    check(lambda *a: norm_kernels.layer_norm(*a, 1e-5), lambda *a: norm.layer_norm(*a, 1e-5), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (5000,), (3, 5, 7)])
def test_channel_mix_activations(shape, dtype):
    check(ffn_kernels.relu_square, ffn.relu_square, [rand(*shape)], dtype)
    check(ffn_kernels.sigmoid_gate, ffn.sigmoid_gate, [rand(*shape), rand(*shape, seed=1)], dtype)


HALF = DTYPES[1]


@pytest.mark.parametrize("rows, c, f, d", [(1, 8, 8, 8), (130, 72, 264, 40), (300, 64, 512, 64)])
def test_products_with_squared_relu_between_them(rows, c, f, d):
    inputs = [rand(rows, c), rand(f, c) / c**0.5, rand(d, f) / f**0.5]
    check(product_kernels.relu_square_products, products.relu_square_products, inputs, HALF)
    check(
        product_kernels.relu_square_products,
        products.relu_square_products,
        [inputs[0].view(1, rows, c), *inputs[1:]],
        HALF,
    )


def test_squares_are_those_of_the_unrounded_product():
    a, b = (x.to(HALF).to(DEVICE) for x in (rand(130, 64), rand(264, 64)))
    exact = (a.double() @ b.double().T).relu().square()
    ulp = (product_kernels._run(a, b, None).double() - exact).abs() / exact.clamp(min=1e-3)
    assert ulp.max() < 1.01 * torch.finfo(HALF).eps / (2 if torch.cuda.is_available() else 1)  # one rounding


def test_products_keep_nan():
    x, key = torch.ones(3, 8, dtype=HALF, device=DEVICE), torch.ones(8, 8, dtype=HALF, device=DEVICE)
    x[1, 2] = float("nan")
    assert product_kernels.relu_square_products(x, key, key).isnan().any(1).tolist() == [False, True, False]


def operators() -> dict[str, tuple[object, ...]]:
    """Every custom operator that has a gradient, with small arguments."""
    x = lambda *shape, seed=0: rand(*shape, seed=seed).float().to(DEVICE).requires_grad_()
    v = lambda seed=0: x(32, seed=seed)
    flat, head = x(1, 5, 32), x(1, 5, 2, 16)
    return {
        "shift_mix": (flat, x(1, 32), x(3, 32), x(3, 1, 5, 32), None, False, torch.float32),
        "decay_and_keys": (flat, head, x(1, 5, 32, seed=1), v(), v(1), v(2), v(3)),
        "value_residual": (flat, x(1, 5, 32, seed=1), x(1, 5, 32, seed=2), v()),
        "norm_and_gate": (head, v(), v(1), flat, x(1, 5, 2), x(1, 5, 2, 16, seed=2), 1e-5, "plain", True),
        "layer_norm": (flat, v(), v(1), 1e-5, torch.float32),
        "add_norm": (flat, x(1, 5, 32, seed=1), v(), v(1), 1e-5, torch.float32),
        "relu_square": (flat,),
        "sigmoid_gate": (flat, x(1, 5, 32, seed=1)),
    }  # fmt: skip


@pytest.mark.parametrize("name", operators())
def test_operators_keep_the_rules_of_torch_library(name):
    """Fake tensors of the right shape and dtype, gradients registered, no hidden mutation: no graph break."""
    torch.library.opcheck(getattr(torch.ops.receptance, name), operators()[name])


def test_kernels_compile_without_a_graph_break():
    def block(x, last, mu, weight, bias):
        a, b = shift_kernels.shift_mix(x, last, [mu, 1 - mu])
        total, normed = norm_kernels.add_norm(a, ffn_kernels.relu_square(b), weight, bias, 1e-5)
        return norm_kernels.layer_norm(total * normed, weight, bias, 1e-5)

    inputs = [x.float().to(DEVICE) for x in (rand(2, 5, 32), rand(2, 32), rand(32), rand(32, seed=1), rand(32, seed=2))]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, expected in zip(results(compiled, inputs), results(block, inputs)):
        torch.testing.assert_close(got, expected)


def test_plain_forms_compile_without_a_graph_break():
    from receptance.models.base import Call

    def block(x, last, mu, weight, bias, r_k):
        call, by_head = Call(), (*x.shape[:2], *r_k.shape)
        a, b, c = call.fused(shift.shift_mix, x, last, [mu, 1 - mu, mu * mu])
        keys = a, b.view(by_head), c, a.view(by_head), mu, mu, weight, bias, r_k
        w, k, erase, write, _, u = call.fused(prepare.keys_and_bonus, *keys)
        v = call.fused(prepare.value_residual, a, b, c, mu)
        y = w * erase + write
        y = call.fused(heads.norm_and_gate, y, weight, bias, 1e-5, a, "silu", (u, k))
        total, normed = call.fused(norm.add_norm, v, ffn.relu_square(y), weight, bias)
        return call.fused(norm.layer_norm, ffn.sigmoid_gate(total, normed), weight, bias)

    inputs = [rand(2, 5, 32), rand(2, 32), rand(32), rand(32, seed=1), rand(32, seed=2), rand(2, 16)]
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    for got, expected in zip(results(compiled, inputs), results(block, inputs)):
        torch.testing.assert_close(got, expected)


def test_every_output_is_written(monkeypatch):
    """Fresh buffers hold NaN here; none may survive."""
    poison = lambda function: lambda *a, **kw: function(*a, **kw).fill_(float("nan"))
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    x, head, v = (lambda seed=0: rand(2, 37, 96, seed=seed)), (lambda seed: rand(2, 37, 2, 48, seed=seed)), rand(96)
    last, own = rand(2, 96), rand(2, 2, 37, 96)
    cases: list[tuple[Function, list[Tensor]]] = [
        (lambda x, last, own, a, b: shift_kernels.shift_mix(x, last, [a, b], own), [x(), last, own, v, v]),
        (prepare_kernels.decay_and_keys, [x(), head(0), x(1), v, v, v, v]),
        (lambda w, k, a, v, u: prepare_kernels.keys_and_bonus(w, k, a, k, v, v, v, v, u),
         [x(), head(0), x(1), v, rand(2, 48)]),
        (prepare_kernels.value_residual, [x(), x(1), x(2), v]),
        (lambda y, g: heads_kernels.norm_and_gate(y, g[0, 0], g[0, 1], 1e-5, g), [head(0), x()]),
        (lambda y, g, k, u: heads_kernels.norm_and_gate(y, g[0, 0], g[0, 1], 1e-5, g, "silu", (u, k)),
         [head(0), x(), head(1), rand(2, 37, 2)]),
        (lambda a, b, w: norm_kernels.add_norm(a, b, w, w, 1e-5), [x(), x(1), v]),
        (lambda a, w: norm_kernels.layer_norm(a, w, w, 1e-5), [x(), v]),
        (ffn_kernels.relu_square, [x()]),
        (ffn_kernels.sigmoid_gate, [x(), x(1)]),
    ]  # fmt: skip
    for function, inputs in cases:
        assert all(y.isfinite().all() for y in results(function, [i.float().to(DEVICE) for i in inputs]))


def test_a_kernel_that_cannot_be_built_is_replaced_with_one_warning(monkeypatch):
    class OnGpu:
        is_cuda, dtype = True, torch.bfloat16

    def broken():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(ffn_kernels, "probe", broken)
    pieces._builds.cache_clear()
    with pytest.warns(RuntimeWarning, match="ffn: the Triton kernel cannot be built .RuntimeError: no compiler"):
        assert not pieces.uses_triton("ffn", OnGpu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not pieces.uses_triton("ffn", OnGpu())
    pieces._builds.cache_clear()


def test_a_kernel_is_tried_apart_from_what_the_caller_does(monkeypatch):
    """Its first use may be inside of activation checkpointing, or without gradients."""

    def probe():
        assert torch.is_grad_enabled()
        x = torch.ones(3, requires_grad=True)
        (x * x).sum().backward()

    class OnGpu:
        is_cuda, dtype = True, torch.bfloat16

    def function(x):
        assert pieces.uses_triton("ffn", OnGpu())
        return x.exp().square()

    monkeypatch.setattr(ffn_kernels, "probe", probe)
    pieces._builds.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint(function, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
        pieces._builds.cache_clear()
        with torch.no_grad():
            function(torch.ones(2))
    pieces._builds.cache_clear()
