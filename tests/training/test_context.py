"""Rows cut over four ranks: outputs, states and every gradient are those of the whole row."""

import json

import pytest
import torch
import torch.distributed as dist
from processes import run
from test_segments import comparable, data, gradients, lively, random_state

from receptance.models import RWKV4, State
from receptance.training.context import ContextParallel, cut_rows
from receptance.training.loss import language_model_loss
from receptance.training.segments import exact_backward

EXACT = 1e-9  # float64, relative to the largest element
CUTS = {"equal": [12, 12, 12, 12], "unequal": [1, 30, 16, 1]}
VERSIONS = ["4", "5.1", "5.2", "6", "7"]


def difference(got, expected):
    """The largest, relative to the largest element; infinite when names are missing."""
    if got.keys() != expected.keys():
        return float("inf")
    return max(float((got[n] - x).abs().max() / x.abs().max().clamp(min=1e-30)) for n, x in expected.items())


def summed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for x in found.values():
        dist.all_reduce(x)
    return found


def mine(tokens, cuts):
    return tokens.split(cuts, 1)[dist.get_rank()].contiguous()


def read(state):
    """A number that depends on all of a state."""
    return sum(
        (torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) * x).sum() for x in comparable(state).values()
    )


def compare(plain, cuts, checkpointing=False):
    """A model on the whole rows here, the same model on this rank's piece there."""
    import copy

    model = copy.deepcopy(plain)
    cut_rows(model)
    model.activation_checkpointing = checkpointing
    ranks = ContextParallel(dist.group.WORLD)
    tokens, targets = data(2, sum(cuts))
    whole, start = random_state(plain, 2), random_state(plain, 2)
    logits, end = plain.forward(tokens, whole)
    (language_model_loss(logits, targets) + read(end)).backward()

    part, after = model.forward(mine(tokens, cuts), start, backend=ranks)
    loss = language_model_loss(part, mine(targets, cuts)) * cuts[ranks.rank] / sum(cuts)
    (loss + read(after) * (ranks.rank == ranks.size - 1)).backward()
    result = {
        "logits": difference({"y": part}, {"y": mine(logits, cuts)}),
        "gradients": difference(summed(gradients(model, start)), gradients(plain, whole)),
    }
    return result | {"state": difference(comparable(ranks.last_state(after)), comparable(end))}


def compare_segments(version):
    """Segments of rows that are cut as well."""
    plain, model = lively(version), lively(version)
    cut_rows(model)
    ranks = ContextParallel(dist.group.WORLD)
    tokens, targets = data(2, 48)
    language_model_loss(plain.forward(tokens)[0], targets).backward()

    def advance(tokens, state):
        return ranks.last_state(model.hidden(tokens, state, lengths=None, backend=ranks)[1])

    def loss(tokens, targets, state):
        logits, state = model.forward(tokens, state, backend=ranks)
        return language_model_loss(logits, targets) / ranks.size, ranks.last_state(state)

    piece = lambda x: torch.cat([s.chunk(ranks.size, 1)[ranks.rank] for s in x.split(16, 1)], 1)
    exact_backward(advance, loss, piece(tokens), piece(targets), 4)
    return {"gradients": difference(summed(gradients(model, State({}))), gradients(plain, State({})))}


def worker(folder):
    found = {f"{v} {name}": compare(lively(v), cuts) for v in VERSIONS for name, cuts in CUTS.items()}
    found["7 checkpointed"] = compare(lively("7"), CUTS["unequal"], checkpointing=True)
    config = RWKV4.Config.make(vocab_size=11, n_layer=2, n_embd=16)
    torch.manual_seed(3)
    pre = RWKV4(type(config)(**{**vars(config), "pre_ffn": True}), dtype=torch.float64)
    with torch.no_grad():
        for parameter in pre.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    found["4 with pre_ffn"] = compare(pre, CUTS["unequal"])
    found |= {f"{v} in segments": compare_segments(v) for v in ("4", "6", "7")}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(everyone))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    run(4, worker, folder, folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_cut_rows_equal_whole_rows(found, version, cuts):
    for rank, result in enumerate(found):
        for name, error in result[f"{version} {cuts}"].items():
            assert error <= EXACT, (rank, name)


@pytest.mark.parametrize(
    "case", ["7 checkpointed", "4 with pre_ffn", "4 in segments", "6 in segments", "7 in segments"]
)
def test_cut_rows_combine_with(found, case):
    for rank, result in enumerate(found):
        for name, error in result[case].items():
            assert error <= EXACT, (rank, name)
