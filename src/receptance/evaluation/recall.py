"""Small models that learn the tests of `synthetic` and `classify`, and how well they then do them."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from receptance.data import IGNORE
from receptance.evaluation.numbers import NUMBERS, Numbers
from receptance.evaluation.synthetic import Ids, Task
from receptance.models import RWKV, apply_recipe
from receptance.models.base import Recipe
from receptance.tokenizers import tokenizer as open_tokenizer
from receptance.training.batch import Batch
from receptance.training.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from receptance.training.distributed import Parallel
from receptance.training.guard import verdict
from receptance.training.loop import Run, autocast, new_model
from receptance.training.optim import build_optimizer
from receptance.training.passes import Passes
from receptance.training.step import Step

CHECKS, CHECK_EVERY, GOOD = 40, 50, 0.999  # looks in a run, steps between them at least; accuracy of a task learnt


@dataclass(frozen=True)
class Score:
    """accuracy: of all answers; last: of the last one in each row; whole: rows without a mistake; groups: by kind."""

    accuracy: float
    last: float
    whole: float
    groups: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Learnt:
    """What came of a run: its scores by the name of the test, its size, its state, and the time that it took.

    curve: (step, accuracy of the last answer, of all) of held-out examples of the task.
    """

    model: str
    parameters: int
    state_bytes: int
    steps: int
    seconds: float
    loss: float
    lr: float
    curve: list[tuple[int, float, float]]
    scores: dict[str, Score]


@dataclass(frozen=True)
class Options:
    """How to learn a task. lr: tried one after another until one learns it; the best on held-out examples counts.

    examples: so many, over and over (0: every step has new ones). shortest: in each step only the answers up to a
    random place, from here to the end, count (0: all do), which makes state tracking learnable. curriculum: over this
    share of the steps that end moves from `shortest` to the task's length. A list of seeds is a run each. precision: as
    run.precision of `receptance train`. stop_at: accuracy of held-out examples at which learning ends (above 1: never).
    """

    steps: int = 1000
    batch: int = 64
    lr: tuple[float, ...] = (2e-3,)
    weight_decay: float = 0.0
    dropout: float = 0.0
    seed: int = 1
    shortest: int = 0
    curriculum: float = 0.0
    examples: int = 0
    precision: str = "auto"
    stop_at: float = GOOD


def build(shape: ModelConfig, task: Task, seed: int = 1, lr: float = 1e-3) -> RWKV:
    """A model of this shape for the task's tokens, with the initial values of its recipe."""
    config = TrainConfig(model=shape, run=RunConfig(ctx_len=0))  # no window: a Transformer sees everything
    model = new_model(config, task.vocab_size)
    if task.reading is not None:
        model.emb = Numbers(task.reading, model.config.n_embd, task.length)  # type: ignore[assignment]
    apply_recipe(model, recipe_of(model, lr), torch.Generator().manual_seed(seed))
    return model


def recipe_of(model: RWKV, lr: float) -> Recipe:
    recipe: Recipe = type(model).recipe(model.config, lr)  # type: ignore[attr-defined]
    return recipe | NUMBERS if isinstance(model.emb, Numbers) else recipe


class TaskRun(Run):
    """A run of the trainer whose batches are a task's examples."""

    examples: "Examples"

    def batch(self, step: int) -> Batch:
        return self.examples.batch(step)


@lru_cache(maxsize=3)  # some seeds of one task
def pool(task: Task, n: int, seed: int) -> tuple[Ids, Ids]:
    """Training examples; the models of a grid learn from the same ones, which can take longer to make than a model."""
    return task.examples(n, np.random.default_rng([seed, n]))


class Examples:
    """A task's training examples on the device: a pool in shuffled passes, or new ones for each step."""

    def __init__(self, task: Task, options: Options, device: torch.device):
        self._task, self._options, self._device = task, options, device
        self._rng = np.random.default_rng(options.seed)
        self._pool = None
        if options.examples:
            self._pool = to(device, pool(task, options.examples, options.seed), torch.int32)  # type: ignore[arg-type]
        self._moves = None if task.moves is None else torch.from_numpy(task.moves).to(device)
        self._order, self._at = torch.empty(0, dtype=torch.long), 0

    def batch(self, step: int) -> Batch:
        tokens, targets = self._next() if self._pool is not None else self._fresh()
        if self._options.shortest:
            end = int(self._rng.integers(self._options.shortest, self._longest(step) + 1))
            targets = targets.clone()
            targets[:, end:] = IGNORE  # models are causal: the same as shorter rows
        return Batch.of(tokens, targets)

    def _longest(self, step: int) -> int:
        """That the random end of a row's answers may have."""
        first, length = self._options.shortest, self._task.length
        grown = (step + 1) / max(1, self._options.curriculum * self._options.steps)
        return min(length, first + int(grown * (length - first)))

    def _fresh(self) -> tuple[Tensor, Tensor]:
        return to(self._device, self._task.examples(self._options.batch, self._rng))

    def _next(self) -> tuple[Tensor, Tensor]:
        assert self._pool is not None
        if self._at + self._options.batch > len(self._order):
            order = self._rng.permutation(max(self._options.batch, len(self._pool[0])))
            self._order = torch.from_numpy(order % len(self._pool[0])).to(self._device)
            self._at = 0
        rows = self._order[self._at : self._at + self._options.batch]
        self._at += self._options.batch
        tokens, targets = (x[rows].long() for x in self._pool)
        if self._moves is not None:
            chosen = torch.from_numpy(self._rng.integers(0, len(self._moves), len(tokens))).to(self._device)
            tokens = nn.functional.pad(tokens, (0, 1)).gather(1, self._moves[chosen])
        return tokens, targets


def learn(
    shape: ModelConfig,
    task: Task,
    tests: Sequence[Task] = (),
    options: Options = Options(),
    *,
    device: str = "cpu",
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[RWKV, Learnt]:
    """Train until the task is learnt (GOOD) or `steps` have passed; then take the tests.

    The step is the trainer's, with the recipe's groups; the rate warms up over a twentieth and falls to a tenth.
    """
    best: tuple[RWKV, Learnt, Score] | None = None
    for lr in options.lr:
        found = _learn_once(shape, task, tests, options, lr, torch.device(device), tell)
        if best is None or found[2].accuracy > best[2].accuracy:
            best = found
        if min(best[2].accuracy, best[2].last) >= GOOD:
            break
    assert best is not None
    return best[0], best[1]


def _learn_once(
    shape: ModelConfig, task: Task, tests: Sequence[Task], options: Options, lr: float, device: torch.device,
    tell: Callable[[str], None],
) -> tuple[RWKV, Learnt, Score]:  # fmt: skip
    run = set_up(shape, task, options, lr, device)
    model, step = run.model, Step(run, tell)
    held = to(device, task.held(512, np.random.default_rng(options.seed + 1_000_003)))
    start, done, loss = time.perf_counter(), 0, math.nan
    every = max(CHECK_EVERY, options.steps // CHECKS)
    curve, score = [], Score(0, 0, 0)
    while done < options.steps:
        outcome = step(done)
        done += 1
        if done % every == 0 or done == options.steps:
            loss = verdict(outcome).loss
            with run.autocast():
                score = grade(model, *held)
            curve.append((done, score.last, score.accuracy))
            if done % (10 * every) == 0:
                tell(f"{shape.version}, {task.name}: step {done}, loss {loss:.4f}, accuracy {score.accuracy:.3f}")
            if min(score.accuracy, score.last) >= options.stop_at or not math.isfinite(loss):
                break
    seconds = time.perf_counter() - start
    scores = {}
    for test in (task, *tests):
        with run.autocast():
            rows = to(device, test.test(np.random.default_rng(options.seed + 7)))
            scores[test.name] = grade(model, *rows, groups=test.groups())
    state = model.zero_state().nbytes if shape.version != "transformer" else cache_bytes(model, task.length)
    kind = f"{shape.version} wide" if shape.wide_rate else shape.version
    size = sum(p.numel() for p in model.parameters())
    return model, Learnt(kind, size, state, done, seconds, loss, lr, curve, scores), score


def set_up(shape: ModelConfig, task: Task, options: Options, lr: float, device: torch.device) -> TaskRun:
    """As `receptance train` sets up a run, without its files."""
    steps, batch = options.steps, options.batch
    config = TrainConfig(
        model=shape,
        optim=OptimConfig(lr=lr, lr_final=lr / 10, warmup_steps=max(1, steps // 20), logit_penalty=0.0,
                          weight_decay=options.weight_decay, dropout=options.dropout),
        run=RunConfig(ctx_len=task.length, batch_size=batch, tokens=steps * batch * task.length, seed=options.seed,
                      precision=options.precision, cuda_graph="on" if device.type == "cuda" else "off"),
    )  # fmt: skip
    model = build(shape, task, options.seed, lr).to(device).train()
    model.dropout = options.dropout
    optimizer = build_optimizer(model, recipe_of(model, lr), config.optim)
    parallel = Parallel(config, device)
    passes = Passes(config, model, parallel, autocast=lambda: autocast(config, device))
    run = TaskRun(config, Path(), device, open_tokenizer("byte"), None, {}, model, optimizer, parallel, passes)  # type: ignore[arg-type]
    run.examples = Examples(task, options, device)
    return run


def to(device: torch.device, examples: tuple[Ids, Ids], dtype: torch.dtype = torch.long) -> tuple[Tensor, Tensor]:
    tokens, targets = (torch.from_numpy(x).to(device, dtype) for x in examples)
    return tokens, targets


def cache_bytes(model: RWKV, length: int) -> int:
    """Keys and values of so many tokens."""
    config = model.config
    return int(8 * config.n_layer * config.n_kv * config.head_size * length)


@torch.no_grad()
def grade(model: RWKV, tokens: Tensor, targets: Tensor, rows: int = 64, groups: Sequence[str] = ()) -> Score:
    """Of the most probable answers, over `rows` rows at a time. groups: the kind of each row."""
    was = model.training
    model.eval()
    right = torch.cat([model(part)[0].argmax(-1) for part in tokens.split(rows)]) == targets
    asked = targets != IGNORE
    place = torch.arange(targets.shape[1], device=targets.device)
    last = torch.where(asked, place, -1).amax(1)
    model.train(was)
    whole = (right | ~asked).all(1)
    by_kind: dict[str, list[bool]] = {}
    for kind, is_right in zip(groups, whole.tolist()):
        by_kind.setdefault(kind, []).append(is_right)
    return Score(
        float((right & asked).sum() / asked.sum()),
        float(right.gather(1, last[:, None]).float().mean()),
        float(whole.float().mean()),
        {kind: sum(found) / len(found) for kind, found in by_kind.items()},
    )


def as_rows(results: Sequence[Learnt]) -> list[dict[str, Any]]:
    """For JSON; numbers that are not finite are null."""
    rows = [dataclasses.asdict(result) for result in results]
    return [row | {"loss": row["loss"] if math.isfinite(row["loss"]) else None} for row in rows]
