"""Looking inside: every number against the operators' own results, in float64."""

import json
from functools import partial

import pytest
import torch

from receptance.errors import ConfigError
from receptance.inspection import attribution, measures
from receptance.inspection.attribution import attribute, distance, reads
from receptance.inspection.record import record
from receptance.inspection.report import Fact, positions, write_report
from receptance.inspection.trace import trace
from receptance.models import RWKV, VERSIONS
from receptance.models.v4 import RWKV4, RWKV4Config
from receptance.tokenizers import tokenizer

TOKENS = [3, 17, 8, 8, 39, 0, 21, 5, 30, 17, 11, 2]
MATRIX = [version for version in VERSIONS if version != "4"]


def build(version: str, vocab_size: int = 40) -> RWKV:
    sizes = {} if version == "4" else {"head_size": 8}
    named = {"version": version} if version.startswith("5") else {}
    config = VERSIONS[version].Config.make(vocab_size=vocab_size, n_layer=3, n_embd=16, **sizes, **named)
    model: RWKV = VERSIONS[version](config, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return model


@pytest.mark.parametrize("version", VERSIONS)
def test_a_recording_has_the_models_own_logits(version):
    model = build(version)
    logits, _ = model.forward(TOKENS)
    recording = record(model, TOKENS)
    assert torch.allclose(recording.logits, logits, rtol=0, atol=1e-10)
    stream = recording.embedded
    for layer in recording.layers:
        stream = stream + layer.att + layer.ffn
        assert torch.allclose(stream, layer.out, rtol=0, atol=1e-10)


@pytest.mark.parametrize("version", VERSIONS)
def test_attributions_add_up_to_the_logit(version):
    recording = record(build(version), TOKENS)
    found = attribute(recording)
    logits = recording.logits - recording.logits.mean(-1, keepdim=True)
    wanted = logits.gather(-1, found.targets[:, None])[:, 0]
    assert found.targets[:-1].tolist() == TOKENS[1:]
    assert (found.total - wanted).abs().max() < 1e-10 * wanted.abs().max()
    assert torch.equal(found.past, found.past * torch.ones_like(found.past[:, 0]).tril()[:, None])  # none from later


def test_attributions_add_up_with_a_channel_mix_first():
    model = RWKV4(RWKV4Config(40, 2, 16, 16, 64, pre_ffn=True), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    recording = record(model, TOKENS)
    found = attribute(recording)
    logits = recording.logits - recording.logits.mean(-1, keepdim=True)
    assert torch.allclose(found.total, logits.gather(-1, found.targets[:, None])[:, 0], rtol=0, atol=1e-10)
    assert torch.all(found.past[:, 0] == 0)


@pytest.mark.parametrize("version", MATRIX)
def test_what_heads_read_is_the_sum_of_what_tokens_wrote(version):
    for layer in record(build(version), TOKENS).layers:
        coefficients, _ = reads(layer)
        again = torch.einsum("thi,ihn->thn", coefficients, layer.inputs["v"])
        assert torch.allclose(again, layer.read, rtol=0, atol=1e-10)  # the start state is empty


@pytest.mark.parametrize("version", VERSIONS)
def test_the_state_that_is_measured_is_the_models(version):
    model = build(version)
    _, state = model.forward(TOKENS)
    for i, layer in enumerate(record(model, TOKENS).layers):
        found = measures.held(layer, most=4)
        assert found.positions[-1] == len(TOKENS) - 1
        if version == "4":
            wanted = (state["num"][i, 0] / state["den"][i, 0]).norm()[None]
        else:
            wanted = state["wkv"][i, 0].norm(dim=(-1, -2))
            assert torch.all((found.rank >= 1) & (found.rank <= 8))
        assert torch.allclose(found.norm[-1], wanted, rtol=1e-9)


def test_reach_is_the_distance_of_what_is_read():
    """One head reads its own token alone, the other always the token two before, of twice the size at the end."""
    coefficients = torch.zeros(6, 2, 6)
    for t in range(6):
        coefficients[t, 0, t] = -3
        if t >= 2:
            coefficients[t, 1, t - 2] = 1
    assert distance(coefficients, torch.ones(6, 2, 4)).tolist() == [0, 2]
    coefficients[5, 1, 5], coefficients[5, 1, 3] = 1, 0  # three reads from two before, one of its own
    values = torch.ones(6, 2, 4)
    values[5] = 3  # which counts three times
    assert distance(coefficients, values)[1] == pytest.approx(3 * 2 / (3 + 3))


def test_everything_is_measured_once(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    counts: dict[str, int] = {}

    def counted(name, made, *given):
        counts[name] = counts.get(name, 0) + 1
        return made(*given)

    for module, name in ((attribution, "reads"), (measures, "held"), (measures, "strengths"), (measures, "logit_lens")):
        monkeypatch.setattr(module, name, partial(counted, name, getattr(module, name)))
    model = build("7", 257).float()
    write_report(model, tokenizer("byte"), "a fox", tmp_path, "model")
    assert counts == {"reads": 3, "held": 3, "strengths": 3, "logit_lens": 1}  # three layers


def test_a_state_of_one_write_has_rank_one():
    layer = record(build("7"), TOKENS[:1]).layers[0]
    assert torch.allclose(measures.held(layer).rank, torch.ones(1, 2, dtype=torch.float64), atol=1e-6)


def test_half_lives_follow_from_decays():
    layer = record(build("4"), TOKENS).layers[0]
    lives = measures.half_life(layer)
    assert torch.allclose((lives * measures.log_decay(layer)).exp(), torch.full_like(lives, 0.5))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_last_layer_of_the_lens_is_the_model(version):
    recording = record(build(version), TOKENS)
    lens = measures.logit_lens(recording)
    assert torch.equal(lens.tokens[-1], recording.logits.argmax(-1))
    assert torch.allclose(lens.final[-1], recording.logits.softmax(-1).max(-1).values)


@pytest.mark.parametrize("version", VERSIONS)
def test_removed_is_what_the_key_loses(version):
    """Of RWKV-7: reading the state with the erased key before and after the erasing; decays lie in (0, 1)."""
    layer = record(build(version), TOKENS).layers[1]
    written, removed = measures.strengths(layer)
    assert torch.all(written >= 0)
    assert torch.all(removed >= 0)
    assert torch.all(removed <= 1)
    if version == "7":
        a, b = layer.inputs["a"][4, 0], layer.inputs["b"][4, 0]
        state = torch.outer(torch.arange(8.0, dtype=torch.float64), -a)  # holds a value under the key kk = -a
        after = state + torch.outer(state @ a, b)
        assert torch.allclose(after @ -a, (state @ -a) * (1 - removed[4, 0]))


@pytest.mark.parametrize("version", VERSIONS)
def test_tracing_puts_things_back(version):
    """The last layer's vector at the last position is the answer's; a state with no noise before it changes nothing."""
    model = build(version)
    found = trace(model, TOKENS[:8], TOKENS[8:9], range(3, 5), samples=2)
    logs = model.forward(TOKENS[:8], last_only=True)[0].detach().log_softmax(-1)
    assert found.clean == pytest.approx(float(logs[TOKENS[8]]), abs=1e-6)
    assert found.corrupted != pytest.approx(found.clean, abs=1e-3)
    assert float(found.hidden[-1, -1]) == pytest.approx(found.clean, abs=1e-5)
    assert torch.all(found.hidden[:, :3] == found.corrupted)
    assert torch.all(found.memory[:, :3] == found.corrupted)
    assert float((found.hidden[-1, :-1] - found.corrupted).abs().max()) < 1e-5  # nothing reads the last layer's past
    assert found.memory.shape == (3, 7)
    assert not model.emb._forward_hooks
    assert not model.blocks[0]._forward_hooks


def by_hand(model, prompt, answer, subject, noise, what=None, layer=0, place=0):
    """Log-probability of the answer with noise on the subject, and one vector put back, in whole passes; no states."""
    tokens = [*prompt, *answer][:-1]
    x = model.emb(torch.tensor([tokens]))
    noisy = x.clone()
    noisy[0, subject.start : subject.stop] += noise
    kept = []
    hooks = [block.register_forward_hook(lambda _, __, out: kept.append(out[0].clone())) for block in model.blocks]
    model.sequence(x)
    for hook in hooks:
        hook.remove()

    def put(_, __, out):
        changed = out[0].clone()
        changed[0, place] = kept[layer][0, place]
        return changed, *out[1:]

    hook = model.blocks[layer].register_forward_hook(put) if what == "vector" else None
    logs = model.head(model.sequence(noisy)[0])[0].log_softmax(-1)[len(prompt) - 1 :]
    if hook is not None:
        hook.remove()
    return float(logs[torch.arange(len(answer)), torch.tensor(answer)].sum())


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_every_vector_that_is_put_back_has_the_effect_of_a_whole_pass(version):
    model, prompt, answer, subject = build(version), TOKENS[:7], TOKENS[7:9], range(2, 4)
    spread = model.emb(torch.tensor(prompt)).std()
    g = torch.Generator().manual_seed(5)
    noise = 3.0 * spread * torch.randn(2, 16, generator=g).double()
    found = trace(model, prompt, answer, subject, samples=1, seed=5)
    assert found.corrupted == pytest.approx(by_hand(model, prompt, answer, subject, noise), abs=1e-5)
    for layer in range(3):
        for place in range(2, 7):
            wanted = by_hand(model, prompt, answer, subject, noise, "vector", layer, place)
            assert float(found.hidden[layer, place]) == pytest.approx(wanted, abs=1e-5)
            if place < 6:
                wanted = with_memory(model, prompt, answer, subject, noise, layer, place)
                assert float(found.memory[layer, place]) == pytest.approx(wanted, abs=1e-5)


def with_memory(model, prompt, answer, subject, noise, layer, place):
    """The same with one layer's state after `place` put back."""
    x = model.emb(torch.tensor([[*prompt, *answer][:-1]]))
    noisy = x.clone()
    noisy[0, subject.start : subject.stop] += noise
    clean, state = (model.sequence(row[:, : place + 1])[1] for row in (x, noisy))
    for name in state:
        state[name][layer] = clean[name][layer]
    y, _ = model.sequence(noisy[:, place + 1 :], state)
    logs = model.head(y)[0].log_softmax(-1)[-len(answer) :]
    return float(logs[torch.arange(len(answer)), torch.tensor(answer)].sum())


def test_a_report_is_pictures_numbers_and_one_page_without_a_network(tmp_path):
    pytest.importorskip("matplotlib")
    model, tok = build("7", 257).float(), tokenizer("byte")
    files = write_report(model, tok, "a </script> fox ", tmp_path / "out", "model", Fact("fox", "!"))
    assert {file.name for file in files} >= {"report.html", "report.json", "decay.png", "trace.png", "attribution.png"}
    assert all(file.stat().st_size > 500 for file in files)
    page = files[0].read_text()
    assert page.count("</script>") == 1
    assert "http://www.w3.org/2000/svg" in page
    assert "src=" not in page
    assert "href=" not in page
    assert "@import" not in page
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(numbers["layers"]) == 3
    assert len(numbers["tokens"]) == 16


def test_the_tokens_of_a_subject_are_found():
    tok = tokenizer("byte")
    text = "größe of it"
    assert positions(tok, text, tok.encode(text), "of") == range(8, 10)
    with pytest.raises(ConfigError, match="does not stand"):
        positions(tok, text, tok.encode(text), "if")


def test_bad_texts_are_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="2 to 512 tokens"):
        write_report(build("7", 257), tokenizer("byte"), "x", tmp_path, "model")
    with pytest.raises(ValueError, match="at least one token"):
        record(build("7"), [])
