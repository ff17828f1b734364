"""Tests of memory are what they claim, and small models learn the smallest of them."""

import itertools

import numpy as np
import pytest
import torch

from receptance.data import IGNORE
from receptance.errors import ConfigError
from receptance.evaluation.recall import Options, grade, learn
from receptance.evaluation.synthetic import Copying, Group, Needle, Recall
from receptance.training.config import ModelConfig

EVERY = [Recall(64, 8, 128), Recall(64, 16, 64, noise=True), Needle(32, 8, 8), Needle(32, distance=10), Copying(7, 5),
         Group("Z2", 9), Group("S3", 9), Group("A5", 9)]  # fmt: skip


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_examples_have_their_shape_and_are_repeatable(task):
    tokens, targets = task.examples(20, np.random.default_rng(3))
    assert tokens.shape == targets.shape == (20, task.length)
    assert tokens.min() >= 0
    assert max(tokens.max(), targets.max()) < task.vocab_size
    assert all(np.array_equal(a, b) for a, b in zip(task.examples(20, np.random.default_rng(3)), (tokens, targets)))
    assert not np.array_equal(task.examples(20, np.random.default_rng(4))[0], tokens)


def test_recall_asks_every_key_once_for_its_value():
    task = Recall(64, 8, 128)
    for tokens, targets in zip(*task.examples(50, np.random.default_rng(0))):
        pairs = dict(tokens[:16].reshape(8, 2))
        assert len(pairs) == len(set(pairs.values())) == 8
        asked = np.flatnonzero(targets != IGNORE)
        assert (asked >= 16).all()
        assert (asked % 2 == 0).all()
        assert {tokens[i]: targets[i] for i in asked} == pairs
        assert (np.delete(tokens, asked)[16:] == 0).all()


def test_gaps_of_recall_follow_their_power_law():
    """The first drawn gap has the odds (g + 1)^-0.99; with one pair it is the only one."""
    _, targets = Recall(32, 1, 16).examples(40_000, np.random.default_rng(0))
    gaps = (np.argmax(targets != IGNORE, axis=1) - 2) // 2
    odds = np.arange(1, 16) ** -0.99
    assert np.bincount(gaps, minlength=15) / 40_000 == pytest.approx(odds / odds.sum(), abs=0.01)


def test_a_needle_is_where_it_is_asked_for():
    tokens, targets = Needle(32, 8, 8, distance=10).examples(50, np.random.default_rng(0))
    assert (tokens[:, 32 - 2 - 10] == targets[:, -1]).all()
    assert (tokens[:, 32 - 3 - 10] == 0).all()
    assert ((tokens == 0).sum(1) == 2).all()
    assert ((tokens >= 1) & (tokens <= 8)).sum() == 50
    anywhere, _ = Needle(32, 8, 8).examples(2000, np.random.default_rng(0))
    assert set(np.argmax((anywhere >= 1) & (anywhere <= 8), axis=1)) == set(range(1, 31))


def test_copying_asks_for_what_came_before_the_mark():
    tokens, targets = Copying(7, 5).examples(10, np.random.default_rng(0))
    assert (targets[:, 7:] == tokens[:, :7]).all()
    assert (tokens[:, 8:] == tokens[:, :6]).all()


@pytest.mark.parametrize(("name", "size", "commutes"), [("Z2", 2, True), ("Z5", 5, True), ("S3", 6, False),
                                                        ("A4", 12, False), ("A5", 60, False),
                                                        ("S5", 120, False)])  # fmt: skip
def test_groups_are_groups(name, size, commutes):
    table = Group(name).table
    assert table.shape == (size, size)
    assert all(len(set(row)) == size for row in (*table, *table.T))
    sample = list(itertools.islice(itertools.product(range(size), repeat=3), 0, None, max(1, size**3 // 500)))
    assert all(table[table[a, b], c] == table[a, table[b, c]] for a, b, c in sample)
    assert np.array_equal(table, table.T) == commutes


def test_a_running_product_is_asked_for():
    task = Group("S3", 20)
    tokens, targets = task.examples(5, np.random.default_rng(0))
    for row, wanted in zip(tokens, targets):
        product = row[0]
        for t in range(1, 20):
            product = task.table[row[t], product]
            assert wanted[t] == product
    parity_tokens, parity = Group("Z2", 20).examples(5, np.random.default_rng(0))
    assert np.array_equal(parity, parity_tokens.cumsum(1) % 2)


def test_impossible_tasks_are_refused():
    for make in (lambda: Recall(16, 5), lambda: Recall(64, 8, 16), lambda: Group("Q8"), lambda: Needle(8, distance=6)):
        with pytest.raises(ConfigError):
            make()


def test_grades_count_what_was_asked():
    class Fixed(torch.nn.Module):
        def forward(self, tokens):
            return torch.nn.functional.one_hot(tokens, 4).float(), None

    tokens = torch.tensor([[1, 2, 3], [0, 1, 2]])
    targets = torch.tensor([[1, 0, 3], [IGNORE, 1, IGNORE]])
    found = grade(Fixed(), tokens, targets)
    assert (found.accuracy, found.last, found.whole) == (pytest.approx(3 / 4), 1.0, 0.5)


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7", "transformer", "lstm"])
def test_every_model_learns_to_hold_one_pair(version):
    shape = ModelConfig(version=version, n_layer=2, n_embd=32, head_size=16)
    _, found = learn(shape, Recall(8, 1, 8), [Recall(16, 1, 8)], Options(150, 64, (5e-3,)))
    assert found.scores["recall of 1 pairs in 8"].accuracy > 0.6  # chance: 0.25
    assert set(found.scores) == {"recall of 1 pairs in 8", "recall of 1 pairs in 16"}
