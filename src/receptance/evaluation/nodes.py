"""`receptance nodes`: the nodes of a graph classified from the sequences of their neighbours."""

import copy
import json
import math
import statistics
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from receptance.errors import ConfigError
from receptance.evaluation import grid
from receptance.evaluation.forecast import groups_of, recipe_of
from receptance.models import RWKV, apply_recipe
from receptance.training.config import VERSIONS, ModelConfig, RunConfig, TrainConfig
from receptance.training.loop import new_model

SIMPLE = ("own", "mean", "transformer", "gcn")
PARTS = ("train", "valid", "test")
Row = dict[str, Any]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Reader:
    """version: of RWKV, or "own" (the node's features alone), "mean" (of the sequence), "transformer", or "gcn" (Kipf
    and Welling, 2017: two layers over the whole graph). bidirectional: of RWKV; else the node itself is read last.
    read: where a sequence's answer is read, at the node's "own" place or from the "mean" of all."""

    name: str
    version: str = "7"
    bidirectional: bool = False
    read: str = "own"
    n_layer: int = 1
    n_embd: int = 64
    head_size: int = 32
    dropout: float = 0.5
    lr: float = 3e-3
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Nodes:
    """A graph, how far its sequences reach, and what holds for all models.

    file: an .npz with feat_row, feat_col and shape (binary features), labels, edges [E, 2], train_idx, valid_idx and
    test_idx. hops, near: so far and so many nodes of each distance at most, drawn anew in each step. draws: sequences
    of a node whose answers are averaged in the end. patience: looks at the validation nodes, each after `every` steps,
    without a lower loss.
    """

    file: str
    out: str = "runs/nodes"
    hops: int = 2
    near: int = 12
    draws: int = 4
    steps: int = 300
    every: int = 10
    patience: int = 8
    seeds: tuple[int, ...] = (1,)
    models: tuple[Reader, ...] = field(default=())


def read_nodes(path: Path, overrides: Mapping[str, str] = {}) -> Nodes:
    """See `grid.read_plan`."""
    found = grid.read_plan(Nodes, path, overrides, (*VERSIONS, *SIMPLE))
    for model in found.models:
        if model.read not in ("own", "mean"):
            raise ConfigError(f"{path}: model {model.name}: read must be own or mean, found {model.read!r}")
    if found.hops < 0 or found.near < 1:
        raise ConfigError(f"{path}: needs hops from 0 and near from 1")
    return found


def run(path: Path, device: str, tell: Callable[[str], None], overrides: Mapping[str, str] = {}) -> Path:
    """Every model with every seed; results.json, report.md. Returns the folder. Processes share the work."""
    plan = read_nodes(path, overrides)
    out = Path(plan.out)
    cells = []
    for model in plan.models:
        for seed in plan.seeds:
            key = {**asdict(plan), "file": Path(plan.file).name, "models": asdict(model), "seeds": seed}
            del key["out"]
            make = partial(learn, plan, model, seed, torch.device(device), tell)
            cells.append(grid.Cell(f"{model.name}, seed {seed}", json.dumps(key, sort_keys=True), make))
    rows = grid.run(out, cells, tell)
    grid.write(out, rows, table(rows))
    return out


def table(rows: Sequence[Row]) -> str:
    """Markdown: accuracy on the test nodes, mean and deviation of the seeds."""
    lines = ["| model | parameters | seeds | validation | test |", "|---" * 5 + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        cells = []
        for part in ("valid", "test"):
            values = [row[part] for row in mine]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | {mine[0]['parameters']:,} | {len(mine)} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


# The graph -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """features [n, F], rows that sum to 1; labels [n]; neighbours: of each node, itself not among them; parts: nodes
    of training, validation and test."""

    features: Tensor
    labels: Tensor
    neighbours: list[Ids]
    parts: dict[str, Ids]

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


def read_graph(path: Path) -> Graph:
    """Edges hold in both directions, loops are left out. Raises ConfigError for a file of another kind."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("feat_row", "feat_col", "shape", "labels", "edges")}
            parts = {part: file[f"{part}_idx"].astype(np.int64) for part in PARTS}
        n, width = (int(x) for x in found["shape"])
        features = np.zeros((n, width), np.float32)
        features[found["feat_row"], found["feat_col"]] = 1
        edges = found["edges"].astype(np.int64)
        nodes = np.concatenate([edges.ravel(), *parts.values()])
        if len(found["labels"]) != n or not ((nodes >= 0) & (nodes < n)).all():
            raise ValueError(f"labels, edges and parts are not those of {n} nodes")
    except (OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: not a graph as `receptance nodes` needs it ({error})") from None
    edges = np.concatenate([edges, edges[:, ::-1]])
    edges = np.unique(edges[edges[:, 0] != edges[:, 1]], axis=0)
    neighbours = np.split(edges[:, 1], np.searchsorted(edges[:, 0], np.arange(1, n)))
    features /= features.sum(1, keepdims=True).clip(1)
    labels = torch.from_numpy(found["labels"].astype(np.int64))
    return Graph(torch.from_numpy(features), labels, neighbours, parts)


def rings(graph: Graph, node: int, hops: int) -> list[Ids]:
    """The nodes at each distance from 0, `node` itself, to `hops`."""
    seen, found = {node}, [np.array([node])]
    for _ in range(hops):
        ring = {int(j) for i in found[-1] for j in graph.neighbours[i]} - seen
        seen |= ring
        found.append(np.array(sorted(ring), np.int64))
    return found


def sequences(all_rings: Sequence[list[Ids]], near: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes [B, T], their distances [B, T] and lengths [B]: at most `near` of each ring, drawn, in random order, the
    farthest first and the node itself last."""
    rows = []
    for found in all_rings:
        drawn = [rng.permutation(ring)[:near] for ring in found]
        rows.append([(int(j), hop) for hop in reversed(range(len(drawn))) for j in drawn[hop]])
    lengths = torch.tensor([len(row) for row in rows])
    nodes, hops = torch.zeros(2, len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        nodes[i, : len(row)], hops[i, : len(row)] = torch.tensor(row).T
    return nodes, hops, lengths


# The models ----------------------------------------------------------------------------------------------------------


class SequenceReader(nn.Module):
    """Features → C, plus the distance; a sequence model; the answer is read at the node itself (last), or overall."""

    def __init__(self, model: Reader, graph: Graph, hops: int):
        super().__init__()
        self.bidirectional, self.overall = model.bidirectional, "mean" in (model.version, model.read)
        self.drop = nn.Dropout(model.dropout)
        self.embed = nn.Linear(graph.features.shape[1], model.n_embd, bias=False)
        nn.init.xavier_uniform_(self.embed.weight)
        self.distance = nn.Embedding(hops + 1, model.n_embd)
        nn.init.zeros_(self.distance.weight)
        self.head = nn.Linear(model.n_embd, graph.classes)
        self.body: nn.Module | None = None
        if model.version == "transformer":
            layer = nn.TransformerEncoderLayer(
                model.n_embd, max(1, model.n_embd // model.head_size), 2 * model.n_embd, model.dropout, "gelu",
                batch_first=True, norm_first=True,
            )  # fmt: skip
            self.body = nn.TransformerEncoder(layer, model.n_layer, enable_nested_tensor=False)
        elif model.version in VERSIONS:
            shape = ModelConfig(
                version=model.version, n_layer=model.n_layer, n_embd=model.n_embd, head_size=model.head_size
            )
            self.body = new_model(TrainConfig(model=shape, run=RunConfig(ctx_len=0)), 2)
            self.body.dropout = model.dropout

    def forward(self, features: Tensor, nodes: Tensor, hops: Tensor, lengths: Tensor) -> Tensor:
        """features [n, F], the rest as `sequences` makes it → [B, classes]."""
        x = self.embed(self.drop(features))  # [n, C]
        x = x[nodes] * math.sqrt(features.shape[1]) + self.distance(hops)  # [B, T, C]; rows sum to 1, so are small
        here = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # [B, T]
        if isinstance(self.body, RWKV):
            if self.bidirectional:
                x = self.body.bidirectional(x, lengths=lengths)
            else:
                x, _ = self.body.sequence(x, lengths=lengths)
        elif self.body is not None:
            x = self.body(x, src_key_padding_mask=~here)
        if self.overall:
            x = (x * here[..., None]).sum(1) / lengths[:, None]
        else:
            x = x[torch.arange(len(x), device=x.device), lengths - 1]
        out: Tensor = self.head(self.drop(x.relu() if self.body is None else x))
        return out


class Convolution(nn.Module):
    """Two layers of averaging over neighbours (Kipf and Welling, 2017)."""

    def __init__(self, model: Reader, graph: Graph):
        super().__init__()
        n = len(graph.labels)
        links = torch.eye(n)
        for i, others in enumerate(graph.neighbours):
            links[i, others] = 1
        scale = links.sum(1).rsqrt()
        self.register_buffer("links", scale[:, None] * links * scale)
        self.drop = nn.Dropout(model.dropout)
        self.first = nn.Linear(graph.features.shape[1], model.n_embd, bias=False)
        self.second = nn.Linear(model.n_embd, graph.classes, bias=False)
        for linear in (self.first, self.second):
            nn.init.xavier_uniform_(linear.weight)

    links: Tensor

    def forward(self, features: Tensor, nodes: Tensor, hops: Tensor, lengths: Tensor) -> Tensor:
        x = (self.links @ self.first(self.drop(features))).relu()
        x = self.links @ self.second(self.drop(x))
        out: Tensor = x[nodes[torch.arange(len(nodes)), lengths - 1]]
        return out


def new_reader(model: Reader, graph: Graph, hops: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if model.version == "gcn":
        return Convolution(model, graph)
    made = SequenceReader(model, graph, hops)
    if isinstance(made.body, RWKV):
        apply_recipe(made.body, recipe_of(made.body), torch.Generator().manual_seed(seed))
    return made


# Learning ------------------------------------------------------------------------------------------------------------


def learn(plan: Nodes, model: Reader, seed: int, device: torch.device, tell: Callable[[str], None]) -> Row:
    """Train on the training nodes; the weights of the lowest validation loss are judged on the test nodes."""
    graph = read_graph(Path(plan.file))
    hops = 0 if model.version in ("own", "gcn") else plan.hops
    features, labels = graph.features.to(device), graph.labels.to(device)
    around = {part: [rings(graph, int(i), hops) for i in index] for part, index in graph.parts.items()}
    net = new_reader(model, graph, hops, seed).to(device)
    optimizer = torch.optim.AdamW(groups_of(net, model.weight_decay), lr=model.lr, betas=(0.9, 0.99))
    for group in optimizer.param_groups:
        group["lr"] = model.lr * group["lr_scale"]
    rng, start = np.random.default_rng(seed), time.perf_counter()
    wanted = labels[graph.parts["train"]]
    best, best_state, stale, steps = math.inf, copy.deepcopy(net.state_dict()), 0, 0

    def judge(part: str, drawn: int) -> tuple[float, float]:
        net.eval()
        same = np.random.default_rng(0)  # the same sequences at every look
        with torch.no_grad():
            chances = sum(
                net(features, *(x.to(device) for x in sequences(around[part], plan.near, same))).softmax(-1)
                for _ in range(drawn)
            )
        right = labels[graph.parts[part]]
        logs = (chances / drawn).clamp(min=1e-12).log()  # type: ignore[union-attr]
        return float(nn.functional.nll_loss(logs, right)), float((logs.argmax(-1) == right).float().mean())

    while steps < plan.steps and stale < plan.patience:
        net.train()
        rows = (x.to(device) for x in sequences(around["train"], plan.near, rng))
        loss = nn.functional.cross_entropy(net(features, *rows), wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % plan.every == 0 or steps == plan.steps:
            found, _ = judge("valid", 1)
            if found < best:
                best, best_state, stale = found, copy.deepcopy(net.state_dict()), 0
            else:
                stale += 1
    net.load_state_dict(best_state)
    draws = 1 if hops == 0 else plan.draws
    (_, valid), (_, test) = judge("valid", draws), judge("test", draws)
    seconds = time.perf_counter() - start
    tell(f"{model.name}, seed {seed}: accuracy {test:.3f} after {steps} steps, {seconds:.0f} s")
    size = sum(p.numel() for p in net.parameters())
    return {"name": model.name, "seed": seed, "valid": valid, "test": test, "valid_loss": best, "steps": steps,
            "seconds": seconds, "parameters": size}  # fmt: skip
