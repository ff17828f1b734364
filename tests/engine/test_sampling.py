import math
from typing import Any, Unpack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from receptance.engine.params import SamplingFields
from receptance.engine.sampling import (
    Counts,
    ParamRows,
    SamplingParams,
    adjusted,
    digit_weight,
    distribution,
    draw,
    log_probabilities,
    sample,
    uniform,
)
from receptance.errors import ConfigError

V = 40


def rows(*params: SamplingParams, vocab: int = V) -> ParamRows:
    return ParamRows.of(params, vocab, 0, "cpu")


def probabilities(logits: torch.Tensor, **fields: Unpack[SamplingFields]) -> torch.Tensor:
    return distribution(logits[None], rows(SamplingParams(**fields), vocab=len(logits)))[0]


logits_rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=V).map(torch.tensor)
any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-5, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
)

# --- truncation ---


@given(logits_rows, any_params)
@settings(deadline=None)
def test_probabilities_sum_to_one_and_keep_the_maximum(logits: torch.Tensor, params: SamplingParams) -> None:
    p = distribution(logits[None], rows(params, vocab=len(logits)))[0]
    assert abs(float(p.sum()) - 1) < 1e-5
    assert p[logits.argmax()] > 0
    assert not p.isnan().any()


@given(logits_rows, st.integers(1, 50))
@settings(deadline=None)
def test_top_k_keeps_the_k_largest_and_their_ties(logits: torch.Tensor, k: int) -> None:
    kept = probabilities(logits, top_k=k) > 0
    plain = logits.softmax(-1)
    smallest = plain.sort(descending=True).values[min(k, len(plain)) - 1]
    assert torch.equal(kept, (plain >= smallest) & (plain > 0))


@given(logits_rows, st.floats(0, 0.999))
@settings(deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_p_and_ties(logits: torch.Tensor, top_p: float) -> None:
    plain = logits.softmax(-1)
    kept = probabilities(logits, top_p=top_p) > 0
    assert float(plain[kept].double().sum()) >= min(top_p, 1) - 1e-5
    least = plain[kept].min()
    assert float(plain[kept & (plain > least)].double().sum()) <= top_p + 1e-5
    assert torch.equal(kept, (plain >= least) & (plain > 0))


@given(logits_rows, st.floats(0.001, 1))
@settings(deadline=None)
def test_min_p_keeps_what_is_near_the_maximum(logits: torch.Tensor, min_p: float) -> None:
    plain = logits.softmax(-1)
    kept = probabilities(logits, min_p=min_p) > 0
    assert torch.equal(kept, plain >= torch.tensor(min_p) * plain.max())


def test_top_p_one_cuts_nothing() -> None:
    logits = torch.linspace(-9, 9, 1000)
    assert (probabilities(logits, top_p=1.0) > 0).all()


def test_temperature_acts_after_truncation() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    kept = probabilities(logits, top_p=0.7, temperature=5.0) > 0
    assert torch.equal(kept, probabilities(logits, top_p=0.7) > 0)


def test_greedy_takes_the_lowest_of_equal_maxima() -> None:
    logits = torch.tensor([1.0, 4.0, 4.0, 0.0])
    assert probabilities(logits, temperature=0.0).tolist() == [0, 1, 0, 0]


def test_a_tiny_temperature_stays_finite() -> None:
    assert probabilities(torch.tensor([1.0, 900.0, 0.0]), temperature=1e-30).tolist() == [0, 1, 0]


# --- rows, seeds, draws ---


@given(st.lists(any_params, min_size=2, max_size=6), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=50)
def test_a_row_is_drawn_the_same_alone_and_anywhere_in_a_batch(params: list[SamplingParams], seed: int) -> None:
    logits = torch.randn(len(params), V, generator=torch.Generator().manual_seed(seed % 2**31)) * 4
    points = [uniform(seed, i) for i in range(len(params))]
    together = sample(logits, rows(*params), points)
    flipped = sample(logits.flip(0), rows(*reversed(params)), points[::-1]).flip(0)
    alone = [sample(logits[i][None], rows(p), [points[i]])[0] for i, p in enumerate(params)]
    assert together.tolist() == flipped.tolist() == torch.stack(alone).tolist()


@given(logits_rows, any_params, st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_only_tokens_with_probability_are_drawn(logits: torch.Tensor, params: SamplingParams, point: float) -> None:
    p = distribution(logits[None], rows(params, vocab=len(logits)))
    assert p[0, draw(p, [point])[0]] > 0


def test_the_ends_of_the_range_draw_the_first_and_last_possible_token() -> None:
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]] * 2)
    assert draw(p, [0.0, 1.0]).tolist() == [1, 3]


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    n = 4000
    drawn = draw(p.expand(n, 4), [uniform(7, i) for i in range(n)])
    frequency = drawn.bincount(minlength=4) / n
    assert (frequency - p).abs().max() < 0.03


def test_uniform_depends_on_seed_and_step_alone() -> None:
    assert uniform(1, 2) == uniform(1, 2) != uniform(2, 1)
    assert all(0 <= uniform(2**64 - 1, i) < 1 for i in range(100))


# --- bias and penalties ---


def test_bias_is_added_and_minus_infinity_bans() -> None:
    params = rows(SamplingParams(logit_bias={2: 5.0, 0: -math.inf}), SamplingParams())
    x = adjusted(torch.zeros(2, V), params)
    assert x[0, :3].tolist() == [-math.inf, 0, 5]
    assert not x[1].any()


def test_ignore_eos_bans_end_of_document() -> None:
    assert adjusted(torch.zeros(1, V), rows(SamplingParams(ignore_eos=True)))[0, 0] == -math.inf


@given(st.lists(st.integers(0, V - 1), max_size=12), st.lists(st.integers(0, V - 1), max_size=12))
@settings(deadline=None, max_examples=50)
def test_penalties_equal_the_long_hand_count(prompt: list[int], output: list[int]) -> None:
    asked = SamplingParams(
        presence_penalty=0.3, frequency_penalty=0.7, repetition_penalty=1.3, penalty_decay=0.9, penalize_digits=True
    )
    logits = torch.linspace(-3, 3, V)
    params, counts = rows(asked), Counts.start([prompt], torch.ones(V))
    for token in output:
        counts = counts.after(torch.tensor([token]), params)
    expected = logits.clone()
    for token in set(prompt + output):
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token in set(output):
        age = [len(output) - 1 - i for i, t in enumerate(output) if t == token]
        expected[token] -= 0.3 + 0.7 * sum(0.9**n for n in age)
    assert (adjusted(logits[None], params, counts)[0] - expected).abs().max() < 1e-5


def test_digit_weight_follows_the_reference_rule() -> None:
    texts = [b"1", b" ", b"12", b"\t", b"a", b"1a", b"  ", "é".encode()]
    assert digit_weight(texts).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_log_probabilities_are_those_of_the_raw_softmax() -> None:
    logits = torch.randn(2, V)
    chosen, ids, values = log_probabilities(logits, torch.tensor([3, 4]), 5)
    expected = logits.log_softmax(-1)
    assert torch.allclose(chosen, expected[[0, 1], [3, 4]])
    assert torch.allclose(values, expected.sort(-1, descending=True).values[:, :5])
    assert torch.allclose(expected.gather(1, ids), values)


# --- validation ---


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("top_p", 1.01),
        ("top_p", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", 2),
        ("presence_penalty", math.inf),
        ("repetition_penalty", 0),
        ("penalty_decay", 1.1),
        ("max_tokens", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", 101),
        ("stop", [""]),
        ("stop", ["x"] * 33),
        ("stop", [3]),
        ("stop_tokens", [-1]),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: 1e39}),  # infinity in float32
        ("ignore_eos", 1),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**dict[str, Any]({field: value}))


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="logit_bias has token id 40"):
        rows(SamplingParams(logit_bias={40: 1.0}))


def test_params_are_hashable_whatever_was_given() -> None:
    assert SamplingParams(logit_bias={3: 1, 1: 2}, stop="x") == SamplingParams(
        logit_bias=((1, 2.0), (3, 1.0)), stop=["x"]
    )
    assert len({SamplingParams(stop=["a"]), SamplingParams(stop="a")}) == 1


def test_the_keyword_fields_are_those_of_the_dataclass() -> None:
    assert SamplingFields.__annotations__ == SamplingParams.__annotations__
