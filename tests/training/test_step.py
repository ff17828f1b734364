"""The training step: guards, optimisers, averages, and the CUDA graph."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_runs import Listener, configure

from receptance.errors import ConfigError
from receptance.training import train
from receptance.training.config import OptimConfig
from receptance.training.guard import judge, new_statistics, verdict
from receptance.training.loop import set_up
from receptance.training.muon import MuonAdamW, orthogonalised
from receptance.training.optim import averaged
from receptance.training.step import CaptureError, Step, prepare


def test_a_graph_on_a_cpu_is_refused(tmp_path):
    run = set_up(configure(tmp_path, "run.cuda_graph=on"), Listener())
    with pytest.raises(ConfigError, match=r"run\.cuda_graph = 'on' needs a CUDA device, the run is on cpu"):
        Step(run, print)


def test_a_failed_capture_is_told_once_and_the_step_taken_without(tmp_path):
    run, messages = set_up(configure(tmp_path), Listener()), []
    plain = Step(copy.deepcopy(run), messages.append)
    step = Step(run, messages.append)

    def graph(batch):
        raise CaptureError("the training step cannot be captured: as a test")

    step._graph = graph
    assert [step(i).tolist() for i in range(3)] == [plain(i).tolist() for i in range(3)]
    assert len(messages) == 1
    assert "going on without a CUDA graph" in messages[0]


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
@pytest.mark.parametrize("settings", [(), ("run.accumulate=2", "run.activation_checkpointing=true")])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_cuda_graph_changes_nothing(tmp_path, version, settings, precision):
    """Eager steps, the capture and replays give the losses and weights of eager steps alone, but for atomic sums."""
    losses, weights = {}, {}
    for wish in ("on", "off"):
        (tmp_path / wish).mkdir()
        base = ["run.device=cuda", f"run.precision={precision}", f"model.version={version}", "optim.dropout=0.0",
                "optim.eps=1e-8"]  # fmt: skip  # 1e-18 would turn rounding noise into whole steps
        run = set_up(configure(tmp_path / wish, *base, *settings, f"run.cuda_graph={wish}"), Listener())
        messages = []
        step = Step(run, messages.append)
        losses[wish] = [step(i)[0].item() for i in range(12)]
        weights[wish] = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        assert messages == []
        if wish == "on":
            assert step._graph is not None
            assert step._graph._graph is not None
    tolerance = 1e-5 if precision == "float32" else 2e-3
    assert losses["on"] == pytest.approx(losses["off"], rel=tolerance)
    for name, expected in weights["off"].items():
        assert (weights["on"][name] - expected).norm() <= 10 * tolerance * expected.norm().clamp(min=1e-2), name


def steps_of(run, n):
    step = Step(run, print)
    return [verdict(step(i)) for i in range(n)]


def weights_of(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def poison(run, step):
    """Make the batch of one step, and of it alone, give NaN: its inputs name a row of the embedding that is NaN."""
    batch = run.batch

    def poisoned(i):
        found = batch(i)
        with torch.no_grad():
            run.model.emb.weight[255] = torch.nan if i == step else 0.0
        return found._replace(tokens=torch.full_like(found.tokens, 255)) if i == step else found

    run.batch = poisoned


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, optimizer):
    run = set_up(configure(tmp_path, f"optim.optimizer={optimizer}", "optim.dropout=0.0"), Listener())
    steps_of(run, 2)
    before, moments = weights_of(run), copy.deepcopy(list(run.optimizer.state.values()))
    poison(run, 2)
    outcome = Step(run, print)
    seen = verdict(outcome(2))
    assert math.isnan(seen.loss)
    assert (seen.in_a_row, seen.skipped) == (1, 1)
    after = weights_of(run)
    after["emb.weight"][255] = before["emb.weight"][255]
    assert all(torch.equal(after[name], before[name]) for name in before)
    for old, new in zip(moments, run.optimizer.state.values()):
        assert all(torch.equal(old[key], new[key]) for key in old if key != "guard")
    seen = verdict(outcome(3))
    assert math.isfinite(seen.loss)
    assert (seen.in_a_row, seen.skipped) == (0, 1)
    assert not torch.equal(weights_of(run)["head.weight"], before["head.weight"])


def test_spikes_are_judged_against_the_mean_of_steps_that_were_taken():
    statistics, config = new_statistics(torch.device("cpu")), OptimConfig(loss_spike=2.0, grad_spike=10.0)

    def judged(loss, norm):
        return bool(judge(statistics, torch.tensor(loss), torch.tensor(norm), config))

    assert not judged(1.0, 1.0)
    assert not judged(50.0, 1.0), "a beginning has no spikes"
    for _ in range(500):
        assert not judged(3.0, 1.0)
    assert not judged(5.9, 9.9)
    assert judged(6.3, 1.0)
    assert judged(3.0, 11.5)
    assert all(judged(100.0, 1.0) for _ in range(200)), "skipped steps do not raise the mean"
    assert statistics[-2:].tolist() == [202, 202]
    assert not judged(3.0, 1.0)
    assert statistics[-2:].tolist() == [0, 202]
    off = OptimConfig(skip_nonfinite=False)
    assert not judge(statistics, torch.tensor(math.nan), torch.tensor(1.0), off)


def test_a_run_that_only_skips_stops_and_names_the_checkpoint(tmp_path):
    config = configure(tmp_path, "optim.loss_spike=1.0001", "optim.max_skips=5", "run.tokens=51200", "optim.dropout=0")
    hostile = replace(config, optim=replace(config.optim, lr=5.0, lr_final=5.0, grad_clip=0.0))
    with pytest.raises(ConfigError, match=r"updates in a row were skipped .*checkpoint is .*step-000000\d\d"):
        train(hostile, Listener())


@pytest.mark.parametrize("skip_nonfinite", ["true", "false"])
def test_the_checkpoint_named_is_from_before_the_update_that_broke_the_weights(tmp_path, monkeypatch, skip_nonfinite):
    """Not one of those that later steps would leave, which would also take the place of the good ones."""
    monkeypatch.setattr("receptance.training.step.rate", lambda config, step: 1e-3 if step < 6 else 1e30)
    config = configure(
        tmp_path, "run.save_every=1", "run.log_every=10", "optim.max_skips=3", f"optim.skip_nonfinite={skip_nonfinite}"
    )
    with pytest.raises(ConfigError, match=r"by step 10; the last good checkpoint is .*step-0000000[67]\. ") as raised:
        train(config, Listener())
    named = re.search(r"checkpoint is (\S+)\. ", str(raised.value))[1]
    assert all(x.abs().max() < 100 for x in load_file(f"{named}/model.safetensors").values())


def test_the_average_of_the_weights_is_the_weighted_mean_and_leaves_the_weights_alone(tmp_path):
    run = set_up(configure(tmp_path, "optim.ema=0.7"), Listener())
    step, history = Step(run, print), []
    for i in range(4):
        step(i)
        history.append(weights_of(run))
    shares = [0.7 ** (3 - i) for i in range(4)]
    with averaged(run.optimizer, 0.7, 4):
        mean = weights_of(run)
    for name, found in mean.items():
        expected = sum(share * weights[name] for share, weights in zip(shares, history)) / sum(shares)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(found, history[-1][name]) for name, found in weights_of(run).items())


def test_weight_decay_follows_its_schedule_in_the_groups_that_have_any(tmp_path):
    run = set_up(configure(tmp_path, "optim.weight_decay_final=0.001"), Listener())
    seen = []
    for i in range(run.config.steps):
        prepare(run, i)
        seen.append({group["weight_decay"] for group in run.optimizer.param_groups})
    assert all(len(values) == 2 and 0.0 in values for values in seen)
    decays = [max(values) for values in seen]
    assert decays == sorted(decays, reverse=True)
    assert decays[-1] == pytest.approx(0.001, rel=1e-9)


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest(tmp_path):
    run = set_up(configure(tmp_path, "optim.optimizer=muon"), Listener())
    muon = {name for group in run.optimizer.param_groups if group["muon"] for name in group["names"]}
    hidden = ("receptance", "key", "value", "output")
    assert muon == {name for name, _ in run.model.named_parameters() if name.split(".")[-2] in hidden}


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 48), (2, 48, 16)])
def test_muon_brings_all_singular_values_near_one_and_keeps_the_directions(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    y = orthogonalised(x)
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.3  # an ill-conditioned square matrix is not lifted all the way in five iterations
    assert values.max() < 1.3
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ y @ vh.mT
    assert (core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4, (
        "odd in x: same singular vectors"
    )
    assert s.max() / s.min() > 2


def test_muon_equals_torch_muon(tmp_path):
    """Where PyTorch has one: the same update for the same momentum and iteration, but for its bfloat16."""
    theirs_class = getattr(torch.optim, "Muon", None)
    if theirs_class is None:
        pytest.skip("this PyTorch has no Muon")
    ours_p, theirs_p = (
        torch.nn.Parameter(torch.randn(24, 48, generator=torch.Generator().manual_seed(2))) for _ in "12"
    )
    start = ours_p.detach().clone()
    group = {"params": [ours_p], "names": ["x"], "weight_decay": 0.1, "muon": True, "muon_momentum": 0.95}
    ours = MuonAdamW([group], lr=0.01, fused=True)
    ours.state[ours_p] = {"momentum_buffer": torch.zeros_like(ours_p)}
    theirs = theirs_class([theirs_p], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for i in range(5):
        gradient = torch.randn(24, 48, generator=torch.Generator().manual_seed(10 + i))
        ours_p.grad, theirs_p.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    change = theirs_p.detach() - start
    assert (ours_p.detach() - theirs_p.detach()).norm() < 2e-2 * change.norm()  # bfloat16 has 8 bits, five iterations
