"""The order of windows and the mixture of sources: functions of the sample's number alone."""

import json
import random

import numpy as np
import pytest

from receptance.data import CubicWindows, Mixture, ShuffledWindows
from receptance.data.order import Permutation
from receptance.errors import ConfigError

BILLIONS = 100_000_000_000  # tokens


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 97, 1000, 12345])
def test_a_permutation_reaches_every_place_once(n):
    for key in range(3):
        permutation = Permutation(n, 1, key)
        assert sorted(permutation(range(n)).tolist()) == list(range(n))
        assert [permutation.at(i) for i in range(n)] == permutation(range(n)).tolist()


def test_a_permutation_looks_random():
    n = 1 << 18
    p = Permutation(n, 5, 7)(np.arange(n))
    assert abs(np.corrcoef(p[:-1], p[1:])[0, 1]) < 5 / n**0.5
    assert abs(np.corrcoef(np.arange(n), p)[0, 1]) < 5 / n**0.5
    assert abs(np.mean(p[1:] > p[:-1]) - 0.5) < 5 * (1 / 12 / n) ** 0.5
    cells = np.histogram2d(np.arange(n), p, bins=32)[0]
    chi2, free = ((cells - n / 1024) ** 2 / (n / 1024)).sum(), 31 * 31
    assert abs(chi2 - free) < 5 * (2 * free) ** 0.5


def test_every_order_of_a_few_things_is_equally_likely():
    counts = {}
    for key in range(6000):
        order = tuple(Permutation(4, 9, key)(range(4)).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi2 = sum((count - 250) ** 2 / 250 for count in counts.values())
    assert chi2 < 23 + 5 * 46**0.5


def test_shuffled_windows_visit_every_window_once_per_epoch():
    order = ShuffledWindows(1000, 16, seed=3)
    phases = []
    for epoch in range(3):
        starts = order.starts(range(epoch * order.per_epoch, (epoch + 1) * order.per_epoch)).tolist()
        phases.append(min(starts))
        assert sorted(starts) == [phases[-1] + 16 * i for i in range(order.per_epoch)]
        assert max(starts) + 17 <= 1000
    assert len(set(phases)) > 1
    again = ShuffledWindows(1000, 16, seed=3)
    across = [order.per_epoch - 1, order.per_epoch, 5, 2 * order.per_epoch]  # a batch may span epochs
    assert again.starts(across).tolist() == [int(order.starts([i])[0]) for i in across]
    assert order.starts(range(50)).tolist() != ShuffledWindows(1000, 16, seed=4).starts(range(50)).tolist()


def test_the_order_is_the_same_on_every_machine():
    assert ShuffledWindows(1_000_000, 512, seed=1).starts([0, 1, 1951, 1952, 10**9]).tolist() == [
        490270,
        876830,
        623390,
        337411,
        787619,
    ]


def test_the_order_of_a_huge_stream_needs_no_memory():
    for order in (ShuffledWindows(BILLIONS, 512, 1), CubicWindows(BILLIONS, 512)):
        starts = order.starts(range(7 * order.per_epoch // 2, 7 * order.per_epoch // 2 + 1000))
        assert len(set(starts.tolist())) == 1000
        assert 0 <= starts.min() < BILLIONS // 10
        assert BILLIONS * 9 // 10 < starts.max() <= BILLIONS - 513
        assert all(not isinstance(value, np.ndarray) for value in vars(order).values())


def test_ranks_see_disjoint_parts_of_the_single_process_order():
    order, size = ShuffledWindows(100_000, 16, seed=1), 12
    for n_ranks in (2, 3, 4):
        for step in range(5):
            whole = order.starts(range(step * size, (step + 1) * size)).tolist()
            own = size // n_ranks
            first = step * size
            parts = [order.starts(range(first + r * own, first + (r + 1) * own)) for r in range(n_ranks)]
            assert np.concatenate(parts).tolist() == whole


def random_weights(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [
        rng.choice([1, 2, 3, 10, rng.randint(1, 10**6), int(10 ** rng.uniform(0, 9))]) for _ in range(seed % 12 + 1)
    ]


@pytest.mark.parametrize("seed", range(24))
def test_a_mixture_keeps_its_proportions_at_every_point(seed):
    """The rule says within 1, a little more in rare branches of large trees."""
    weights = random_weights(seed)
    mixture, n = Mixture(weights), 2000
    seen = np.zeros((n + 1, len(weights)))
    for sample in range(n):
        source, earlier = mixture.locate(sample)
        assert earlier == seen[sample, source], "each source's samples are numbered without a gap"
        seen[sample + 1] = seen[sample]
        seen[sample + 1, source] += 1
    wanted = np.arange(n + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(seen - wanted).max() < 1.25
    window = 100
    assert np.abs((seen[window:] - seen[:-window]) - (wanted[window:] - wanted[:-window])).max() < 2.5
    assert [mixture.count(source, n) for source in range(len(weights))] == seen[-1].tolist()


def test_a_mixture_is_exact_after_each_whole_round():
    mixture = Mixture([5, 3, 2])
    for n in (10, 20, 1_000_000_000_000):
        assert [mixture.count(source, n) for source in range(3)] == [n // 2, 3 * n // 10, n // 5]
    assert mixture.locate(10**15)[1] == mixture.count(mixture.locate(10**15)[0], 10**15)


@pytest.mark.parametrize("weights", [[], [1, 0], [-1]])
def test_weights_must_be_positive(weights):
    with pytest.raises(ConfigError, match="above 0"):
        Mixture(weights)


def test_the_community_order_has_no_seed(shared):
    reference = json.loads((shared / "oracles" / "misc" / "data_sampling.json").read_text())
    order = CubicWindows(reference["n_tokens"], reference["ctx_len"])
    assert sorted(order.starts(range(order.prime)).tolist()) == [i * reference["ctx_len"] for i in range(order.prime)]
