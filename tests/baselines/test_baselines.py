"""The models that RWKV is compared with: right by somebody else's code, and by their own slow form."""

import json

import pytest
import torch
from torch.testing import assert_close

import receptance as rc
from receptance.baselines import RNN, RNNConfig, Transformer, TransformerConfig
from receptance.baselines.budget import count
from receptance.errors import CheckpointError, ConfigError
from receptance.models import RWKV, apply_recipe
from receptance.training import read_config, train
from receptance.training.loop import new_model
from receptance.training.report import Silent

VOCAB = 50


def build(kind: str) -> RWKV:
    torch.manual_seed(0)
    if kind in ("lstm", "gru"):
        model: RWKV = RNN(RNNConfig.make(VOCAB, 2, 24, kind))
    else:
        kv, window = (2, 0) if kind == "gqa" else (0, 5 if kind == "window" else 0)
        config = TransformerConfig(VOCAB, 2, 32, 48, 8, kv, window, token_shift=kind == "shift")
        model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.4)
    return model.double().eval()


KINDS = ["transformer", "gqa", "window", "shift", "lstm", "gru"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["transformer", "gqa"])
def test_the_transformer_equals_llama_of_transformers(kind):
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = build(kind)
    c = ours.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=c.n_embd, intermediate_size=c.dim_ffn, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv, rms_norm_eps=1e-5, tie_word_embeddings=False,
        )
    ).double().eval()  # fmt: skip
    names = {
        "emb": "model.embed_tokens", "ln_out": "model.norm", "head": "lm_head", "att.query": "self_attn.q_proj",
        "att.key": "self_attn.k_proj", "att.value": "self_attn.v_proj", "att.output": "self_attn.o_proj",
        "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj", "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm", "blocks": "model.layers",
    }  # fmt: skip
    copied = {}
    for name, x in ours.state_dict().items():
        for a, b in names.items():
            name = name.replace(f"{a}.", f"{b}.")
        copied[name] = x
    theirs.load_state_dict(copied)
    inputs = tokens(2, 33)
    # their cosines are made in float32
    assert_close(ours(inputs)[0], theirs(inputs).logits, rtol=1e-5, atol=1e-5)


@every_kind
def test_token_by_token_equals_all_at_once(kind):
    model, inputs = build(kind), tokens(2, 13)
    whole, end = model(inputs)
    state, parts = None, []
    for part in inputs.split([1, 1, 5, 1, 1, 4], 1):
        logits, state = model(part, state)
        parts.append(logits)
    assert_close(torch.cat(parts, 1), whole)
    if kind == "window":
        assert state["keys"].shape[3] == 5
    assert all(torch.allclose(state[name], end[name]) for name in end)


@every_kind
def test_a_document_sees_nothing_before_it(kind):
    model, inputs = build(kind), tokens(2, 12)
    resets = torch.zeros(2, 12, dtype=torch.bool)
    resets[0, 5] = resets[1, 3] = resets[1, 8] = True
    _, state = model(tokens(2, 4))
    logits, after = model(inputs, state, resets=resets)
    assert_close(logits[0, 5:], model(inputs[0, 5:])[0])
    assert_close(logits[1, 3:8], model(inputs[1, 3:8])[0])
    assert_close(logits[1, 8:], model(inputs[1, 8:])[0])
    assert_close(logits[0, :5], model(inputs[0, :5], state.select(0))[0])
    more = tokens(2, 3)
    assert_close(model(more, after)[0][1], model(torch.cat([inputs[1, 8:], more[1]]))[0][4:])


@pytest.mark.parametrize("kind", ["transformer", "window", "shift", "lstm", "gru"])
def test_padded_rows_equal_rows_alone(kind):
    model, inputs = build(kind), tokens(3, 9)
    lengths = torch.tensor([4, 9, 0])
    logits, after = model(inputs, lengths=lengths)
    assert_close(logits[0, :4], model(inputs[0, :4])[0])
    more = tokens(3, 6)
    again, _ = model(more, after, lengths=torch.tensor([6, 2, 6]))
    assert_close(again[0], model(torch.cat([inputs[0, :4], more[0]]))[0][4:])
    assert_close(again[1, :2], model(torch.cat([inputs[1], more[1, :2]]))[0][9:])
    assert_close(again[2], model(more[2])[0])


def test_a_window_hides_what_is_further_back():
    model, inputs = build("window"), tokens(1, 30)
    other = inputs.clone()
    other[0, 0] = (other[0, 0] + 1) % VOCAB
    a, b = model(inputs)[0][0], model(other)[0][0]
    assert not torch.allclose(a[4], b[4])
    assert_close(a[9:], b[9:])  # two layers see 2 · 4 tokens back


@every_kind
def test_gradients_reach_every_parameter(kind):
    model = build(kind)
    loss, _ = model.loss(tokens(2, 12), tokens(2, 12))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7", "transformer", "lstm", "gru"])
def test_a_budget_of_parameters_is_met_within_two_percent(version):
    config = read_config(None, [f"model.version={version}", "model.parameters=3_000_000", 'data.train=["x.txt"]'])
    size = count(new_model(config, 256, "meta"))
    assert abs(size - 3_000_000) <= 0.02 * 3_000_000


def test_a_budget_that_cannot_be_met_is_refused():
    config = read_config(None, ["model.version=lstm", "model.parameters=20", 'data.train=["x.txt"]'])
    with pytest.raises(ConfigError, match="within 2 %"):
        new_model(config, 256, "meta")


@pytest.mark.parametrize("version", ["transformer", "lstm", "gru"])
def test_the_recipe_covers_every_parameter(version):
    config = read_config(None, [f"model.version={version}", 'data.train=["x.txt"]'])
    model = new_model(config, 64)
    apply_recipe(model, type(model).recipe(model.config))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_the_trainer_trains_it_and_the_folder_loads(kind, tmp_path):
    text = "\n".join(f"{i} plus {j} is {i + j}." for i in range(30) for j in range(30))
    (tmp_path / "text.txt").write_text(text)
    config = read_config(None, [
        f'data.train=["{tmp_path}/text.txt"]', f'data.valid={{held="{tmp_path}/text.txt"}}', "data.tokenizer=byte",
        f"model.version={kind}", "model.n_layer=1", "model.n_embd=32", "model.head_size=16", "run.ctx_len=32",
        "run.batch_size=8", "run.tokens=10240", "run.log_every=40", "optim.lr=1e-2", f"run.out={tmp_path}/run",
        "run.device=cpu", "run.valid_tokens=2000", "data.packing=resets", "optim.dropout=0.1",
    ])  # fmt: skip
    folder = train(config, Silent())
    report = json.loads((folder / "training.json").read_text())
    assert report["validation"]["held"]["bits_per_byte"] < 4.5  # 8 at first
    model, tok = rc.load(folder), rc.tokenizer(folder)
    assert model.config.version == kind
    assert "".join(rc.generate(model, tok, "1 plus", max_tokens=5, temperature=0))
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no intact baseline"):
        rc.load(folder)
