"""Products of few rows: norms that they make for themselves, and weights of 8 bits."""

import pytest
import torch
from tests.engine.gpu.test_model import BOUND, DEVICE, error, filled, make, older, put, start

from receptance.engine.gpu import model as gpu
from receptance.engine.gpu.gemv import quantised, quantised_float8
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
        ("5.2", 64, 2, {}),
        ("5.0", 64, 1, {}),
        ("4", 64, 3, {}),
    ],
)
def test_norms_inside_of_products_give_the_bits_of_those_before(version, head, batch, options, monkeypatch):
    model = make(head) if version == "7" else older(version, head)
    state = start(model, batch)
    slots = torch.arange(batch, dtype=torch.int32, device=DEVICE).flip(0)
    results = []
    for most in 8, 0:
        monkeypatch.setattr(gpu, "NORMED_ROWS", most)
        fast = GpuModel(model, slots=batch + 2, most_rows=9, **options)
        assert fast.can_norm(batch)
        for x in fast.state.values():
            x.fill_(torch.nan)
        put(fast, slots.tolist(), state)
        for i in range(2):
            tokens = (torch.arange(batch, device=DEVICE) * 7 + i) % 96
            logits = fast.decode(tokens, slots).clone()
        assert all(x[:, batch:].isnan().all() for x in fast.state.values())
        results.append([logits, *(x[:, :batch] for x in fast.state.values())])
    for one, other in zip(*results):
        assert torch.equal(one, other)


@pytest.mark.parametrize("processors", [1, 2])
def test_a_block_with_tiles_of_several_mixes(processors, monkeypatch):
    model, results = make(), []
    for most in 8, 0:
        monkeypatch.setattr(gpu, "NORMED_ROWS", most)
        fast = GpuModel(model, slots=3, most_rows=9)
        fast.processors = processors
        put(fast, [0, 1, 2], start(model, 3))
        slots = torch.arange(3, dtype=torch.int32, device=DEVICE)
        results.append(fast.decode(torch.tensor([5, 90, 7], device=DEVICE), slots).clone())
    assert torch.equal(*results)


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
