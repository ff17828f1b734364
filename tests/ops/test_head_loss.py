"""Head, cross entropy and logit penalty in row blocks against the loss on whole logits, and the kernel against both."""

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before ours is imported

from receptance.ops.head_loss import head_loss, module_loss, plain_softmax_gradient_
from receptance.training.loss import language_model_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PENALTY = 1e-2  # a hundred times the reference's, so that a mistake in it shows


def draw(n: int = 26, width: int = 8, vocab: int = 37, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, n // 2, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return [x, weight, torch.randint(vocab, (2, n // 2), generator=g)]


@pytest.mark.parametrize("rows", [1, 7, 26, 100, None])
def test_blocks_equal_the_loss_on_whole_logits(rows):
    x, weight, targets = draw()
    expected = language_model_loss(x @ weight.T, targets, PENALTY)
    got = head_loss(x, weight, targets, PENALTY, rows=rows)
    assert abs(got - expected) < 1e-10
    leaves = [x, weight]
    for a, b in zip(torch.autograd.grad(3 * got, leaves), torch.autograd.grad(3 * expected, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [5, None])
def test_a_module_for_a_head_has_the_same_loss_and_gradients(rows, weighted):
    x, weight, targets = draw()
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(3)) if weighted else None
    if weights is not None:
        weights[0, :4] = 0
        targets[0, 1] = -100
    head = torch.nn.Linear(8, 37, bias=False, dtype=torch.float64)
    head.weight = torch.nn.Parameter(weight.detach().clone())
    expected = head_loss(x, weight, targets, PENALTY, token_weights=weights)
    got = module_loss(x, head, targets, 37, PENALTY, token_weights=weights, rows=rows)
    assert abs(got - expected) < 1e-10
    found = torch.autograd.grad(3 * got, [x, head.weight])
    for a, b in zip(found, torch.autograd.grad(3 * expected, [x, weight])):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_masked_positions_count_for_nothing():
    x, weight, targets = draw()
    mask = torch.rand(targets.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    hidden = torch.where(mask, targets, -100)
    got = head_loss(x, weight, hidden, PENALTY, token_weights=mask, rows=5)
    expected = language_model_loss((x @ weight.T)[mask][None], targets[mask][None], PENALTY)
    assert abs(got - expected) < 1e-10
    for a, b in zip(torch.autograd.grad(got, [x, weight]), torch.autograd.grad(expected, [x, weight])):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_nothing_to_learn_from_gives_zero_not_nan():
    x, weight, targets = draw()
    loss = head_loss(x, weight, targets, PENALTY, token_weights=torch.zeros(targets.shape))
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, [x, weight]))


def test_token_weights_weigh_loss_and_gradient():
    x, weight, targets = draw()
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got = head_loss(x, weight, targets, token_weights=weights, total=2.5, rows=5)
    nats = torch.nn.functional.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), reduction="none")
    expected = (nats * weights.flatten()).sum() / 2.5
    assert abs(got - expected) < 1e-10
    for a, b in zip(torch.autograd.grad(got, [x, weight]), torch.autograd.grad(expected, [x, weight])):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_accumulate_over_parts_of_a_batch():
    x, weight, targets = draw()
    whole = torch.autograd.grad(head_loss(x, weight, targets, PENALTY), [x, weight])
    for row in range(2):
        (head_loss(x[row], weight, targets[row], PENALTY) / 2).backward()
    for a, b in zip([x.grad, weight.grad], whole):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_graph_kept_can_be_used_twice():
    x, weight, targets = draw()
    loss = head_loss(x, weight, targets, PENALTY)
    first = torch.autograd.grad(loss, [x, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient_and_costs_none(frozen):
    leaves = draw()
    leaves[frozen].requires_grad_(False)
    head_loss(*leaves).backward()
    assert leaves[frozen].grad is None
    assert leaves[1 - frozen].grad is not None


def test_under_autocast_it_is_as_exact_as_the_loss_on_whole_logits():
    x, weight, targets = draw(n=64, width=32, vocab=100, dtype=torch.float32)
    exact = torch.autograd.grad(language_model_loss(x.double() @ weight.double().T, targets, PENALTY), [x, weight])
    with torch.autocast("cpu", torch.bfloat16):
        blocks = head_loss(x, weight, targets, PENALTY, rows=16)
        whole = language_model_loss((x @ weight.T).float(), targets, PENALTY)
    assert blocks.dtype == torch.float32
    got, usual = (torch.autograd.grad(loss, [x, weight]) for loss in (blocks, whole))
    for a, b, reference in zip(got, usual, exact):
        assert a.dtype == torch.float32
        assert (a - reference).norm() < 1.1 * (b - reference).norm()


def test_it_compiles_without_a_graph_break():
    x, weight, targets = draw()
    compiled = torch.compile(lambda x, w: head_loss(x, w, targets, PENALTY, rows=7), fullgraph=True, backend="eager")
    got = torch.autograd.grad(compiled(x, weight), [x, weight])
    for a, b in zip(got, torch.autograd.grad(head_loss(x, weight, targets, PENALTY), [x, weight])):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_operator_keeps_the_rules_of_torch_library():
    x, weight, targets = draw()
    arguments = x.flatten(0, 1), weight, targets.flatten(), None, PENALTY, x.dtype, 7, False, True, True
    torch.library.opcheck(torch.ops.receptance.head_loss, arguments)


@pytest.mark.parametrize("vocab", [5, 300, 9000])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_equals_the_plain_form(vocab, gradient, dtype):
    kernel = pytest.importorskip("receptance.ops.head_loss.triton").softmax_gradient_
    g = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(6, vocab, generator=g)).to(dtype).to(DEVICE)
    targets = torch.randint(vocab, (6,), generator=g).to(DEVICE)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0], device=DEVICE)
    for w in (None, weights):
        got, expected = logits.clone(), logits.double()
        loss = kernel(got, targets, w, PENALTY, gradient)
        exact = plain_softmax_gradient_(expected, targets, w, PENALTY, gradient)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
        # half precision: rounding at writing, below the smallest normal number absolute
        torch.testing.assert_close(got.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=1e-7)
