"""bfloat16 weights beside float32 masters: the update against torch's AdamW, and whole runs."""

import gc
import json
import os
import shutil
import weakref

import pytest
import torch
from test_runs import Listener, configure
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before ours is imported

import receptance as rc
from receptance.errors import ConfigError
from receptance.ops import adamw
from receptance.training import master, train
from receptance.training.loop import set_up
from receptance.training.master import MasterAdamW
from receptance.training.memory import plan_memory
from receptance.training.optim import averaged
from receptance.training.step import compute, prepare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"a": [(3, 50), (4, 64), (7,)], "b": [(130,), (1, 1, 5)]}
IN_HALF = "run.precision=bfloat16", "run.weights=bfloat16", "run.valid_tokens=64"


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def groups():
    made = []
    for name, lr_scale, decay in (("a", 1.0, 0.1), ("b", 2.0, 0.0)):
        params = [nn.Parameter(draw(*shape)) for shape in SHAPES[name]]
        names = [f"{name}{i}" for i in range(len(params))]
        made.append({"params": params, "names": names, "weight_decay": decay, "lr_scale": lr_scale, "muon": False,
                     "lr": 1e-3 * lr_scale})  # fmt: skip
    return made


@pytest.mark.parametrize("large", [master.LARGE, 256])
def test_an_update_equals_torch_adamw_on_float32_copies(large, monkeypatch):
    """The same gradients, clipped by their norm; masters and moments to float32's rounding, weights their rounding.

    large: from so many elements on a gradient is read where it lies.
    """
    monkeypatch.setattr(master, "LARGE", large)
    ours = MasterAdamW(groups(), betas=(0.9, 0.99), eps=1e-18, clip=3.0)
    plain_groups = groups()
    plain = torch.optim.AdamW(plain_groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-18, fused=True)
    theirs = [p for group in plain_groups for p in group["params"]]
    for step in range(5):
        for i, (weight, p) in enumerate(zip(ours.weights, theirs)):
            weight.grad = draw(*p.shape, seed=10 * step + i).bfloat16()
            p.grad = weight.grad.float()
        expected = nn.utils.clip_grad_norm_(theirs, 3.0)
        norm = ours.collect()
        assert all(weight.grad is None for weight in ours.weights)
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        assert norm > 3
        ours.step()
        plain.step()
    for name, copy in ours.masters().items():
        p = next(p for group in plain_groups for n, p in zip(group["names"], group["params"]) if n == name)
        torch.testing.assert_close(copy.detach(), p.detach(), rtol=3e-6, atol=1e-6)
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(ours.state[copy][kind], plain.state[p][kind], rtol=1e-5, atol=1e-7)
    for weight, copy in zip(ours.weights, ours.masters().values()):
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, copy.bfloat16())


def test_the_kernel_equals_the_plain_form():
    kernel = pytest.importorskip("receptance.ops.adamw.triton")
    for n in (1, 130, 5000):
        one = [draw(n).bfloat16(), *(draw(n, seed=i) for i in (1, 2)), draw(n, seed=3).square(), draw(n).bfloat16()]
        two = [x.clone() for x in one]
        for keep in (1.0, 0.0):
            before = [x.clone() for x in two]
            numbers = torch.tensor([keep, 0.7, 1e-2, 0.999, 1.7], device=DEVICE)
            adamw.update(tuple(one), numbers, (0.9, 0.99), 1e-18)
            kernel.update(tuple(two), numbers, (0.9, 0.99), 1e-18)
            for a, b, old in zip(one[1:4], two[1:4], before[1:4]):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
                assert torch.equal(b, old) != bool(keep)
            torch.testing.assert_close(one[4], two[4], rtol=2**-7, atol=1e-6)


def test_a_weight_without_gradient_stays_and_a_skipped_update_changes_nothing():
    ours = MasterAdamW(groups(), betas=(0.9, 0.99), eps=1e-18)
    first, alone = [p.detach().clone() for p in ours.weights], next(iter(ours.masters().values())).detach().clone()
    for skip in (1.0, 0.0):
        for p in ours.weights[1:]:
            p.grad = torch.full_like(p, float("inf") if skip else 1.0)
        ours.weights[2].grad[::2] = 0
        ours.collect()
        ours.found_inf = torch.tensor(skip, device=DEVICE)
        before = [x.clone() for state in ours.state.values() for x in state.values()]
        ours.step()
        after = [x for state in ours.state.values() for x in state.values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after)) == bool(skip)
        assert all(torch.equal(a, b) for a, b in zip(first[1:], ours.weights[1:])) == bool(skip)
    torch.testing.assert_close(
        next(iter(ours.masters().values())).detach(), alone * (1 - 1e-3 * 0.1), rtol=1e-6, atol=0
    )


def test_a_run_in_half_learns_and_resumes_bit_for_bit(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    more = *IN_HALF, "optim.ema=0.9", "run.save_in_background=true"
    listener = Listener()
    whole = train(configure(tmp_path / "one", *more), listener)
    assert listener.rows[-1]["loss"] < listener.rows[0]["loss"] - 1
    config = configure(tmp_path / "two", *more)
    train(config, Listener())
    shutil.rmtree(sorted((tmp_path / "two" / "run" / "checkpoints").iterdir())[-1])
    resumed = train(config, listener := Listener())
    assert any("continuing from step 15" in text for text in listener.messages)
    for folder in ("model", "model-ema"):
        a, b = (rc.load(x.parent / folder).state_dict() for x in (whole, resumed))
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any((x != x.bfloat16().float()).any() for x in a.values())  # the masters, not the rounded weights
    logs = [(x.parent / "log.jsonl").read_text().splitlines() for x in (whole, resumed)]
    losses = [[row["loss"] for row in map(json.loads, log) if "loss" in row] for log in logs]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("first, second", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_run_goes_on_with_the_other_kind_of_weights(tmp_path, first, second):
    def config(kind):
        return configure(tmp_path, *IN_HALF, f"run.weights={kind}", "optim.ema=0.9")

    train(config(first), Listener())
    folder = sorted((tmp_path / "run" / "checkpoints").iterdir())[-2]
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}
    run = set_up(config(second), Listener())
    from receptance.training.resume import Checkpoints

    assert Checkpoints(run.out, run.parallel).load(run.model, run.optimizer).step == 15
    now = run.optimizer.masters() if isinstance(run.optimizer, MasterAdamW) else run.model.state_dict()
    assert all(torch.equal(now[name], x) for name, x in saved.items())
    assert all(torch.equal(x, saved[name].to(x.dtype)) for name, x in run.model.state_dict().items())
    rows = (listener := Listener()).rows
    train(config(second), listener)
    assert len(rows) == 5
    assert rows[-1]["loss"] < 5


def test_a_step_in_half_is_near_one_in_float32(tmp_path):
    outcomes = {}
    for kind in (("run.precision=float32",), IN_HALF):
        run = set_up(configure(tmp_path, *kind, "optim.dropout=0"), Listener())
        outcomes[kind] = torch.stack([compute(run, prepare(run, step)) for step in range(6)])[:, :2]
    exact, half = outcomes.values()
    torch.testing.assert_close(half, exact, rtol=3e-2, atol=0)
    assert not torch.equal(half, exact)


def test_averaged_weights_reach_the_model_and_leave_it(tmp_path):
    run = set_up(configure(tmp_path, *IN_HALF, "optim.ema=0.5"), Listener())
    for step in range(4):
        compute(run, prepare(run, step))
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    with averaged(run.optimizer, 0.5, 4):
        inside = {name: x.clone() for name, x in run.model.state_dict().items()}
        masters = run.optimizer.masters()
        assert all(torch.equal(x, masters[name].bfloat16()) for name, x in inside.items())
    assert any((inside[name] != x).any() for name, x in before.items())
    assert all(torch.equal(x, before[name]) for name, x in run.model.state_dict().items())


def test_the_plan_counts_weights_masters_and_moments(tmp_path):
    run = set_up(configure(tmp_path, *IN_HALF), Listener())
    n = sum(p.numel() for p in run.model.parameters())
    plan = plan_memory(run)
    assert plan.weights == plan.gradients == 2 * n
    assert 12 * n <= plan.optimizer < 12 * n + 8 * len(run.optimizer.weights)


@pytest.mark.parametrize(
    "setting, named",
    [("run.precision=float32", "run.precision = 'float32'"), ("run.accumulate=2", "run.accumulate > 1"),
     ("optim.optimizer=muon", "optim.optimizer = 'muon'"), ("run.segment_len=16", "run.segment_len"),
     ("model.version=lstm", "model.version = 'lstm'")],
)  # fmt: skip
def test_weights_in_half_that_cannot_be_are_refused(tmp_path, setting, named):
    with pytest.raises(ConfigError, match="run.weights = 'bfloat16' does not go with " + named):
        set_up(configure(tmp_path, *IN_HALF, setting), Listener())
    run = set_up(configure(tmp_path, IN_HALF[0], setting), Listener())
    assert run.model.dtype == torch.float32


def test_an_optimizer_that_nobody_holds_gives_its_memory_back_at_once():
    MasterAdamW(
        groups(), betas=(0.9, 0.99), eps=1e-18
    )  # torch's first optimiser of a process stays, in a frame it keeps
    gc.disable()
    try:
        optimizer = MasterAdamW(groups(), betas=(0.9, 0.99), eps=1e-18)
        there = weakref.ref(optimizer)
        del optimizer
        assert there() is None
    finally:
        gc.enable()
