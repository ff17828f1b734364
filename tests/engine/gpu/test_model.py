"""The GPU's decoding and prefill against the models in float64; without a GPU the kernels are emulated."""

from itertools import pairwise

import pytest
import torch

from receptance.engine.gpu import model as gpu
from receptance.engine.gpu.model import GpuModel
from receptance.models import RWKV, RWKV4, RWKV5, RWKV6, RWKV7
from receptance.models.v4 import RWKV4Config
from receptance.models.v5 import RWKV5Config
from receptance.models.v6 import RWKV6Config
from receptance.models.v7 import RWKV7Config

pytestmark = pytest.mark.usefixtures("kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 6e-3  # of logits: the roundings to float16 between kernels, a few per layer, on vectors of few elements


OLDER = ["4", "5.0", "5.1", "5.2", "6"]


def make(
    head: int = 64, heads: int = 2, layers: int = 2, first_value: bool = True, ranks=(32, 64, 32, 96), vocab: int = 96
) -> RWKV7:
    c = head * heads
    config = RWKV7Config(vocab, layers, c, 3 * c + 32, *ranks, head_size=head, first_value=first_value)
    return filled(RWKV7(config))


def older(version: str, head: int = 64, heads: int = 2, layers: int = 2, vocab: int = 96) -> RWKV:
    c = head * heads
    if version == "4":
        return filled(RWKV4(RWKV4Config(vocab, layers, c, c, 4 * c)))
    if version == "6":
        return filled(RWKV6(RWKV6Config(vocab, layers, c, 3 * c + 32, head, mix_rank=32, decay_rank=64)))
    return filled(RWKV5(RWKV5Config(vocab, layers, c, 3 * c + 32, head, version=version)))


def filled(model):
    """Random weights everywhere, rounded so that casting them costs nothing."""
    g = torch.Generator().manual_seed(0)
    vectors = "r_k", "time_decay", "time_faaaa", "time_first"
    for name, p in model.named_parameters():
        # RWKV-6's five second maps in one tensor too: larger ones make a model that torch's own float16 misses by 6e-3
        is_matrix = p.dim() >= 2 and min(p.shape) > 1 and not name.endswith(vectors)
        scale = 1 / p.shape[-1] ** 0.5 if is_matrix else 0.5
        p.data = torch.randn(p.shape, generator=g) * scale + (1.0 if "ln" in name and name.endswith("weight") else 0.0)
        p.data = p.data.half().float()
    return model.double().to(DEVICE).requires_grad_(False)


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x.double() - reference).norm() / reference.norm())


def put(fast: GpuModel, slots: list[int], state) -> None:
    for name, x in fast.state.items():
        x[:, slots] = state[name].to(x)


def meaning(state) -> dict[str, torch.Tensor]:
    """RWKV-4's num and den share a factor that depends on how its exponent was chosen: the average, and the weight."""
    parts = {name: x.double() for name, x in state.items()}
    if "exp" in parts:
        weight = parts["den"].log() + parts.pop("exp")
        parts |= {"num": parts["num"] / parts["den"], "den": weight}
    return parts


def check_state(fast: GpuModel, slots: list[int], state, bound: float = BOUND) -> None:
    expected = meaning(state)
    for name, x in meaning({name: x[:, slots] for name, x in fast.state.items()}).items():
        assert error(x, expected[name]) < bound, name


def start(model: RWKV, batch: int, tokens: int = 3):
    ids = torch.randint(96, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return model.forward(ids, last_only=True)[1]


@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("head", [32, 64, 128])
def test_decoding_equals_the_model(head, batch):
    if head != 64 and batch == 9:
        return
    check_decoding(make(head), batch)


def check_decoding(model: RWKV, batch: int, steps: int = 2, bound: float = BOUND, **options) -> GpuModel:
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
    assert all(x[:, free].isnan().all() for x in fast.state.values())
    return fast


@pytest.mark.parametrize("version", OLDER)
def test_older_versions_decode_as_the_models(version):
    check_decoding(older(version), 3)


@pytest.mark.parametrize(("version", "head"), [("6", 32), ("5.2", 128)])
def test_other_heads_of_older_versions(version, head):
    check_decoding(older(version, head), 1)


@pytest.mark.parametrize("version", OLDER)
def test_many_rows_of_older_versions(version, monkeypatch):
    many(monkeypatch)
    check_decoding(older(version, heads=3), 5)


def test_older_versions_with_some_rows(monkeypatch):
    monkeypatch.setattr(gpu, "FEW_ROWS", 2)
    check_decoding(older("6"), 9)


def many(monkeypatch) -> None:
    """Makes a few rows take what many do."""
    monkeypatch.setattr(gpu, "GEMV_ROWS", 2)
    monkeypatch.setattr(gpu, "FEW_ROWS", 2)


def test_many_rows_take_other_products(monkeypatch):
    many(monkeypatch)
    check_decoding(make(layers=3), 5)


def test_many_rows_with_a_half_precision_state(monkeypatch):
    many(monkeypatch)
    check_decoding(make(), 4, bound=8e-3, state_dtype=torch.float16)


def test_some_rows_apply_the_low_rank_maps_apart(monkeypatch):
    monkeypatch.setattr(gpu, "FEW_ROWS", 2)
    check_decoding(make(heads=3, first_value=False), 9)


def test_a_half_precision_state():
    check_decoding(make(), 3, bound=8e-3, state_dtype=torch.float16)


def test_weights_in_bfloat16_decode_too():
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
    check_prefill(make(head), lengths)


@pytest.mark.parametrize("lengths", [[4, 4], [1, 7, 3]])
@pytest.mark.parametrize("version", OLDER)
def test_older_versions_prefill_as_the_models(version, lengths):
    check_prefill(older(version), lengths)


def check_prefill(model, lengths):
    n, total = len(lengths), sum(lengths)
    state = start(model, n)
    fast = GpuModel(model, slots=n + 1, most_rows=8)
    slots = list(range(n, 0, -1))
    tokens = torch.arange(total, device=DEVICE) * 11 % 96
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for x in fast.state.values():
        x.fill_(torch.nan)
    put(fast, slots, state)
    all_logits = fast.prefill(tokens, starts, slots, all_logits=True)
    put(fast, slots, state)
    got = fast.prefill(tokens, starts, slots)
    for i, (a, b) in enumerate(pairwise(starts)):
        expected, after = model.forward(tokens[None, a:b], state.select(i))
        assert error(got[i : i + 1], expected[:, -1]) < BOUND
        assert error(all_logits[a:b], expected[0]) < BOUND
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
    with pytest.raises(ValueError, match="dim_att is 64"):
        GpuModel(RWKV4(RWKV4Config(96, 1, 32, 64, 96)), slots=1)
    with pytest.raises(ValueError, match="mix_rank 20"):
        GpuModel(RWKV6(RWKV6Config(96, 1, 64, 96, mix_rank=20)), slots=1)
    with pytest.raises(ValueError, match="do not cut 3 tokens into 2"):
        GpuModel(make(), slots=2, most_rows=8).prefill(torch.zeros(3, dtype=torch.long), [0, 2], [0, 1])
