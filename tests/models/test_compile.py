"""torch.compile takes the forward pass and the loss of a model as one graph, and its gradients are the same."""

import pytest
import torch
from torch import Tensor

from receptance.models import RWKV, VERSIONS, State, apply_recipe


def lively(version: str) -> RWKV:
    """By the recipe plus noise, so that no branch is zero; float64, so that only a mistake can make a difference."""
    sizes = {} if version == "4" else {"head_size": 8}
    sizes |= {"version": version} if version.startswith("5") else {}
    config = VERSIONS[version].Config.make(vocab_size=40, n_layer=2, n_embd=16, **sizes)
    generator = torch.Generator().manual_seed(0)
    model = VERSIONS[version](config)
    apply_recipe(model, VERSIONS[version].recipe(config), generator)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model.double()


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_loss_and_gradients_without_a_graph_break(version):
    """fullgraph raises at a break. Rows hold documents, start from a state, and a loss reads the final state too."""
    model = lively(version)
    tokens = torch.randint(40, (2, 71), generator=torch.Generator().manual_seed(2))
    resets = torch.zeros(2, 70, dtype=torch.bool)
    resets[0, [0, 5, 32]] = True
    with torch.no_grad():
        _, start = model(tokens[:, :5])

    def learn(inputs: Tensor, targets: Tensor, resets: Tensor | None, state: State | None) -> Tensor:
        loss, end = model.loss(inputs, targets, state, resets=resets, logit_penalty=1e-2)
        return loss + sum(end[name].square().mean() for name in end if name not in ("num", "den", "exp"))

    torch._dynamo.reset()
    compiled = torch.compile(learn, fullgraph=True, backend="aot_eager")
    for more in ((None, None), (resets, start)):
        results = []
        for function in (learn, compiled):
            model.zero_grad()
            loss = function(tokens[:, :-1], tokens[:, 1:], *more)
            loss.backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            results.append({"loss": loss.detach(), **gradients})
        expected, got = results
        assert got.keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
