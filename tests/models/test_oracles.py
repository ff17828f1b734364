"""Every version against independent references: logits, states, gradients; in one piece, by token and split."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from receptance.models import RWKV, VERSIONS, State
from receptance.ops import BACKENDS

MODELS = {"v4_dev": "4", "v50_dev": "5.0", "v51_dev": "5.1", "v52_dev": "5.2", "v6_dev": "6", "v7_dev": "7"}
OP = {"4": "wkv4", "5.0": "wkv6", "5.1": "wkv6", "5.2": "wkv6", "6": "wkv6", "7": "wkv7"}
CASES = [(name, backend) for name, version in MODELS.items() for backend in BACKENDS[OP[version]]]


def build(folder: Path, version: str, dtype: torch.dtype) -> RWKV:
    weights = load_file(folder / "weights.safetensors")
    cls = VERSIONS[version]
    model = cls(cls.Config.from_shapes({name: tuple(x.shape) for name, x in weights.items()}), dtype=dtype)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def reference_state(outputs: dict[str, Tensor], index: int, version: str, n_layer: int) -> dict[str, Tensor]:
    """The reference's flat list, as our named tensors with B = 1."""
    parts = [outputs[f"state_f64_{index}.{j}"] for j in range(n_layer * (5 if version == "4" else 3))]
    per = len(parts) // n_layer
    field = lambda j: torch.stack(parts[j::per])[:, None]
    if version == "4":
        scale = field(3).exp()
        return {"att_shift": field(0), "num": field(1) * scale, "den": field(2) * scale, "ffn_shift": field(4)}
    wkv = field(1) if version == "7" else field(1).mT
    return {"att_shift": field(0), "wkv": wkv, "ffn_shift": field(2)}


def comparable(state: State) -> dict[str, Tensor]:
    fields = dict(state)
    if "exp" in fields:
        scale = fields.pop("exp").exp()
        fields["num"], fields["den"] = fields["num"] * scale, fields["den"] * scale
    return fields


@torch.no_grad()
def run(model: RWKV, tokens: Tensor, sizes: list[int], backend: str) -> tuple[Tensor, State]:
    state, logits = None, []
    for piece in tokens.split(sizes):
        out, state = model.forward(piece, state, backend=backend)
        logits.append(out)
    return torch.cat(logits), state


def pieces(t: int) -> dict[str, list[int]]:
    odd = [1, 3, 16, 5, 2, 9, 4]
    split, left = [], t
    for size in odd:
        if left:
            split.append(min(size, left))
            left -= split[-1]
    return {"whole": [t], "by token": [1] * t, "split": split}


@pytest.mark.parametrize("dtype,tolerance,state_tolerance", [(torch.float64, 1e-8, 1e-8), (torch.float32, 2e-4, 1e-3)])
@pytest.mark.parametrize("name,backend", CASES)
def test_logits_and_states_match(shared, name, backend, dtype, tolerance, state_tolerance):
    folder, version = shared / "oracles" / name, MODELS[name]
    model = build(folder, version, dtype)
    outputs = load_file(folder / "outputs.safetensors")
    for index in range(3):
        tokens, expected = outputs[f"tokens_{index}"], outputs[f"logits_f64_{index}"]
        final = reference_state(outputs, index, version, model.config.n_layer)
        for sizes in pieces(len(tokens)).values():
            logits, state = run(model, tokens, sizes, backend)
            assert (logits - expected).abs().max() <= tolerance
            for key, value in comparable(state).items():
                scale = final[key].abs().max().clamp(min=1)
                assert ((value - final[key]).abs().max() / scale) <= state_tolerance, key


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 0.3), (torch.float16, 0.05)])
@pytest.mark.parametrize("name,backend", CASES)
def test_half_precision_weights(shared, name, backend, dtype, tolerance):
    """The references' own half-precision error on these models is 0.05-0.11 (bf16), 0.01-0.02 (fp16); ours is bounded
    by a few times that, and the state that is not a plain activation stays float32."""
    folder, version = shared / "oracles" / name, MODELS[name]
    model = build(folder, version, dtype)
    outputs = load_file(folder / "outputs.safetensors")
    for sizes in pieces(len(outputs["tokens_2"])).values():
        logits, state = run(model, outputs["tokens_2"], sizes, backend)
        assert (logits.double() - outputs["logits_f64_2"]).abs().max() <= tolerance
        assert all(x.dtype == (dtype if key.endswith("shift") else torch.float32) for key, x in state.items())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name,backend", [case for case in CASES if case[0] in ("v4_dev", "v7_dev")])
def test_parameter_gradients_match(shared, name, backend, checkpointing):
    folder = shared / "oracles" / name
    model = build(folder, MODELS[name], torch.float64)
    model.activation_checkpointing = checkpointing
    reference = load_file(folder / "grads.safetensors")
    meta = json.loads((folder / "meta.json").read_text())["gradients"]
    logits, _ = model.forward(reference["idx"], backend=backend)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), reference["targets"].flatten())
    loss.backward()
    assert abs(loss.item() - meta["loss"]) < 1e-9
    checked = 0
    for key, parameter in model.named_parameters():
        if parameter.grad is None:  # v0, v1, v2 of RWKV-7's first layer take no part
            assert key.startswith("blocks.0.att.v"), key
            continue
        if f"grad.{key}" in reference:
            expected = reference[f"grad.{key}"].double()
            assert (parameter.grad - expected).abs().max() <= 1e-6 * expected.abs().max(), key
            checked += 1
        norm = meta["param_grad_l2_norms"][key]
        assert abs(parameter.grad.norm().item() - norm) <= 1e-8 * max(norm, 1), key
    assert checked >= 10


@pytest.mark.parametrize("name", MODELS)
def test_recurrent_and_parallel_gradients_agree(shared, name):
    """Also for the versions without a gradient oracle, and for the initial state."""
    model = build(shared / "oracles" / name, MODELS[name], torch.float64)
    tokens = torch.randint(0, model.config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(0))
    _, start = model.forward(tokens[:, :5])
    start = State({k: x.detach().requires_grad_(k != "exp") for k, x in start.items()})
    leaves = [*(p for n, p in model.named_parameters() if not n.startswith("blocks.0.att.v") or "value" in n)]
    leaves += [x for x in start.values() if x.requires_grad]

    def gradients(backend: str) -> list[Tensor]:
        logits, end = model.forward(tokens[:, 5:], start, backend=backend)
        loss = logits.square().mean() + sum(x.square().mean() for x in comparable(end).values())
        return list(torch.autograd.grad(loss, leaves))

    for a, b in zip(gradients("naive"), gradients("chunk")):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1e-12)


@pytest.mark.parametrize("name,backend", CASES)
def test_ragged_rows_equal_rows_alone(shared, name, backend):
    model = build(shared / "oracles" / name, MODELS[name], torch.float64)
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (4, 30), generator=g)
    lengths = torch.tensor([30, 1, 17, 0])
    with torch.no_grad():
        _, start = model.forward(tokens[:, :9])
        logits, state = model.forward(tokens, start, lengths=lengths, backend=backend)
        last, _ = model.forward(tokens, start, lengths=lengths, backend=backend, last_only=True)
        for row, n in enumerate(lengths.tolist()):
            before = start.select(row)
            if n == 0:
                assert all(torch.equal(state.select(row)[key], before[key]) for key in state)
                continue
            alone, after = model.forward(tokens[row, :n], before, backend=backend)
            torch.testing.assert_close(logits[row, :n], alone, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(last[row], alone[-1], rtol=1e-10, atol=1e-10)
            for key, value in comparable(after).items():
                torch.testing.assert_close(comparable(state.select(row))[key], value, rtol=1e-9, atol=1e-10)
