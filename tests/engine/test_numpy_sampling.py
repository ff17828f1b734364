"""The NumPy sampler beside the torch one: the same probabilities, counts and draws for any parameters."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from receptance.engine import numpy_rows, numpy_sampling, sampling, torch_rows
from receptance.engine.params import SamplingParams
from receptance.errors import ConfigError

V = 40
ROUNDING = 1e-5  # float32 probabilities

any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    presence_penalty=st.sampled_from([0.0, 0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    penalize_digits=st.booleans(),
    ignore_eos=st.booleans(),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from([-math.inf, -1.5, 2.0]), max_size=3),
)


def both(params: list[SamplingParams], prompts: list[list[int]]):
    weight = np.array([i % 3 > 0 for i in range(V)], np.float32)
    theirs = sampling.ParamRows.of(params, V, 0, "cpu"), sampling.Counts.start(prompts, torch.from_numpy(weight))
    ours = numpy_sampling.ParamRows.of(params, V, 0), numpy_sampling.Counts.start(prompts, weight)
    return theirs, ours


@given(st.integers(0, 10**6), st.lists(any_params, min_size=1, max_size=4))
@settings(deadline=None)
def test_both_samplers_agree(seed, params):
    g = np.random.default_rng(seed)
    prompts = [g.integers(0, V, 5).tolist() for _ in params]
    (their_rows, theirs), (our_rows, ours) = both(params, prompts)
    for _ in range(4):
        logits = (g.standard_normal((len(params), V)) * 3).astype(np.float32)
        expected = sampling.adjusted(torch.from_numpy(logits), their_rows, theirs)
        found = numpy_sampling.adjusted(logits, our_rows, ours)
        assert np.allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
        probs = sampling.distribution(expected, their_rows)
        # from the same adjusted logits: a rounding before a truncation could move a token across it
        assert np.abs(numpy_sampling.distribution(expected.numpy(), our_rows) - probs.numpy()).max() <= ROUNDING
        uniforms = [float(u) for u in g.random(len(params))]
        drawn = sampling.draw(probs, uniforms)
        assert numpy_sampling.draw(probs.numpy(), uniforms) == drawn.tolist()
        theirs, ours = theirs.after(drawn, their_rows), ours.after(drawn.tolist(), our_rows)
        assert np.allclose(ours.occurrence, theirs.occurrence.numpy(), rtol=1e-6)
        assert np.array_equal(ours.seen, theirs.seen.numpy())


def test_log_probabilities_agree():
    logits = np.random.default_rng(0).standard_normal((3, V)).astype(np.float32)
    expected = sampling.log_probabilities(torch.from_numpy(logits), torch.tensor([1, 2, 3]), 5)
    found = numpy_sampling.log_probabilities(logits, [1, 2, 3], 5)
    assert np.allclose(found[0], expected[0].numpy(), atol=1e-6)
    assert np.array_equal(found[1], expected[1].numpy())
    assert np.allclose(found[2], expected[2].numpy(), atol=1e-6)


def test_a_bias_beyond_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="logit_bias has token id 40"):
        numpy_sampling.ParamRows.of([SamplingParams(logit_bias={40: 1.0})], V, 0)


def test_rows_can_be_left_out():
    _, (_, counts) = both([SamplingParams()] * 3, [[1], [2], [3]])
    assert counts.select([2]).seen[0].nonzero()[0].tolist() == [3]


def test_nothing_is_drawn_from_nan_or_infinity() -> None:
    for bad, are_broken in (np.nan, True), (np.inf, True), (-np.inf, False), (1e38, False):
        logits = np.array([[0, 1], [2, bad]], np.float32)
        assert numpy_rows.are_broken(logits) == torch_rows.are_broken(torch.from_numpy(logits)) == are_broken
