"""The GPU's sampler against `engine.sampling.sample`: the same tokens for the same uniform numbers."""

import numpy as np
import pytest
import torch

from receptance.engine.gpu import sampler as sampler_module
from receptance.engine.gpu.sampler import GpuSampler
from receptance.engine.params import SamplingParams
from receptance.engine.sampling import Counts, ParamRows, sample
from receptance.errors import ConfigError

pytestmark = pytest.mark.usefixtures("kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 3000


PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=1),
    SamplingParams(top_k=40),
    SamplingParams(top_p=0.3),
    SamplingParams(top_p=0.95, top_k=500, temperature=1.7),
    SamplingParams(min_p=0.1),
    SamplingParams(top_p=0.9, min_p=0.2),
    SamplingParams(top_p=0.5, min_p=0.001, temperature=1.4),
    SamplingParams(top_p=0.9, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2, penalty_decay=0.99),
    SamplingParams(top_k=3, logit_bias={5: 4.0, 17: 3.5, 99: -2.0}, ignore_eos=True),
]


def draws(params: list[SamplingParams], logits: torch.Tensor, uniforms: list[float], steps: int = 1):
    """Tokens of the GPU's sampler and of the plain one, for the same logits `steps` times."""
    n = len(params)
    weight = (np.arange(V) % 7 > 0).astype(np.float32)
    prompts = [[i, 2 * i + 1, 7] for i in range(n)]
    fast = sampler(weight)
    for i, (p, prompt) in enumerate(zip(params, prompts)):
        fast.admit(n - i, p, prompt)
    there = torch.from_numpy(weight).to(DEVICE)
    rows, counts = ParamRows.of(params, V, 0, DEVICE), Counts.start(prompts, there)
    got, expected = [], []
    for _ in range(steps):
        got.append(fast.draw(logits, range(n, 0, -1), uniforms, None))
        expected.append(sample(logits.float(), rows, uniforms, counts))
        counts = counts.after(expected[-1], rows)
    return torch.tensor(got), torch.stack(expected).cpu()


def sampler(weight: np.ndarray) -> GpuSampler:
    return GpuSampler(V, 0, lambda: weight, torch.device(DEVICE))


def make_logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def test_tokens_are_those_of_the_plain_sampler():
    same = total = 0
    for seed in range(3):
        uniforms = torch.rand(len(PARAMS), generator=torch.Generator().manual_seed(seed + 9)).tolist()
        got, expected = draws(PARAMS, make_logits(len(PARAMS), seed), uniforms, steps=3)
        same, total = same + int((got == expected).sum()), total + got.numel()
    assert same == total


def test_half_precision_logits_have_ties():
    logits = make_logits(len(PARAMS), 5).half()
    got, expected = draws(PARAMS, logits, [0.3] * len(PARAMS))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("room", [0, sampler_module.ROW_BYTES])
def test_logits_that_find_room_on_the_multiprocessor_and_that_do_not(room, half, monkeypatch):
    """Rows that lie a multiple of eight apart, and of four alone, which are not copied."""
    monkeypatch.setattr(sampler_module, "ROW_BYTES", room)
    chosen = [PARAMS[i] for i in (0, 1, 3, 5, 8)]
    fast = sampler(np.ones(V, np.float32))
    for row, params in enumerate(chosen):
        fast.admit(row, params, [])
    entries = torch.from_numpy(fast.entries(range(5), [0.6] * 5, None)[0].view(np.uint8)).to(DEVICE)
    expected = None
    for beyond in 0, 4:
        wide = torch.full((5, V + beyond), torch.nan, device=DEVICE)
        wide[:, :V] = make_logits(5, 8)
        wide = wide.half() if half else wide
        tokens = torch.empty(5, dtype=torch.int64, device=DEVICE)
        fast.launch(wide, entries, tokens)
        if expected is None:
            expected = sample(wide.float(), ParamRows.of(chosen, V, 0, DEVICE), [0.6] * 5, None)
        assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_distribution(u):
    got, expected = draws(PARAMS, make_logits(len(PARAMS), 6, scale=1.0), [u] * len(PARAMS))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "params", [SamplingParams(top_p=0.4), SamplingParams(top_k=700, top_p=0.99), SamplingParams(top_k=9)]
)
def test_more_tokens_of_about_one_probability_than_a_list_holds(params):
    vocab = 9000
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(3)).mul(1e-3).to(DEVICE)
    logits[1] = 0.5
    fast = GpuSampler(vocab, 0, lambda: np.ones(vocab, np.float32), torch.device(DEVICE))
    for row in range(2):
        fast.admit(row, params, [])
    for u in 0.1234, 0.7712:
        expected = sample(logits, ParamRows.of([params] * 2, vocab, 0, DEVICE), [u] * 2, None)
        assert fast.draw(logits, [0, 1], [u] * 2, None) == expected.tolist()


def test_greedy_takes_the_lowest_of_equals_and_nan_is_reported():
    logits = torch.zeros(2, V, device=DEVICE)
    logits[0, [9, 4, 2000]] = 1.0
    logits[1, 100] = torch.nan
    fast = sampler(np.ones(V, np.float32))
    fast.admit(0, SamplingParams(temperature=0), [])
    fast.admit(1, SamplingParams(), [])
    assert fast.draw(logits, [0, 1], [0.5, 0.5], None) == [4, -1]
    again = torch.full((2,), 7, device=DEVICE)
    entries = torch.from_numpy(fast.entries([0, 1], [0.5, 0.5], None)[0].view(np.uint8)).to(DEVICE)
    fast.launch(logits, entries, torch.empty_like(again), again=again)
    assert again.tolist() == [4, 0]


def test_only_allowed_tokens_come():
    mask = np.zeros(-(-V // 32), np.uint32)
    mask[40] = 1 << 3
    fast = sampler(np.ones(V, np.float32))
    for row, params in enumerate([SamplingParams(), SamplingParams(top_p=0.5, logit_bias={3: 50.0}), SamplingParams()]):
        fast.admit(row, params, [])
    got = fast.draw(make_logits(3), [0, 1, 2], [0.5] * 3, [mask, mask, None])
    assert got[:2] == [40 * 32 + 3] * 2
    assert got[2] != got[0]


def test_rows_of_an_odd_length_are_taken_too():
    logits = make_logits(2)[:, : V - 1]
    fast = GpuSampler(V - 2, 0, lambda: np.ones(V - 2, np.float32), torch.device(DEVICE))
    fast.admit(0, SamplingParams(temperature=0), [])
    assert fast.draw(logits, [0, 0], [0.5] * 2, None) == logits[:, : V - 2].argmax(1).tolist()


def test_a_bias_beyond_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=f"token id {V}"):
        sampler(np.ones(V, np.float32)).admit(0, SamplingParams(logit_bias={V: 1.0}), [])
