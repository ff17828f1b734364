"""Weights of 8 bits in products of few rows."""

import pytest
import torch
from tests.engine.gpu.test_model import BOUND, DEVICE, error, filled, make, put, start

from receptance.engine.gpu.gemv import quantised, quantised_float8
from receptance.engine.gpu.model import GpuModel
from receptance.models import RWKV7
from receptance.models.v7 import RWKV7Config

pytestmark = pytest.mark.usefixtures("kernels")


def as_int8(weight: torch.Tensor) -> torch.Tensor:
    numbers, scales = quantised(weight.half())
    return ((numbers.float() - 128) * scales[:, None]).to(weight)


def as_float8(weight: torch.Tensor) -> torch.Tensor:
    numbers, scales = quantised_float8(weight.half())
    return (numbers.view(torch.float8_e4m3fn).float() / 256 * scales[:, None]).to(weight)


@pytest.mark.parametrize("batch", [1, 11])
@pytest.mark.parametrize(("weights", "rounded"), [("int8", as_int8), ("float8", as_float8)])
def test_weights_of_8_bits_are_those_of_the_rounded_model(weights, rounded, batch):
    model = filled(RWKV7(RWKV7Config(96, 2, 128, 448, 32, 64, 32, 96, head_size=64)))
    fast = GpuModel(model, slots=batch, most_rows=batch, weights=weights)
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


def test_every_number_of_8_bits_is_exact():
    """A matrix whose rows begin with 1 and 448 and hold all finite e4m3 numbers, times rows of the unit matrix."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = torch.cat([values[:127], values[128:255], torch.zeros(2)])  # but for the two that are no numbers
    numbers, scales = quantised_float8(values.repeat(2, 1) * torch.tensor([[1.0], [0.5]]))
    assert torch.equal(numbers[0].view(torch.float8_e4m3fn).float(), values)
    assert scales.tolist() == [256.0, 128.0]


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"head": 32, "heads": 1}])
def test_8_bits_where_they_do_not_fit_are_refused(options):
    model = make(options.pop("head", 64), options.pop("heads", 2))
    with pytest.raises(ValueError, match="needs float16 and sizes that are multiples of 64"):
        GpuModel(model, slots=1, weights="float8", **options)
