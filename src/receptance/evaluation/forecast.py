"""`receptance forecast`: time series forecast by RWKV, DLinear and a patch Transformer in one harness."""

import copy
import csv
import io
import json
import lzma
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from receptance.errors import ConfigError
from receptance.evaluation import grid
from receptance.models import RWKV, apply_recipe
from receptance.training.config import VERSIONS, ModelConfig, RunConfig, TrainConfig
from receptance.training.loop import new_model
from receptance.training.optim import param_groups

SPLITS = {  # rows of training, validation and test; None: 70, 10 and 20 %
    "hours": (8640, 2880, 2880),
    "shares": None,
}
SIMPLE = ("repeat", "dlinear", "patch-transformer")
Row = dict[str, Any]


@dataclass(frozen=True)
class Forecaster:
    """version: of RWKV, or "dlinear", "patch-transformer", "repeat" (the last value). The rest is what it has of it.

    end_norms: RWKV's ln0 and ln_out, which lose the size of a patch. head: reads "all" patches' vectors or the "last".
    """

    name: str
    version: str = "7"
    n_layer: int = 3
    n_embd: int = 64
    heads: int = 4
    head_size: int = 64
    dropout: float = 0.2
    lr: float = 1e-3
    patch: int = 16
    stride: int = 8
    end_norms: bool = True
    head: str = "all"


@dataclass(frozen=True)
class Forecasts:
    """A table of numbers by time, the past that is seen, and how far ahead; what holds for all models.

    split: "hours", ETTh's 12, 4 and 4 months, or "shares". patience: passes without a better validation error.
    """

    file: str
    out: str = "runs/forecast"
    split: str = "shares"
    look_back: int = 512
    horizons: tuple[int, ...] = (96, 192, 336, 720)
    epochs: int = 30
    patience: int = 5
    batch: int = 128
    weight_decay: float = 0.0
    seeds: tuple[int, ...] = (1,)
    steps: int = 0
    models: tuple[Forecaster, ...] = field(default=())


def read_forecasts(path: Path, overrides: Mapping[str, str] = {}) -> Forecasts:
    """See `grid.read_plan`."""
    found = grid.read_plan(Forecasts, path, overrides, (*VERSIONS, *SIMPLE))
    for model in found.models:
        if model.head not in ("all", "last"):
            raise ConfigError(f"{path}: model {model.name}: head must be all or last, found {model.head!r}")
    if found.split not in SPLITS:
        raise ConfigError(f"{path}: split must be one of {', '.join(SPLITS)}")
    return found


def run(path: Path, device: str, tell: Callable[[str], None], overrides: Mapping[str, str] = {}) -> Path:
    """Every model at every horizon; results.json, report.md. Returns the folder. Processes share the work."""
    plan = read_forecasts(path, overrides)
    out = Path(plan.out)
    cells = []
    for model in plan.models:
        for horizon in plan.horizons:
            for seed in plan.seeds:
                key = {**asdict(plan), "file": Path(plan.file).name, "models": asdict(model), "at": [horizon, seed]}
                del key["out"], key["horizons"], key["seeds"]
                make = partial(learn, plan, model, horizon, seed, torch.device(device), tell)
                title = f"{model.name}, {horizon}, seed {seed}"
                cells.append(grid.Cell(title, json.dumps(key, sort_keys=True), make))
    rows = grid.run(out, cells, tell)
    grid.write(out, rows, table(rows))
    return out


# The data ------------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> np.ndarray:
    """[rows, variates] of a CSV file whose first column, the time, is left out."""
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        rows = list(csv.reader(io.StringIO(data.decode())))[1:]
        return np.array([[float(x) for x in row[1:]] for row in rows], np.float32)
    except (OSError, ValueError, lzma.LZMAError) as error:
        raise ConfigError(f"{path}: not a CSV file with a time and numbers ({error})") from None


def windows(plan: Forecasts, horizon: int, device: torch.device) -> dict[str, Tensor]:
    """All windows [W, variates, look_back + horizon] of each part, standardised by the training part's statistics."""
    table = read_table(Path(plan.file))
    split = SPLITS[plan.split]
    n = len(table)
    train, valid, test = split or (int(n * 0.7), n - int(n * 0.7) - int(n * 0.2), int(n * 0.2))
    ends = {"train": train, "valid": train + valid, "test": train + valid + test}
    starts = {"train": 0, "valid": train - plan.look_back, "test": train + valid - plan.look_back}
    if ends["test"] > n or min(ends["train"], valid + plan.look_back) < plan.look_back + horizon:
        raise ConfigError(f"{plan.file}: {n} rows are too few for look_back {plan.look_back} and horizon {horizon}")
    table = (table - table[:train].mean(0)) / table[:train].std(0)
    x = torch.from_numpy(table).to(device)
    return {part: x[starts[part] : ends[part]].unfold(0, plan.look_back + horizon, 1) for part in ends}


# The models: [B, look_back] → [B, horizon], the same weights for every variate ----------------------------------------


class Repeat(nn.Module):
    def __init__(self, horizon: int):
        super().__init__()
        self.horizon = horizon

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1:].expand(-1, self.horizon)


class DLinear(nn.Module):
    """Trend and rest, a linear map each (Zeng et al., 2023)."""

    def __init__(self, look_back: int, horizon: int, window: int = 25):
        super().__init__()
        self.window = window
        self.trend, self.rest = (nn.Linear(look_back, horizon) for _ in range(2))
        for linear in (self.trend, self.rest):
            nn.init.constant_(linear.weight, 1 / look_back)

    def forward(self, x: Tensor) -> Tensor:
        side = (self.window - 1) // 2
        padded = nn.functional.pad(x[:, None], (side, self.window - 1 - side), mode="replicate")
        trend = nn.functional.avg_pool1d(padded, self.window, 1)[:, 0]
        out: Tensor = self.trend(trend) + self.rest(x - trend)
        return out


class Patches(nn.Module):
    """Instance norm, overlapping patches, a sequence model over them, a linear map from all outputs (PatchTST)."""

    def __init__(self, model: Forecaster, look_back: int, horizon: int):
        super().__init__()
        self.patch, self.stride = model.patch, model.stride
        count = (look_back + model.stride - model.patch) // model.stride + 1
        self.embed = nn.Linear(model.patch, model.n_embd)
        self.drop = nn.Dropout(model.dropout)
        self.last, self.end_norms = model.head == "last", model.end_norms
        self.head = nn.Linear((1 if self.last else count) * model.n_embd, horizon)
        if model.version == "patch-transformer":
            self.place = nn.Parameter(0.02 * torch.randn(count, model.n_embd))
            layer = nn.TransformerEncoderLayer(
                model.n_embd, model.heads, 2 * model.n_embd, model.dropout, "gelu", batch_first=True
            )
            self.body: nn.Module = nn.TransformerEncoder(layer, model.n_layer, enable_nested_tensor=False)
        else:
            shape = ModelConfig(
                version=model.version,
                n_layer=model.n_layer,
                n_embd=model.n_embd,
                head_size=min(64, model.n_embd, model.head_size),
            )
            self.body = new_model(TrainConfig(model=shape, run=RunConfig(ctx_len=0)), 2)
            self.body.dropout = model.dropout

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True, correction=0) + 1e-5
        x = (x - mean) / deviation
        x = torch.cat([x, x[:, -1:].expand(-1, self.stride)], 1).unfold(1, self.patch, self.stride)  # [B, P, patch]
        x = self.embed(x)
        if isinstance(self.body, RWKV):
            x, _ = self.body.sequence(x, end_norms=self.end_norms)
        else:
            x = self.body(self.drop(x + self.place))
        x = x[:, -1:] if self.last else x
        out: Tensor = self.head(self.drop(x).flatten(1)).float()
        return out * deviation + mean


def new_forecaster(model: Forecaster, look_back: int, horizon: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if model.version == "repeat":
        return Repeat(horizon)
    if model.version == "dlinear":
        return DLinear(look_back, horizon)
    made = Patches(model, look_back, horizon)
    if isinstance(made.body, RWKV):
        apply_recipe(made.body, recipe_of(made.body), torch.Generator().manual_seed(seed))
    return made


def recipe_of(body: RWKV) -> Any:
    return type(body).recipe(body.config)  # type: ignore[attr-defined]


# Learning ------------------------------------------------------------------------------------------------------------


def learn(
    plan: Forecasts, model: Forecaster, horizon: int, seed: int, device: torch.device, tell: Callable[[str], None]
) -> Row:
    """Train until the validation error has not fallen for `patience` passes; the errors of the best pass on the test.

    Errors are means over all windows, all variates and all steps ahead, of standardised values.
    """
    parts = windows(plan, horizon, device)
    net = new_forecaster(model, plan.look_back, horizon, seed).to(device)
    start = time.perf_counter()
    best, best_state, stale, epochs = math.inf, copy.deepcopy(net.state_dict()), 0, 0
    if any(True for _ in net.parameters()):
        optimizer = torch.optim.AdamW(groups_of(net, plan.weight_decay), lr=model.lr, betas=(0.9, 0.99))
        rng = torch.Generator().manual_seed(seed)
        for epoch in range(plan.epochs):
            for group in optimizer.param_groups:
                group["lr"] = model.lr * group["lr_scale"] * 0.5 * (1 + math.cos(math.pi * epoch / plan.epochs))
            train_pass(net, parts["train"], horizon, plan, optimizer, rng)
            epochs = epoch + 1
            error, _ = errors(net, parts["valid"], horizon)
            if error < best:
                best, best_state, stale = error, copy.deepcopy(net.state_dict()), 0
            else:
                stale += 1
            if stale >= plan.patience:
                break
        net.load_state_dict(best_state)
    mse, mae = errors(net, parts["test"], horizon)
    seconds = time.perf_counter() - start
    tell(f"{model.name}, {horizon}: MSE {mse:.4f}, MAE {mae:.4f} after {epochs} passes, {seconds:.0f} s")
    size = sum(p.numel() for p in net.parameters())
    return {"name": model.name, "horizon": horizon, "seed": seed, "mse": mse, "mae": mae,
            "valid": best if epochs else None,
            "epochs": epochs, "seconds": seconds, "parameters": size}  # fmt: skip


def groups_of(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """RWKV's recipe has learning rates and decay of its own; everything else has one rate."""
    body = getattr(net, "body", None)
    groups = param_groups(body, recipe_of(body), weight_decay) if isinstance(body, RWKV) else []
    known = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in net.parameters() if id(p) not in known]
    return [*groups, {"params": rest, "weight_decay": weight_decay, "lr_scale": 1.0}]


def train_pass(
    net: nn.Module, part: Tensor, horizon: int, plan: Forecasts, optimizer: torch.optim.Optimizer, rng: torch.Generator
) -> None:
    net.train()
    order = torch.randperm(len(part), generator=rng).split(plan.batch)
    for index in order[: plan.steps or None]:
        rows = part[index.to(part.device)].flatten(0, 1)  # [B · variates, look_back + horizon]
        with torch.autocast(part.device.type, torch.bfloat16, enabled=part.is_cuda):
            found = net(rows[:, :-horizon])
        loss = nn.functional.mse_loss(found.float(), rows[:, -horizon:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def errors(net: nn.Module, part: Tensor, horizon: int, batch: int = 256) -> tuple[float, float]:
    """Mean squared and mean absolute error over all windows, the last incomplete batch included."""
    net.eval()
    squared = absolute = 0.0
    for rows in part.split(batch):
        rows = rows.flatten(0, 1)
        with torch.autocast(part.device.type, torch.bfloat16, enabled=part.is_cuda):
            found = net(rows[:, :-horizon])
        off = found.float() - rows[:, -horizon:]
        squared += float(off.square().sum(dtype=torch.float64))
        absolute += float(off.abs().sum(dtype=torch.float64))
    count = part.shape[0] * part.shape[1] * horizon
    return squared / count, absolute / count


def table(rows: Sequence[Row]) -> str:
    """Markdown: models down, horizons across, MSE / MAE, and the mean over horizons; means of seeds."""
    horizons = sorted({row["horizon"] for row in rows})
    lines = [
        "| model | parameters | " + " | ".join(map(str, horizons)) + " | mean |",
        "|---" * (len(horizons) + 3) + "|",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        means = []
        for horizon in horizons:
            at = [row for row in mine if row["horizon"] == horizon]
            means.append(tuple(statistics.mean(row[kind] for row in at) if at else math.nan for kind in ("mse", "mae")))
        means.append(tuple(statistics.mean(pair[i] for pair in means) for i in (0, 1)))
        cells = [f"{mse:.3f} / {mae:.3f}" if math.isfinite(mse) else "–" for mse, mae in means]
        lines.append(f"| {name} | {max(row['parameters'] for row in mine):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
