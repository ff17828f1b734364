"""What Recompute drops and makes again, and that nobody can tell from the gradients."""

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from receptance.models import VERSIONS, apply_recipe
from receptance.models.base import Call
from receptance.ops.recompute import Recompute


class Mix:
    """x·2 and x·3, counting its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return x * 2, x * 3


def forward(mix: Mix, x: Tensor, weight: Tensor, recompute: Recompute) -> Tensor:
    a, b = recompute(mix, x)
    return (a @ weight).tanh() + (b.view(-1, 4) @ weight).view_as(a) * recompute(torch.exp, a)


def gradients(active: bool) -> tuple[list[Tensor], int]:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    mix, recompute = Mix(), Recompute()
    if active:
        with recompute:
            y = forward(mix, x, weight, recompute)
    else:
        y = forward(mix, x, weight, recompute)
    return list(torch.autograd.grad(y.sum(), [x, weight])), mix.calls


def test_gradients_are_the_same_and_results_are_made_again_once():
    kept, calls = gradients(False)
    again, more = gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(kept, again))
    assert (calls, more) == (1, 2)


def test_a_graph_kept_can_be_used_twice():
    x, recompute = torch.randn(3, 4, requires_grad=True), Recompute()
    with recompute:
        (a, _) = recompute(Mix(), x)
        y = a.square().sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, 8 * x)


def test_an_address_used_again_is_not_taken_for_the_old_tensor():
    x, recompute = torch.randn(1000, requires_grad=True), Recompute()
    with recompute:
        recompute(Mix(), x)  # dropped at once: its memory is free for the next tensor of its size
        y = (x * 5).sin().sum()
    assert torch.allclose(torch.autograd.grad(y, x)[0], 5 * (x * 5).cos())


def test_autocast_is_the_same_the_second_time():
    x, weight, recompute = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4), Recompute()
    dtypes = []

    def product(x: Tensor) -> Tensor:
        dtypes.append((x @ weight).dtype)
        return x @ weight

    with torch.autocast("cpu", torch.bfloat16), recompute:
        y = recompute(product, x).square()
    y.sum().backward()
    assert dtypes == [torch.bfloat16] * 2


@pytest.mark.parametrize("version", VERSIONS)
def test_a_model_learns_the_same_and_keeps_nothing_cheap(version, monkeypatch):
    config = VERSIONS[version].Config.make(vocab_size=50, n_layer=2, n_embd=64)
    model = VERSIONS[version](config)
    apply_recipe(model, VERSIONS[version].recipe(config), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    tokens = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(2))
    storages: list[StorageWeakRef] = []
    cheap, enter = Call.cheap, Call.enter

    def watched(self, function, *inputs, dear=False):
        outputs = cheap(self, function, *inputs, dear=dear)
        for x in [outputs] if isinstance(outputs, Tensor) else outputs:
            storages.append(StorageWeakRef(x.untyped_storage()))
        return outputs

    def entered(self, *inputs, keep=False, **options):
        outputs = enter(self, *inputs, keep=keep, **options)
        storages.extend(StorageWeakRef(x.untyped_storage()) for x in outputs[2] if not keep)
        return outputs

    monkeypatch.setattr(Call, "cheap", watched)
    monkeypatch.setattr(Call, "enter", entered)
    gradients, alive = [], []
    for recompute in (False, True):
        model.recompute = recompute
        storages.clear()
        loss, state = model.loss(tokens[:, :-1], tokens[:, 1:])
        del state
        alive.append(sum(not storage.expired() for storage in storages))
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert alive[0] > 4
    assert alive[1] == 0
    for a, b in zip(*gradients):
        assert (a is None and b is None) or torch.equal(a, b)
