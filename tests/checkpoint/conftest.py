import pytest
import torch
from checkpoint_helpers import tiny_weights


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """The state dict of a tiny RWKV-7, free to be changed."""
    return tiny_weights()
