"""Operators made of two functions, and the WKV operators made so: the rules of torch.library, gradients, compiling."""

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from receptance.ops import BACKENDS, GPU_BACKENDS
from receptance.ops.custom import custom_operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _forward(x: Tensor, y: Tensor, mask: Tensor | None, power: int, is_saving: bool) -> tuple[Tensor, Tensor, Tensor]:
    kept = x**power if is_saving else x.new_empty(0)
    product = x**power * y
    return product if mask is None else product * mask, x.sin(), kept


def _backward(gradients, inputs, others, kept):
    g_product, g_sin = gradients
    x, y = inputs
    mask, power = others
    if mask is not None:
        g_product = g_product * mask
    return g_product * power * x ** (power - 1) * y + g_sin * x.cos(), g_product * kept[0]


def _fake(x, y, mask, power, is_saving):
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(x) if is_saving else x.new_empty(0)


toy = custom_operator("toy_for_tests", _forward, _backward, _fake, n_inputs=2, n_outputs=2)


def pair() -> list[Tensor]:
    return [torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.mark.parametrize("mask", [None, torch.arange(4) < 2])
def test_a_custom_operator_has_the_gradients_of_its_forward_function(mask):
    x, y = (z.requires_grad_() for z in pair())
    mask = mask if mask is None else mask.double()
    assert torch.autograd.gradcheck(lambda x, y: toy(x, y, mask, 3)[:2], (x, y))


def test_a_result_that_nobody_uses_has_a_gradient_of_zero():
    x, y = (z.requires_grad_() for z in pair())
    (g,) = torch.autograd.grad(toy(x, y, None, 2)[1].sum(), x)
    torch.testing.assert_close(g, x.detach().cos())


def test_nothing_is_kept_where_no_backward_pass_follows():
    x, y = pair()
    assert toy(x, y, None, 2)[2].numel() == 0
    x.requires_grad_()
    assert toy(x, y, None, 2)[2].numel() == 12
    with torch.no_grad():
        assert toy(x, y, None, 2)[2].numel() == 0


def test_what_is_kept_has_no_gradient():
    x, y = (z.requires_grad_() for z in pair())
    assert [z.requires_grad for z in toy(x, y, None, 2)] == [True, True, False]


def test_backward_twice_is_refused():
    x, y = (z.requires_grad_() for z in pair())
    (g,) = torch.autograd.grad(toy(x, y, None, 2)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="toy_for_tests_backward"):
        torch.autograd.grad(g.sum(), x)


def test_it_compiles_and_keeps_its_intermediate_results_from_nobody():
    x, y = (z.requires_grad_() for z in pair())
    torch.library.opcheck(torch.ops.receptance.toy_for_tests, (x, y, None, 2, True))
    compiled = torch.compile(lambda x, y: toy(x, y, None, 2)[0].sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, y), (x, y))
    torch.testing.assert_close(got, torch.autograd.grad((x**2 * y).sum(), (x, y)))


def arguments(op: str, backend: str, packed: bool) -> tuple[object, ...]:
    """For `receptance::OP_BACKEND`, with gradients wanted."""
    dtype = torch.float64 if backend == "chunk" else torch.float32
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).to(DEVICE)
    b, t, h, n = 2, 37 if backend == "chunk" else 17, 2, 16  # interpreted kernels are slow
    resets = None
    if packed:
        resets = torch.zeros(b, t, dtype=torch.bool, device=DEVICE)
        resets[0, [0, t - 4]] = True
    if op == "wkv4":
        inputs = [-rand(8).exp(), rand(b, t, 8), rand(b, t, 8), rand(8), rand(b, 8), rand(b, 8).exp()]
        lengths = torch.tensor([t, 10], device=DEVICE) if packed else None
        others = [rand(b, 8), lengths, resets]
    else:
        inputs = [rand(b, t, h, n) for _ in range({"wkv6": 4, "wkv7": 6}[op])]
        inputs[1] = -inputs[1].exp().clamp(max=1)
        inputs += [rand(h, n)] if op == "wkv6" else []
        inputs += [rand(b, h, n, n)]
        others = [resets, "tf32x3"] if (op, backend) == ("wkv6", "triton") else [resets]
    return (*(x.requires_grad_() for x in inputs), *others, True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["chunk", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", BACKENDS)
def test_wkv_operators_keep_the_rules_of_torch_library(op, backend, packed):
    if backend == "triton":
        pytest.importorskip("triton")
        __import__(GPU_BACKENDS[op]["triton"])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(
        getattr(torch.ops.receptance, f"{op}_{backend}"), arguments(op, backend, packed), test_utils=tests
    )
