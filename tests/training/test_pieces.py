"""Schedule, groups, loss and configuration against the reference trainers."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from receptance.errors import ConfigError
from receptance.models import VERSIONS
from receptance.training import read_config
from receptance.training.config import TrainConfig, fixed_settings
from receptance.training.loss import language_model_loss
from receptance.training.optim import param_groups
from receptance.training.schedule import learning_rate, progress, weight_decay


def test_schedules_match_the_reference(shared):
    table = json.loads((shared / "oracles" / "misc" / "lr_schedules.json").read_text())["schedules"]
    assert len(table) == 9
    for name, entry in table.items():
        a = entry["args"]
        by_steps, by_tokens = (
            a["epoch_count"] * a["epoch_steps"],
            abs(a["my_exit_tokens"]) / a["ctx_len"] / a["real_bsz"],
        )
        cosine, exponential = ("cosine", by_tokens), ("exponential", by_steps)
        kinds = [exponential] if a["my_exit_tokens"] == 0 else [cosine]
        if a["my_exit_tokens"] < 0:  # the mean of both
            kinds = [cosine, exponential]
        constants = {"lr": a["lr_init"], "lr_final": a["lr_final"], "warmup_steps": a["warmup_steps"]}
        constants["warmup_floor"] = 0.2 if name.startswith("v4neo") else 0.01
        for step, lr, lr2, wd in entry["rows_step_lr_lr2x_wd"]:
            rates = [learning_rate(step, total, kind=kind, **constants) for kind, total in kinds]
            got = sum(rates) / len(rates)
            assert got == pytest.approx(lr, rel=1e-9, abs=1e-18), (name, step)
            assert 2 * got == pytest.approx(lr2, rel=1e-9, abs=1e-18)
            done = progress(step, by_steps, a["warmup_steps"], "exponential")
            assert weight_decay(done, a["weight_decay"], a["weight_decay_final"]) == pytest.approx(wd, rel=1e-9)


@pytest.mark.parametrize("decay", [0.1, 0.0])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name,version", [("v4", "4"), ("v5.0", "5.0"), ("v5.2", "5.2"), ("v6", "6"), ("v7", "7")])
def test_optimizer_groups_match_the_reference(shared, name, version, stage, decay):
    facts = json.loads((shared / "oracles" / "misc" / "init_and_optimizer.json").read_text())["versions"]
    trainer = "v7_v5repo" if name == "v7" and stage == 2 else name
    shapes = {key: tuple(shape) for key, shape in facts[trainer]["shapes"].items()}
    cls = VERSIONS[version]
    config = cls.Config.from_shapes(shapes)
    groups = param_groups(cls(config), cls.recipe(config), decay, stage2=stage == 2)
    got = {(g["weight_decay"], g["lr_scale"]): set(g["names"]) for g in groups}
    expected: dict[tuple[float, float], set[str]] = {}
    for group in facts[trainer]["optimizer_groups"][f"weight_decay={decay},stage={stage}"]["groups"]:
        if group["params"]:
            expected.setdefault((group["weight_decay"], group["lr_scale"]), set()).update(group["params"])
    assert got == expected


@pytest.mark.parametrize("name,version", [("v4_dev", "4"), ("v7_dev", "7")])
def test_gradients_of_the_training_loss_match_the_reference(shared, name, version):
    """With the logit penalty, which changes gradients and not the value."""
    folder = shared / "oracles" / name
    weights, reference = load_file(folder / "weights.safetensors"), load_file(folder / "grads.safetensors")
    cls = VERSIONS[version]
    model = cls(cls.Config.from_shapes({k: tuple(x.shape) for k, x in weights.items()}), dtype=torch.float64)
    model.load_state_dict(weights)
    logits, _ = model.forward(reference["idx"])
    loss = language_model_loss(logits, reference["targets"], 1e-4)
    loss.backward()
    facts = json.loads((folder / "meta.json").read_text())["gradients"]
    assert loss.item() == pytest.approx(facts["loss_with_l2wrap_value"], abs=1e-9)
    checked = 0
    for key, parameter in model.named_parameters():
        if f"grad_l2wrap.{key}" in reference:
            expected = reference[f"grad_l2wrap.{key}"].double()
            assert (parameter.grad - expected).abs().max() <= 1e-6 * expected.abs().max(), key
            checked += 1
    assert checked >= 4


def test_the_logit_penalty_scales_with_the_loss():
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (2, 3))
    (whole,) = torch.autograd.grad(language_model_loss(logits, targets), logits)
    (half,) = torch.autograd.grad(language_model_loss(logits, targets) / 2, logits)
    torch.testing.assert_close(half * 2, whole)


def test_overrides_and_errors_of_the_configuration(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[data]\ntrain = ["x.txt"]\n[optim]\nlr = 1e-3\n')
    config = read_config(path, ["optim.lr=2e-3", "run.out=somewhere", "model.n_layer=3", 'data.train=["y.txt"]'])
    assert (config.optim.lr, config.run.out, config.model.n_layer, config.data.train) == (
        2e-3,
        "somewhere",
        3,
        ("y.txt",),
    )
    assert config.data.root == str(tmp_path)
    assert config.steps == math.ceil(1_000_000 / (16 * 256))
    for override, message in [
        ("optim.lrr=1", "unknown setting optim.lrr"),
        ("optim.lr=fast", "expected float, found 'fast'"),
        ("optimizer.lr=1", "unknown setting optimizer; there are data, model"),
        ("lr=1", r"expected section\.key=value"),
        ("model.version=8", r"model\.version = '8' is out of range; expected 4, .* 7, transformer, lstm or gru"),
        ("run.precision=fp8", r"run\.precision = 'fp8' is out of range; expected auto, float32 or bfloat16"),
        ('model.without=["x"]', r"model\.without = \('x',\) is out of range; expected small-embedding, "),
        ("run.keep_best=held", r"run\.keep_best = 'held' must be a name in data\.valid; there is none"),
        ("run.early_stop=2", r"run\.early_stop looks at validation texts"),
        ("model.n_layer=true", "expected int, found True"),
        ("run.batch_size=0", r"run\.batch_size = 0 is out of range"),
        ("run.log_every=0", r"run\.log_every = 0 is out of range"),
        ("model.head_size=0", r"model\.head_size = 0 is out of range"),
        ("optim.beta1=2", r"optim\.beta1 = 2\.0 is out of range"),
        ("run.seed=-1", r"run\.seed = -1 is out of range"),
        ("run.seed=20_000_000_000_000", r"run\.seed = 20000000000000 is out of range"),
        ("data.weights=[inf]", r"data\.weights = \(inf,\) is out of range"),
        ("data.separator=", r"data\.separator = '' is out of range"),
        ("data.valid.train=y.txt", "'train' cannot be the name of a validation text"),
        ("data.valid.train-1=y.txt", "'train-1' cannot be the name of a validation text"),
        ("data.valid=y.txt", r"data\.valid: expected a table, as in \{name = \"x\"\}, found 'y\.txt'"),
        ("data.repeat=[0]", r"data\.repeat = \(0,\) is out of range"),
        ("data.train=[]", "nothing to train on"),
        ("data.train=y.txt", r"data\.train: expected a list, as in \[\"x\"\], found 'y\.txt'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_config(path, [override])
    path.write_text('[data]\ntrain = ["x.txt"]\nvalid = {"../held" = "y.txt"}')
    with pytest.raises(ConfigError, match=r"'\.\./held' cannot be the name"):
        read_config(path)
    path.write_text("[data\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_config(path)


def test_wsd_is_stable_and_then_decays_in_either_shape():
    rates = {
        shape: [
            learning_rate(
                s, 100, lr=1.0, lr_final=0.1, warmup_steps=10, kind="wsd", decay_fraction=0.2, decay_shape=shape
            )
            for s in range(101)
        ]
        for shape in ("linear", "1-sqrt")
    }
    for values in rates.values():
        assert values[0] == pytest.approx(0.01)
        assert values[10:81] == [1.0] * 71
        assert values[80:] == sorted(values[80:], reverse=True)
        assert values[100] == pytest.approx(0.1)
    assert rates["linear"][90] == pytest.approx(0.55)
    assert rates["1-sqrt"][85] == pytest.approx(0.55)  # half of the fall after a quarter of the way


def test_every_range_of_the_new_settings_is_checked(tmp_path):
    for override in (
        "optim.optimizer=sgd", "optim.schedule=warmup", "optim.decay_fraction=1.5", "optim.decay_shape=cosine",
        "optim.weight_decay_final=0", "optim.muon_momentum=1", "optim.ema=1", "optim.loss_spike=0.5",
        "optim.grad_spike=1", "optim.max_skips=0", "optim.lr=inf", "optim.lr=nan", "run.cuda_graph=yes",
        "run.early_stop=-1", "run.wandb_mode=off",
    ):  # fmt: skip
        name = override.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"{name} = .* is out of range"):
            read_config(None, ['data.train=["x.txt"]', override])


def test_the_documentation_names_every_setting_that_may_change_between_attempts():
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    sentence = text.split("These may change between attempts:")[1].split("and all of")[0]
    fixed = set(fixed_settings())
    free = {key for section, values in asdict(TrainConfig()).items() for key in values if (section, key) not in fixed}
    parallel = set(asdict(TrainConfig())["parallel"])
    assert parallel < free
    assert set(re.findall(r"`(\w+)`", sentence)) == free - parallel
