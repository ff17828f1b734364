"""Prompts padded to a few lengths, and the graphs that read them."""

import pytest
import torch
from tests.engine.gpu.test_model import BOUND, DEVICE, OLDER, check_prefill, check_state, error, make, older, put, start

from receptance.engine.gpu.model import GpuModel
from receptance.engine.gpu.prompts import Prompts, padded
from receptance.ops.products import has_kernel

pytestmark = pytest.mark.usefixtures("kernels")


def test_prompts_are_padded_to_one_of_a_few_lengths():
    assert [padded(x) for x in (1, 8, 9, 255, 257, 512, 513)] == [8, 8, 16, 256, 512, 512, 768]


@pytest.mark.parametrize("version", ["7", *OLDER])
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_padding_behind_a_prompt_changes_nothing(version, tokens):
    model = make() if version == "7" else older(version)
    state = start(model, 1)
    fast = GpuModel(model, slots=2, most_rows=8)
    ids = torch.arange(tokens, device=DEVICE) * 11 % 96
    expected, after = model.forward(ids[None], state)
    for x in fast.state.values():
        x.fill_(torch.nan)
    prompts = Prompts(fast, 8, 1, 8, True)
    for _ in range(2):  # what the first leaves behind does not matter
        put(fast, [1], state)
        prompts.put(ids, [tokens], [1])
        with torch.inference_mode():
            all_logits = prompts.run(True)[:tokens]
        check_state(fast, [1], after)
        assert error(all_logits, expected[0]) < BOUND
    put(fast, [1], state)
    with torch.inference_mode():
        assert error(prompts.run(False), expected[:, -1]) < BOUND
    assert all(x[:, 0].isnan().all() for x in fast.state.values())


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["7", "6", "5.2", "4"])
@pytest.mark.parametrize("all_logits", [False, True])
def test_graphs_give_the_bits_of_kernels_one_by_one(version, all_logits):
    model = make() if version == "7" else older(version)
    fast = GpuModel(model, slots=3, most_rows=8)
    results: dict[tuple[int, int], list[torch.Tensor]] = {}
    for _ in range(3):  # by kernels, by a graph that is captured, by the graph
        for slot, tokens in enumerate((20, 700, 31)):
            ids = torch.arange(tokens, device=DEVICE) * (slot + 3) % 96
            put(fast, [slot], start(model, 1))
            logits = fast.prefill(ids, [0, tokens], [slot], all_logits=all_logits)
            assert len(logits) == (tokens if all_logits else 1)
            results.setdefault((slot, tokens), []).append(logits)
            states = torch.cat([x[:, slot].double().flatten() for x in fast.state.values()])
            results[slot, tokens].append(states)
    for found in results.values():
        for turn in (1, 2):
            assert torch.equal(found[0], found[2 * turn])
            assert torch.equal(found[1], found[2 * turn + 1])
    assert len(fast.reader._graphs) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[300], [130, 7, 64]])
def test_squares_are_made_within_the_product_of_many_tokens(lengths, monkeypatch):
    monkeypatch.setattr("receptance.engine.gpu.prompts.SQUARED_WAVES", 0)
    monkeypatch.setattr("receptance.engine.gpu.prompts.SLOW_SQUARED_WAVES", 0)
    model = make()
    x = torch.zeros(8, 128, dtype=torch.float16, device=DEVICE)
    if not has_kernel(x, model.blocks[0].ffn.key.weight, waves=0):
        pytest.skip("needs compute capability 9.0 and Triton")
    check_prefill(model, lengths)
