"""Initial values and optimiser groups against what the reference trainers build."""

import json

import pytest
import torch
from safetensors.torch import load_file

from receptance.models import VERSIONS, apply_recipe

VERSION_OF = {"v4": "4", "v5.0": "5.0", "v5.1": "5.1", "v5.2": "5.2", "v6": "6", "v7": "7"}


@pytest.fixture(scope="module")
def reference(shared):
    misc = shared / "oracles" / "misc"
    facts = json.loads((misc / "init_and_optimizer.json").read_text())
    return facts, load_file(misc / "init_deterministic.safetensors")


def build(reference, name: str):
    shapes = {key: tuple(shape) for key, shape in reference[0]["versions"][name]["shapes"].items()}
    cls = VERSIONS[VERSION_OF[name]]
    model = cls(cls.Config.from_shapes(shapes))
    assert {key: tuple(x.shape) for key, x in model.state_dict().items()} == shapes
    recipe = cls.recipe(model.config, lr=6e-4)
    apply_recipe(model, recipe, torch.Generator().manual_seed(0))
    return model, recipe


@pytest.mark.parametrize("name", VERSION_OF)
def test_initial_tensors_match_the_reference(reference, name):
    """Deterministic ones to float32 rounding; random ones in kind, bound, spread and singular values."""
    model, _ = build(reference, name)
    facts, values = reference[0]["versions"][name]["random_tensors"], reference[1]
    for key, tensor in model.state_dict().items():
        if f"{name}.{key}" in values:
            torch.testing.assert_close(tensor, values[f"{name}.{key}"], rtol=1e-5, atol=4e-7)
            continue
        fact = facts[key]
        if fact["kind"] == "zeros":
            assert not tensor.any(), key
        elif fact["kind"] == "uniform":
            assert tensor.abs().max() == pytest.approx(fact["max_abs"], rel=0.01), key
            assert tensor.std() == pytest.approx(fact["std"], rel=0.03), key
        else:
            assert fact["kind"] == "orthogonal"
            singular = torch.linalg.svdvals(tensor.double())
            assert singular.min() == pytest.approx(fact["singular_min"], rel=1e-5), key
            assert singular.max() == pytest.approx(fact["singular_max"], rel=1e-5), key


@pytest.mark.parametrize("name", VERSION_OF)
def test_current_shapes_match_the_reference(reference, name):
    shapes = {key: tuple(shape) for key, shape in reference[0]["versions"][name]["shapes"].items()}
    cls = VERSIONS[VERSION_OF[name]]
    read = cls.Config.from_shapes(shapes)
    arguments = {"vocab_size": 300, "n_layer": 4, "n_embd": 128}
    if name != "v4":
        arguments["head_size"] = read.head_size
    if name.startswith("v5"):
        arguments["version"] = VERSION_OF[name]
    made = cls.Config.make(**arguments)
    if name in ("v5.0",):
        made = made.__class__(**{**made.__dict__, "dim_ffn": read.dim_ffn})  # the reference file was made at 3.5 C
    assert made == read


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", VERSION_OF)
def test_recipe_groups_match_the_reference(reference, name, stage):
    trainer = "v7_v5repo" if name == "v7" and stage == 2 else name  # v7's own trainer has no second stage
    groups = reference[0]["versions"][trainer]["optimizer_groups"][f"weight_decay=0.1,stage={stage}"]
    _, recipe = build(reference, name)
    seen = set()
    for group in groups["groups"]:
        for key in group["params"]:
            rule = recipe[key]
            assert (rule.lr_stage2 if stage == 2 else rule.lr) == group["lr_scale"], key
            assert (0.1 if rule.decay else 0.0) == group["weight_decay"], key
            seen.add(key)
    assert seen == set(recipe)
