"""Training on a Ray cluster of this machine, where Ray is installed."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_distributed import config_of

import receptance as rc
from receptance.errors import ConfigError
from receptance.training.ray_launcher import train_on_ray


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.train", None)
    with pytest.raises(ConfigError, match=r"pip install 'receptance\[ray\]'"):
        train_on_ray(config_of(tmp_path, "ray"), 2)


def workers() -> list[int]:
    """Process ids of Ray's training workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"RayTrainWorker" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_run_on_ray_survives_kill_minus_nine(tmp_path):
    ray = pytest.importorskip("ray")
    settings = ["run.tokens=7680", "run.save_every=2"]
    config = config_of(tmp_path, "ray", *settings)
    log = Path(config.run.out) / "log.jsonl"

    def kill() -> None:
        while not log.exists() or log.read_text().count('"loss"') < 5:
            time.sleep(0.02)
        os.kill(workers()[-1], signal.SIGKILL)

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        found = rc.load(train_on_ray(config, 2)).state_dict()
        assert not killer.is_alive()
        expected = rc.load(train_on_ray(config_of(tmp_path, "whole", *settings), 2)).state_dict()
    finally:
        ray.shutdown()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
