"""Blocks that hand on their sum for the next one's first kernel: nothing else changes, and hooks see the sum."""

import pytest
import torch

from receptance.models import RWKV, VERSIONS, apply_recipe
from receptance.models.base import Call


def build(version: str) -> RWKV:
    cls = VERSIONS[version]
    config = cls.Config.make(vocab_size=50, n_layer=3, n_embd=64)
    model = cls(config).double()
    apply_recipe(model, cls.recipe(config), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(i)))
    return model


def results(model: RWKV) -> list[torch.Tensor | None]:
    tokens = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1))
    loss, state = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss = loss + sum(x.sum() for x in state.values())
    return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


def equal(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("version", VERSIONS)
def test_training_and_evaluation_are_the_same_to_the_last_bit(version, monkeypatch):
    handed, leave = [], Call.leave

    def watched(self, x, delta):
        handed.append(self.hands_on)
        return leave(self, x, delta)

    monkeypatch.setattr(Call, "leave", watched)
    model = build(version)
    plain, training = results(model.eval()), results(model.train())
    assert handed == [False] * 3 + [True] * 3
    assert equal(plain, training)


@pytest.mark.parametrize("version", ["4", "7"])
def test_a_hook_on_a_block_sees_the_sum(version):
    model = build(version)
    plain = results(model.train())
    seen = []
    model.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out[0].shape))
    assert equal(plain, results(model))
    assert seen == [(2, 19, 64)]


def test_whole_blocks_made_again_keep_one_tensor_each(monkeypatch):
    model = build("7").train()
    plain = results(model)
    monkeypatch.setattr(Call, "leave", lambda self, x, delta: x + delta if not self.hands_on else 1 / 0)
    model.activation_checkpointing = True
    assert all(x is y is None or torch.allclose(x, y) for x, y in zip(plain, results(model)))
