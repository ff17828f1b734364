"""Whole runs under torchrun: one report, and a process lost at any moment costs nothing but time."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import receptance as rc

TEXT = "\n".join(f"{i} plus {j} is {i + j}." for i in range(40) for j in range(40))


def torchrun(folder: Path, n: int, *overrides: str, restarts: int = 0) -> subprocess.Popen[str]:
    """`receptance train` in n processes."""
    (folder / "text.txt").write_text(TEXT)
    settings = [
        f'data.train=["{folder}/text.txt"]', "data.tokenizer=byte", "model.n_layer=2", "model.n_embd=32",
        "model.head_size=16", "run.ctx_len=32", "run.batch_size=8", "run.log_every=1", "run.save_every=2",
        f"run.out={folder / 'run'}", "run.device=cpu", "optim.lr=3e-3", "optim.dropout=0.1",
    ]  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}",
        f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "receptance", "train", *settings, *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    output = open(folder / "output.txt", "a")  # noqa: SIM115
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment)


def workers(parent: int) -> list[int]:
    """Ranks' process ids, in the order in which torchrun started them."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    try:
        return [int(pid) for pid in children.read_text().split() if b"receptance" in _command(int(pid))]
    except FileNotFoundError:
        return []


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def finished(run: subprocess.Popen[str], folder: Path, timeout: float = 200) -> dict[str, torch.Tensor]:
    """The trained weights."""
    try:
        code = run.wait(timeout)
    except subprocess.TimeoutExpired:
        run.kill()
        raise
    assert code == 0, (folder / "output.txt").read_text()[-4000:]
    return rc.load(folder / "run" / "model").state_dict()


def steps_done(folder: Path) -> int:
    log = folder / "run" / "log.jsonl"
    return log.read_text().count('"loss"') if log.exists() else 0


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_a_run_of_two_survives_the_loss_of_one_and_reports_once(tmp_path):
    run = torchrun(tmp_path, 2, "run.tokens=2560", restarts=1)
    while steps_done(tmp_path) < 5:
        assert run.poll() is None, (tmp_path / "output.txt").read_text()[-4000:]
        time.sleep(0.01)
    os.kill(workers(run.pid)[1], signal.SIGKILL)
    found = finished(run, tmp_path)
    output = (tmp_path / "output.txt").read_text()
    assert re.search(r"continuing from step \d+ of 10", output)
    assert output.count("finished: ") == 1
    assert output.count("step 10/10") == 1
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("parallel.kind=fsdp", "run.save_in_background=true")], ids=["ddp", "fsdp"])
def test_kill_minus_nine_of_one_of_four_twenty_times(tmp_path, settings):
    """Every one of twenty runs ends with the weights of the run that was left alone, bit for bit."""
    whole = tmp_path / "whole"
    whole.mkdir()
    settings = ("run.tokens=5120", *settings)
    expected = finished(torchrun(whole, 4, *settings), whole)
    draw = random.Random(1)
    resumed = 0
    for i in range(10):
        folder = tmp_path / str(i)
        folder.mkdir()
        run = torchrun(folder, 4, *settings, restarts=1)
        steps = draw.randrange(20)  # of 20: from before the first to after the last, while it is saved
        while steps_done(folder) < steps or len(workers(run.pid)) < 4:
            assert run.poll() is None, (folder / "output.txt").read_text()[-4000:]
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.5))
        if pids := workers(run.pid):
            os.kill(draw.choice(pids), signal.SIGKILL)
        found = finished(run, folder)
        resumed += "continuing from step" in (folder / "output.txt").read_text()
        for name, x in expected.items():
            assert torch.equal(found[name], x), (i, name)
    assert resumed >= 5  # the others were hit before their first checkpoint, or had finished
