"""The step in one launch against the separate kernels, whose bits it gives."""

import pytest
import torch
from tests.engine.gpu.test_model import DEVICE, make, older, put, start

from receptance.engine.gpu import model as gpu
from receptance.engine.gpu.model import GpuModel

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize(
    ("version", "head", "batch", "options"),
    [
        ("7", 64, 1, {}),
        ("7", 64, 3, {"state_dtype": torch.float16}),
        ("7", 128, 2, {"dtype": torch.bfloat16}),
        ("7", 32, 5, {}),
        ("6", 64, 3, {}),
        ("6", 32, 1, {"state_dtype": torch.float16}),
        ("5.2", 64, 2, {}),
        ("5.0", 64, 1, {}),
        ("4", 64, 3, {}),
    ],
)
def test_one_launch_gives_the_bits_of_many(version, head, batch, options, monkeypatch):
    model = make(head) if version == "7" else older(version, head)
    state = start(model, batch)
    slots = torch.arange(batch, dtype=torch.int32, device=DEVICE).flip(0)
    results = []
    for rows in 8, 0:
        monkeypatch.setattr(gpu, "CHAIN_ROWS", rows)
        fast = GpuModel(model, slots=batch + 2, most_rows=9, **options)
        for x in fast.state.values():
            x.fill_(torch.nan)
        put(fast, slots.tolist(), state)
        for i in range(2):
            logits = fast.decode((torch.arange(batch, device=DEVICE) * 7 + i) % 96, slots).clone()
        assert all(x[:, batch:].isnan().all() for x in fast.state.values())
        results.append([logits, *(x[:, :batch] for x in fast.state.values())])
    for one, other in zip(*results):
        assert torch.equal(one, other)
