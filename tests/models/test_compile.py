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


@pytest.mark.parametrize("way", ["replaced", "hooked", "parametrised"])
def test_the_loss_calls_a_head_that_is_not_plain(way):
    """What a low-rank addition to the head's weight says, however it was put there."""
    model = lively("7")
    tokens = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(2))
    more = 0.1 * torch.randn(40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    head = model.head
    if way == "replaced":
        model.head = torch.nn.Linear(16, 40, dtype=torch.float64)
        model.head.load_state_dict({"weight": head.weight + more, "bias": torch.zeros(40)})
    elif way == "hooked":
        head.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ more.T)
    else:

        class Sum(torch.nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return weight + more

        torch.nn.utils.parametrize.register_parametrization(head, "weight", Sum())
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    logits, _ = model(tokens[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert abs(loss - plain) > 1e-4
