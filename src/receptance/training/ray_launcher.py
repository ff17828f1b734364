"""A run on a Ray cluster: the same training, its processes started, watched and restarted by Ray Train.

Needs the extra `receptance[ray]`. Ray belongs on a network of trusted machines: whoever reaches it can run code.
"""

from dataclasses import replace
from pathlib import Path

from receptance.errors import ConfigError
from receptance.training.config import TrainConfig
from receptance.training.loop import train


class _Lines:
    """The first worker's news, which Ray passes on to whoever started the run."""

    def message(self, text: str) -> None:
        print(text, flush=True)

    def step(self, row: dict[str, float]) -> None:
        print(f"step {row['step']:.0f} · loss {row['loss']:.4f} · lr {row['lr']:.2e}", flush=True)


def _work(arguments: dict[str, TrainConfig]) -> None:
    """What each worker does. Ray has set RANK and WORLD_SIZE and made the process group."""
    train(arguments["config"], _Lines())


def train_on_ray(config: TrainConfig, workers: int, *, max_failures: int = 3) -> Path:
    """Train with `workers` processes of the cluster that `ray.init` finds, or starts here; returns the model's folder.

    run.out and the data must be where every worker sees them under the same path. A worker that is lost restarts them
    all from the last checkpoint, up to max_failures times (-1: always). Each takes a GPU unless run.device is "cpu".
    Raises ConfigError when Ray is not installed.
    """
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError:
        raise ConfigError("training on Ray needs it installed: pip install 'receptance[ray]'") from None
    out, root = Path(config.run.out).resolve(), Path(config.data.root).resolve()
    init = config.model.init
    if init is not None and Path(init).exists():
        init = str(Path(init).resolve())
    config = replace(  # workers run in folders of their own
        config,
        run=replace(config.run, out=str(out)),
        data=replace(config.data, root=str(root)),
        model=replace(config.model, init=init),
    )
    uses_gpu = config.run.device != "cpu"
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": config},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=uses_gpu),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if uses_gpu else "gloo"),
        run_config=RunConfig(
            name="run", storage_path=str(out / "ray"), failure_config=FailureConfig(max_failures=max_failures)
        ),
    )
    trainer.fit()
    return out / "model"
