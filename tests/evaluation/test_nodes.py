"""Nodes from the sequences of their neighbours: who is in them, in which order, and that it helps."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from receptance.cli import build
from receptance.errors import ConfigError
from receptance.evaluation.nodes import Nodes, Reader, learn, new_reader, read_graph, read_nodes, rings, sequences

CPU = torch.device("cpu")
SMALL = Reader("r", n_embd=16, head_size=8, dropout=0.0, lr=1e-2)
RIVALS = ["7", "4", "transformer", "mean"]


def write(path, n, edges, labels, words, parts=None, **changes):
    """words: the feature of each node, -1 for none."""
    has = np.flatnonzero(np.asarray(words) >= 0)
    parts = parts or (range(n), range(n), range(n))
    found = {"feat_row": has, "feat_col": np.asarray(words)[has], "shape": np.array([n, max(words) + 1]),
             "labels": np.asarray(labels, np.int8), "edges": np.asarray(edges, np.int16)}  # fmt: skip
    found |= {f"{name}_idx": np.array(part) for name, part in zip(("train", "valid", "test"), parts)}
    np.savez(path, **{**found, **changes})
    return path


@pytest.fixture
def chain(tmp_path):
    """0 - 1 - 2 - 3 - 4, a loop at 0, one link told twice, and 5 alone."""
    edges = [(0, 1), (2, 1), (2, 3), (3, 4), (0, 0), (1, 2)]
    return write(tmp_path / "chain.npz", 6, edges, [0, 1, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2])


@pytest.fixture
def stars(tmp_path):
    """Forty hubs without words of their own; three leaves each, whose words are those of the hub's class."""
    rng = np.random.default_rng(0)
    labels, edges, words = list(rng.integers(0, 2, 40)), [], [-1] * 40
    for hub in range(40):
        for _ in range(3):
            edges.append((hub, len(words)))
            words.append(int(3 * labels[hub] + rng.integers(3)))
            labels.append(labels[hub])
    parts = range(20), range(20, 30), range(30, 40)
    return write(tmp_path / "stars.npz", len(words), edges, labels, words, parts)


def test_links_hold_in_both_directions_once(chain):
    graph = read_graph(chain)
    assert [x.tolist() for x in graph.neighbours] == [[1], [0, 2], [1, 3], [2, 4], [3], []]
    assert torch.equal(graph.features.sum(1), torch.ones(6))
    assert graph.classes == 2


def test_rings_are_nodes_at_that_distance(chain):
    graph = read_graph(chain)
    assert [x.tolist() for x in rings(graph, 1, 3)] == [[1], [0, 2], [3], [4]]
    assert [x.tolist() for x in rings(graph, 5, 2)] == [[5], [], []]


def test_a_sequence_goes_from_far_to_the_node_itself(chain):
    graph = read_graph(chain)
    around = [rings(graph, i, 2) for i in range(6)]
    seen = set()
    for seed in range(20):
        nodes, hops, lengths = sequences(around, 1, np.random.default_rng(seed))
        assert lengths.tolist() == [3, 3, 3, 3, 3, 1]
        for i in range(6):
            row, far = nodes[i, : lengths[i]].tolist(), hops[i, : lengths[i]].tolist()
            assert row[-1] == i
            assert far == sorted(far, reverse=True)
            assert all(j in around[i][hop] for j, hop in zip(row, far))
        seen.add(int(nodes[2, 1]))
    assert seen == {1, 3}  # one neighbour of two, drawn
    _, _, lengths = sequences(around, 9, np.random.default_rng(0))
    assert lengths.tolist() == [3, 4, 5, 4, 3, 1]


@pytest.mark.parametrize(("bidirectional", "read"), [(False, "own"), (True, "mean")])
@pytest.mark.parametrize("version", RIVALS)
@torch.no_grad()
def test_padding_is_not_read_and_neighbours_are(chain, version, bidirectional, read):
    graph = read_graph(chain)
    net = new_reader(replace(SMALL, version=version, bidirectional=bidirectional, read=read), graph, 2, 1).eval()
    for parameter in net.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    nodes, hops, lengths = sequences([rings(graph, i, 2) for i in (5, 2)], 9, np.random.default_rng(0))
    found = net(graph.features, nodes, hops, lengths)
    changed = nodes.clone()
    changed[0, 1:] = 3
    assert torch.allclose(net(graph.features, changed, hops, lengths), found, atol=1e-5)
    changed = nodes.clone()
    changed[1, 0] = (nodes[1, 0] + 1) % 3  # the farthest, another word
    assert (net(graph.features, changed, hops, lengths)[1] - found[1]).abs().max() > 1e-4


def test_neighbours_tell_what_a_node_does_not(stars):
    plan = Nodes(str(stars), hops=1, steps=40, every=10)
    accuracy = {version: learn(plan, replace(SMALL, version=version), 1, CPU, lambda text: None)["test"]
                for version in ("own", "7", "gcn")}  # fmt: skip
    assert accuracy["own"] < 0.9
    assert accuracy["7"] == accuracy["gcn"] == 1


def test_a_convolution_averages_over_links(chain):
    graph = read_graph(chain)
    net = new_reader(replace(SMALL, version="gcn"), graph, 0, 1)
    links = torch.zeros(6, 6)
    for i, j in ((0, 1), (1, 2), (2, 3), (3, 4)):
        links[i, j] = links[j, i] = 1
    links += torch.eye(6)
    degree = links.sum(1)
    assert torch.allclose(net.links, links / (degree[:, None] * degree).sqrt())


CONFIG = """
file = "stars.npz"
out = "out"
hops = 1
steps = 2
seeds = [1, 2]
[[models]]
name = "RWKV-7"
n_embd = 16
head_size = 8
bidirectional = true
[[models]]
name = "mean"
version = "mean"
"""


def test_one_command_gives_a_table_and_runs_nothing_twice(stars):
    folder = stars.parent
    (folder / "x.toml").write_text(CONFIG)
    outs = [CliRunner().invoke(build("nodes"), ["nodes", str(folder / "x.toml")], catch_exceptions=False)
            for _ in range(2)]  # fmt: skip
    assert outs[0].exit_code == 0, outs[0].output
    assert outs[0].stdout == outs[1].stdout
    rows = json.loads((folder / "out/results.json").read_text())
    assert [(row["name"], row["seed"]) for row in rows] == [("RWKV-7", 1), ("RWKV-7", 2), ("mean", 1), ("mean", 2)]
    mean = (rows[2]["test"] + rows[3]["test"]) / 2
    assert f"| mean | {rows[2]['parameters']:,} | 2 |" in outs[0].stdout
    assert f"| {mean:.3f} ± " in outs[0].stdout
    assert outs[1].stderr == ""  # nothing was run


@pytest.mark.parametrize(("old", "new", "match"), [
    ('"mean"\nversion = "mean"', '"m"\nversion = "sum"', "sum"), ("hops = 1", "hops = -1", "hops"),
    ("steps = 2", "step = 2", "step"), ("bidirectional = true", 'read = "first"', "first"),
])  # fmt: skip
def test_wrong_settings_are_named(tmp_path, old, new, match):
    (tmp_path / "x.toml").write_text(CONFIG.replace(old, new))
    with pytest.raises(ConfigError, match=match):
        read_nodes(tmp_path / "x.toml")


def test_wrong_graphs_are_named(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "empty.npz", labels=np.zeros(3))
    write(tmp_path / "far.npz", 2, [(0, 7)], [0, 1], [0, 1])
    np.savez(tmp_path / "pickled.npz", labels=np.array([{}], dtype=object))
    for name in ("text", "empty", "far", "pickled", "absent"):
        with pytest.raises(ConfigError, match=name):
            read_graph(tmp_path / f"{name}.npz")
