"""The fast samplers give the draws of `numpy_sampling`, which tests/engine/test_sampling*.py hold to their oracles."""

import random
import threading

import numpy as np
import pytest

import receptance
from receptance.engine.core_sampler import CoreSampler
from receptance.engine.numpy_sampling import Counts, ParamRows, sample
from receptance.engine.params import SamplingParams
from receptance.engine.plain_sampler import PlainSampler
from receptance.engine.runner import Sampler

VOCAB, EOS = 1000, 0
WEIGHT = (np.arange(VOCAB) % 7 > 0).astype(np.float32)


@pytest.fixture(params=["core", "plain"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    if request.param == "plain":
        return PlainSampler(VOCAB, EOS, lambda: WEIGHT)
    model = receptance.load("rwkv7-stories", engine="native")
    assert model.core is not None
    return CoreSampler(model.core, model.team, model.threads, VOCAB, EOS, lambda: WEIGHT)


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0, 0.3, 1.0, 1.0, 2.0]),
        top_p=rng.choice([1.0, 0.95, 0.5, 0.0]),
        top_k=rng.choice([0, 1, 5, 2000]),
        min_p=rng.choice([0, 0, 0.02, 1.0]),
        presence_penalty=rng.choice([0, 0.5]),
        frequency_penalty=rng.choice([0, 0, 0.3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        penalty_decay=rng.choice([1.0, 0.9]),
        penalize_digits=rng.random() < 0.5,
        logit_bias={rng.randrange(VOCAB): rng.choice([3.0, float("-inf")]) for _ in range(rng.choice([0, 3]))},
        ignore_eos=rng.random() < 0.3,
    )


def test_draws_are_those_of_the_plain_functions(sampler: Sampler) -> None:
    rng, numbers = random.Random(1), np.random.default_rng(1)
    for trial in range(30):
        count = rng.choice([1, 2, 9])
        rows = rng.sample(range(90), count)
        params = [random_params(rng) for _ in rows]
        prompts = [[rng.randrange(VOCAB) for _ in range(5)] for _ in rows]
        columns = ParamRows.of(params, VOCAB, EOS)
        counts = Counts.start(prompts, WEIGHT)
        for row, p, prompt in zip(rows, params, prompts):
            sampler.admit(row, p, prompt)
        for _ in range(5):
            logits = numbers.normal(size=(count, VOCAB + 24)).astype(np.float32) * rng.choice([1, 3])
            uniforms = [rng.random() for _ in rows]
            expected = sample(logits[:, :VOCAB], columns, uniforms, counts)
            counts = counts.after(expected, columns)
            assert sampler.draw(logits, rows, uniforms, None) == expected, trial
        for row in rows:
            sampler.free(row)


def test_a_mask_leaves_only_its_tokens(sampler: Sampler) -> None:
    mask = np.zeros(-(-VOCAB // 32), np.uint32)
    for token in (3, 64, 999):
        mask[token // 32] |= np.uint32(1 << token % 32)
    for row in range(3):
        sampler.admit(row, SamplingParams(temperature=[0, 1, 1][row], top_p=[1, 1, 0.5][row]), [])
    logits = np.random.default_rng(2).normal(size=(3, VOCAB)).astype(np.float32)
    for u in np.linspace(0, 0.999, 20):
        drawn = sampler.draw(logits, [0, 1, 2], [u] * 3, [mask, mask, None])
        assert drawn[0] == max((3, 64, 999), key=lambda t: logits[0, t])
        assert drawn[1] in (3, 64, 999)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_with_nan_or_infinity_is_minus_one_and_others_are_not(sampler: Sampler, bad: float) -> None:
    logits = np.zeros((3, VOCAB), np.float32)
    logits[1, 17] = bad
    logits[0, 4] = logits[2, 5] = 1
    for row in range(3):
        sampler.admit(row, SamplingParams(temperature=0), [])
    assert sampler.draw(logits, [0, 1, 2], [0.5] * 3, None) == [4, -1, 5]


def test_the_threads_of_a_model_draw_and_multiply_for_one_caller_at_a_time() -> None:
    model = receptance.load("rwkv7-stories", engine="native", threads=2)
    assert model.core is not None
    sampler = CoreSampler(model.core, model.team, model.threads, VOCAB, EOS, lambda: WEIGHT)
    for row in 0, 1:
        sampler.admit(row, SamplingParams(), [1])
    drawing = threading.Thread(target=sampler.draw, args=(np.zeros((2, VOCAB), np.float32), [0, 1], [0.5, 0.5], None))
    with model.team():
        drawing.start()
        drawing.join(0.2)
        assert drawing.is_alive()
    drawing.join(30)
    assert not drawing.is_alive()
