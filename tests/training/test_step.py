"""The training step: with and without a CUDA graph."""

import copy

import pytest
from test_runs import Listener, configure

from receptance.errors import ConfigError
from receptance.training.loop import set_up
from receptance.training.step import CaptureError, Step


def test_a_graph_on_a_cpu_is_refused(tmp_path):
    run = set_up(configure(tmp_path, "run.cuda_graph=on"), Listener())
    with pytest.raises(ConfigError, match=r"run\.cuda_graph = 'on' needs a CUDA device, the run is on cpu"):
        Step(run, print)


def test_a_failed_capture_is_told_once_and_the_step_taken_without(tmp_path):
    run, messages = set_up(configure(tmp_path), Listener()), []
    plain = Step(copy.deepcopy(run), messages.append)
    step = Step(run, messages.append)

    def graph(inputs, targets):
        raise CaptureError("the training step cannot be captured: as a test")

    step._graph = graph
    assert [step(i).item() for i in range(3)] == [plain(i).item() for i in range(3)]
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
        base = ["run.device=cuda", f"run.precision={precision}", f"model.version={version}", "optim.dropout=0.0"]
        run = set_up(configure(tmp_path / wish, *base, *settings, f"run.cuda_graph={wish}"), Listener())
        messages = []
        step = Step(run, messages.append)
        losses[wish] = [step(i).item() for i in range(12)]
        weights[wish] = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        assert messages == []
        if wish == "on":
            assert step._graph is not None
            assert step._graph._graph is not None
    tolerance = 1e-5 if precision == "float32" else 2e-3
    assert losses["on"] == pytest.approx(losses["off"], rel=tolerance)
    for name, expected in weights["off"].items():
        assert (weights["on"][name] - expected).norm() <= 10 * tolerance * expected.norm().clamp(min=1e-2), name
