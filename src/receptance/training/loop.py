"""One training run on one device: a pure function of its configuration and data, interruptible at any moment."""

import json
import shutil
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from receptance.checkpoint import load, save
from receptance.data import ORDERS, BinIdx, CubicWindows, ShuffledWindows, documents, prepare
from receptance.errors import ConfigError
from receptance.models import RWKV, VERSIONS, apply_recipe
from receptance.tokenizers import tokenizer as open_tokenizer
from receptance.tokenizers import train_bpe
from receptance.tokenizers.base import Tokenizer
from receptance.training.config import TrainConfig, to_json
from receptance.training.memory import plan_memory
from receptance.training.optim import averaged, build_optimizer
from receptance.training.report import Log, Meter, Reporter, Sampler, look, samples, should_stop, step_row, validate
from receptance.training.resume import load_checkpoint, save_checkpoint, saved_config
from receptance.training.step import Step
from receptance.training.track import trackers


@dataclass
class Run:
    """Everything a step needs."""

    config: TrainConfig
    out: Path
    device: torch.device
    tokenizer: Tokenizer
    train: BinIdx
    valid: dict[str, BinIdx]
    order: ShuffledWindows | CubicWindows
    model: RWKV
    optimizer: Optimizer

    @property
    def precision(self) -> str:
        """Of matrix products: "float32" or "bfloat16"."""
        if self.config.run.precision != "auto":
            return self.config.run.precision
        return "bfloat16" if self.device.type == "cuda" else "float32"

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step, [B, T] each on the device."""
        size, t = self.config.run.batch_size, self.config.run.ctx_len
        starts = [self.order.start(step * size + row) for row in range(size)]
        rows = np.stack([np.asarray(self.train.tokens[s : s + t + 1], np.int64) for s in starts])
        tokens = torch.from_numpy(rows)
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]


def train(config: TrainConfig, reporter: Reporter, sampler: Sampler | None = None) -> Path:
    """Train as configured, continuing the run in `run.out` if there is one. Returns the finished model's folder.

    Raises ConfigError when `run.out` holds a run of another configuration, or when too many updates in a row had to be
    skipped.
    """
    run = set_up(config, reporter)
    first, warnings = load_checkpoint(run.out, run.model, run.optimizer)
    for warning in warnings:
        reporter.message(warning)
    if first:
        reporter.message(f"continuing from step {first} of {config.steps}")
    announce_memory(run, reporter)
    with ExitStack() as stack:
        following = trackers(config, run.out)
        for tracker in following:
            stack.callback(tracker.close)
        log = Log(run.out / "log.jsonl", first, following)
        last = take_steps(run, first, log, reporter, sampler)
        return finish(run, last, log, reporter, sampler)


def take_steps(run: Run, first: int, log: Log, reporter: Reporter, sampler: Sampler | None) -> int:
    """From step `first` to the end, with rows, looks and checkpoints in between. Returns the number of steps taken."""
    config, often = run.config, run.config.run
    step, meter = Step(run, reporter.message), Meter(run, first)
    skipped = 0.0
    done = first
    while done < config.steps and not should_stop(run, log):
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
        if done % often.valid_every == 0 and not is_last:
            look(run, done, log, reporter, sampler)
        if done % often.save_every == 0 or is_last:
            save_checkpoint(run.out, done, run.model, run.optimizer, to_json(config), often.keep)
        meter.pause(time.perf_counter() - pause)
    if done < config.steps:
        save_checkpoint(run.out, done, run.model, run.optimizer, to_json(config), often.keep)
        reporter.message(f"step {done}: no improvement in {often.early_stop} looks, so the run ends here")
    return done


def announce_memory(run: Run, reporter: Reporter) -> None:
    plan = plan_memory(run)
    reporter.message(str(plan))
    if not plan.fits:
        reporter.message(
            f"that is more than {run.device} has free: raise run.accumulate, set run.activation_checkpointing, or "
            "lower run.batch_size or run.ctx_len"
        )


def set_up(config: TrainConfig, reporter: Reporter) -> Run:
    """Tokenizer, token files, model and optimizer; what is already in `run.out` is reused."""
    out = Path(config.run.out)
    _refuse_other_run(out, config)
    out.mkdir(parents=True, exist_ok=True)
    _drop_other_text(out, config)
    (out / "config.json").write_text(to_json(config))
    device = _device(config.run.device)
    tokenizer = _tokenizer(config, out, reporter)
    data = _data(config, out, tokenizer, reporter)
    train_data = data.pop("train")
    torch.manual_seed(config.run.seed)
    model = _model(config, tokenizer, device)
    model.dropout = config.optim.dropout
    model.activation_checkpointing = config.run.activation_checkpointing
    optim = config.optim
    recipe = type(model).recipe(model.config, optim.lr)  # type: ignore[attr-defined]
    optimizer = build_optimizer(model, recipe, optim)
    order = ORDERS[config.data.order](len(train_data.tokens), config.run.ctx_len, config.run.seed)
    size = sum(p.numel() for p in model.parameters())
    reporter.message(
        f"RWKV-{model.config.version} with {size:,} parameters on {device}; {len(train_data.tokens):,} training "
        f"tokens, {config.steps:,} steps of {config.run.batch_size} × {config.run.ctx_len}"
    )
    return Run(config, out, device, tokenizer, train_data, data, order, model.train(), optimizer)


def finish(run: Run, steps: int, log: Log, reporter: Reporter, sampler: Sampler | None) -> Path:
    """Write the model's folder, and that of the averaged weights if there are any, `out`/model-ema."""
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
    save({name: x.detach().to(dtype) for name, x in run.model.state_dict().items()}, folder, format="folder")
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
    old = saved_config(out)
    if old is None:
        return
    new = json.loads(to_json(config))
    defaults = json.loads(to_json(TrainConfig()))  # what a setting was before it existed
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
        "cuda_graph",
        "early_stop",
        "tensorboard",
        "wandb",
        "wandb_mode",
        "max_skips",
    }
    for section in new:
        for key, value in new[section].items():
            before = old.get(section, {}).get(key, defaults[section][key])  # type: ignore[attr-defined]
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
        if any((Path(data.root) / (name + ".idx")).exists() for name in data.train):
            raise ConfigError("data.tokenizer = 'bpe' needs text; name the tokenizer that made the .bin and .idx files")
        reporter.message(f"training a tokenizer with {data.vocab_size:,} ids on the training text")
        files = [Path(data.root) / name for name in data.train]
        tokenizer: Tokenizer = train_bpe((text for path in files for text in documents(path)), data.vocab_size)
    elif data.tokenizer in ("world", "pile", "byte"):
        tokenizer = open_tokenizer(data.tokenizer)
    else:
        tokenizer = open_tokenizer(Path(data.root) / data.tokenizer)
    tokenizer.save(folder)
    return tokenizer


def _data(config: TrainConfig, out: Path, tokenizer: Tokenizer, reporter: Reporter) -> dict[str, BinIdx]:
    """The training stream under "train", the validation sets under their names; tokenised once into `out`/data."""
    data, root = config.data, Path(config.data.root)
    wanted = {"train": list(data.train), **{name: [path] for name, path in data.valid.items()}}
    files = {}
    for name, paths in wanted.items():
        sources = [root / path for path in paths]
        if len(sources) == 1 and sources[0].with_name(sources[0].name + ".idx").exists():
            files[name] = BinIdx(sources[0])
            if (top := int(files[name].tokens.max())) >= tokenizer.vocab_size:
                raise ConfigError(f"{sources[0]}: holds token {top}; the tokenizer has {tokenizer.vocab_size} ids")
            continue
        prefix = out / "data" / name
        if not prefix.with_name(name + ".idx").exists():
            reporter.message(f"tokenising {name}: {', '.join(paths)}")
            prepare(sources, tokenizer, prefix, repeat=data.repeat if name == "train" else ())
        files[name] = BinIdx(prefix)
    return files


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
