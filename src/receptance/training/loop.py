"""One training run: a pure function of its configuration and data, interruptible at any moment."""

import json
import os
import shutil
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from receptance.atomic import replacing
from receptance.baselines import BASELINES, RNN, fit_budget, save_baseline
from receptance.checkpoint import load, save
from receptance.data import BinIdx, documents
from receptance.errors import CheckpointError, ConfigError
from receptance.models import RWKV, VERSIONS, apply_recipe
from receptance.models.base import Recipe
from receptance.tokenizers import tokenizer as open_tokenizer
from receptance.tokenizers import train_bpe
from receptance.tokenizers.base import Tokenizer
from receptance.training.ablation import freeze, without
from receptance.training.batch import Batch
from receptance.training.config import HEADLESS, TrainConfig, fixed_settings, to_json
from receptance.training.data import TrainingData, is_token_file, open_data, source_path
from receptance.training.distributed import Parallel, precision
from receptance.training.evaluate import Loss
from receptance.training.guard import verdict
from receptance.training.master import MasterAdamW, widen
from receptance.training.memory import plan_memory
from receptance.training.optim import averaged, build_optimizer
from receptance.training.passes import Passes
from receptance.training.report import (
    Log,
    Meter,
    Reporter,
    Sampler,
    Silent,
    look,
    samples,
    should_stop,
    step_row,
    validate,
)
from receptance.training.resume import Checkpoints, saved_config
from receptance.training.step import Step
from receptance.training.track import trackers

MADE = ("config.json", "tokenizer", "data", "checkpoints", "log.jsonl", "model", "model-ema")  # of a run's folder


@dataclass
class Run:
    """Everything a step needs."""

    config: TrainConfig
    out: Path
    device: torch.device
    tokenizer: Tokenizer
    data: TrainingData
    valid: dict[str, BinIdx]
    model: RWKV
    optimizer: Optimizer
    parallel: Parallel
    passes: Passes

    @property
    def precision(self) -> str:
        """Of matrix products: "float32" or "bfloat16"."""
        return precision(self.config, self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """For passes of the model, whose weights are of the products' type or are cast to it."""
        return casts(self.config, self.parallel, self.model)

    def batch(self, step: int) -> Batch:
        """All of one step, on the device."""
        size = self.config.run.batch_size
        rows = self.data.rows(range(step * size, (step + 1) * size))
        resets = None if rows.resets is None else self._to_device(rows.resets)
        return Batch.of(self._to_device(rows.inputs), self._to_device(rows.targets), resets)

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    in_half = precision(config, device) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16) if in_half else nullcontext()


def casts(config: TrainConfig, parallel: Parallel, model: RWKV) -> AbstractContextManager[object]:
    """What a pass runs under: autocast, unless its weights are bfloat16 when it sees them."""
    in_half = model.dtype == torch.bfloat16 or parallel.gathers_half
    return nullcontext() if in_half else autocast(config, parallel.device)


def has_masters(config: TrainConfig, parallel: Parallel, model: RWKV) -> bool:
    """Whether weights are bfloat16 beside float32 masters. Raises ConfigError when that is asked for and cannot be.

    bfloat16 gradients must not be added up over many passes, where what comes late would be rounded away. Shards need
    no masters: they are float32, and gathered as bfloat16 (`Parallel.gathers_half`).
    """
    wish, run = config.run.weights, config.run
    if parallel.gathers_half:
        return False
    reasons = {
        "run.precision = 'float32'": precision(config, parallel.device) == "float32",
        "optim.optimizer = 'muon'": config.optim.optimizer == "muon",
        "run.accumulate > 1": run.accumulate > 1,
        "run.segment_len": bool(run.segment_len),
        "parallel.kind = 'fsdp'": parallel.is_sharded,
        f"model.version = {config.model.version!r}": config.model.version in BASELINES,
        "weights that are not trained": not all(p.requires_grad for p in model.parameters()),
    }
    if wish == "bfloat16" and any(reasons.values()):
        found = ", ".join(reason for reason, holds in reasons.items() if holds)
        raise ConfigError(f"run.weights = 'bfloat16' does not go with {found}; use 'auto' or 'float32'")
    return wish == "bfloat16" or (wish == "auto" and parallel.device.type == "cuda" and not any(reasons.values()))


def train(config: TrainConfig, reporter: Reporter, sampler: Sampler | None = None) -> Path:
    """Train as configured, continuing the run in `run.out` if there is one. Returns the finished model's folder.

    Started several times by torchrun, it is one run of all these processes; the first of them alone reports.
    Raises ConfigError when `run.out` holds a run of another configuration, or when too many updates in a row had to be
    skipped.
    """
    run = set_up(config, reporter)
    is_first = run.parallel.is_first
    if not is_first:
        reporter = Silent()
    checkpoints = Checkpoints(run.out, run.parallel, keep=config.run.keep, in_background=config.run.save_in_background)
    restored = checkpoints.load(run.model, run.optimizer)
    first = restored.step
    for warning in restored.warnings:
        reporter.message(warning)
    if first:
        reporter.message(f"continuing from step {first} of {config.steps}")
    announce_memory(run, reporter)
    with ExitStack() as stack:
        stack.callback(settle, checkpoints, reporter)
        following = trackers(config, run.out) if is_first else []
        for tracker in following:
            stack.callback(tracker.close)
        log = Log(run.out / "log.jsonl" if is_first else None, first, following, reporter.message)
        last = take_steps(run, first, checkpoints, log, reporter, sampler)
        return finish(run, last, log, reporter, sampler)


def settle(checkpoints: Checkpoints, reporter: Reporter) -> None:
    """Let the checkpoint in the background reach the disk, also when the run breaks off: processes may leave next."""
    try:
        checkpoints.wait()
    except CheckpointError as error:
        reporter.message(str(error))


def take_steps(
    run: Run, first: int, checkpoints: Checkpoints, log: Log, reporter: Reporter, sampler: Sampler | None
) -> int:
    """From step `first` to the end, with rows, looks and checkpoints in between.

    Returns the number of steps that made the weights: after an early stop with run.keep_best, those of the best look.
    """
    config, often = run.config, run.config.run
    step, meter = Step(run, reporter.message), Meter(run, first)
    skipped = 0.0
    is_due = False
    done = first
    while done < config.steps and not (often.early_stop and run.parallel.agree(should_stop(run, log))):
        outcome = step(done)
        done += 1
        is_last = done == config.steps
        if done % often.log_every == 0 or is_last:
            row = step_row(run, done - 1, outcome, meter)
            log.write(row)
            reporter.step(row)
            if row["skipped"] > skipped:
                reporter.message(f"step {done}: {row['skipped']:.0f} updates skipped so far: loss or gradient was off")
                skipped = row["skipped"]
        pause = time.perf_counter()
        score = None
        if done % often.valid_every == 0 and not is_last:
            score = _score(run, look(run, done, log, reporter, sampler))
        is_best = score is not None and checkpoints.is_best(score)
        is_due = is_due or done % often.save_every == 0
        # one after a bad step waits: it may be the weights that are wrong, and they would take the place of good ones
        if is_last or is_best or (is_due and verdict(outcome).is_sound):
            _save(run, done, score, checkpoints, reporter)
            is_due = False
        meter.pause(time.perf_counter() - pause)
    checkpoints.wait()
    if done < config.steps:
        checkpoints.save(done, run.model, run.optimizer, to_json(config))
        checkpoints.wait()
        reporter.message(f"step {done}: no improvement in {often.early_stop} looks, so the run ends here")
        if often.keep_best is not None:
            done = _back_to_best(run, done, checkpoints, reporter)
    return done


def _back_to_best(run: Run, done: int, checkpoints: Checkpoints, reporter: Reporter) -> int:
    """Put the best checkpoint into the run, if one is intact; returns its step."""
    best = checkpoints.load(run.model, run.optimizer, best=True)
    for warning in best.warnings:
        reporter.message(warning)
    if not best.step:
        return done
    reporter.message(f"the model is that of step {best.step}, the best on {run.config.run.keep_best}")
    return best.step


def _save(run: Run, done: int, score: float | None, checkpoints: Checkpoints, reporter: Reporter) -> None:
    """Save; a disk that is full for now does not end the run, unless it is the last step's."""
    intact = "the ones before it are intact, going on"
    try:
        checkpoints.wait()
    except CheckpointError as error:
        reporter.message(f"{error}; {intact}")
    try:
        checkpoints.save(done, run.model, run.optimizer, to_json(run.config), score=score)
    except CheckpointError as error:
        if done == run.config.steps:
            raise
        reporter.message(f"{error}; {intact}")


def _score(run: Run, results: dict[str, Loss]) -> float | None:
    """By which the best checkpoint is known."""
    name = run.config.run.keep_best
    return None if name is None else run.parallel.agree(results[name].bits_per_byte)


def announce_memory(run: Run, reporter: Reporter) -> None:
    """Say what the run will take, and what to change if that is more than there is."""
    if run.parallel.size > 1:  # the plan is for whole models
        return
    try:
        plan = plan_memory(run)
    except torch.OutOfMemoryError as error:
        reporter.message(f"memory: not even two rows of {run.config.run.ctx_len} tokens fit: {error}")
        return
    reporter.message(str(plan))
    if not plan.fits:
        reporter.message(
            f"that is more than {run.device} has free: raise run.accumulate, set run.activation_checkpointing, or "
            "lower run.batch_size or run.ctx_len"
        )


def set_up(config: TrainConfig, reporter: Reporter) -> Run:
    """Tokenizer, token files, model and optimizer; what is already in `run.out` is reused."""
    out = Path(config.run.out)
    parallel = Parallel(config, _device(config.run.device))
    device = parallel.device
    if config.model.version in BASELINES and (parallel.is_sharded or config.parallel.context > 1):
        raise ConfigError(f"model.version = {config.model.version!r} trains with parallel.kind = 'ddp', rows whole")
    if not parallel.is_first:
        reporter = Silent()
    with parallel.first_alone():
        _refuse_other_run(out, config)
        if parallel.is_first:
            out.mkdir(parents=True, exist_ok=True)
            _drop_other_text(out, config)
            with replacing(out / "config.json") as file:
                file.write(to_json(config).encode())
        tokenizer = _tokenizer(config, out, reporter)
        data, valid = open_data(config, out, tokenizer, reporter.message)
    torch.manual_seed(config.run.seed)
    model = parallel.shard(_model(config, tokenizer, torch.device("cpu")))
    model.dropout = config.optim.dropout
    model.activation_checkpointing = config.run.activation_checkpointing
    model.recompute = {"auto": None, "on": True, "off": False}[config.run.recompute]
    optim = config.optim
    freeze(model, config.model.without)
    recipe = recipe_of(model, config)
    optimizer = build_optimizer(model, recipe, optim, masters=has_masters(config, parallel, model))
    size = sum(p.numel() for p in model.parameters())
    version = model.config.version
    kind = version if version in BASELINES else f"RWKV-{version}"
    reporter.message(
        f"{kind} with {size:,} parameters on {device}; {data.n_tokens:,} training "
        f"tokens, {config.steps:,} steps of {config.run.batch_size} × {config.run.ctx_len}"
    )
    for line in data.report(config.steps * config.run.batch_size):
        reporter.message(line)
    passes = Passes(config, model, parallel, autocast=lambda: casts(config, parallel, model))
    model.train()
    return Run(config, out, device, tokenizer, data, valid, model, optimizer, parallel, passes)


def finish(run: Run, steps: int, log: Log, reporter: Reporter, sampler: Sampler | None) -> Path:
    """Write the model's folder, and that of the averaged weights if there are any, `out`/model-ema."""
    if isinstance(run.optimizer, MasterAdamW):
        widen(run.model, run.optimizer)
    if run.config.optim.ema:
        with averaged(run.optimizer, run.config.optim.ema, steps):
            release(run, run.out / "model-ema", steps, "_ema", log, reporter)
    folder = run.out / "model"
    release(run, folder, steps, "", log, reporter)
    samples(run, steps, reporter, sampler)
    return folder


def release(run: Run, folder: Path, steps: int, suffix: str, log: Log, reporter: Reporter) -> None:
    """Round to the stored precision, measure that, and write weights, config, tokenizer and training.json."""
    dtype = getattr(torch, run.config.run.save_dtype)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.copy_(parameter.to(dtype))
    results = validate(run, steps, suffix, log, reporter)
    tensors = run.parallel.whole(run.model)
    if not run.parallel.is_first:
        return
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    if run.model.config.version in BASELINES:
        save_baseline(tensors, run.model.config, folder)
    elif "ln0" in run.config.model.without:
        reporter.message("no weights are written: no format knows a model without ln0")
    else:
        save(tensors, folder, format="folder")
    run.tokenizer.save(folder)
    report = {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokens_seen": steps * run.config.run.batch_size * run.config.run.ctx_len,
        "validation": {name: {"bits_per_byte": x.bits_per_byte, "nats_per_token": x.per_token, "tokens": x.tokens,
                              "bytes": x.n_bytes} for name, x in results.items()},
        "config": json.loads(to_json(run.config)),
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(report, indent=2))


def _refuse_other_run(out: Path, config: TrainConfig) -> None:
    """Raise ConfigError rather than mix with what `out` holds: a run of other settings, or anything but a run."""
    saved = saved_config(out)
    if saved is None and "run" not in _json(out / "config.json"):
        for name in MADE:
            if (out / name).exists():
                raise ConfigError(f"{out} holds {name}, which is not a run's; choose another run.out")
        return
    # a finished run whose checkpoints are gone keeps its model
    old: Any = saved or _json(out / "model" / "training.json").get("config")
    if not isinstance(old, dict):
        return
    new = json.loads(to_json(config))
    defaults = json.loads(to_json(TrainConfig()))  # what a setting was before it existed
    for section, key in fixed_settings():
        value = new[section][key]
        before = old.get(section, {}).get(key, defaults[section][key])
        if before != value:
            raise ConfigError(
                f"{out} holds a run with {section}.{key} = {before!r}, this configuration says {value!r}; "
                "choose another run.out, or delete that folder to start over"
            )


def _drop_other_text(out: Path, config: TrainConfig) -> None:
    """Without a checkpoint nothing is lost by tokenising anew, so text prepared for other settings goes."""
    old = _json(out / "config.json").get("data")
    if old is not None and saved_config(out) is None and old != json.loads(to_json(config))["data"]:
        for name in ("tokenizer", "data"):
            shutil.rmtree(out / name, ignore_errors=True)


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.empty(0, device=name)
        found.cpu()  # which "meta" cannot
        return found.device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # on MPS a list of all back ends follows
        raise ConfigError(f"run.device = {name!r} cannot be used here: {reason}") from None


def _tokenizer(config: TrainConfig, out: Path, reporter: Reporter) -> Tokenizer:
    folder = out / "tokenizer"
    if folder.is_dir() and any(folder.iterdir()):
        return open_tokenizer(folder)
    data = config.data
    if data.tokenizer == "bpe":
        if config.model.init is not None:
            raise ConfigError(
                f"data.tokenizer = 'bpe' would make new ids that mean nothing to {config.model.init}; "
                "name the tokenizer it was trained with (its folder, or world)"
            )
        if any(is_token_file(data, name) for name in data.train):
            raise ConfigError("data.tokenizer = 'bpe' needs text; name the tokenizer that made the .bin and .idx files")
        reporter.message(f"training a tokenizer with {data.vocab_size:,} ids on the training text")
        files = [source_path(data, name) for name in data.train]
        texts = (text for path in files for text in documents(path, data.column, data.separator, data.skip_bad))
        tokenizer: Tokenizer = train_bpe(texts, data.vocab_size)
    elif data.tokenizer in ("world", "pile", "byte"):
        tokenizer = open_tokenizer(data.tokenizer)
    else:
        tokenizer = open_tokenizer(Path(data.root) / data.tokenizer)
    part = out / ".tokenizer.part"
    tokenizer.save(part)
    os.replace(part, folder)  # a run that is killed leaves a whole vocabulary or none
    return tokenizer


def _model(config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> RWKV:
    if config.model.init is not None:
        model: RWKV = load(config.model.init, dtype="float32")
        if model.config.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"{config.model.init} has {model.config.vocab_size} token rows, "
                f"the tokenizer {tokenizer.vocab_size} ids"
            )
        model.fingerprint = None  # its weights are about to change
        return model.to(device)
    model = new_model(config, tokenizer.vocab_size)
    recipe = recipe_of(model, config)
    apply_recipe(model, recipe, torch.Generator().manual_seed(config.run.seed))
    return model.to(device)


def recipe_of(model: RWKV, config: TrainConfig) -> Recipe:
    recipe: Recipe = type(model).recipe(model.config, config.optim.lr)  # type: ignore[attr-defined]
    return without(recipe, model, config.model.without) if config.model.without else recipe


def new_model(config: TrainConfig, vocab_size: int, device: str = "cpu") -> RWKV:
    """The model that the configuration describes, before its initial values."""
    shape, version = config.model, config.model.version
    classes: dict[str, Any] = {**VERSIONS, **BASELINES}
    cls = classes[version]
    extra: dict[str, object] = {} if version in HEADLESS else {"head_size": shape.head_size}
    if version.startswith("5") or cls is RNN:
        extra["version"] = version
    elif version == "7":
        extra["wide_rate"] = shape.wide_rate
    elif version == "transformer":  # it sees as far as its rows are long, also where a text is longer
        extra |= {"kv_heads": shape.kv_heads, "window": config.run.ctx_len}

    def make(n_embd: int) -> Any:
        made = cls.Config.make(vocab_size=vocab_size, n_layer=shape.n_layer, n_embd=n_embd, **extra)
        return replace(made, token_shift=True) if shape.token_shift else made

    if shape.parameters:
        multiple = 8 if version in HEADLESS else shape.head_size * max(1, shape.kv_heads)
        found = fit_budget(make, lambda c: cls(c, device="meta"), shape.parameters, multiple)
    else:
        found = make(shape.n_embd)
    model: RWKV = cls(found, device=device)
    return model
