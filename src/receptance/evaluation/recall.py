"""Small models that learn the tests of `synthetic`, and how well they then do them."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from receptance.data import IGNORE
from receptance.evaluation.synthetic import Task
from receptance.models import RWKV, apply_recipe
from receptance.training.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from receptance.training.loop import new_model
from receptance.training.optim import build_optimizer, set_learning_rate
from receptance.training.schedule import learning_rate

CHECK_EVERY, GOOD = 50, 0.999  # steps; an accuracy at which a model has learnt its task


@dataclass(frozen=True)
class Score:
    """accuracy: of all answers; last: of the last one in each row; whole: rows without a mistake."""

    accuracy: float
    last: float
    whole: float


@dataclass(frozen=True)
class Learnt:
    """What came of a run: its scores by the name of the test, its size, its state, and the time that it took."""

    model: str
    parameters: int
    state_bytes: int
    steps: int
    seconds: float
    loss: float
    scores: dict[str, Score]


def build(shape: ModelConfig, task: Task, seed: int = 1, lr: float = 1e-3) -> RWKV:
    """A model of this shape for the task's tokens, with the initial values of its recipe."""
    config = TrainConfig(model=shape, run=RunConfig(ctx_len=0))  # no window: a Transformer sees everything
    model = new_model(config, task.vocab_size)
    apply_recipe(model, type(model).recipe(model.config, lr), torch.Generator().manual_seed(seed))  # type: ignore[attr-defined]
    return model


def learn(
    shape: ModelConfig,
    task: Task,
    tests: Sequence[Task] = (),
    *,
    steps: int = 1000,
    batch: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.0,
    seed: int = 1,
    shortest: int = 0,
    device: str = "cpu",
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[RWKV, Learnt]:
    """Train on fresh examples until the task is learnt (GOOD) or `steps` have passed; then take the tests.

    shortest: each step's rows have a random length from here to the task's (0: always the task's), which makes state
    tracking learnable. The optimiser has the recipe's groups; the rate warms up over a twentieth and falls to a tenth.
    """
    model = build(shape, task, seed, lr).to(device)
    model.train()
    recipe = type(model).recipe(model.config, lr)  # type: ignore[attr-defined]
    optimizer = build_optimizer(model, recipe, OptimConfig(lr=lr, weight_decay=weight_decay))
    rng = np.random.default_rng(seed)
    held = make(task, 256, np.random.default_rng(seed + 1_000_003), device)
    start, done, loss = time.perf_counter(), 0, torch.zeros(())
    while done < steps:
        tokens, targets = make(task, batch, rng, device)
        if shortest:
            length = int(rng.integers(shortest, task.length + 1))
            tokens, targets = tokens[:, :length], targets[:, :length]
        rate = learning_rate(done, steps, lr=lr, lr_final=lr / 10, warmup_steps=max(1, steps // 20), kind="cosine",
                             decay_fraction=0.2, decay_shape="linear")  # fmt: skip
        set_learning_rate(optimizer, rate)
        loss, _ = model.loss(tokens, targets, token_weights=targets != IGNORE)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        if done % CHECK_EVERY == 0:
            score = grade(model, *held)
            news = f"step {done}, loss {float(loss.detach()):.4f}, accuracy {score.accuracy:.3f}"
            tell(f"{shape.version}, {task.name}: {news}")
            if min(score.accuracy, score.last) >= GOOD:
                break
    seconds = time.perf_counter() - start
    scores = {
        test.name: grade(model, *make(test, 512, np.random.default_rng(seed + 7), device)) for test in (task, *tests)
    }
    state = model.zero_state().nbytes if shape.version != "transformer" else cache_bytes(model, task.length)
    kind = f"{shape.version} wide" if shape.wide_rate else shape.version
    size = sum(p.numel() for p in model.parameters())
    return model, Learnt(kind, size, state, done, seconds, float(loss.detach()), scores)


def make(task: Task, n: int, rng: np.random.Generator, device: str) -> tuple[Tensor, Tensor]:
    tokens, targets = task.examples(n, rng)
    return torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device)


def cache_bytes(model: RWKV, length: int) -> int:
    """Keys and values of so many tokens."""
    config = model.config
    return int(8 * config.n_layer * config.n_kv * config.head_size * length)


@torch.no_grad()
def grade(model: RWKV, tokens: Tensor, targets: Tensor, rows: int = 64) -> Score:
    """Of the most probable answers, over `rows` rows at a time."""
    was = model.training
    model.eval()
    right = torch.cat([model(part)[0].argmax(-1) for part in tokens.split(rows)]) == targets
    asked = targets != IGNORE
    place = torch.arange(targets.shape[1], device=targets.device)
    last = torch.where(asked, place, -1).amax(1)
    model.train(was)
    return Score(
        float((right & asked).sum() / asked.sum()),
        float(right.gather(1, last[:, None]).float().mean()),
        float((right | ~asked).all(1).float().mean()),
    )


def as_rows(results: Sequence[Learnt]) -> list[dict[str, Any]]:
    """For JSON; numbers that are not finite are null."""
    rows = [dataclasses.asdict(result) for result in results]
    return [row | {"loss": row["loss"] if math.isfinite(row["loss"]) else None} for row in rows]
