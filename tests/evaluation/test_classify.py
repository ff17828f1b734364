"""ListOps, digits and questions: the rows say what they ask, and nothing of a test is trained on."""

import gzip
import io
import lzma
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from receptance.data import IGNORE
from receptance.errors import ConfigError
from receptance.evaluation import classify
from receptance.evaluation.classify import CLOSE, PADDING, Digits, ListOps, Questions
from receptance.evaluation.recall import Examples, Options, build, learn
from receptance.training.config import ModelConfig


def rng(seed=0):
    return np.random.default_rng(seed)


# ListOps -------------------------------------------------------------------------------------------------------------


def value(tokens):
    """Of a whole expression, by a parser of its own: a stack of lists."""
    stack = [[]]
    for token in tokens:
        if token < 10:
            stack[-1].append(token)
        elif token < CLOSE:
            stack.append([token])
        else:
            operator, *values = stack.pop()
            assert 2 <= len(values) <= 10
            middle = sorted(values)[(len(values) - 1) // 2], sorted(values)[len(values) // 2]
            stack[-1].append({10: min(values), 11: max(values), 12: sum(middle) // 2, 13: sum(values) % 10}[operator])
    (only,) = stack[0]
    return only


def depth(tokens):
    return int(np.cumsum([(9 < t < CLOSE) - (t == CLOSE) for t in tokens]).max())


def test_expressions_have_the_value_that_is_asked_for():
    task = ListOps(60, 5, 4)
    tokens, targets = task.examples(300, rng())
    assert tokens.shape == targets.shape == (300, 60)
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        n = row.index(PADDING)
        assert 5 < n < 60
        assert set(row[n:]) == {PADDING}
        assert [t for t in wanted if t != IGNORE] == [wanted[n - 1]] == [value(row[:n])]
        assert 1 <= depth(row[:n]) < 4
    assert set(tokens[:, 0].tolist()) == {10, 11, 12, 13}
    assert len(np.unique(tokens, axis=0)) > 290


def test_as_many_draws_are_expressions_as_were_counted():
    """By the published rules 8 % of draws at depth 10 have 500 to 2,000 tokens, about 1,055 in the mean, 17 % nines."""
    tokens, targets = ListOps().examples(60, rng())
    lengths = (tokens != PADDING).sum(1)
    assert lengths.min() > 500
    assert lengths.mean() == pytest.approx(1055, abs=150)
    answers = targets.max(1)
    assert (answers == 9).mean() + (answers == 0).mean() == pytest.approx(0.344, abs=0.18)


def test_many_rows_are_the_same_as_few(monkeypatch):
    """What several processes make does not depend on how many there are, but for where pieces end."""
    task = ListOps(40, 5, 4)
    pieces = [classify._listops_rows(task, n, seed) for n, seed in ((20, 7), (20, 8), (5, 9))]
    whole = [row for piece in pieces for row in piece]
    monkeypatch.setattr(classify, "PIECE", 20)
    tokens, targets = classify._listops.__wrapped__(task, 45, 7)
    assert [value(row[row != PADDING]) for row in tokens] == [answer for _, answer in whole]
    assert (targets.max(1) == [answer for _, answer in whole]).all()


def test_expressions_that_cannot_be_are_refused():
    for make in (lambda: ListOps(50, 50), lambda: ListOps(50, 5, 1)):
        with pytest.raises(ConfigError, match="no expression"):
            make()


# Digits --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(monkeypatch):
    """Image i has a label of i mod 10, and in each quarter another shade; those of the test are brighter."""

    def made(root, name):
        n = 60_000 if "train" in name else 10_000
        if "labels" in name:
            return (np.arange(n) % 10).astype(np.uint8)
        base = (np.arange(n) % 50 + (0 if n == 60_000 else 100)).astype(np.uint8)
        found = np.zeros((n, 28, 28), np.uint8)
        for k in range(4):
            found[:, 14 * (k // 2) : 14 * (k // 2) + 14, 14 * (k % 2) : 14 * (k % 2) + 14] = (base + k)[:, None, None]
        return found

    monkeypatch.setattr(classify, "_idx", made)


def test_pixels_are_read_row_by_row_and_the_label_is_asked_for_at_the_end(images):
    tokens, targets = Digits(side=14).examples(20, rng())
    assert tokens.shape == (20, 196)
    assert (targets[:, :-1] == IGNORE).all()
    first = tokens[:, 0]
    assert (tokens[:, 13] == first + 1).all()
    assert (tokens[:, 7 * 14] == first + 2).all()
    assert (tokens[:, -1] == first + 3).all()
    assert (targets[:, -1] % 10 == first % 10).all()  # of the same image


def test_validation_and_test_images_are_not_trained_on(images, monkeypatch):
    seen = {}
    rows = Digits._rows
    monkeypatch.setattr(Digits, "_rows", lambda self, part, index: seen.setdefault(len(seen), (part, index)))
    task = Digits(side=7)
    task.examples(60_000, rng()), task.held(60_000, rng()), task.test(rng())
    (train, a), (valid, b), (test, c) = seen.values()
    assert (train, valid, test) == ("train", "train", "t10k")
    assert not set(a) & set(b)
    assert sorted([*a, *b]) == list(range(60_000))
    assert sorted(c) == list(range(10_000))
    assert rows(task, "t10k", c[:3])[0].min() >= 100


def test_a_permutation_is_the_same_for_all(images):
    plain, permuted = (Digits(side=7, permuted=p).examples(30, rng())[0] for p in (False, True))
    assert not np.array_equal(plain, permuted)
    order = np.random.default_rng(92_916).permutation(49)
    assert np.array_equal(plain[:, order], permuted)


def test_shades_are_steps_of_equal_width(images):
    fine, coarse = (Digits(side=7, shades=n) for n in (256, 16))
    assert coarse.vocab_size == 16
    assert coarse.name == "digits of 49 pixels in 16 shades"
    assert np.array_equal(coarse.test(rng())[0], fine.test(rng())[0] // 16)  # shades from 100 to 152
    assert len(np.unique(coarse.test(rng())[0])) == 4
    with pytest.raises(ConfigError, match="9 shades"):
        Digits(shades=9)
    with pytest.raises(ConfigError, match="words"):
        Digits(read="words")
    with pytest.raises(ConfigError, match="numbers"):
        Digits(places=True)


@pytest.mark.parametrize("permuted", [False, True])
def test_images_that_are_learnt_from_move_as_a_whole(permuted):
    plain = np.arange(1, 50).reshape(7, 7)
    around = np.pad(plain, 1)
    order = Digits(side=7, permuted=permuted).order
    moves = Digits(side=7, permuted=permuted, shift=1).moves
    row = np.append(plain.ravel()[order], 0)  # what is outside the image is black
    found = {tuple(row[move]) for move in moves}
    assert found == {tuple(around[y : y + 7, x : x + 7].ravel()[order]) for y in range(3) for x in range(3)}
    assert len(found) == 9
    assert Digits(side=7).moves is None


def test_only_what_is_learnt_from_moves(images):
    plain, moving = Digits(side=7), Digits(side=7, shift=1)
    for part in ("held", "test"):
        rows = [getattr(task, part)(*([20, rng()] if part == "held" else [rng()]))[0] for task in (plain, moving)]
        assert np.array_equal(*rows)
    options = Options(batch=8, examples=8)
    given, moved = (Examples(task, options, torch.device("cpu")).batch(0) for task in (plain, moving))
    assert torch.equal(given.targets, moved.targets)
    assert not torch.equal(given.tokens, moved.tokens)


@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize("version", ["4", "7", "transformer", "lstm"])
def test_numbers_are_read_by_a_linear_map(images, version, places):
    """Beside the same written out: a table whose rows are the vectors that belong to each pixel."""
    task = Digits(side=7, read="numbers", places=places)
    model = build(ModelConfig(version=version, n_layer=2, n_embd=16, head_size=8), task).double()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tokens, _ = (torch.from_numpy(x) for x in task.examples(5, rng()))
    logits, _ = model(tokens)
    logits.sum().backward()
    emb = model.emb
    assert emb.bias.shape == (49 if places else 1, 16)
    assert min(emb.weight.grad.abs().max(), emb.bias.grad.abs().max()) > 0
    x = (tokens.double()[..., None] / 256 - 0.13) / 0.31 * emb.weight + emb.bias
    model.emb, model.config = (
        nn.Embedding.from_pretrained(x.detach().flatten(0, 1)),
        replace(model.config, vocab_size=1000),
    )
    wanted, _ = model(torch.arange(5 * 49).reshape(5, 49))
    assert torch.allclose(logits, wanted, rtol=1e-10, atol=1e-12)


def test_a_small_model_learns_digits_from_numbers(monkeypatch):
    """The brighter an image the larger its digit."""
    digits = np.arange(60_000) % 10
    images = np.broadcast_to((25 * digits + np.arange(60_000) % 7)[:, None, None], (60_000, 28, 28)).astype(np.uint8)
    monkeypatch.setattr(classify, "_idx", lambda root, name: digits if "labels" in name else images)
    options = Options(steps=150, batch=32, lr=(1e-2,), examples=1000)
    _, found = learn(ModelConfig(version="lstm", n_layer=1, n_embd=32), Digits(side=7, read="numbers"), (), options)
    assert found.scores["digits of 49 pixels as numbers"].accuracy > 0.9


def test_mnist_files_are_read_plain_and_packed(tmp_path):
    data = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 4)) + bytes(range(24))
    for i, pack in enumerate((bytes, gzip.compress, lzma.compress)):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / ("x" + ["", ".gz", ".xz"][i])).write_bytes(pack(data))
        assert np.array_equal(classify._idx(folder, "x"), np.arange(24).reshape(2, 3, 4))
    (tmp_path / "y").write_bytes(b"\0\0\x0d\x03" + data[4:])
    for name, match in (("y", "not an IDX"), ("z", "give the folder")):
        with pytest.raises(ConfigError, match=match):
            classify._idx(tmp_path, name)
    with pytest.raises(ConfigError, match="28 wide"):
        Digits(side=5)


# Questions -----------------------------------------------------------------------------------------------------------

STORY = """1 Mary went to the {place}.
2 John sat.
3 Where is Mary?\t{place}\t1
4 Mary ran to the yard.
5 Where is Mary?\tyard\t4
"""


@pytest.fixture
def archive(tmp_path):
    """Two tasks of the archive's form, 50 stories to learn from and 3 to be tested on each."""
    places = ["house", "school", "garden", "shop", "park"]
    with tarfile.open(tmp_path / "babi_en_en10k.tar.xz", "w:xz") as file:
        for size in ("en", "en-10k"):
            for number, kind in ((1, "single"), (6, "yes-no")):
                for part, n in (("train", 50), ("test", 3)):
                    text = "".join(STORY.format(place=places[i % 5]) for i in range(n)).encode()
                    info = tarfile.TarInfo(f"tasks/{size}/qa{number}_{kind}_{part}.txt")
                    info.size = len(text)
                    file.addfile(info, io.BytesIO(text))
    return tmp_path


def words(task, row):
    names = {i: word for word, i in task._data.words.items()}
    return " ".join(names[i] for i in row if i)


def test_a_question_comes_after_its_story_or_before_it(archive):
    for first in (False, True):
        task = Questions(str(archive), first, tasks=(1,), length=24)
        tokens, targets = task.test(rng())
        assert len(tokens) == 6
        story, question = "mary went to the house . john sat .", "where is mary ?"
        assert words(task, tokens[0]) == (f"{question} {story}" if first else f"{story} {question}")
        assert words(task, tokens[1]).count("mary ran to the yard .") == 1  # the story so far
        asked = targets[0] != IGNORE
        assert asked.sum() == 1
        assert np.flatnonzero(asked) == np.count_nonzero(tokens[0]) - 1  # at the last word
        assert [words(task, [row.max()]) for row in targets[:2]] == ["house", "yard"]


def test_what_is_held_out_is_not_trained_on(archive):
    task = Questions(str(archive), length=24)
    count = len(task._data.train)
    assert count == 2 * 100
    assert len(task.examples(1000, rng())[0]) == count - count // 20
    assert len(task.held(1000, rng())[0]) == count // 20
    assert task.groups() == ["qa1"] * 6 + ["qa6"] * 6


def test_long_stories_are_left_out_of_rows_and_groups_alike(archive):
    task = Questions(str(archive), length=14)  # the second question of each story has 20 words
    assert len(task.test(rng())[0]) == len(task.groups()) == 6


def test_questions_that_are_not_there_are_refused(archive, tmp_path):
    with pytest.raises(ConfigError, match="no tasks"):
        _ = Questions(str(archive), tasks=(9,)).vocab_size
    with pytest.raises(ConfigError, match="no such file"):
        _ = Questions(str(tmp_path / "absent")).vocab_size
