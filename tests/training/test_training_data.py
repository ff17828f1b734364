"""What a run trains on: sources, their shares, their rows, and what has changed since they were tokenised."""

import numpy as np
import pytest
import torch
from test_runs import Listener, configure

from receptance.data import BinIdxWriter, prepare
from receptance.errors import ConfigError
from receptance.tokenizers import tokenizer
from receptance.training.data import open_data
from receptance.training.loop import set_up
from receptance.training.step import Step


def write_texts(folder):
    """Two sources that no byte has in common."""
    (folder / "small.txt").write_text("abcdefg " * 300)
    (folder / "large.jsonl").write_text("".join(f'{{"text": "{"QRSTUVW!" * (3 + i % 9)}"}}\n' for i in range(400)))


def open_mixture(folder, *overrides):
    write_texts(folder)
    config = configure(folder, 'data.train=["small.txt", "large.jsonl"]', *overrides)
    messages: list[str] = []
    return open_data(config, folder / "run", tokenizer("byte"), messages.append)[0], config


def is_small(inputs: np.ndarray) -> np.ndarray:
    return np.isin(inputs, [byte + 1 for byte in b"abcdefg "]).mean(1) > 0.5


def test_weights_give_exact_shares_in_every_batch(tmp_path):
    data, config = open_mixture(tmp_path, "data.weights=[0.75, 0.25]")
    for step in range(20):
        rows = data.rows(range(8 * step, 8 * step + 8))
        assert is_small(rows.inputs).sum() == 6
    lines = data.report(config.steps * config.run.batch_size)
    assert lines[0].startswith("small.txt: 2,401 tokens, 75.0% of the rows, ")
    rows = config.steps * config.run.batch_size
    assert lines[0].endswith(f"{0.75 * rows / data.sources[0].packing.per_epoch:,.2f} passes")


def test_each_source_has_its_own_shuffled_passes(tmp_path):
    data, _ = open_mixture(tmp_path, "data.weights=[1, 1]")
    per_epoch = data.sources[1].packing.per_epoch
    rows = data.rows(range(2 * per_epoch))
    starts = {tuple(row.tolist()) for row in rows.targets[~is_small(rows.inputs)]}
    assert (~is_small(rows.inputs)).sum() == per_epoch
    whole = data.sources[1].packing.rows(range(per_epoch))
    assert starts == {tuple(row.tolist()) for row in whole.targets}


@pytest.mark.parametrize("packing", ["contiguous", "resets", "documents"])
def test_rows_do_not_depend_on_how_they_are_asked_for(tmp_path, packing):
    """One process, a rank of several, or a resumed run."""
    data, _ = open_mixture(tmp_path, "data.weights=[2, 3]", f"data.packing={packing}")
    whole = data.rows(range(1000, 1012))
    for first, last in [(1000, 1004), (1004, 1011), (1011, 1012)]:
        part, where = data.rows(range(first, last)), slice(first - 1000, last - 1000)
        assert (part.inputs == whole.inputs[where]).all()
        assert (part.targets == whole.targets[where]).all()
        assert (part.resets is None) == (packing == "contiguous")
        if part.resets is not None:
            assert (part.resets == whole.resets[where]).all()


@pytest.mark.parametrize("packing", ["contiguous", "resets", "documents"])
def test_every_packing_learns(tmp_path, packing):
    write_texts(tmp_path)
    run = set_up(
        configure(tmp_path, 'data.train=["large.jsonl"]', f"data.packing={packing}", "run.accumulate=2"), Listener()
    )
    step = Step(run, print)
    losses = [step(i)[0].item() for i in range(15)]
    assert losses[-1] < losses[0] - 1.5


def test_accumulation_weighs_each_target_the_same_when_rows_are_padded(tmp_path):
    write_texts(tmp_path)
    after = []
    for accumulate in (1, 8):
        run = set_up(
            configure(
                tmp_path, 'data.train=["large.jsonl"]', "data.packing=documents", f"run.accumulate={accumulate}",
                "optim.dropout=0.0", "run.ctx_len=80", f"run.out={tmp_path}/{accumulate}",
            ), Listener(),
        )  # fmt: skip
        padded = (run.batch(0).targets < 0).sum(1)
        assert padded.unique().numel() > 1, "rows must differ for this to test anything"
        after.append((Step(run, print)(0)[0].item(), torch.cat([p.detach().flatten() for p in run.model.parameters()])))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-5)
    torch.testing.assert_close(after[0][1], after[1][1], rtol=1e-3, atol=1e-5)


def test_several_token_files_are_mixed_by_their_size(tmp_path):
    write_texts(tmp_path)
    for name, source in [("a", "small.txt"), ("b", "large.jsonl")]:
        prepare([tmp_path / source], tokenizer("byte"), tmp_path / name)
    data, _ = open_mixture(tmp_path, 'data.train=["a", "b"]')
    assert data.mixture.weights == [len(source.tokens.tokens) for source in data.sources]
    assert [line.split(":")[0] for line in data.report(10)] == ["a", "b"]


def test_a_token_file_of_another_tokenizer_is_refused(tmp_path):
    write_texts(tmp_path)
    prepare([tmp_path / "small.txt"], tokenizer("world"), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"was made with the tokenizer .*world.*data\.tokenizer is .*byte"):
        open_mixture(tmp_path, 'data.train=["a"]')
    (tmp_path / "a.json").unlink()
    with pytest.raises(ConfigError, match=r"holds token \d+; the tokenizer has 257 ids"):
        open_mixture(tmp_path, 'data.train=["a"]')


def test_negative_ids_are_refused(tmp_path):
    writer = BinIdxWriter(tmp_path / "a", 1 << 17)
    writer.add([5, -1] * 200)
    writer.close()
    with pytest.raises(ConfigError, match=r"holds token -1; the tokenizer has 257 ids"):
        open_mixture(tmp_path, 'data.train=["a"]')


@pytest.mark.parametrize("order", ["shuffled", "cubic"])
def test_a_source_that_is_too_short_is_named(tmp_path, order):
    (tmp_path / "tiny.txt").write_text("x" * 50)
    config = configure(tmp_path, 'data.train=["text.txt", "tiny.txt"]', "data.weights=[1, 1]", f"data.order={order}")
    with pytest.raises(ConfigError, match=r"tiny\.txt: 51 tokens are too few .*lower run\.ctx_len, or .*'documents'"):
        open_data(config, tmp_path / "run", tokenizer("byte"), print)


def test_a_changed_text_is_noticed_and_a_missing_one_is_not_missed(tmp_path):
    data, config = open_mixture(tmp_path)
    (tmp_path / "small.txt").unlink()
    again, _ = open_data(config, tmp_path / "run", tokenizer("byte"), print)
    assert (again.rows(range(8)).inputs == data.rows(range(8)).inputs).all()
    (tmp_path / "small.txt").write_text("other")
    with pytest.raises(ConfigError, match=r"train\.json: was made with sources\[0\]\.bytes"):
        open_data(config, tmp_path / "run", tokenizer("byte"), print)


@pytest.mark.parametrize(
    "override,message",
    [
        ("data.weights=[1]", r"data\.weights = \(1\.0,\) is out of range"),
        ("data.weights=[1, 0]", r"data\.weights = \(1\.0, 0\.0\) is out of range"),
        ("data.packing=tight", r"data\.packing = 'tight' is out of range"),
        ("data.processes=0", r"data\.processes = 0 is out of range"),
        ("data.repeat=[1]", "1 repeat counts for 2 files"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        open_mixture(tmp_path, override)


def test_weights_and_repeat_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="give one of them"):
        open_mixture(tmp_path, "data.weights=[1, 2]", "data.repeat=[1, 2]")
