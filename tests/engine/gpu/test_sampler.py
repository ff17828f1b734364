"""The GPU's sampler against `engine.sampling.sample`: the same tokens for the same uniform numbers."""

import pytest
import torch

from receptance.engine.gpu.sampler import GpuSampler
from receptance.engine.params import SamplingParams
from receptance.engine.sampling import Counts, ParamRows, sample

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
    SamplingParams(top_p=0.9, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2, penalty_decay=0.99),
    SamplingParams(top_k=3, logit_bias={5: 4.0, 17: 3.5, 99: -2.0}, ignore_eos=True),
]


def draws(params: list[SamplingParams], logits: torch.Tensor, uniforms: list[float], steps: int = 1):
    """Tokens of the GPU's sampler and of the plain one, for the same logits `steps` times."""
    n = len(params)
    weight = (torch.arange(V, device=DEVICE) % 7 > 0).float()
    prompts = [[i, 2 * i + 1, 7] for i in range(n)]
    fast = GpuSampler(n, n, V, weight)
    fast.set(params)
    slots = torch.arange(n, 0, -1, dtype=torch.int32, device=DEVICE) - 1
    for i, prompt in enumerate(prompts):
        fast.start(n - 1 - i, prompt)
    rows, counts = ParamRows.of(params, V, 0, DEVICE), Counts.start(prompts, weight)
    got, expected = [], []
    points = torch.tensor(uniforms, dtype=torch.float64, device=DEVICE)
    for _ in range(steps):
        got.append(fast.draw(logits, slots, points).clone())
        expected.append(sample(logits.float(), rows, uniforms, counts))
        counts = counts.after(expected[-1], rows)
    return torch.stack(got), torch.stack(expected)


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


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_distribution(u):
    got, expected = draws(PARAMS, make_logits(len(PARAMS), 6, scale=1.0), [u] * len(PARAMS))
    assert torch.equal(got, expected)


def test_greedy_takes_the_lowest_of_equals_and_nan_is_reported():
    logits = torch.zeros(2, V, device=DEVICE)
    logits[0, [9, 4, 2000]] = 1.0
    logits[1, 100] = torch.nan
    fast = GpuSampler(2, 2, V, torch.ones(V, device=DEVICE))
    fast.set([SamplingParams(temperature=0), SamplingParams()])
    slots = torch.arange(2, dtype=torch.int32, device=DEVICE)
    again = torch.full((2,), 7, device=DEVICE)
    tokens = fast.draw(logits, slots, torch.full((2,), 0.5, dtype=torch.float64, device=DEVICE), again=again)
    assert tokens.tolist() == [4, -1]
    assert again.tolist() == [4, 0]


def test_only_allowed_tokens_come():
    bits = torch.zeros(1, -(-V // 32), dtype=torch.int32, device=DEVICE)
    bits[0, 40] = 1 << 3
    fast = GpuSampler(1, 1, V, torch.ones(V, device=DEVICE))
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    half = torch.full((1,), 0.5, dtype=torch.float64, device=DEVICE)
    assert fast.draw(make_logits(1), zero, half, allowed=bits).tolist() == [40 * 32 + 3]
