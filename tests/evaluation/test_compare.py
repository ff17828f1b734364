"""Comparisons: everything trained alike, one report."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from receptance.cli import build
from receptance.errors import ConfigError
from receptance.evaluation import tasks
from receptance.evaluation.compare import (
    Comparison,
    compare,
    long_loss,
    positions,
    read_comparison,
    report,
    summary,
    trained,
)
from receptance.evaluation.score import PlainScorer
from receptance.training import read_config
from receptance.training.loop import new_model, recipe_of
from receptance.training.report import Silent

CONFIG = """
generation = 12

[data]
train = ["text.txt"]
valid = {held = "text.txt"}
tokenizer = "byte"

[run]
out = "out"
tokens = 2048
ctx_len = 32
batch_size = 8
log_every = 2
valid_every = 4
valid_tokens = 500
device = "cpu"

[model]
n_layer = 1
head_size = 16
parameters = 30_000

[[models]]
name = "RWKV 7"
version = "7"

[[models]]
name = "Transformer"
version = "transformer"
optim = {lr = 1e-3}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"{i} plus {j} is {i + j}." for i in range(20) for j in range(20)))
    (tmp_path / "compare.toml").write_text(CONFIG)
    return tmp_path / "compare.toml"


def test_models_share_all_that_they_do_not_change(config):
    found = read_comparison(config, ["run.seed=5"])
    a, b = (entry.config for entry in found.entries)
    assert (a.data, a.run.tokens, a.run.seed) == (b.data, b.run.tokens, 5)
    assert (a.optim.lr, b.optim.lr) == (6e-4, 1e-3)
    assert (a.model.version, b.model.version) == ("7", "transformer")
    assert a.run.out.endswith("out/RWKV-7")
    assert found.generation == 12


@pytest.mark.parametrize(("wrong", "match"), [
    ('[[models]]\nname = "RWKV 7"\n', "name of its own"), ('[[models]]\nname = "x"\ncolour = 1\n', "colour"),
    ('[[models]]\nname = "x"\nversion = "9"\n', "model.version"),
])  # fmt: skip
def test_wrong_models_are_refused(config, wrong, match):
    config.write_text(CONFIG + wrong)
    with pytest.raises(ConfigError, match=match):
        read_comparison(config)


def test_one_command_gives_report_numbers_and_pictures(config):
    pytest.importorskip("matplotlib")
    found = CliRunner().invoke(build("compare"), ["compare", str(config)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    out = config.parent / "out"
    assert {"report.md", "compare.json", "loss.png", "loss.svg", "generation.png"} <= {p.name for p in out.iterdir()}
    rwkv, transformer = json.loads((out / "compare.json").read_text())["models"]
    for row in (rwkv, transformer):
        assert abs(row["parameters_without_embedding"] - 30_000) <= 600
        assert row["tokens"] == 2048
        assert row["curve"][-1]["tokens"] == 2048
        assert [look["tokens"] for look in row["looks"]] == [1024, 2048]
        assert row["validation"]["held"] < 8
        assert row["seconds"] == pytest.approx(sum(256 * 2 / x for x in speeds(out, row["name"])), rel=1e-9)
    assert len(set(rwkv["generation"]["state_bytes"])) == 1
    assert transformer["generation"]["state_bytes"] == [
        12 * size // 12 for size in transformer["generation"]["state_bytes"]
    ]
    assert "| Transformer |" in (out / "report.md").read_text()
    # a second time, nothing is trained
    before = {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")}
    compare(read_comparison(config), Silent())
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")}


def speeds(out, name):
    rows = map(json.loads, (out / name.replace(" ", "-") / "log.jsonl").read_text().splitlines())
    return [row["tokens_per_second"] for row in rows if "loss" in row]


def test_a_cache_grows_and_a_state_does_not():
    for version, grows in (("7", False), ("4", False), ("lstm", False), ("transformer", True)):
        config = read_config(None, [f"model.version={version}", "model.n_layer=1", "model.n_embd=32",
                                    "model.head_size=16", 'data.train=["x"]', "run.device=cpu"])  # fmt: skip
        found = positions(config, 32, points=4)
        sizes = found.state_bytes
        assert found.position == [8, 16, 24, 32]
        if grows:  # keys and values in float32, and two numbers of eight bytes, for each token
            assert sizes == [n * (2 * 32 * 4 + 2 * 8) for n in found.position]
        else:
            assert len(set(sizes)) == 1
        assert found.seconds == sorted(found.seconds)


def build_without(version, *ideas):
    config = read_config(None, [f"model.version={version}", "model.n_layer=2", "model.n_embd=64", 'data.train=["x"]',
                                f"model.without={list(ideas)}"])  # fmt: skip
    model = new_model(config, 64)
    return recipe_of(model, config), model


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_each_idea_of_the_recipe_can_be_left_out(version):
    whole, _ = build_without(version)
    changed = {}
    for idea in ("small-embedding", "zero-matrices", "decay-spread", "mix-spread", "lr-groups"):
        recipe, _ = build_without(version, idea)
        assert recipe.keys() == whole.keys()
        changed[idea] = {name for name, rule in recipe.items() if not same(rule, whole[name])}
    assert changed["small-embedding"] == {"emb.weight"}
    assert changed["zero-matrices"] >= {"blocks.0.ffn.value.weight", "blocks.1.ffn.value.weight"}
    assert all("w0" in name or "time_decay" in name for name in changed["decay-spread"])
    assert len(changed["decay-spread"]) == 2
    assert changed["mix-spread"]
    assert changed["lr-groups"]


def same(a, b):
    equal = torch.equal(a.init, b.init) if isinstance(a.init, torch.Tensor) else a.init == b.init
    return equal and (a.lr, a.lr_stage2, a.decay) == (b.lr, b.lr_stage2, b.decay)


@pytest.mark.parametrize("version", ["4", "5.2", "7"])
def test_without_token_shift_the_previous_token_reaches_only_the_state(version):
    from receptance.models import apply_recipe

    outs = []
    for ideas in ((), ("token-shift",)):
        recipe, model = build_without(version, *ideas)
        apply_recipe(model, recipe)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not any(part in name for part in ("x_", "time_mix", "time_decay", "w0")):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        state = model.zero_state()
        shifted = {name: (x + 1 if name.endswith("shift") else x) for name, x in state.items()}
        a, b = model([1], state)[0], model([1], type(state)(shifted))[0]
        outs.append(float((a - b).detach().abs().max()))
    assert outs[0] > 1e-3
    assert outs[1] == 0


def test_what_cannot_be_left_out_is_refused():
    for version, idea in (("6", "token-shift"), ("transformer", "lr-groups")):
        with pytest.raises(ConfigError, match=r"cannot be taken out|another"):
            build_without(version, idea)
    with pytest.raises(ConfigError, match=r"model\.without"):
        build_without("7", "everything")


def test_a_run_that_was_made_otherwise_is_no_result(config):
    found = read_comparison(config, ["run.tokens=512"])
    compare(Comparison(found.out, found.entries[1:]), Silent())
    assert summary(found.entries[1])["tokens"] == 512
    with pytest.raises(ConfigError, match=r"run\.tokens"):
        compare(read_comparison(config), Silent())


# What a comparison can ask besides -----------------------------------------------------------------------------------

MORE = """
[search]
lr = [1e-7, 3e-3]
tokens = 1024

[long]
text = "long.jsonl"
tokens = 150
rows = 2

[tasks]
lambada = "words.jsonl"
choice = ["pairs.jsonl"]
limit = 5

"""
LONG = [
    "".join(f"{i} plus {j} is {i + j}. " for j in range(n)) for i, n in ((1, 12), (2, 40), (3, 2), (4, 12), (5, 12))
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """One small RWKV at the better of two rates, with its losses by position and its tasks."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "text.txt").write_text("\n".join(f"{i} plus {j} is {i + j}." for i in range(20) for j in range(20)))
    words = [{"text": f"{i} plus 2 is {i + 2}"} for i in range(9)]
    pairs = [{"sentence_good": f"{i} plus 1 is {i + 1}.", "sentence_bad": f"plus {i} is"} for i in range(9)]
    for name, rows in (("long", [{"text": text} for text in LONG]), ("words", words), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CONFIG.replace("generation = 12\n", "").replace("[[models]]", MORE + "[[models]]", 1)
    (folder / "compare.toml").write_text(text)
    found = read_comparison(folder / "compare.toml", [f"data.root={folder}"])
    found = Comparison(found.out, found.entries[:1], search=found.search, long=found.long, tasks=found.tasks)
    compare(found, Silent())
    (row,) = json.loads((found.out / "compare.json").read_text())["models"]
    return found, row


def test_the_better_of_the_rates_is_taken(asked):
    found, row = asked
    slow, fast = row["search"]
    assert (slow["lr"], fast["lr"]) == (1e-7, 3e-3)
    assert fast["bits"] < slow["bits"] - 0.5  # one learns nothing in so few steps
    assert row["lr"] == 3e-3
    made = json.loads((found.out / "RWKV-7/model/training.json").read_text())
    assert made["config"]["optim"]["lr"] == 3e-3
    assert made["config"]["optim"]["lr_final"] == pytest.approx(3e-4)  # which falls as far
    assert row["tokens"] == 2048
    assert not list((found.out / "RWKV-7").glob("search-*"))  # short runs leave nothing but their results
    assert len(list((found.out / "cells/search").glob("*.json"))) == 2


def test_loss_by_position_is_that_of_a_pass_over_each_document(asked):
    """Three documents have 150 tokens, two of them are taken; rates and lengths are in bytes here."""
    found, row = asked
    config = made_config(found, row)
    model, tok = trained(config)
    nats = torch.zeros(2, 150)
    with torch.no_grad():
        for place, text in enumerate([LONG[0], LONG[1]]):
            ids = tok.encode(text)[:150]
            logits, _ = model(torch.tensor([tok.eos_id, *ids[:-1]]))
            nats[place] = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(ids), reduction="none")
    assert row["long"]["end"] == [64, 128, 150]
    assert row["long"]["documents"] == 2
    wanted = [float(nats[:, a:b].mean()) / math.log(2) for a, b in ((0, 64), (64, 128), (128, 150))]
    assert row["long"]["bits"] == pytest.approx(wanted, rel=1e-4)
    pieces = long_loss(config, found.long, first=50, chunk=7)
    assert pieces["end"] == [50, 100, 150]
    assert sum(pieces["bits"]) / 3 == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-4)
    with pytest.raises(ConfigError, match=r"lower long\.tokens"):
        long_loss(config, type(found.long)(found.long.text, 2000))


def made_config(found, row):
    from receptance.evaluation.compare import at_rate

    return at_rate(found.entries[0].config, row["lr"])


def test_tasks_are_scored_as_eval_scores_them(asked):
    found, row = asked
    model, tok = trained(made_config(found, row))
    scorer, root = PlainScorer(model, tok), found.out.parent
    words = tasks.lambada(scorer, tok, tasks.sample(list(tasks.read_rows(root / "words.jsonl")), 5))
    assert row["tasks"]["LAMBADA"]["n"] == row["tasks"]["pairs"]["n"] == 5
    assert row["tasks"]["LAMBADA"]["perplexity"] == pytest.approx(words.perplexity, rel=1e-4)
    questions = [tasks.choice_of(x) for x in tasks.sample(list(tasks.read_rows(root / "pairs.jsonl")), 5)]
    wanted = tasks.multiple_choice(scorer, tok, questions)
    assert row["tasks"]["pairs"]["accuracy"] == pytest.approx(wanted.accuracy)
    text = report([row])
    assert f"| RWKV 7 | {row['tasks']['LAMBADA']['accuracy']:.4f} |" in text
    assert f"| {row['long']['bits'][0]:.3f} |" in text


def test_without_ln0_the_size_of_an_embedding_is_not_lost():
    """ln0 makes vectors of any size alike; without it a larger embedding is another input, and nothing else is gone."""
    from receptance.models import apply_recipe
    from receptance.training.ablation import freeze

    whole, model = build_without("7", "ln0")
    apply_recipe(model, whole, torch.Generator().manual_seed(0))
    count = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3, generator=torch.Generator().manual_seed(1))

    def moved():
        with torch.no_grad():
            before = model([1, 2, 3])[0]
            model.emb.weight *= 1000
            return float((model([1, 2, 3])[0] - before).abs().max())

    model.emb.weight.data.normal_(generator=torch.Generator().manual_seed(2))
    assert moved() < 1e-3
    model.emb.weight.data /= 1000
    freeze(model, ("ln0",))
    assert moved() > 1e-1
    assert count - sum(p.numel() for p in model.parameters()) == 2 * 64
    assert isinstance(model.blocks[0].ln0, torch.nn.Identity)
    assert isinstance(model.ln_out, torch.nn.LayerNorm)
