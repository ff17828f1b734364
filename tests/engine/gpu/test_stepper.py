"""Steps of a batch on the GPU: what comes of a batch is what comes of its rows alone, and of the model itself."""

import pytest
import torch
from tests.engine.gpu.test_rwkv7 import DEVICE, make

from receptance.engine.gpu.rwkv7 import GpuModel
from receptance.engine.gpu.sampler import GpuSampler
from receptance.engine.gpu.stepper import Stepper, bucket
from receptance.engine.params import SamplingParams

GREEDY = SamplingParams(temperature=0)

pytestmark = pytest.mark.usefixtures("kernels")


def run(model, prompts: list[list[int]], slots: list[int], steps: int) -> list[list[int]]:
    fast = GpuModel(model, slots=4, most_rows=4)
    for x in fast.state.values():
        x.fill_(torch.nan)
    sampler = GpuSampler(4, 4, 96, torch.ones(96, device=DEVICE))
    stepper = Stepper(fast, sampler)
    sampler.set([GREEDY] * len(slots))
    for slot, prompt in zip(slots, prompts):
        fast.reset(slot)
        if len(prompt) > 1:
            fast.prefill(torch.tensor(prompt[:-1], device=DEVICE), [0, len(prompt) - 1], [slot])
    stepper.assign(slots, [prompt[-1] for prompt in prompts])
    return torch.stack([stepper.step([0.5] * len(slots)).clone() for _ in range(steps)], 1).tolist()


def test_a_batch_goes_on_by_itself_as_the_model_does():
    model = make(layers=1)
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6]]
    got = run(model, prompts, [2, 0, 3], steps=4)
    for prompt, tokens in zip(prompts, got):
        logits, state = model.forward(prompt)
        expected = []
        for _ in tokens:
            expected.append(int(logits[-1].argmax()))
            logits, state = model.forward(expected[-1:], state)
        assert tokens == expected


def test_buckets_and_sizes():
    assert [bucket(x, 100) for x in (1, 2, 3, 8, 9, 100)] == [1, 2, 4, 8, 16, 100]
    fast = GpuModel(make(layers=1), slots=1, most_rows=8)
    with pytest.raises(ValueError, match="a sampler of 4 rows for a model of 8"):
        Stepper(fast, GpuSampler(4, 1, 96, torch.ones(96, device=DEVICE)))
