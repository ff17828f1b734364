"""The GPU's decoding and prefill of RWKV-7 against the model in float64; without a GPU the kernels are emulated."""

from itertools import pairwise

import pytest
import torch

from receptance.engine.gpu import rwkv7
from receptance.engine.gpu.rwkv7 import GpuModel
from receptance.models.v7 import RWKV7, RWKV7Config

pytestmark = pytest.mark.usefixtures("kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 6e-3  # of logits: the roundings to float16 between kernels, a few per layer, on vectors of few elements


def make(head: int = 64, heads: int = 2, layers: int = 2, first_value: bool = True, ranks=(32, 64, 32, 96)) -> RWKV7:
    c = head * heads
    config = RWKV7Config(96, layers, c, 3 * c + 32, *ranks, head_size=head, first_value=first_value)
    model = RWKV7(config)
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        scale = 1 / p.shape[-1] ** 0.5 if p.dim() == 2 and min(p.shape) > 1 and "r_k" not in name else 0.5
        p.data = torch.randn(p.shape, generator=g) * scale + (1.0 if "ln" in name and name.endswith("weight") else 0.0)
        p.data = p.data.half().float()  # so that casting the weights costs nothing
    return model.double().to(DEVICE).requires_grad_(False)


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x.double() - reference).norm() / reference.norm())


def put(fast: GpuModel, slots: list[int], state) -> None:
    for name, x in fast.state.items():
        x[:, slots] = state[name].to(x)


def check_state(fast: GpuModel, slots: list[int], state, bound: float = BOUND) -> None:
    for name, x in fast.state.items():
        assert error(x[:, slots], state[name]) < bound, name


def start(model: RWKV7, batch: int, tokens: int = 3):
    ids = torch.randint(96, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return model.forward(ids, last_only=True)[1]


@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("head", [32, 64, 128])
def test_decoding_equals_the_model(head, batch):
    if head != 64 and batch == 9:
        return
    check_decoding(make(head), batch)


def check_decoding(model: RWKV7, batch: int, steps: int = 2, bound: float = BOUND, **options) -> GpuModel:
    state = start(model, batch)
    fast = GpuModel(model, slots=batch + 2, most_rows=40, **options)
    for x in fast.state.values():
        x.fill_(torch.nan)  # free rows, which nothing may read
    slots = torch.randperm(batch + 2, generator=torch.Generator().manual_seed(2))[:batch].tolist()
    put(fast, slots, state)
    for i in range(steps):
        tokens = (torch.arange(batch, device=DEVICE) * 7 + i) % 96
        expected, state = model.forward(tokens[:, None], state, last_only=True)
        got = fast.decode(tokens, torch.tensor(slots, dtype=torch.int32, device=DEVICE))
        assert error(got, expected) < bound
        check_state(fast, slots, state, bound)
    free = [i for i in range(batch + 2) if i not in slots]
    assert fast.state["wkv"][:, free].isnan().all()
    return fast


def test_many_rows_take_other_products(monkeypatch):
    monkeypatch.setattr(rwkv7, "GEMV_ROWS", 2)
    monkeypatch.setattr(rwkv7, "FEW_ROWS", 2)
    check_decoding(make(layers=3), 5)


def test_some_rows_apply_the_low_rank_maps_apart(monkeypatch):
    monkeypatch.setattr(rwkv7, "FEW_ROWS", 2)
    check_decoding(make(heads=3, first_value=False), 9)


def test_a_half_precision_state():
    check_decoding(make(), 3, bound=8e-3, state_dtype=torch.float16)


def test_bfloat16():
    check_decoding(make(), 2, bound=5e-2, dtype=torch.bfloat16)


def test_a_row_does_not_depend_on_the_others():
    model = make(layers=1)
    state = start(model, 11)
    tokens = torch.arange(11, device=DEVICE) * 5
    results = []
    for rows in ([0], [4, 0, 2], list(range(11))):
        fast = GpuModel(model, slots=11, most_rows=16, invariant=True)
        put(fast, list(range(11)), state)
        index = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
        results.append(fast.decode(tokens[rows], index)[rows.index(0)].clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("head", "lengths"), [(64, [5]), (64, [1, 7, 3]), (32, [4, 4]), (128, [2])])
def test_prefill_equals_the_model(head, lengths):
    model = make(head)
    n, total = len(lengths), sum(lengths)
    state = start(model, n)
    fast = GpuModel(model, slots=n + 1, most_rows=8)
    for x in fast.state.values():
        x.fill_(torch.nan)
    slots = list(range(n, 0, -1))
    put(fast, slots, state)
    tokens = torch.arange(total, device=DEVICE) * 11 % 96
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    got = fast.prefill(tokens, starts, slots)
    for i, (a, b) in enumerate(pairwise(starts)):
        expected, after = model.forward(tokens[None, a:b], state.select(i), last_only=True)
        assert error(got[i : i + 1], expected) < BOUND
        check_state(fast, [slots[i]], after)


def test_prefill_then_decode_goes_on():
    model = make(layers=1)
    fast = GpuModel(model, slots=2, most_rows=8)
    tokens = torch.tensor([3, 1, 4, 1, 5], device=DEVICE)
    fast.prefill(tokens[:4], [0, 4], [1])
    got = fast.decode(tokens[4:], torch.tensor([1], dtype=torch.int32, device=DEVICE))
    expected, _ = model.forward(tokens[None], last_only=True)
    assert error(got, expected) < BOUND


def test_a_model_that_does_not_fit_says_why():
    config = RWKV7Config(96, 1, 48, 96, 32, 32, 32, 32, head_size=16)
    with pytest.raises(ValueError, match="heads of 16"):
        GpuModel(RWKV7(config), slots=1)
    with pytest.raises(ValueError, match="do not cut 3 tokens into 2"):
        GpuModel(make(), slots=2, most_rows=8).prefill(torch.zeros(3, dtype=torch.long), [0, 2], [0, 1])
