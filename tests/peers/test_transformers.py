"""Hugging Face's RwkvForCausalLM, the independent RWKV-4, on our export."""

from pathlib import Path

import pytest
import torch

import receptance
from receptance.models import RWKV4, RWKV4Config, apply_recipe

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> RWKV4:
    """By the recipe, plus noise: the recipe's zeros would hide whole branches."""
    config = RWKV4Config.make(vocab_size=61, n_layer=8, n_embd=64)
    model = RWKV4(config)
    generator = torch.Generator().manual_seed(1)
    apply_recipe(model, RWKV4.recipe(config), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@torch.no_grad()
def test_transformers_gives_our_logits_and_continues_our_state(tmp_path: Path, model: RWKV4) -> None:
    transformers = pytest.importorskip("transformers")
    receptance.save(model, tmp_path, format="hf")
    config = transformers.RwkvConfig.from_pretrained(tmp_path, rescale_every=0)
    theirs = transformers.RwkvForCausalLM.from_pretrained(tmp_path, config=config).eval()
    assert theirs.config.rescale_every == 0

    tokens = torch.randint(61, (40,), generator=torch.Generator().manual_seed(3))
    logits, end = model.forward(tokens)
    assert logits.std() > 0.3
    out = theirs(tokens[None], use_cache=True)
    torch.testing.assert_close(logits, out.logits[0], rtol=TOLERANCE, atol=TOLERANCE)

    # its state: ffn_shift, att_shift, num, den, exp, each [B, C, L]
    ffn_shift, att_shift, num, den, exp = (part[0].mT[:, None] for part in out.state)
    torch.testing.assert_close(end["ffn_shift"], ffn_shift, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(end["att_shift"], att_shift, rtol=TOLERANCE, atol=TOLERANCE)
    scale = (end["exp"] - exp).exp()
    torch.testing.assert_close(end["num"] * scale, num, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(end["den"] * scale, den, rtol=TOLERANCE, atol=TOLERANCE)

    _, state = model.forward(tokens[:17])
    handed = [state[name][:, 0].mT[None].contiguous() for name in ("ffn_shift", "att_shift", "num", "den", "exp")]
    step = theirs(tokens[None, 17:], state=handed, use_cache=True).logits[0]
    torch.testing.assert_close(step, logits[17:], rtol=TOLERANCE, atol=TOLERANCE)
