"""What a token costs: times are added up as they are measured, sizes are those of the states."""

import itertools

import pytest

from receptance.evaluation import costs
from receptance.evaluation.costs import fitted, positions, training
from receptance.training import read_config


def config(version="7"):
    return read_config(None, [f"model.version={version}", "model.n_layer=1", "model.n_embd=16", "model.head_size=8",
                              'data.train=["x"]', "run.device=cpu"])  # fmt: skip


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_an_exponent_is_that_of_a_power(exponent):
    lengths = [512, 1024, 2048, 4096]
    assert fitted(lengths, [3 * n**exponent for n in lengths]) == pytest.approx(exponent, abs=1e-9)
    assert fitted([512], [3.0]) == 1.0


class Clock:
    """A clock whose every reading is `tick` later; a doubled tick is time that grows."""

    def __init__(self, tick):
        self.now, self.ticks = 0.0, iter(tick)

    def perf_counter(self):
        self.now += next(self.ticks)
        return self.now


def test_cumulative_time_is_that_of_the_fastest_tokens(monkeypatch):
    """Of the 16 tokens before each place the fastest takes 1, 2, 3, then 4 seconds; other work delays the rest."""
    pairs = itertools.chain.from_iterable((0.0, k + (i != 11) * 9.0) for k in (1, 2, 3, 4) for i in range(16))
    monkeypatch.setattr(costs, "time", Clock(pairs))
    found = positions(config(), 80, points=4)
    assert found.position == [20, 40, 60, 80]
    assert found.milliseconds == [1e3, 2e3, 3e3, 4e3]
    assert found.seconds == [20 * 1, 20 * (1 + 1.5), 20 * (1 + 1.5 + 2.5), 20 * (1 + 1.5 + 2.5 + 3.5)]
    assert found.exponent == fitted([60, 80], found.seconds[2:])
    assert found.peak_bytes == []  # a CPU does not tell


def test_training_is_timed_at_doubled_lengths_by_its_best_repeat(monkeypatch):
    pairs = itertools.chain.from_iterable((0.0, seconds) for n in (1, 2, 4) for seconds in (9.0, 0.5 * n, 7.0))
    monkeypatch.setattr(costs, "time", Clock(pairs))
    found = training(config("lstm"), 40, shortest=8)
    assert found.length == [8, 16, 32]
    assert found.seconds == [0.5, 1, 2]
    assert found.time_exponent == pytest.approx(1)
    assert (found.peak_bytes, found.memory_exponent) == ([], None)


def test_a_row_shorter_than_the_shortest_is_measured_once():
    assert training(config(), 5, shortest=8, repeats=1).length == [5]
