"""Blocks that read a row from both ends."""

import pytest
import torch

from receptance.models import RWKV, VERSIONS

T, LENGTHS = 37, [37, 20, 1]


def build(version: str) -> RWKV:
    sizes = {"vocab_size": 2, "n_layer": 3, "n_embd": 16} | ({} if version == "4" else {"head_size": 8})
    config = VERSIONS[version].Config.make(**sizes, **({"version": version} if version.startswith("5") else {}))
    model: RWKV = VERSIONS[version](config, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return model


def rows() -> torch.Tensor:
    return torch.randn(3, T, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_a_row_turned_round_gives_its_result_turned_round(version):
    model, x = build(version), rows()
    there = model.bidirectional(x)
    assert off(model.bidirectional(x.flip(1)), there.flip(1)) < 1e-10
    assert off(model.sequence(x.flip(1))[0], model.sequence(x)[0].flip(1)) > 1e-2  # which one direction does not


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_padding_is_not_read_and_rows_do_not_meet(version):
    model, x, lengths = build(version), rows(), torch.tensor(LENGTHS)
    padded = x.clone()
    for row, n in zip(padded, LENGTHS):
        row[n:] = 1e3
    found = model.bidirectional(padded, lengths=lengths)
    for i, n in enumerate(LENGTHS):
        assert off(found[i, :n], model.bidirectional(x[i : i + 1, :n])[0]) < 1e-10
    order = [2, 0, 1]
    turned = model.bidirectional(padded[order], lengths=lengths[order])
    assert all(off(turned[i, : LENGTHS[j]], found[j, : LENGTHS[j]]) < 1e-10 for i, j in enumerate(order))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_position_sees_the_whole_row(version):
    model, x = build(version), rows()[:1, :9].requires_grad_()
    for at in (0, 4, 8):
        (gradient,) = torch.autograd.grad(model.bidirectional(x)[0, at].square().sum(), x)
        assert (gradient[0].abs().amax(-1) > 1e-9 * gradient.abs().max()).all()
        (gradient,) = torch.autograd.grad(model.sequence(x)[0][0, at].square().sum(), x)
        later = gradient[0, at + 1 :].abs().sum()  # the causal form sees nothing of what comes, but for rounding
        assert later < 1e-12 * gradient.abs().max()


@torch.no_grad()
def test_one_position_alone_is_the_causal_form():
    model, x = build("7"), rows()[:, :1]
    assert off(model.bidirectional(x), model.sequence(x)[0]) < 1e-12


@torch.no_grad()
def test_the_layers_by_hand():
    """One block by its own forward pass in both directions, without norms at the ends."""
    model, x = build("7"), rows()
    block, state = model.blocks[0], model.zero_state(3).layer(0)
    call = model._call(x, None, None)
    ahead, back = (block(row, None, state, call)[0] for row in (x, x.flip(1)))
    model.blocks = model.blocks[:1]
    assert off(model.bidirectional(x, end_norms=False), (ahead + back.flip(1)) / 2) < 1e-12


def test_recomputing_gives_the_same_gradients():
    model, x = build("7"), rows()
    plain = torch.autograd.grad(model.bidirectional(x).square().sum(), list(model.blocks[1].parameters()))
    model.activation_checkpointing = True
    again = torch.autograd.grad(model.bidirectional(x).square().sum(), list(model.blocks[1].parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(plain, again))


@torch.no_grad()
def test_without_end_norms_the_size_of_the_vectors_is_kept():
    """Blocks that add nothing: what goes in comes out, while the norms would lose the size."""
    model, x = build("7"), rows()
    for block in model.blocks:
        block.att.output.weight.zero_()
        block.ffn.value.weight.zero_()
    assert torch.equal(model.sequence(x, end_norms=False)[0], x)
    assert torch.equal(model.bidirectional(x, end_norms=False), x)
    assert off(model.sequence(1000 * x)[0], model.sequence(x)[0]) < 1e-4
