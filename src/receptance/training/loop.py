"""One training run on one device: a pure function of its configuration and data, interruptible at any moment."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from receptance.checkpoint import load, save
from receptance.data import IGNORE, BinIdx, documents
from receptance.errors import ConfigError
from receptance.models import RWKV, VERSIONS, apply_recipe
from receptance.tokenizers import tokenizer as open_tokenizer
from receptance.tokenizers import train_bpe
from receptance.tokenizers.base import Tokenizer
from receptance.training.config import TrainConfig, to_json
from receptance.training.data import TrainingData, is_token_file, open_data, source_path
from receptance.training.evaluate import Loss, evaluate
from receptance.training.loss import language_model_loss
from receptance.training.optim import build_optimizer, set_learning_rate
from receptance.training.resume import load_checkpoint, save_checkpoint, saved_config
from receptance.training.schedule import learning_rate

Sampler = Callable[[RWKV, Tokenizer, str, int], str]  # (model, tokenizer, prompt, tokens) → continuation


class Reporter(Protocol):
    """Where a run's news goes; the command line shows a progress bar, tests listen."""

    def message(self, text: str) -> None: ...
    def step(self, row: dict[str, float]) -> None: ...


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

    def autocast(self) -> AbstractContextManager[object]:
        precision = self.config.run.precision
        if precision == "auto":
            precision = "bfloat16" if self.device.type == "cuda" else "float32"
        return torch.autocast(self.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, targets and resets (or none) of one step, [B, T] each on the device."""
        size = self.config.run.batch_size
        rows = self.data.rows(range(step * size, (step + 1) * size))
        resets = None if rows.resets is None else self._to_device(rows.resets)
        return self._to_device(rows.inputs), self._to_device(rows.targets), resets

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def train(config: TrainConfig, reporter: Reporter, sampler: Sampler | None = None) -> Path:
    """Train as configured, continuing the run in `run.out` if there is one. Returns the finished model's folder.

    Raises ConfigError when `run.out` holds a run of another configuration, or the loss stops being finite.
    """
    run = set_up(config, reporter)
    first, warnings = load_checkpoint(run.out, run.model, run.optimizer)
    for warning in warnings:
        reporter.message(warning)
    if first:
        reporter.message(f"continuing from step {first} of {config.steps}")
    log = Log(run.out / "log.jsonl", first)
    started, seen = time.perf_counter(), 0
    for step in range(first, config.steps):
        loss = take_step(run, step)
        seen += config.run.batch_size * config.run.ctx_len
        done = step + 1
        if done % config.run.log_every == 0 or done == config.steps:
            row = _row(run, step, loss, seen / (time.perf_counter() - started))
            log.write(row)
            reporter.step(row)
        if done % config.run.valid_every == 0 and done < config.steps:
            pause = time.perf_counter()
            _look(run, done, log, reporter, sampler)
            started += time.perf_counter() - pause
        if done % config.run.save_every == 0 or done == config.steps:
            _require_finite(run, step, loss)
            pause = time.perf_counter()
            save_checkpoint(run.out, done, run.model, run.optimizer, to_json(config), config.run.keep)
            started += time.perf_counter() - pause
    return finish(run, log, reporter, sampler)


def set_up(config: TrainConfig, reporter: Reporter) -> Run:
    """Tokenizer, token files, model and optimizer; what is already in `run.out` is reused."""
    out = Path(config.run.out)
    _refuse_other_run(out, config)
    out.mkdir(parents=True, exist_ok=True)
    _drop_other_text(out, config)
    (out / "config.json").write_text(to_json(config))
    device = _device(config.run.device)
    tokenizer = _tokenizer(config, out, reporter)
    data, valid = open_data(config, out, tokenizer, reporter.message)
    torch.manual_seed(config.run.seed)
    model = _model(config, tokenizer, device)
    model.dropout = config.optim.dropout
    model.activation_checkpointing = config.run.activation_checkpointing
    optim = config.optim
    recipe = type(model).recipe(model.config, optim.lr)  # type: ignore[attr-defined]
    optimizer = build_optimizer(
        model, recipe, weight_decay=optim.weight_decay, betas=(optim.beta1, optim.beta2), eps=optim.eps
    )
    size = sum(p.numel() for p in model.parameters())
    reporter.message(
        f"RWKV-{model.config.version} with {size:,} parameters on {device}; {data.n_tokens:,} training "
        f"tokens, {config.steps:,} steps of {config.run.batch_size} × {config.run.ctx_len}"
    )
    for line in data.report(config.steps * config.run.batch_size):
        reporter.message(line)
    return Run(config, out, device, tokenizer, data, valid, model.train(), optimizer)


def take_step(run: Run, step: int) -> Tensor:
    """One optimiser step; returns the batch's mean loss (a tensor on the device, not synchronised)."""
    config, optim = run.config.run, run.config.optim
    torch.manual_seed(config.seed * 1_000_003 + step)  # dropout depends on the step alone, so a resumed run repeats it
    set_learning_rate(
        run.optimizer,  # type: ignore[arg-type]
        learning_rate(step, run.config.steps, lr=optim.lr, lr_final=optim.lr_final,
                      warmup_steps=optim.warmup_steps, kind=optim.schedule),
    )  # fmt: skip
    inputs, targets, resets = run.batch(step)
    total = torch.zeros((), device=run.device)
    n_targets = (targets != IGNORE).sum()
    rows = config.batch_size // config.accumulate
    for first in range(0, config.batch_size, rows):
        part = slice(first, first + rows)
        with run.autocast():
            logits, _ = run.model.forward(inputs[part], resets=None if resets is None else resets[part])
        share = (targets[part] != IGNORE).sum() / n_targets
        loss = language_model_loss(logits.float(), targets[part], optim.logit_penalty) * share
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if optim.grad_clip:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), optim.grad_clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return total


def finish(run: Run, log: "Log", reporter: Reporter, sampler: Sampler | None) -> Path:
    """Round to the stored precision, measure that, and write the model folder: weights, config and tokenizer."""
    dtype = getattr(torch, run.config.run.save_dtype)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.copy_(parameter.to(dtype))
    results = _look(run, run.config.steps, log, reporter, sampler)
    folder = run.out / "model"
    save({name: x.detach().to(dtype) for name, x in run.model.state_dict().items()}, folder, format="folder")
    run.tokenizer.save(folder)
    report = {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokens_seen": run.config.steps * run.config.run.batch_size * run.config.run.ctx_len,
        "validation": {name: {"bits_per_byte": x.bits_per_byte, "nats_per_token": x.per_token, "tokens": x.tokens,
                              "bytes": x.n_bytes} for name, x in results.items()},
        "config": json.loads(to_json(run.config)),
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(report, indent=2))
    return folder


class Log:
    """The run's history, one JSON object a line; rows beyond the step we resume from are dropped."""

    def __init__(self, path: Path, first: int):
        self.path = path
        kept = []
        if first and path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the line being written when the run was killed
                    continue
                if row["step"] <= first:
                    kept.append(line + "\n")
        path.write_text("".join(kept))

    def write(self, row: dict[str, float]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def _require_finite(run: Run, step: int, loss: Tensor) -> float:
    value = loss.item()
    if not np.isfinite(value):
        raise ConfigError(
            f"the loss became {value} by step {step + 1}; the last good checkpoint is in {run.out / 'checkpoints'}. "
            "Lower optim.lr or raise optim.warmup_steps"
        )
    return value


def _row(run: Run, step: int, loss: Tensor, tokens_per_second: float) -> dict[str, float]:
    value = _require_finite(run, step, loss)
    lr = min(group["lr"] / group["lr_scale"] for group in run.optimizer.param_groups)
    return {"step": step + 1, "loss": value, "lr": lr, "tokens_per_second": tokens_per_second}


def _look(run: Run, step: int, log: Log, reporter: Reporter, sampler: Sampler | None) -> dict[str, Loss]:
    """Validation losses and sample texts."""
    results = {}
    for name, data in run.valid.items():
        with run.autocast() if step < run.config.steps else nullcontext():
            results[name] = loss = evaluate(run.model, run.tokenizer, data, run.config.run.valid_tokens)
        log.write({"step": step, f"{name}_bits_per_byte": loss.bits_per_byte, f"{name}_loss": loss.per_token})
        reporter.message(
            f"step {step}: {name} {loss.bits_per_byte:.4f} bits per byte ({loss.per_token:.4f} nats per token)"
        )
    if sampler is not None:
        run.model.eval()
        for prompt in run.config.run.sample:
            text = sampler(run.model, run.tokenizer, prompt, run.config.run.sample_tokens)
            reporter.message(f"step {step}: {prompt}{text}")
        run.model.train()
    return results


def _refuse_other_run(out: Path, config: TrainConfig) -> None:
    old = saved_config(out)
    if old is None:
        return
    new = json.loads(to_json(config))
    free = {
        "log_every",
        "valid_every",
        "save_every",
        "keep",
        "sample",
        "sample_tokens",
        "device",
        "out",
        "valid_tokens",
        "processes",
    }
    for section in new:
        for key, value in new[section].items():
            before = old.get(section, {}).get(key)  # type: ignore[attr-defined]
            if key not in free and key != "root" and before != value:
                raise ConfigError(
                    f"{out} holds a run with {section}.{key} = {before!r}, this configuration says {value!r}; "
                    "choose another run.out, or delete that folder to start over"
                )


def _drop_other_text(out: Path, config: TrainConfig) -> None:
    """Without a checkpoint nothing is lost by tokenising anew, so text prepared for other settings goes."""
    try:
        old = json.loads((out / "config.json").read_text())["data"]
    except (OSError, ValueError, KeyError):
        old = None
    if saved_config(out) is None and old != json.loads(to_json(config))["data"]:
        for name in ("tokenizer", "data"):
            shutil.rmtree(out / name, ignore_errors=True)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"run.device = {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


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
    tokenizer.save(folder)
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
    cls, shape = VERSIONS[config.model.version], config.model
    arguments: dict[str, object] = {
        "vocab_size": tokenizer.vocab_size,
        "n_layer": shape.n_layer,
        "n_embd": shape.n_embd,
    }
    if shape.version != "4":
        arguments["head_size"] = shape.head_size
    if shape.version.startswith("5"):
        arguments["version"] = shape.version
    model = cls(cls.Config.make(**arguments))  # type: ignore[arg-type]
    apply_recipe(model, cls.recipe(model.config, config.optim.lr), torch.Generator().manual_seed(config.run.seed))  # type: ignore[arg-type]
    return model.to(device)
