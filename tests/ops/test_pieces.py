"""The Triton forms of the fused pieces against the plain ones in float64; without a GPU, in the interpreter."""

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before ours is imported
pytest.importorskip("triton")

from receptance.ops import ffn, heads, norm, prepare, shift
from receptance.ops.ffn import triton as ffn_kernels
from receptance.ops.heads import triton as heads_kernels
from receptance.ops.norm import triton as norm_kernels
from receptance.ops.prepare import triton as prepare_kernels
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
    for i, (got, exact) in enumerate(zip(results(kernel, cast), results(plain, [x.double() for x in cast]))):
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
    kernel = lambda x, last, *mixes: shift_kernels.shift_mix(x, last, mixes, None, present)
    plain = lambda x, last, *mixes: shift.shift_mix(x, last, mixes, present=present)
    check(kernel, plain, inputs, dtype)


def test_token_shift_stops_at_a_document():
    resets = torch.zeros(2, 37, dtype=torch.bool, device=DEVICE)
    resets[0, [0, 5, 6]] = resets[1, [31, 36]] = True
    inputs = [rand(2, 37, 64), rand(2, 64), rand(1, 1, 64), rand(1, 1, 64, seed=1)]
    kernel = lambda x, last, *mixes: shift_kernels.shift_mix(x, last, mixes, resets)
    plain = lambda x, last, *mixes: shift.shift_mix(x, last, mixes, resets=resets)
    check(kernel, plain, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b, t, h, n", [(1, 1, 1, 64), (2, 40, 2, 64), (1, 33, 3, 32), (1, 9, 2, 20), (1, 5, 1, 128)])
def test_decay_and_keys(b, t, h, n, dtype):
    c = h * n
    vectors = [rand(1, 1, c, seed=j) for j in range(4)]
    check(
        prepare_kernels.decay_and_keys,
        prepare.decay_and_keys,
        [rand(b, t, c), rand(b, t, h, n), rand(b, t, c, seed=1), *vectors],
        dtype,
    )


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "plain", "silu"])
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("b, t, h, n", [(1, 1, 1, 64), (2, 40, 2, 64), (1, 33, 3, 20)])
def test_group_norm_bonus_and_gate(b, t, h, n, bonus, activation, dtype):
    inputs = [rand(b, t, h, n), rand(h * n), rand(h * n, seed=1)]
    inputs += [] if activation == "none" else [rand(b, t, h * n)]
    inputs += [*(rand(b, t, h, n, seed=j) for j in (1, 2, 3)), rand(h, n)] if bonus else []

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


def operators() -> dict[str, tuple[object, ...]]:
    """Every custom operator that has a gradient, with small arguments."""
    x = lambda *shape, seed=0: rand(*shape, seed=seed).float().to(DEVICE).requires_grad_()
    v = lambda seed=0: x(32, seed=seed)
    flat, head = x(1, 5, 32), x(1, 5, 2, 16)
    return {
        "shift_mix": (flat, x(1, 32), x(3, 32), None, False, torch.float32),
        "decay_and_keys": (flat, head, x(1, 5, 32, seed=1), v(), v(1), v(2), v(3)),
        "value_residual": (flat, x(1, 5, 32, seed=1), x(1, 5, 32, seed=2), v()),
        "norm_and_gate": (head, v(), v(1), flat, x(1, 5, 2, 16, seed=1), x(1, 5, 2, 16, seed=2),
                          x(1, 5, 2, 16, seed=3), x(2, 16), 1e-5, "plain", True),
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
