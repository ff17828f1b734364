"""Steps of a batch on the GPU: what comes of a batch is what comes of its rows alone, and of the model itself."""

import numpy as np
import pytest
import torch
from tests.engine.gpu.test_model import DEVICE, make

from receptance.engine.gpu.model import GpuModel
from receptance.engine.gpu.sampler import GpuSampler
from receptance.engine.gpu.stepper import Stepper, bucket
from receptance.engine.params import SamplingParams
from receptance.models.v7 import RWKV7

pytestmark = pytest.mark.usefixtures("kernels")


def stepper_of(model: RWKV7) -> Stepper:
    fast = GpuModel(model, slots=4, most_rows=4)
    for x in fast.state.values():
        x.fill_(torch.nan)
    return Stepper(fast, GpuSampler(96, 0, lambda: np.ones(96, np.float32), torch.device(DEVICE)))


def run(model: RWKV7, prompts: list[list[int]], slots: list[int], steps: int) -> list[list[int]]:
    stepper = stepper_of(model)
    for slot, prompt in zip(slots, prompts):
        stepper.model.reset(slot)
        if len(prompt) > 1:
            stepper.model.prefill(torch.tensor(prompt[:-1], device=DEVICE), [0, len(prompt) - 1], [slot])
    tokens = [stepper.step(slots, [prompt[-1] for prompt in prompts])[0].clone()]
    tokens += [stepper.again()[0].clone() for _ in range(steps - 1)]
    return torch.stack(tokens, 1).tolist()


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


def test_a_step_draws_as_the_sampler_does():
    stepper = stepper_of(make(layers=1))
    params = [SamplingParams(seed=1), SamplingParams(top_p=0.5), SamplingParams(frequency_penalty=0.5)]
    for row, p in enumerate(params):
        stepper.sampler.admit(row, p, [])
        stepper.model.reset(row)
    twin = GpuSampler(96, 0, lambda: np.ones(96, np.float32), torch.device(DEVICE))
    for row, p in enumerate(params):
        twin.admit(row, p, [])
    tokens = [5, 6, 7]
    for step in range(4):
        uniforms = [0.1 + 0.2 * step, 0.9 - 0.2 * step, 0.4]
        entries, _ = stepper.sampler.entries([0, 1, 2], uniforms, None)
        drawn, logits = stepper.step([0, 1, 2], tokens, entries)
        tokens = drawn.tolist()
        assert tokens == twin.draw(logits, [0, 1, 2], uniforms, None)
    assert len(set(tokens)) > 1


def test_new_random_numbers_for_the_same_sequences():
    stepper = stepper_of(make(layers=1))
    stepper.sampler.admit(0, SamplingParams(), [])
    stepper.model.reset(0)
    entries, _ = stepper.sampler.entries([0], [0.2], None)
    stepper.step([0], [3], entries)
    drawn, logits = stepper.again(torch.tensor([0.7], dtype=torch.float64, device=DEVICE))
    assert drawn.tolist() == stepper.sampler.draw(logits, [0], [0.7], None)


def test_steps_have_a_graph_for_each_power_of_two_of_rows():
    assert [bucket(x, 100) for x in (1, 2, 3, 8, 9, 100)] == [1, 2, 4, 8, 16, 100]
