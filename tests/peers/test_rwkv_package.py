"""Ours and the `rwkv` package on the same .pth file: logits, states, and states handed over in both directions."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rwkv_package import Package, Parts
from torch import Tensor

import receptance
from receptance.models import RWKV, VERSIONS, State, apply_recipe

pytestmark = pytest.mark.skipif(importlib.util.find_spec("rwkv") is None, reason="the rwkv package is not installed")

TOLERANCE = 1e-4
VOCAB, LAYERS, WIDTH, HEAD_SIZE = 61, 3, 64, 16
SLOW = pytest.mark.slow  # seconds for each: an interpreter and the package's imports
VERSION_PARAMS = ["4", pytest.param("5.0", marks=SLOW), pytest.param("5.1", marks=SLOW), "5.2", "6", "7"]
TOKENS: list[int] = torch.randint(VOCAB, (45,), generator=torch.Generator().manual_seed(3)).tolist()


@torch.no_grad()
def lively_model(version: str) -> RWKV:
    """By the recipe, plus noise: the recipe's zeros would hide whole branches."""
    cls = VERSIONS[version]
    sizes: dict[str, object] = {"vocab_size": VOCAB, "n_layer": LAYERS, "n_embd": WIDTH}
    if version != "4":
        sizes["head_size"] = HEAD_SIZE
    if version.startswith("5"):
        sizes["version"] = version
    config = cls.Config.make(**sizes)  # type: ignore[arg-type]
    model: RWKV = cls(config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    apply_recipe(model, cls.recipe(config), generator)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@dataclass
class Pair:
    version: str
    ours: RWKV
    package: Package

    @torch.no_grad()
    def run_ours(self, tokens: list[int], state: State | None = None) -> tuple[Tensor, State]:
        return self.ours.forward(tokens, state)

    def to_package(self, state: State) -> Parts:
        """A flat list, layer by layer: RWKV-4 att_shift, num, den, exp, ffn_shift; 5 to 7 att_shift, wkv, ffn_shift.

        The matrix is key × value for RWKV-5 and 6, value × key (as ours) for RWKV-7.
        """
        names = ["num", "den", "exp"] if self.version == "4" else ["wkv"]
        parts = []
        for layer in range(LAYERS):
            for name in ["att_shift", *names, "ffn_shift"]:
                part = state[name][layer, 0]
                parts.append((part.mT if name == "wkv" and self.version != "7" else part).contiguous().numpy())
        return parts

    def from_package(self, parts: Parts) -> State:
        names = ["num", "den", "exp"] if self.version == "4" else ["wkv"]
        names = ["att_shift", *names, "ffn_shift"]
        tensors = {}
        for i, name in enumerate(names):
            stack = torch.from_numpy(np.stack(parts[i :: len(names)]))[:, None]  # [L, 1, …]
            tensors[name] = stack.mT.contiguous() if name == "wkv" and self.version != "7" else stack
        return State(tensors)


@pytest.fixture(scope="module", params=VERSION_PARAMS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path: Path = tmp_path_factory.mktemp("peer") / "model.pth"
    model = lively_model(request.param)
    receptance.save(model, path)
    package = Package(path, request.param)
    yield Pair(request.param, model, package)
    package.close()


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def assert_same_state(found: State, expected: State) -> None:
    """RWKV-4's numerator and denominator count relative to e^exp, which the two may choose differently."""
    assert found.keys() == expected.keys()
    for name in found.keys() - {"exp"}:
        scale = (found["exp"] - expected["exp"]).exp() if name in ("num", "den") else 1.0
        assert_near(found[name] * scale, expected[name])


def test_the_models_are_not_degenerate(pair: Pair) -> None:
    logits, state = pair.run_ours(TOKENS)
    other, _ = pair.run_ours([*TOKENS[:20], (TOKENS[20] + 1) % VOCAB, *TOKENS[21:]])
    assert logits.std() > 0.3
    assert (logits - other)[:20].abs().max() < TOLERANCE
    assert (logits - other)[-1].abs().max() > 100 * TOLERANCE  # 24 tokens later the change is still felt
    for name in state:
        assert (state[name].abs() > 0.01).float().mean() > 0.5, name


@pytest.mark.parametrize("sizes", [[45], [1] * 45, [7, 1, 37]], ids=["whole", "by token", "split"])
def test_logits_and_states_agree(pair: Pair, sizes: list[int]) -> None:
    parts, start, logits = None, 0, []
    for size in sizes:
        out, parts = pair.package.run(TOKENS[start : start + size], parts)
        logits.append(out)
        start += size
    expected, state = pair.run_ours(TOKENS)
    assert_near(expected, torch.cat(logits))
    assert parts is not None
    assert_same_state(state, pair.from_package(parts))


def test_a_text_begun_by_the_package_continues_here_and_ends_there(pair: Pair) -> None:
    whole, end = pair.package.run(TOKENS)
    first, parts = pair.package.run(TOKENS[:13])
    second, state = pair.run_ours(TOKENS[13:29], pair.from_package(parts))
    third, parts = pair.package.run(TOKENS[29:], pair.to_package(state))
    assert_near(torch.cat([first, second, third]), whole)
    assert_same_state(pair.from_package(parts), pair.from_package(end))


def test_a_text_begun_here_continues_in_the_package_and_ends_here(pair: Pair) -> None:
    whole, end = pair.run_ours(TOKENS)
    first, state = pair.run_ours(TOKENS[:13])
    second, parts = pair.package.run(TOKENS[13:29], pair.to_package(state))
    third, state = pair.run_ours(TOKENS[29:], pair.from_package(parts))
    assert_near(torch.cat([first, second, third]), whole)
    assert_same_state(state, end)


def test_the_conversion_of_layouts_is_exact_both_ways(pair: Pair) -> None:
    _, state = pair.run_ours(TOKENS)
    again = pair.from_package(pair.to_package(state))
    assert all(torch.equal(again[name], state[name]) for name in state)
