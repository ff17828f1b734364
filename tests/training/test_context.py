"""Rows cut over four ranks: outputs, states and every gradient are those of the whole row."""

import json

import pytest
import torch
import torch.distributed as dist
from processes import run
from test_segments import comparable, data, gradients, lively, random_state

from receptance.models import RWKV4, State
from receptance.training.batch import Batch
from receptance.training.context import ContextParallel
from receptance.training.loss import language_model_loss
from receptance.training.segments import exact_backward

EXACT = 1e-9  # float64, relative to the largest element
CUTS = {"with documents": [12, 12, 12, 12], "of any length": [1, 30, 16, 1]}
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


def compare(plain, cuts, checkpointing=False, resets=None):
    """A model on the whole rows here, the same model on this rank's piece there."""
    import copy

    model = copy.deepcopy(plain)
    model.activation_checkpointing = checkpointing
    ranks = ContextParallel(dist.group.WORLD)
    tokens, targets = data(2, sum(cuts))
    whole, start = random_state(plain, 2), random_state(plain, 2)
    logits, end = plain.forward(tokens, whole, resets=resets)
    (language_model_loss(logits, targets) + read(end)).backward()

    here = None if resets is None else mine(resets, cuts)
    part, after = model.forward(mine(tokens, cuts), start, resets=here, backend=ranks)
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
    ranks = ContextParallel(dist.group.WORLD)
    tokens, targets = data(2, 48)
    language_model_loss(plain.forward(tokens)[0], targets).backward()

    def advance(batch, state):
        state = model.hidden(batch.tokens, state, lengths=None, resets=None, backend=ranks)[1]
        return ranks.last_state(state)

    def loss(batch, state):
        part, state = model.loss(
            batch.tokens, batch.targets, state, logit_penalty=1e-4, total=batch.n_targets, backend=ranks
        )
        return part, ranks.last_state(state)

    places = torch.cat([s.chunk(ranks.size)[ranks.rank] for s in torch.arange(48).split(16)])
    exact_backward(advance, loss, Batch.of(tokens, targets).positions(places), 4)
    return {"gradients": difference(summed(gradients(model, State({}))), gradients(plain, State({})))}


def worker(folder):
    documents = torch.zeros(2, 48, dtype=torch.bool)
    documents[0, [0, 5, 11, 24, 30]] = True  # at the start, inside a piece, at its end, at the start of another …
    documents[1, 40] = True  # … and a document that passes through three of them
    found = {}
    for v in VERSIONS:
        for name, cuts in CUTS.items():
            resets = documents if name == "with documents" else None
            found[f"{v} {name}"] = compare(lively(v), cuts, resets=resets)
    found["7 checkpointed"] = compare(lively("7"), CUTS["of any length"], checkpointing=True)
    config = RWKV4.Config.make(vocab_size=11, n_layer=2, n_embd=16)
    torch.manual_seed(3)
    pre = RWKV4(type(config)(**{**vars(config), "pre_ffn": True}), dtype=torch.float64)
    with torch.no_grad():
        for parameter in pre.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    found["4 with pre_ffn"] = compare(pre, CUTS["of any length"])
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
