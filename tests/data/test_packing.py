"""Rows of tokens: which tokens, which targets, and where the state is reset."""

from collections import Counter

import numpy as np
import pytest
import torch

from receptance.data import IGNORE, BinIdx, BinIdxWriter, Contiguous, Documents, ShuffledWindows
from receptance.data.packing import best_fit
from receptance.models import RWKV7
from receptance.training.loss import language_model_loss


def write(path, lengths: list[int]) -> BinIdx:
    """Documents of these many tokens, the end (id 0) among them; every other token is a number of its own."""
    writer, next_token = BinIdxWriter(path / "x", 1 << 20), 1
    for length in lengths:
        writer.add([*range(next_token, next_token + length - 1), 0])
        next_token += length - 1
    writer.close()
    return BinIdx(path / "x")


def lengths(n: int, longest: int, seed: int = 0) -> list[int]:
    return (1 + np.minimum(np.random.default_rng(seed).geometric(0.1, n), longest - 1)).tolist()


def test_windows_are_the_stream(tmp_path):
    data = write(tmp_path, lengths(200, 40))
    order = ShuffledWindows(len(data.tokens), 16, seed=1)
    rows = Contiguous(data, 16, order, with_resets=False).rows(range(10))
    for i, start in enumerate(order.starts(range(10)).tolist()):
        assert rows.inputs[i].tolist() == data.tokens[start : start + 16].tolist()
        assert rows.targets[i].tolist() == data.tokens[start + 1 : start + 17].tolist()
    assert rows.resets is None


def test_resets_stand_at_the_token_that_a_document_is_predicted_from(tmp_path):
    data = write(tmp_path, [*lengths(200, 40), 1, 1, 2, 1, *lengths(50, 40)])
    packing = Contiguous(data, 16, ShuffledWindows(len(data.tokens), 16, seed=1), with_resets=True)
    rows = packing.rows(range(packing.per_epoch))
    assert (rows.resets == (rows.inputs == 0)).all(), "here every end of a document is id 0 and nothing else is"


def test_resets_follow_the_index_and_not_the_ids(tmp_path):
    writer = BinIdxWriter(tmp_path / "x", 300)
    for _ in range(20):
        writer.add([0, 5, 0, 7, 9])  # zeros inside, none at the end
    writer.close()
    data = BinIdx(tmp_path / "x")
    rows = Contiguous(data, 8, ShuffledWindows(100, 8, seed=1), with_resets=True).rows(range(11))
    assert (rows.resets == (rows.inputs == 9)).all()


@pytest.mark.parametrize("ctx_len", [4, 16, 64, 300])
def test_packed_documents_appear_whole_and_once_per_epoch(tmp_path, ctx_len):
    data = write(tmp_path, [*lengths(300, 200), 2 * ctx_len, ctx_len, 5 * ctx_len + 1, 1])
    packing = Documents(data, ctx_len, seed=1, eos_id=0)
    for epoch in range(2):
        rows = packing.rows(range(epoch * packing.per_epoch, (epoch + 1) * packing.per_epoch))
        real = rows.targets != IGNORE
        seen = Counter(rows.targets[real].tolist())
        assert seen == Counter(data.tokens.tolist())
        assert (real.cumsum(1) == real.sum(1, keepdims=True))[~real].all(), "padding stands at the end"
        assert (rows.inputs[:, 1:] == rows.targets[:, :-1])[real[:, 1:] & ~rows.resets[:, 1:]].all()
        assert rows.resets[:, 0].all()
        first = rows.inputs[rows.resets]  # of each piece: the end before a document, or the token before a later piece
        pieces = sum(-(-int(size) // ctx_len) for size in data.sizes)
        assert len(first) == pieces
        assert (first == 0).sum() == len(data)
    assert packing.filled > 0.9


def test_documents_that_fit_are_not_cut(tmp_path):
    data = write(tmp_path, lengths(500, 32))
    packing = Documents(data, 32, seed=1, eos_id=0)
    rows = packing.rows(range(packing.per_epoch))
    assert int(rows.resets.sum()) == len(data)
    assert (rows.inputs[rows.resets] == 0).all()


def test_each_epoch_combines_documents_anew(tmp_path):
    data = write(tmp_path, lengths(500, 32))
    packing = Documents(data, 32, seed=1, eos_id=0)
    epochs = [packing.rows(range(e * packing.per_epoch, (e + 1) * packing.per_epoch)) for e in range(2)]
    several = [epoch.targets[epoch.resets.sum(1) > 1] for epoch in epochs]
    together = [{tuple(row.tolist()) for row in rows} for rows in several]
    assert len(together[0] & together[1]) < 0.1 * len(several[0])
    again = Documents(data, 32, seed=1, eos_id=0).rows([3, 77])
    assert (again.targets == packing.rows([3, 77]).targets).all()
    other = Documents(data, 32, seed=2, eos_id=0).rows([3, 77])
    assert (again.targets != other.targets).any()


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_places_every_item_and_leaves_little_room(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 400))
    counts = {int(n): int(rng.integers(1, 1000)) for n in rng.integers(1, capacity + 1, 30)}
    patterns = best_fit(counts, capacity)
    placed = Counter()
    for pattern, times in patterns:
        assert sum(pattern) <= capacity
        assert times > 0
        for length in pattern:
            placed[length] += times
    assert placed == Counter(counts)
    rows, items = sum(times for _, times in patterns), sum(n * m for n, m in counts.items())
    halves = sum(m for n, m in counts.items() if 2 * n > capacity)
    assert rows <= max(1.25 * items / capacity, halves) + len(counts)


def test_natural_lengths_fill_rows_almost_entirely():
    sizes = np.random.default_rng(0).lognormal(6, 1.2, 100_000).astype(int).clip(1, 4096)
    values, counts = np.unique(sizes, return_counts=True)
    patterns = best_fit(dict(zip(values.tolist(), counts.tolist())), 4096)
    assert sizes.sum() / (4096 * sum(times for _, times in patterns)) > 0.999


def test_a_packed_batch_has_the_loss_and_gradients_of_its_documents_alone(tmp_path):
    """Through the model: nothing leaks between documents, and padding weighs nothing."""
    writer = BinIdxWriter(tmp_path / "x", 40)
    rng = np.random.default_rng(3)
    for length in [5, 9, 1, 20, 7, 14, 3, 22, 11]:
        writer.add([*rng.integers(1, 40, length - 1).tolist(), 0])
    writer.close()
    data = BinIdx(tmp_path / "x")
    model = RWKV7(RWKV7.Config.make(40, n_layer=2, n_embd=16, head_size=8), dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    parameters = [
        p for name, p in model.named_parameters() if name[:15] not in {f"blocks.0.att.v{i}" for i in range(3)}
    ]

    packing = Documents(data, 24, seed=1, eos_id=0)
    rows = packing.rows(range(packing.per_epoch))
    assert (rows.targets == IGNORE).any()
    logits, _ = model.forward(torch.from_numpy(rows.inputs), resets=torch.from_numpy(rows.resets))
    packed = torch.autograd.grad(language_model_loss(logits, torch.from_numpy(rows.targets), 0.1), parameters)

    parts, targets = [], []
    for i in range(len(data)):
        document = torch.from_numpy(data[i].astype(np.int64))
        parts.append(model.forward(torch.cat([torch.zeros(1, dtype=torch.long), document[:-1]]))[0])
        targets.append(document)
    loss = language_model_loss(torch.cat(parts)[None], torch.cat(targets)[None], 0.1)
    for a, b in zip(packed, torch.autograd.grad(loss, parameters)):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()
