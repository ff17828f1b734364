"""The memory plan against what a step really takes, and the figures of the log."""

import weakref
from dataclasses import replace

import pytest
import torch
from test_runs import Listener, configure
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from receptance.models import VERSIONS
from receptance.training import train
from receptance.training.loop import set_up
from receptance.training.memory import plan_memory
from receptance.training.metrics import flops_per_token, peak_flops, peak_memory
from receptance.training.step import Step

LOW, HIGH = 1.0, 1.3  # planned over measured: never too little, and not much too much


class Live(TorchDispatchMode):
    """Bytes of all storages that operations make, as long as they live; `peak` is their most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self._sizes = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return result

    def _gone(self, key):
        self.now -= self._sizes.pop(key)


@pytest.mark.parametrize("version", ["4", "6", "7"])
@pytest.mark.parametrize(
    "setting", ["", "run.activation_checkpointing=true", "run.accumulate=4", "run.precision=bfloat16"]
)
def test_the_memory_plan_is_near_the_peak_of_a_step(tmp_path, version, setting):
    shape = ["model.n_layer=4", "model.n_embd=64", "run.ctx_len=128", f"model.version={version}", "optim.dropout=0"]
    run = set_up(configure(tmp_path, *shape, *([setting] if setting else [])), Listener())
    plan = plan_memory(run)
    step = Step(run, print)
    step(0)
    with Live() as live:
        step(1)
    planned = plan.total - plan.weights - plan.optimizer  # these are there before
    assert LOW < planned / live.peak < HIGH


def test_the_plan_knows_weights_and_optimizer_exactly_and_says_when_it_does_not_fit(tmp_path):
    run = set_up(configure(tmp_path, "optim.ema=0.9"), Listener())
    plan, n = plan_memory(run), sum(p.numel() for p in run.model.parameters())
    assert plan.weights == 4 * n
    assert plan.optimizer == 4 * (3 * n + len(list(run.model.parameters())) + 5)  # moments, average, step counts, guard
    assert plan.fits
    assert not replace(plan, free=plan.activations).fits
    assert str(plan).startswith("memory: about ")


def test_a_run_tells_its_memory_before_it_starts(tmp_path):
    listener = Listener()
    train(configure(tmp_path, "run.tokens=256"), listener)
    assert any(text.startswith("memory: about") for text in listener.messages)
    assert listener.rows[0]["memory_gib"] == pytest.approx(peak_memory(torch.device("cpu")) / 2**30, rel=0.5)
    assert listener.rows[0]["bits"] == pytest.approx(listener.rows[0]["loss"] / 0.6931, rel=1e-4)


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_flops_are_six_per_parameter_and_token_plus_the_state(version):
    """Elements of all matrices but the embedding, times six, and a few per cent on top."""
    cls = VERSIONS[version]
    model = cls(cls.Config.make(65536, 12, 768), device="meta")
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and n != "emb.weight")
    assert 6 * matrices <= flops_per_token(model) <= 1.08 * 6 * matrices


def test_no_peak_is_claimed_for_a_cpu():
    assert peak_flops(torch.device("cpu"), "bfloat16") is None


@pytest.mark.parametrize("version", ["4", "7"])
def test_work_that_is_not_made_again_takes_memory_and_changes_no_weight(tmp_path, version):
    runs = {}
    for setting in ("on", "off"):
        (tmp_path / setting).mkdir()
        more = f"model.version={version}", "optim.dropout=0", f"run.recompute={setting}"
        runs[setting] = set_up(configure(tmp_path / setting, *more), Listener())
    assert plan_memory(runs["on"]).activations < 0.8 * plan_memory(runs["off"]).activations
    for run in runs.values():
        step = Step(run, print)
        for i in range(2):
            step(i)
    pairs = zip(runs["on"].model.parameters(), runs["off"].model.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_memory_to_spare_holds_what_would_be_made_again_dear_results_first(tmp_path):
    run = set_up(configure(tmp_path, "model.version=7", "optim.dropout=0", "run.recompute=on"), Listener())
    run.model.spare.limit = 0
    sizes, calls = [], []
    takes = run.model.spare.takes

    def watched(n_bytes: int, dear: bool) -> bool:
        sizes.append((n_bytes, dear, takes(n_bytes, dear)))
        return sizes[-1][2]

    run.model.spare.takes = watched
    step = Step(run, print)
    step(0)
    assert not any(kept for _, _, kept in sizes)
    dear = sum(n for n, is_dear, _ in sizes if is_dear)
    for limit in (dear // 2, dear, 2 * dear, 100 * dear):
        run.model.spare.limit = limit
        sizes.clear()
        step(1)
        kept = [n for n, _, is_kept in sizes if is_kept]
        others = [n for n, is_dear, is_kept in sizes if is_kept and not is_dear]
        calls.append((sum(kept), sum(others)))
        assert sum(kept) <= limit
    assert [bool(others) for _, others in calls] == [False, False, True, True]
    assert calls[1][0] == dear
    assert calls[3][0] == sum(n for n, _, _ in sizes)


def test_a_run_spends_the_memory_it_is_given(tmp_path):
    """The same weights, and it says what it does with it."""
    weights = []
    for memory, said in (("0", None), ("0.001", "nothing is kept beyond that"), ("1000", "GB more may hold")):
        (tmp_path / memory).mkdir()
        more = "model.version=7", "optim.dropout=0", "run.recompute=on", f"run.memory={float(memory)}"
        run, messages = set_up(configure(tmp_path / memory, *more), Listener()), []
        step = Step(run, messages.append)
        for i in range(4):
            step(i)
        assert [said in text for text in messages] == ([] if said is None else [True])
        assert (run.model.spare.limit > 0) == (memory == "1000")
        weights.append(list(run.model.parameters()))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*weights))
