"""A run's configuration: frozen dataclasses, TOML on disk, dotted overrides on the command line."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypeVar, get_type_hints

from receptance.errors import ConfigError
from receptance.settings import build, put, read_toml

T = TypeVar("T")

VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7")
BASELINES = ("transformer", "lstm", "gru")
IDEAS = ("small-embedding", "ln0", "zero-matrices", "decay-spread", "mix-spread", "lr-groups", "token-shift")
HEADLESS = ("4", "lstm", "gru")
MOST_SEED = 10**12  # with steps and ranks it must fit into the 64 bits of a generator's seed
CHOICES = {
    "model.version": (*VERSIONS, *BASELINES),
    "model.without": IDEAS,
    "data.packing": ("contiguous", "resets", "documents"),
    "data.order": ("shuffled", "cubic"),
    "optim.optimizer": ("adamw", "muon"),
    "optim.schedule": ("cosine", "exponential", "linear", "wsd"),
    "optim.decay_shape": ("linear", "1-sqrt"),
    "run.precision": ("auto", "float32", "bfloat16"),
    "run.weights": ("auto", "float32", "bfloat16"),
    "run.recompute": ("auto", "on", "off"),
    "run.cuda_graph": ("auto", "on", "off"),
    "run.save_dtype": ("float32", "bfloat16", "float16"),
    "run.segment_gradients": ("exact", "truncated"),
    "run.segment_states": ("device", "cpu", "sqrt"),
    "run.wandb_mode": ("online", "offline"),
    "parallel.kind": ("ddp", "fsdp"),
}


def free(default: T) -> T:
    """The default of a setting that may change between two attempts at one run."""
    return field(default=default, metadata={"free": True})


def fixed_settings() -> Iterator[tuple[str, str]]:
    """Section and key of each setting that is not free."""
    for section, kind in get_type_hints(TrainConfig).items():
        yield from ((section, f.name) for f in fields(kind) if not f.metadata.get("free"))


@dataclass(frozen=True)
class ModelConfig:
    """Which model to train. init: a checkpoint to start from; its shape then replaces the numbers here.

    version: of RWKV, or "transformer", "lstm" or "gru" to compare it with. parameters: a budget that the width is
    chosen for, embedding and head not counted (0: n_embd says it). kv_heads, token_shift: of the Transformer.
    wide_rate: RWKV-7's in-context rate goes up to 1 + decay. without: ideas left out of the recipe (`ablation.py`).
    """

    version: str = "7"
    n_layer: int = 6
    n_embd: int = 256
    head_size: int = 64
    init: str | None = None
    parameters: int = 0
    wide_rate: bool = False
    kv_heads: int = 0
    token_shift: bool = False
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataConfig:
    """What to train on. Paths are relative to `root`, which is relative to the config file.

    train: texts and tables that `receptance data prepare` takes, or NAME of a NAME.bin and .idx.
    repeat: how often each goes in, per epoch. weights: each is a source of its own with this share of the rows.
    column, separator, skip_bad, processes: how texts are read, as for `receptance data prepare`.
    tokenizer: "bpe" (trained on the training text, up to `vocab_size` ids), "world", "byte", or a path.
    packing: "contiguous" windows of the stream, the same with "resets" between documents, or whole "documents".
    order: of windows: "shuffled", or the community trainer's "cubic" order.
    """

    train: tuple[str, ...] = ()
    root: str = free(".")
    valid: dict[str, str] = field(default_factory=dict)
    repeat: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    column: str = "text"
    separator: str | None = None
    skip_bad: bool = False
    processes: int = free(1)
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    packing: str = "contiguous"
    order: str = "shuffled"


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser over the recipe's groups, its schedules, and what is done to the loss and its gradient.

    optimizer: "adamw", or "muon" for the hidden matrices. schedule: "cosine", "exponential", "linear" (the reference's)
    or "wsd"; the last decay_fraction of a wsd run decays, "linear" or "1-sqrt". Warm-up multiplies any of them.
    weight_decay_final: where the reference's exponential schedule of the weight decay ends.
    dropout: after the embedding and on the residual after each half block (0 in the reference's large runs).
    ema: decay of an average of the weights. loss_spike, grad_spike: times the running mean. All three: 0 means off.
    """

    optimizer: str = "adamw"
    lr: float = 6e-4
    lr_final: float = 6e-5
    schedule: str = "cosine"
    warmup_steps: int = 10
    decay_fraction: float = 0.2
    decay_shape: str = "linear"
    weight_decay: float = 0.1
    weight_decay_final: float | None = None
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-18
    muon_momentum: float = 0.95
    grad_clip: float = 1.0
    logit_penalty: float = 1e-4
    dropout: float = 0.0
    ema: float = 0.0
    skip_nonfinite: bool = True
    loss_spike: float = 0.0
    grad_spike: float = 0.0
    max_skips: int = free(20)


@dataclass(frozen=True)
class RunConfig:
    """How long, where and how.

    tokens: length of the run. batch_size: rows of ctx_len tokens per step, over `accumulate` passes.
    device, precision: "auto" takes a GPU with bfloat16 matrix products when there is one, else the CPU in float32.
    weights: "bfloat16" beside float32 masters in the optimiser, "float32", or "auto": the former where it can be.
    recompute: "auto", "on", "off": whether the backward pass makes elementwise work again (auto: on a GPU).
    memory: GB that the run may take; what its first steps leave holds results that would be made again (0: none).
    cuda_graph: "auto", "on", "off": whether the GPU replays the whole step instead of being told each kernel.
    valid_tokens: upper bound per validation file (0: all of it). keep: finished checkpoints left on disk.
    early_stop: looks at the validation texts without an improvement after which the run ends (0: never).
    save_dtype: of the finished model in `out`/model. wandb: a project's name; wandb_mode: "online" or "offline".
    segment_len: rows run in segments of so many tokens (0: whole). keep_best: a validation text; the checkpoint with
    the lowest loss on it stays.
    """

    out: str = free("runs/run")
    tokens: int = 1_000_000
    ctx_len: int = 256
    batch_size: int = 16
    accumulate: int = 1
    seed: int = 1
    device: str = free("auto")
    precision: str = "auto"
    weights: str = free("auto")
    activation_checkpointing: bool = False
    recompute: str = free("auto")
    memory: float = free(0.0)
    segment_len: int = 0
    segment_gradients: str = "exact"
    segment_states: str = free("device")
    cuda_graph: str = free("auto")
    save_dtype: str = "float32"
    log_every: int = free(10)
    valid_every: int = free(200)
    valid_tokens: int = free(200_000)
    early_stop: int = free(0)
    save_every: int = free(200)
    keep: int = free(2)
    keep_best: str | None = free(None)
    save_in_background: bool = free(False)
    sample: tuple[str, ...] = free(())
    sample_tokens: int = free(120)
    tensorboard: bool = free(False)
    wandb: str | None = free(None)
    wandb_mode: str = free("online")


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun or Ray started share the work; without them nothing here matters.

    kind: "ddp", each holds the whole model, or "fsdp", each a shard of it. shard_size: processes among which one copy
    is sharded (0: all); fewer than all is HSDP. context: processes among which each row is cut.
    """

    kind: str = free("ddp")
    shard_size: int = free(0)
    context: int = free(1)


@dataclass(frozen=True)
class TrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def steps(self) -> int:
        return -(-self.run.tokens // (self.run.batch_size * self.run.ctx_len))


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The TOML file at `path` with `section.key=value` overrides on top (TOML values; bare words are strings).

    Raises ConfigError naming the unknown key, or the value's found and expected type.
    """
    raw = {} if path is None else read_toml(Path(path))
    folder = Path.cwd() if path is None else Path(path).resolve().parent
    root = folder / build(TrainConfig, raw, "").data.root  # that of an override is relative to where the user is
    raw.setdefault("data", {})["root"] = str(root)
    for override in overrides:
        put(raw, override, "optim.lr=1e-3")
    config = build(TrainConfig, raw, "")
    check(config)
    return config


def check(config: TrainConfig) -> None:
    """Raise ConfigError for a value out of range."""
    rules = [
        ("model.n_layer", config.model.n_layer, config.model.n_layer >= 1),
        ("model.n_embd", config.model.n_embd, config.model.n_embd >= 2),
        ("model.head_size", config.model.head_size, config.model.version in HEADLESS or (config.model.head_size >= 1
         and (config.model.n_embd % config.model.head_size == 0 or config.model.parameters > 0))),
        ("model.parameters", config.model.parameters, config.model.parameters >= 0),
        ("model.wide_rate", config.model.wide_rate, config.model.version == "7" or not config.model.wide_rate),
        ("model.kv_heads", config.model.kv_heads, config.model.kv_heads >= 0
         and (config.model.version == "transformer" or config.model.kv_heads == 0)),
        ("model.token_shift", config.model.token_shift,
         config.model.version == "transformer" or not config.model.token_shift),
        ("data.repeat", config.data.repeat, all(count >= 1 for count in config.data.repeat)),
        ("data.weights", config.data.weights, all(0 < weight < math.inf for weight in config.data.weights)
         and len(config.data.weights) in (0, len(config.data.train))),
        ("data.processes", config.data.processes, config.data.processes >= 1),
        ("data.separator", config.data.separator, config.data.separator != ""),
        ("data.vocab_size", config.data.vocab_size, config.data.vocab_size >= 257),
        ("optim.lr", config.optim.lr, config.optim.lr > 0),
        ("optim.lr_final", config.optim.lr_final, config.optim.lr_final >= 0),
        ("optim.decay_fraction", config.optim.decay_fraction, 0 <= config.optim.decay_fraction <= 1),
        ("optim.warmup_steps", config.optim.warmup_steps, config.optim.warmup_steps >= 0),
        ("optim.weight_decay", config.optim.weight_decay, config.optim.weight_decay >= 0),
        ("optim.weight_decay_final", config.optim.weight_decay_final,
         config.optim.weight_decay_final is None or config.optim.weight_decay_final > 0),
        ("optim.beta1", config.optim.beta1, 0 <= config.optim.beta1 < 1),
        ("optim.beta2", config.optim.beta2, 0 <= config.optim.beta2 < 1),
        ("optim.eps", config.optim.eps, config.optim.eps > 0),
        ("optim.muon_momentum", config.optim.muon_momentum, 0 <= config.optim.muon_momentum < 1),
        ("optim.grad_clip", config.optim.grad_clip, config.optim.grad_clip >= 0),
        ("optim.logit_penalty", config.optim.logit_penalty, config.optim.logit_penalty >= 0),
        ("optim.dropout", config.optim.dropout, 0 <= config.optim.dropout < 1),
        ("optim.ema", config.optim.ema, 0 <= config.optim.ema < 1),
        ("optim.loss_spike", config.optim.loss_spike, config.optim.loss_spike == 0 or config.optim.loss_spike > 1),
        ("optim.grad_spike", config.optim.grad_spike, config.optim.grad_spike == 0 or config.optim.grad_spike > 1),
        ("optim.max_skips", config.optim.max_skips, config.optim.max_skips >= 1),
        ("run.tokens", config.run.tokens, config.run.tokens >= 1),
        ("run.ctx_len", config.run.ctx_len, config.run.ctx_len >= 1),
        ("run.batch_size", config.run.batch_size, config.run.batch_size >= 1),
        ("run.accumulate", config.run.accumulate, config.run.accumulate >= 1
         and config.run.batch_size % config.run.accumulate == 0),
        ("run.memory", config.run.memory, config.run.memory >= 0),
        ("run.seed", config.run.seed, 0 <= config.run.seed <= MOST_SEED),
        ("run.log_every", config.run.log_every, config.run.log_every >= 1),
        ("run.valid_every", config.run.valid_every, config.run.valid_every >= 1),
        ("run.valid_tokens", config.run.valid_tokens, config.run.valid_tokens >= 0),
        ("run.early_stop", config.run.early_stop, config.run.early_stop >= 0),
        ("run.save_every", config.run.save_every, config.run.save_every >= 1),
        ("run.sample_tokens", config.run.sample_tokens, config.run.sample_tokens >= 0),
        ("run.keep", config.run.keep, config.run.keep >= 2),
        ("run.segment_len", config.run.segment_len, config.run.segment_len >= 0),
        ("parallel.shard_size", config.parallel.shard_size, config.parallel.shard_size >= 0),
        ("parallel.context", config.parallel.context, config.parallel.context >= 1),
    ]  # fmt: skip
    if not config.data.train:
        raise ConfigError("nothing to train on: give a configuration file, or --text FILE, or data.train=[...]")
    settings = {f"{section}.{key}": x for section, values in asdict(config).items() for key, x in values.items()}
    for name, allowed in CHOICES.items():
        value = settings[name]
        if not set(value if isinstance(value, tuple) else (value,)) <= set(allowed):
            raise ConfigError(
                f"{name} = {value!r} is out of range; expected {', '.join(allowed[:-1])} or {allowed[-1]}"
            )
    rules += [(name, x, math.isfinite(x)) for name, x in settings.items() if isinstance(x, float)]
    for name, value, good in rules:
        if not good:
            raise ConfigError(f"{name} = {value!r} is out of range; see the defaults and limits in docs/training.md")
    for name in config.data.valid:  # it names files beside those of the training text, and rows of the log
        if not name or "/" in name or re.fullmatch(r"train(-\d+)?", name):
            raise ConfigError(f"data.valid: {name!r} cannot be the name of a validation text; choose another one")
    if config.run.keep_best not in (None, *config.data.valid):
        names = ", ".join(config.data.valid) or "none"
        raise ConfigError(f"run.keep_best = {config.run.keep_best!r} must be a name in data.valid; there is {names}")
    if config.run.early_stop and not config.data.valid:
        raise ConfigError("run.early_stop looks at validation texts: name some in data.valid")


def to_json(config: TrainConfig) -> str:
    return json.dumps(asdict(config), indent=2, sort_keys=True)
