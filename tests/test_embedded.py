"""The model inside the package: found by name, of the promised size, and able to write."""

import receptance as rc
from receptance.embedded import ASSETS, embedded_models


def test_it_loads_by_name_and_writes_words():
    assert embedded_models() == ["rwkv7-stories"]
    model, tok = rc.load("rwkv7-stories", dtype="float32"), rc.tokenizer("rwkv7-stories")
    assert model.config.version == "7"
    assert model.config.vocab_size == tok.vocab_size
    text = "".join(rc.generate(model, tok, "Once upon a time, there was a", max_tokens=40, temperature=0))
    words = text.split()
    assert len(words) > 10
    common = {"the", "a", "and", "to", "was", "he", "she", "it", "in", "of", "who", "named", "had", "his", "her"}
    assert len(common & set(words)) >= 4


def test_it_predicts_held_out_sentences_far_better_than_chance():
    """Two bits per byte on plain story text; a uniform guess over its ids costs about 3.4."""
    from receptance.training.loss import language_model_loss

    model, tok = rc.load("rwkv7-stories", dtype="float32"), rc.tokenizer("rwkv7-stories")
    text = "The boy ran to the door and opened it. His mother was standing in the garden with a basket of apples."
    ids = [tok.eos_id, *tok.encode(text)]
    import torch

    tokens = torch.tensor([ids])
    logits, _ = model.forward(tokens[:, :-1])
    nats = language_model_loss(logits, tokens[:, 1:], 0).item() * (len(ids) - 1)
    assert nats / 0.6931 / len(text) < 1.6


def test_each_stored_model_stays_within_sixteen_megabytes():
    for weights in ASSETS.glob("*/model.safetensors"):
        assert weights.stat().st_size <= 16_000_000
