"""Several documents in one row, each of which sees nothing of the others."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from receptance.models import RWKV, VERSIONS
from receptance.ops import BACKENDS

OP = {"4": "wkv4", "5.0": "wkv6", "5.1": "wkv6", "5.2": "wkv6", "6": "wkv6", "7": "wkv7"}
CASES = [(version, backend) for version, op in OP.items() for backend in BACKENDS[op]]
T = 75
STARTS = [{0, 1, 2, 30, 74}, {32, 33, 70}, {5}]  # first tokens of documents: at 0, adjacent, at the row's end
LENGTHS = [75, 64, 3]  # the last reset of the third row lies in its padding


def build(version: str, **changes: bool) -> RWKV:
    """Random weights everywhere: initial zeros would hide whole branches."""
    sizes = {"vocab_size": 40, "n_layer": 2, "n_embd": 16}
    if version != "4":
        sizes["head_size"] = 8
    cls = VERSIONS[version]
    config = cls.Config.make(**sizes, **({"version": version} if version.startswith("5") else {}))
    model = cls(type(config)(**{**vars(config), **changes}), dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return model


def row_loss(logits: Tensor) -> Tensor:
    """Weighs every logit differently, by nothing but its position in the concatenated documents."""
    g = torch.Generator().manual_seed(2)
    return (logits * torch.randn(logits.shape, generator=g, dtype=torch.float64)).sum()


def check(model: RWKV, backend: str) -> None:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 40, (3, T), generator=g)
    resets = torch.tensor([[i in starts for i in range(T)] for starts in STARTS])
    parameters = [
        p
        for name, p in model.named_parameters()
        if not name.startswith(("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"))
    ]
    with torch.no_grad():
        _, state = model.forward(tokens[:, :7])
    logits, after = model.forward(tokens, state, lengths=torch.tensor(LENGTHS), resets=resets, backend=backend)
    packed = torch.cat([row[:n] for row, n in zip(logits, LENGTHS)])
    alone = []
    for row, (starts, n) in enumerate(zip(STARTS, LENGTHS)):
        cuts = [0, *sorted(i for i in starts if 0 < i < n), n]
        for first, last in pairwise(cuts):
            start = None if first in starts else state.select(row)
            part, end = model.forward(tokens[row, first:last], start, backend="naive")
            alone.append(part)
        for name, value in end.items():
            if name not in ("num", "den", "exp"):  # the exponent of RWKV-4 is free
                torch.testing.assert_close(after.select(row)[name], value, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(row_loss(packed), parameters)
    expected = torch.autograd.grad(row_loss(torch.cat(alone)), parameters)
    for a, b in zip(got, expected):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()
        assert b.abs().max() > 0


@pytest.mark.parametrize("version,backend", CASES)
def test_a_packed_row_equals_its_documents_alone(version, backend):
    """Logits, states and the gradient of every parameter."""
    check(build(version), backend)


def test_a_packed_row_equals_its_documents_alone_with_a_channel_mix_first():
    check(build("4", pre_ffn=True), "chunk")


def test_a_packed_row_equals_its_documents_alone_under_activation_checkpointing():
    model = build("7")
    model.activation_checkpointing = True
    check(model, "chunk")


def test_resets_of_one_row_need_no_batch_axis():
    model, tokens = build("7"), torch.arange(9)
    resets = torch.arange(9) == 4
    logits, _ = model.forward(tokens, resets=resets)
    expected, _ = model.forward(tokens[None], resets=resets[None])
    torch.testing.assert_close(logits, expected[0], rtol=0, atol=0)


def test_wrong_resets_are_refused():
    model, tokens = build("7"), torch.arange(9)
    with pytest.raises(ValueError, match=r"resets must be bool \[1, 9\], got torch.bool \[1, 8\]"):
        model.forward(tokens, resets=torch.zeros(8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"resets must be bool \[1, 9\], got torch.int64"):
        model.forward(tokens, resets=torch.zeros(9, dtype=torch.long))
    with pytest.raises(ValueError, match="tuned initial state"):
        build("7", time_state=True).forward(tokens, resets=torch.zeros(9, dtype=torch.bool))
