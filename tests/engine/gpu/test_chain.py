"""The step in one launch against the separate kernels, whose bits it gives."""

import pytest
import torch
from tests.engine.gpu.test_model import BOUND, DEVICE, error, filled, make, older, put, start

from receptance.engine.gpu.chain import quantised
from receptance.engine.gpu.model import GpuModel
from receptance.models import RWKV7
from receptance.models.v7 import RWKV7Config

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize(
    ("version", "head", "batch", "options"),
    [
        ("7", 64, 1, {}),
        ("7", 64, 3, {"state_dtype": torch.float16}),
        ("7", 128, 2, {"dtype": torch.bfloat16}),
        ("7", 32, 5, {}),
        ("6", 64, 3, {}),
        ("6", 32, 1, {"state_dtype": torch.float16}),
        ("5.2", 64, 2, {}),
        ("5.0", 64, 1, {}),
        ("4", 64, 3, {}),
    ],
)
def test_one_launch_gives_the_bits_of_many(version, head, batch, options):
    model = make(head) if version == "7" else older(version, head)
    state = start(model, batch)
    slots = torch.arange(batch, dtype=torch.int32, device=DEVICE).flip(0)
    results = []
    for chained in True, False:
        fast = GpuModel(model, slots=batch + 2, most_rows=9, **options)
        assert fast.can_chain(batch)
        for x in fast.state.values():
            x.fill_(torch.nan)
        put(fast, slots.tolist(), state)
        for i in range(2):
            tokens = (torch.arange(batch, device=DEVICE) * 7 + i) % 96
            logits = fast.decode(tokens, slots, chained=chained).clone()
        assert all(x[:, batch:].isnan().all() for x in fast.state.values())
        results.append([logits, *(x[:, :batch] for x in fast.state.values())])
    for one, other in zip(*results):
        assert torch.equal(one, other)


@pytest.mark.parametrize("batch", [1, 11])
def test_weights_of_8_bits_are_those_of_the_rounded_model(batch):
    model = filled(RWKV7(RWKV7Config(96, 2, 128, 448, 32, 64, 32, 96, head_size=64)))
    fast = GpuModel(model, slots=batch, most_rows=batch, int8=True)
    for block in model.blocks:
        for linear in (block.att.receptance, block.att.key, block.att.value, block.att.output, *block.ffn.children()):
            linear.weight.data = rounded(linear.weight.data)
        for name in ("w1", "a1", "g1", *(["v1"] if hasattr(block.att, "v1") else [])):
            first = getattr(block.att, name)
            first.data = rounded(first.data.T).T.contiguous()
    model.head.weight.data = rounded(model.head.weight.data)
    state = start(model, batch)
    slots = torch.arange(batch, dtype=torch.int32, device=DEVICE)
    put(fast, slots.tolist(), state)
    tokens = torch.arange(batch, device=DEVICE) * 7 % 96
    expected, _ = model.forward(tokens[:, None], state, last_only=True)
    assert error(fast.decode(tokens, slots), expected) < BOUND


def rounded(weight: torch.Tensor) -> torch.Tensor:
    numbers, scales = quantised(weight.half())
    return ((numbers.float() - 128) * scales[:, None]).to(weight)


def test_8_bits_where_they_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="int8 needs float16"):
        GpuModel(make(), slots=1, dtype=torch.bfloat16, int8=True)
