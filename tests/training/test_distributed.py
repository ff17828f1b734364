"""Four processes train as one: same losses, same weights, checkpoints that any number of them can go on from."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from processes import run
from test_runs import Listener, configure

import receptance as rc
from receptance.errors import ConfigError
from receptance.training import loop, train
from receptance.training.config import read_config
from receptance.training.distributed import Parallel
from receptance.training.evaluate import evaluate

SAME = 1e-5  # float32, relative: the order of summation is all that differs
CASES = {
    "ddp": ("model.version=7", "run.accumulate=3"),
    "fsdp": ("model.version=7", "parallel.kind=fsdp"),
    "context": ("model.version=4", "parallel.context=4"),
}
MORE = {
    "fsdp, accumulated": ("model.version=7", "parallel.kind=fsdp", "run.accumulate=3"),
    "segments, context and fsdp": (
        "model.version=6", "run.segment_len=8", "parallel.context=2", "parallel.kind=fsdp",
    ),
    "hsdp": ("model.version=5.2", "parallel.kind=fsdp", "parallel.shard_size=2"),
    "context, checkpointed": ("model.version=7", "parallel.context=4", "run.activation_checkpointing=true"),
    "context and fsdp": ("model.version=7", "parallel.context=2", "parallel.kind=fsdp"),
    "context and ddp": ("model.version=6", "parallel.context=2", "run.accumulate=2"),
    "segments and fsdp": ("model.version=7", "run.segment_len=10", "parallel.kind=fsdp"),
    "segments and ddp": ("model.version=4", "run.segment_len=10", "run.accumulate=3"),
    "segments and context": ("model.version=7", "run.segment_len=8", "parallel.context=4"),
    "documents, segments and context": (
        "model.version=7", "data.packing=documents", "run.segment_len=8", "parallel.context=2",
    ),
    "resets, context and fsdp": (
        "model.version=4", "data.packing=resets", "parallel.context=2", "parallel.kind=fsdp", "optim.ema=0.9",
    ),
    "truncated segments and ddp": ("model.version=7", "run.segment_len=10", "run.segment_gradients=truncated"),
}  # fmt: skip
ALONE = ("parallel.kind", "parallel.shard_size", "parallel.context", "run.segment_len", "run.activation_checkpointing")


def config_of(folder, name, *overrides):
    # the recipe's zeros make the first gradients tiny, and Adam then amplifies their rounding: a larger epsilon
    folder = folder / name
    folder.mkdir(exist_ok=True)
    return configure(
        folder, "run.batch_size=12", "run.tokens=1536", "run.save_every=2", "optim.dropout=0.0", "optim.eps=1e-8",
        "run.valid_every=3", "run.valid_tokens=100", *overrides,
    )  # fmt: skip


def losses(folder, name):
    rows = map(json.loads, (folder / name / "run" / "log.jsonl").read_text().splitlines())
    return [
        row[name] for row in rows for name in ("loss", "held_bits_per_byte", "held_ema_bits_per_byte") if name in row
    ]


class Stopped(Exception):
    pass


def train_until(config, step):
    """Train and break off before `step`, as all processes do together when one is lost."""

    class Step(loop.Step):
        def __call__(self, i):
            if i == step:
                raise Stopped
            return super().__call__(i)

    ordinary, loop.Step = loop.Step, Step
    try:
        train(config, Listener())
    except Stopped:
        pass
    finally:
        loop.Step = ordinary


def run_cases(folder, cases):
    for name, overrides in cases.items():
        listener = Listener()
        train(config_of(folder, name, *overrides), listener)
        assert bool(listener.rows) == (torch.distributed.get_rank() == 0)


def worker(folder):
    run_cases(folder, CASES)
    train_until(config_of(folder, "four", "parallel.kind=fsdp", "run.save_in_background=true"), 2)


def go_on(folder, name, until, *overrides):
    train_until(config_of(folder, name, *overrides), until)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run(4, worker, folder, folder, timeout=300)
    return folder


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run(4, run_cases, folder, folder, MORE, timeout=300)
    return folder


def compare_with_one(folder, tmp_path, name, overrides):
    truncated = "run.segment_gradients=truncated" in overrides
    alone = [setting for setting in overrides if truncated or not setting.startswith(ALONE)]
    whole = rc.load(train(config_of(tmp_path, name, *alone), Listener())).state_dict()
    expected = losses(tmp_path, name)
    assert len(expected) >= 4 + 2  # training and validation
    assert losses(folder, name) == pytest.approx(expected, rel=SAME)
    found = rc.load(folder / name / "run" / "model").state_dict()
    for key, x in whole.items():
        assert (found[key] - x).norm() <= 1e-3 * x.norm() + 1e-6, key


def evaluate_shares(folder):
    """Documents of 1 to 600 tokens over three processes, one of which has fewer windows; whole and sharded models."""
    for name, more in (("whole", ()), ("sharded", ("parallel.kind=fsdp",))):
        config = replace(config_of(folder, name, "run.batch_size=12", *more), data=held_out(folder / name))
        run = loop.set_up(config, Listener())
        alone = evaluate(run.model, run.tokenizer, run.valid["held"]) if name == "whole" else None
        shared = evaluate(run.model, run.tokenizer, run.valid["held"], 0, run.parallel)
        run.parallel.settle(run.model)
        if alone is not None:
            assert (shared.tokens, shared.n_bytes) == (alone.tokens, alone.n_bytes)
            assert shared.nats == pytest.approx(alone.nats, rel=1e-6)
            found = shared.nats
        assert shared.nats == pytest.approx(found, rel=1e-6)


def held_out(folder):
    lengths = [1, 2, 5, 600, 30, 30, 31, 550, 7, 520, 3]
    (folder / "held.jsonl").write_text("\n".join(json.dumps({"text": "ab"[i % 2] * n}) for i, n in enumerate(lengths)))
    data = config_of(folder.parent, folder.name).data
    return replace(data, valid={"held": "held.jsonl"})


def test_processes_share_a_validation_and_find_the_same_loss(tmp_path):
    run(3, evaluate_shares, tmp_path, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_four_processes_reproduce_the_run_of_one(folder, tmp_path, name):
    compare_with_one(folder, tmp_path, name, CASES[name])


HALF = ("model.version=7", "run.precision=bfloat16", "run.weights=bfloat16", "optim.ema=0.9")


def in_half(folder):
    sharded = (*HALF, "parallel.kind=fsdp")
    cases = {"ddp": HALF, "fsdp": sharded, "slices": (*sharded, "run.accumulate=3")}
    cases |= {"context": (*HALF, "parallel.context=2"), "both": (*sharded, "parallel.context=2")}
    run_cases(folder, cases)
    setup = loop.set_up(config_of(folder, "types", *cases["fsdp"]), Listener())
    assert not isinstance(setup.optimizer, loop.MasterAdamW)
    seen = []
    setup.model.blocks[1].att.key.register_forward_hook(lambda module, _, out: seen.append((module.weight, out)))
    setup.passes.backward(setup.parallel.share(setup.batch(0)), last=True)
    assert [(weight.dtype, out.dtype) for weight, out in seen] == [(torch.bfloat16, torch.bfloat16)]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in setup.model.parameters() if p.grad is not None)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    for name in ("two", "one"):
        (folder / name).mkdir()
    run(2, in_half, folder, folder / "two")
    train(config_of(folder / "one", "half", *HALF), Listener())
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp", "slices", "context", "both"])
def test_two_processes_with_weights_in_half_are_near_one(halves, name):
    """Gradients leave each process in bfloat16: 8 bits, in losses that a step changes by a tenth."""
    assert losses(halves / "two", name) == pytest.approx(losses(halves / "one", "half"), rel=2e-3)
    whole, found = (rc.load(halves / x / "run" / "model").state_dict() for x in ("one/half", f"two/{name}"))
    for key, x in whole.items():
        assert (found[key] - x).norm() <= 3e-2 * x.norm() + 1e-6, key
    assert any((x != x.bfloat16().float()).any() for x in found.values())  # the masters


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_four_processes_reproduce_the_run_of_one_in_every_combination(more, tmp_path, name):
    compare_with_one(more, tmp_path, name, MORE[name])


@pytest.mark.parametrize("sizes", [(2,), *(pytest.param(more, marks=pytest.mark.slow) for more in ((2, 3), (1,)))])
def test_a_run_sharded_over_four_goes_on_with_fewer_or_more(folder, tmp_path, sizes):
    """The first two steps were saved by four, in the background; each number of processes takes one or more."""
    saved = shutil.copytree(folder / "four" / "run", tmp_path / "saved")  # the other case starts from there too
    for until, size in zip((3, 9)[-len(sizes) :], sizes):
        run(size, go_on, tmp_path, folder, "four", until, "parallel.kind=fsdp", "run.save_every=1")
    found = losses(folder, "four")
    shutil.rmtree(folder / "four" / "run")
    shutil.move(saved, folder / "four" / "run")
    train(config_of(tmp_path, "alone"), Listener())
    assert found == pytest.approx(losses(tmp_path, "alone"), rel=SAME)


@pytest.mark.slow
def test_a_run_of_one_goes_on_sharded(tmp_path):
    go_on(tmp_path, "one", 3)
    run(2, go_on, tmp_path, tmp_path, "one", 9, "parallel.kind=fsdp")
    train(config_of(tmp_path, "alone"), Listener())
    assert losses(tmp_path, "one") == pytest.approx(losses(tmp_path, "alone"), rel=SAME)


@pytest.mark.parametrize(
    "override,message",
    [
        ("parallel.context=3", r"parallel\.context = 3 does not divide 4 processes"),
        ("run.batch_size=6", r"run\.batch_size = 6 is not a multiple of 4 processes"),
        ("parallel.shard_size=3", r"parallel\.shard_size = 3 does not divide 4"),
    ],
)
def test_numbers_that_do_not_fit_are_named(tmp_path, override, message):
    config = read_config(None, ['data.train=["x"]', override])
    parallel = Parallel(config_of(tmp_path, "ddp"), torch.device("cpu"))
    parallel.config, parallel.size = config, 4
    with pytest.raises(ConfigError, match=message):
        parallel._check()
