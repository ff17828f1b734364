"""Comparisons: everything trained alike, one report."""

import json

import pytest
import torch
from typer.testing import CliRunner

from receptance.cli import build
from receptance.errors import ConfigError
from receptance.evaluation.compare import Comparison, compare, positions, read_comparison, summary
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
